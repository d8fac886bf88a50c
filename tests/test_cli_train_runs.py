"""`funcprop train`: checkpoints, signals, precision, logs, processes, and what it refuses."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import module as module  # the fixture
from command import run, run_json

SETUP = """
    import numpy as np, optax
    X = np.linspace(-1, 1, 120).reshape(30, 4)
    def loss(w, x, y):
        return jnp.mean((jnp.tanh(x @ w["up"]) @ w["down"] - y) ** 2)
    def setup():
        params = {"up": jnp.ones((4, 3)) / 3, "down": jnp.arange(3.0)}
        batches = lambda key: fp.training.minibatches((X, X.sum(1)), 10, key)
        return fp.training.Setup(loss, params, batches, optax.adam(0.01), epochs=4)
"""
STATEFUL = (
    SETUP.replace("def loss(w, x, y):", "def loss(w, mean, x, y, *, key):")
    .replace("- y) ** 2)", "- y) ** 2), (mean + 1, {'norm': jnp.sum(w['up'] ** 2)})")
    .replace("epochs=4)", "4, None, {'has_aux': True, 'keyed': True, 'model_state': jnp.zeros(())})")
)


def norms(data: Any) -> dict[str, float]:
    return {v["name"]: v["value"]["norm"] for v in data["variables"] if v["name"].startswith("w/")}


def test_a_run_goes_on_where_it_was(module: Any, tmp_path: Path) -> None:
    target = f"{module(SETUP)}:setup"
    whole = run_json("train", target, "--seed", "3")
    first = run("train", target, "--seed", "3", "--epochs", "2", "--checkpoints", "run")
    assert first.exit_code == 0
    rest = run("train", target, "--seed", "3", "--resume", "run", "--json")
    assert rest.exit_code == 0
    assert "goes on after step 6 of run\n" in rest.stderr
    data = json.loads(rest.stdout)
    assert data["epochs"] == whole["epochs"][2:]
    assert norms(data) == norms(whole)


@pytest.mark.parametrize("mesh", ["data=2", "data=2,model=3"])
def test_a_mesh_of_devices(module: Any, mesh: str) -> None:
    target = f"{module(SETUP)}:setup"
    plain, planned = run_json("train", target), run_json("train", target, "--mesh", mesh)
    for a, b in zip(plain["epochs"], planned["epochs"], strict=True):
        np.testing.assert_allclose(b["loss"], a["loss"], rtol=1e-9)
    found, expected = norms(planned), norms(plain)
    assert found.keys() == expected.keys()
    np.testing.assert_allclose(list(found.values()), list(expected.values()), rtol=1e-9)


def test_the_command_on_a_mesh_goes_on_where_it_was(module: Any) -> None:
    """With a state of the model, keys and accumulation; interrupted, and resumed on another mesh."""
    target = f"{module(STATEFUL.replace('(4, 3)', '(4, 8)').replace('arange(3.0)', 'arange(8.0)'))}:setup"
    options = ["--accumulate", "5", "--seed", "3"]
    mesh = ["--mesh", "data=2,model=4"]
    whole = run_json("train", target, *options)
    first = run_json("train", target, *options, *mesh, "--epochs", "2", "--checkpoints", "run")
    rest = [run_json("train", target, *options, *mesh, "--epochs", "3", "--resume", "run")]
    rest += [run_json("train", target, *options, "--mesh", "model=8", "--resume", "run")]
    epochs = [epoch for data in (first, *rest) for epoch in data["epochs"]]
    assert [epoch["epoch"] for epoch in epochs] == [1, 2, 3, 4]
    for found, expected in zip(epochs, whole["epochs"], strict=True):
        for name in ("loss", "norm"):
            np.testing.assert_allclose(found[name], expected[name], rtol=1e-11)
    assert norms(rest[-1]).keys() == norms(whole).keys()
    np.testing.assert_allclose(list(norms(rest[-1]).values()), list(norms(whole).values()), rtol=1e-11)


def test_a_mesh_that_is_not_there(module: Any) -> None:
    result = run("train", f"{module(SETUP)}:setup", "--mesh", "data=64")
    assert result.exit_code == 1
    assert result.stderr.startswith("funcprop: --mesh: ")


def test_model_state_and_keys_of_a_setup(module: Any) -> None:
    data = run_json("train", f"{module(STATEFUL)}:setup", "--accumulate", "2")
    assert set(data["epochs"][0]) == {"epoch", "loss", "norm"}
    assert data["objective"] < data["epochs"][0]["loss"]


def test_precision_and_log(module: Any, tmp_path: Path) -> None:
    target = f"{module(SETUP)}:setup"
    plain = run_json("train", target)
    half = run_json("train", target, "--precision", "bfloat16", "--log", "run.jsonl")
    losses = [[epoch["loss"] for epoch in data["epochs"]] for data in (plain, half)]
    assert losses[0] != losses[1]
    np.testing.assert_allclose(*losses, rtol=0.05)
    records = [json.loads(line) for line in (tmp_path / "run.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if record["event"] == "step"] == list(range(1, 13))


def test_sigterm_leaves_with_a_line(module: Any, tmp_path: Path) -> None:
    slow = SETUP.replace("epochs=4", "epochs=100000")
    command = [sys.executable, "-m", "funcprop.cli", "train", f"{module(slow)}:setup", "--resume", "run"]
    command += ["--log", "log.jsonl"]
    process = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    until = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < until:
        log = tmp_path / "log.jsonl"
        if log.exists() and log.read_text().count("saved") > 1:
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143, err
    last = max(int(path.name) for path in (tmp_path / "run").iterdir() if path.name.isdecimal())
    anew = "there is no step in run: the run begins anew, and is saved there"
    assert err.splitlines() == [
        anew,
        f"fit: SIGTERM after step {last}; step {last} is saved in {tmp_path}/run.",
    ]


def test_a_missing_setup_says_what_to_write(module: Any) -> None:
    result = run("train", f"{module('def loss(w): return w')}:setup")
    assert result.exit_code == 1
    assert "has no 'setup'; define `def setup(): return fp.training.Setup(…)`." in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mesh", "data"], "--mesh 'data': write axes and their sizes, such as data=2,model=4."),
        (["--mesh", "data=0"], "--mesh 'data=0': write axes and their sizes"),
        (["--mesh", "data=2,data=2"], "--mesh 'data=2,data=2': write axes and their sizes"),
        (["--resume", "a", "--checkpoints", "b"], "a run goes on in its own directory; give one of them"),
        (["--every", "3"], "--every says how often to save; give --checkpoints DIR as well."),
        (["--log", "absent/log"], "--log 'absent/log' cannot be written: No such file or directory."),
        (["--precision", "half-hearted"], "precision='half-hearted'; pass 'bfloat16', 'float16'"),
        (["--accumulate", "4"], "accumulate=4 does not divide a batch whose arrays have 10 examples"),
        (["--coordinator", "here"], "coordinator='here'; write host:port"),
        (["--processes", "2", "--process-id", "2"], "process_id=2; with 2 processes it is between 0 and 1"),
        (["--resume", "file/run"], "file/run cannot be written: Not a directory"),
        (["--epochs", "0"], "--epochs"),
    ],
)
def test_refused(module: Any, tmp_path: Path, arguments: list[str], message: str) -> None:
    (tmp_path / "file").write_text("")
    result = run("train", f"{module(SETUP)}:setup", *arguments)
    assert result.exit_code in (1, 2)
    assert message in result.stderr


def test_steps_of_an_earlier_run_are_not_gone_on_with_by_accident(module: Any) -> None:
    target = f"{module(SETUP)}:setup"
    assert run("train", target, "--epochs", "1", "--checkpoints", "run").exit_code == 0
    result = run("train", target, "--checkpoints", "run")
    assert "--checkpoints 'run' has steps up to 3 of an earlier run; --resume 'run' goes on" in result.stderr
    other = run("train", target, "--resume", "run", "--seed", "4")
    assert "was written by a run with another key (seed)" in other.stderr


def test_tensorboard_is_named_where_it_is_missing(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    result = run("train", f"{module(SETUP)}:setup", "--tensorboard", "runs")
    assert "'tensorboardX' is not installed; pip install tensorboardX" in result.stderr
