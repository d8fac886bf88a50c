"""The command run in this process, and modules for it to load."""

import json
import re
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from funcprop.cli.app import app


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments), catch_exceptions=False)


def run_json(*arguments: str) -> Any:
    """The one JSON object on stdout; `NaN` and `Infinity` as bare words are not JSON."""
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.stderr

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    return json.loads(result.stdout, parse_constant=refuse)


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Write a module into the current directory; its name is new for every test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    header = "import jax, jax.numpy as jnp, funcprop as fp\n"

    def write(source: str) -> str:
        name = f"users_{re.sub('[^a-z0-9]', '_', tmp_path.name)}"
        (tmp_path / f"{name}.py").write_text(header + textwrap.dedent(source))
        return name

    return write
