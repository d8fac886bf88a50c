"""What every command with `--out` owes its user: no work for nothing, and no work lost. Also its progress."""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path
from typing import Any

import pytest
from command import module as module  # the fixture
from command import run, run_json

SOURCE = """
    import os
    def loss(w):
        print("traced")
        return jnp.sum(w**2)
    def example():
        return (jnp.ones(2),)
    def pair(w):
        return loss(w), w
    def spoils(w):
        os.makedirs(os.environ["SPOILED"], exist_ok=True)
        return jnp.sum(w**2)
    """
WRITING = {
    "draw": ("--out", "a.dot"),
    "memory": ("--no-measure", "--out", "a.json"),
    "rematerialize": ("--no-measure", "--out", "a.json"),
    "second": ("--repeats", "1", "--out", "a.txt"),
    "curvature": ("--out", "a.svg"),
    "report": ("--out", "a.html"),
}
QUICK = {
    "backward": (),
    "derive": (),
    "draw": ("--backward",),
    "memory": ("--no-measure", "--optimizer", "sgd"),
    "second": ("--repeats", "1"),
    "curvature": (),
    "compare": ("--repeats", "1"),
}


@pytest.mark.parametrize("command", WRITING)
def test_an_unwritable_file_is_refused_before_anything_is_done(command: str, module: Any) -> None:
    *options, name = WRITING[command]
    directory = Path(f"directory{Path(name).suffix}")
    directory.mkdir()
    for path, reason in ((f"nowhere/{name}", "No such file or directory"), (directory, "Is a directory")):
        result = run(command, f"{module(SOURCE)}:loss", *options, str(path))
        assert result.exit_code == 1
        assert f"--out {str(path)!r} cannot be written: {reason}. Nothing has been computed" in result.stderr
        assert not result.stdout


@pytest.mark.parametrize("command", ["draw", "memory", "curvature"])
def test_a_result_that_cannot_be_written_in_the_end_is_not_lost(
    command: str, module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    *options, name = WRITING[command]
    monkeypatch.setenv("SPOILED", str(tmp_path / name))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    result = run(command, f"{module(SOURCE)}:spoils", *options, name)
    assert result.exit_code == 1
    said = re.search(r"cannot be written: Is a directory; it was saved as '(.*?)' instead", result.stderr)
    assert said, result.stderr
    saved = Path(said[1])
    assert saved.suffix == Path(name).suffix
    assert saved.stat().st_size > 100
    assert result.stdout.startswith(f"{saved}: ")


def test_content_that_cannot_be_written_anywhere_is_printed(
    module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPOILED", str(tmp_path / "a.json"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    result = run("memory", f"{module(SOURCE)}:spoils", *WRITING["memory"])
    assert result.exit_code == 1
    assert "nor can a temporary file: No such file or directory; its content is on stdout." in result.stderr
    assert json.loads(result.stdout)["name"] == "spoils"


@pytest.mark.parametrize("command", QUICK)
def test_auxiliary_data_are_left_out(command: str, module: Any) -> None:
    target = f"{module(SOURCE)}:pair"
    assert run_json(command, target, "--has-aux", *QUICK[command])
    result = run(command, target.replace("pair", "loss"), "--has-aux", *QUICK[command])
    assert "has_aux=True, but loss returns" in result.stderr
    assert "return the pair (result, auxiliary data)" in result.stderr


def test_progress_is_on_the_terminal_alone(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    target = f"{module(SOURCE)}:spoils"
    monkeypatch.setenv("SPOILED", "spoiled")
    commands = {"compare": "by autodiff and by rules", "memory": "memory", "curvature": "curvature"}
    for command, doing in commands.items():
        quiet = run(command, target, *QUICK[command])
        assert not quiet.stderr
        with monkeypatch.context() as patched:
            patched.setenv("FORCE_COLOR", "1")  # so that stderr counts as a terminal
            shown = run(command, target, *QUICK[command])
        assert f"{target}: {doing}" in shown.stderr
        assert doing == "curvature" or f"{target}: {doing}" not in shown.stdout
