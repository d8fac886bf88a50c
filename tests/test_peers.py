"""Two real processes: they train as one, and notice when one of them is gone, stopped, or another."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from funcprop.training import Checkpoints

PROGRAM = Path(__file__).with_name("peer_run.py")


class Ended(NamedTuple):
    """How a process ended: its code, what it wrote, and when."""

    code: int
    out: str
    err: str
    at: float


def started(directory: Path, what: str, victim: int = 1, at: int = 0) -> list[subprocess.Popen[str]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (directory / "steps").mkdir(exist_ok=True)
    rest = [str(port), str(directory / "steps"), what, str(victim), str(at)]
    options: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=1"  # The last one counts.
    options["env"] = os.environ | {"XLA_FLAGS": flags}
    return [subprocess.Popen([sys.executable, PROGRAM, rank, *rest], **options) for rank in ("0", "1")]


def ended(process: subprocess.Popen[str], timeout: float = 90) -> Ended:
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return Ended(process.returncode, out, err, time.time())


def outcome(directory: Path, what: str, victim: int = 1, at: int = 0) -> list[Ended]:
    processes = started(directory, what, victim, at)
    try:
        return [ended(process) for process in processes]
    finally:
        for process in processes:
            process.kill()


def said(result: Ended) -> str:
    """The one line of ours on stderr."""
    (line,) = [line for line in result.err.splitlines() if line.startswith("fit: ")]
    return line


def result_of(ended: Ended) -> Any:
    assert ended.code == 0, ended.err
    return json.loads(ended.out.splitlines()[-1])


def test_two_processes_train_as_one_and_go_on_from_each_others_files(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.mkdir()
    first, second = (result_of(one) for one in outcome(plain, "plain"))
    assert first == second
    assert Checkpoints(plain / "steps").steps() == [8, 10, 12]
    manifest = json.loads((plain / "steps" / "12" / "manifest.json").read_text())["manifest"]
    assert manifest["devices"]["processes"] == 2
    regions = sorted(region for region, _ in manifest["leaves"]["params.up"]["shards"])
    assert regions == [[[0, 6], [0, 4]], [[0, 6], [4, 8]]]
    # Terminated: one process hears of it, both save the same step and leave.
    broken = tmp_path / "broken"
    broken.mkdir()
    results = outcome(broken, "term", victim=1, at=7)
    assert [one.code for one in results] == [143, 143]
    (last,) = Checkpoints(broken / "steps").steps()[-1:]
    assert said(results[0]) == f"fit: SIGTERM after step {last}; step {last} is saved in {broken}/steps."
    # Damage that one of them sees is damage for both.
    data = max((broken / "steps" / str(last)).rglob("d/*"), key=lambda path: path.stat().st_size)
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 4
    data.write_bytes(content)
    again = outcome(broken, "resume")
    assert [result_of(one) for one in again] == [first, first]
    assert all(f"{data} is damaged" in one.err for one in again)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("victim", [0, 1])
def test_a_dead_peer_is_one_line_and_a_code_within_10_seconds(tmp_path: Path, victim: int) -> None:
    processes = started(tmp_path, "kill", victim, 11)
    survivor = ended(processes[1 - victim])
    dead = ended(processes[victim])
    assert dead.code == -9
    assert survivor.code == 75, survivor.err
    assert survivor.at - json.loads(dead.out.splitlines()[-1])["at"] < 10
    last = Checkpoints(tmp_path / "steps").steps()[-1]
    assert last >= 4
    line = said(survivor)
    assert line.startswith(f"fit: process {victim} of 2 is gone (")
    assert line.endswith(
        f"; step {last} is the last in {tmp_path}/steps; start all processes again to go on."
    )


@pytest.mark.sampled(1)
@pytest.mark.parametrize("victim", [0, 1])
def test_a_stopped_peer_is_one_line_within_60_seconds(tmp_path: Path, victim: int) -> None:
    processes = started(tmp_path, "stop", victim, 11)
    try:
        survivor = ended(processes[1 - victim])
    finally:
        processes[victim].kill()
    stopped = ended(processes[victim])
    assert survivor.code == 75, survivor.err
    assert survivor.at - json.loads(stopped.out.splitlines()[-1])["at"] < 60
    assert said(survivor).startswith(f"fit: process {victim} of 2 is gone (no ")


@pytest.mark.nightly
def test_a_peer_that_fails_by_itself(tmp_path: Path) -> None:
    survivor, failed = outcome(tmp_path, "fail", 1, 11)
    assert failed.code == 1
    assert "Check failure" not in failed.err
    assert "KeyError: 'a fault of this process alone'" in failed.err
    assert survivor.code == 75, survivor.err
    assert said(survivor).startswith("fit: process 1 of 2 is gone (")


@pytest.mark.nightly
def test_processes_that_are_not_one_run_are_refused(tmp_path: Path) -> None:
    """They differ in one thing after the other, and go on after each refusal."""
    for one in outcome(tmp_path, "differ"):
        refusals = result_of(one)
        for what in ("code", "data", "parameters"):
            refusal = refusals.pop(what)
            assert refusal.startswith(f"fit: processes 0 and 1 are not one run, they differ in {what}: ")
            assert "Start all with the same code, data, parameters and seed." in refusal
        (local,) = refusals.values()
        assert "fit: 2 processes, but the parameters lie on this process's devices alone" in local


REFUSED = {
    ("localhost", 2, 0): "coordinator='localhost'; write host:port",
    ("localhost:1", 0, 0): "processes=0; pass how many there are, 1 or more",
    ("localhost:1", 2, 2): "process_id=2; with 2 processes it is between 0 and 1",
    (None, None, None): "coordinator_address should be defined. Pass coordinator, processes and",
    ("localhost:1", None, None): "Number of processes must be defined. Pass coordinator, processes and",
}


def test_refused() -> None:
    """In one process of its own: none of them leaves anything behind."""
    code = f"""
import funcprop as fp
for arguments in {list(REFUSED)!r}:
    try:
        fp.training.join_processes(*arguments)
    except (ValueError, RuntimeError) as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for line, message in zip(done.stdout.splitlines(), REFUSED.values(), strict=True):
        assert message in line
