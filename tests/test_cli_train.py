"""`funcprop train`: its text, its JSON, its progress bar, and its errors."""

import contextlib
import os
import pty
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import module as module  # the fixture
from command import run, run_json
from idx_files import write_split

SETUP = """
    import optax
    def loss(w, x, y):
        return jnp.mean((x @ w - y) ** 2)
    def setup():
        x = jnp.arange(6.0).reshape(3, 2) / 5
        batches = [(x, x @ jnp.array([1.0, -1.0]))]
        return RETURNED
"""
FULL = (
    "fp.training.Setup(loss, jnp.zeros(2), batches, optax.sgd(0.3), 5, "
    "lambda w: {'norm': jnp.linalg.norm(w)})"
)


def test_train_of_a_users_setup(module: Any) -> None:
    name = module(SETUP.replace("RETURNED", FULL))
    text = run("train", f"{name}:setup").stdout
    assert re.match(r"epoch 1/5  loss \S+  norm \S+\n", text)
    # What is computed and what comes back, in the lines that `derive` writes.
    assert re.search(r"^J = .+ scalar +\d", text, re.MULTILINE)
    assert re.search(r"^∂J/∂w = .+ 2 +\d", text, re.MULTILINE)
    assert "dot_general" not in text
    data = run_json("train", f"{name}:setup", "--epochs", "7")
    losses = [epoch["loss"] for epoch in data["epochs"]]
    assert len(losses) == 7
    assert losses == sorted(losses, reverse=True)
    w = next(variable for variable in data["variables"] if variable["name"] == "w")
    np.testing.assert_allclose(w["value"]["norm"], data["epochs"][-1]["norm"])
    assert w["gradient"]["shape"] == [2]
    assert data["objective"] < losses[-1]


MODELS = """
    import equinox as eqx, optax
    from flax import nnx
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.Linear(2, 3, rngs=rngs)
            self.norm = nnx.BatchNorm(3, rngs=rngs)
            self.dropout = nnx.Dropout(0.5, rngs=rngs)
        def __call__(self, x):
            return self.dropout(self.norm(self.linear(x)))
    x = jnp.arange(8.0, dtype=jnp.float32).reshape(4, 2) / 5
    def of_nnx():
        loss = lambda net, x: jnp.mean((net(x) - 1) ** 2)
        return fp.training.Setup(loss, Net(nnx.Rngs(0)), [(x,)], optax.sgd(0.1), 2)
    def of_equinox():
        loss = lambda net, x: jnp.mean((jax.vmap(net)(x) - 1) ** 2)
        net = eqx.nn.MLP(2, 3, 4, 1, key=jax.random.key(0))
        return fp.training.Setup(loss, net, [(x,)], optax.adam(0.1), 2)
"""


@pytest.mark.parametrize(("of", "weights"), [("of_nnx", "linear/kernel"), ("of_equinox", "layers/0/weight")])
def test_models_as_they_are(module: Any, of: str, weights: str) -> None:
    """A run of one ends with both sweeps, and a `setup()` is what other commands are about, too."""
    name = module(MODELS)
    data = run_json("train", f"{name}:{of}")
    assert data["epochs"][1]["loss"] != data["epochs"][0]["loss"]
    (norm,) = (v["gradient"]["norm"] for v in data["variables"] if weights in v["name"])
    assert norm > 0
    assert "x" in {variable["name"] for variable in data["variables"]}  # as the loss calls it
    found = run_json("backward", f"{name}:{of}")
    np.testing.assert_allclose(found["value"], data["epochs"][0]["loss"], rtol=1e-6)


def test_setup_may_be_a_dict(module: Any) -> None:
    returned = "dict(loss=loss, params=jnp.zeros(2), batches=batches, optimizer=optax.sgd(0.3), epochs=2)"
    name = module(SETUP.replace("RETURNED", returned))
    assert len(run_json("train", f"{name}:setup")["epochs"]) == 2


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ("dict(loss=loss, model=1)", "has unknown 'model'; its keys are loss, params"),
        ("dict(loss=loss)", "has no 'params', 'batches', 'optimizer'; its keys are loss, params"),
        (
            "fp.training.Setup(loss, jnp.zeros(3), batches, optax.sgd(0.3))",
            r"in loss(.|\n)*dot_general requires",
        ),
        (
            "fp.training.Setup(loss, jnp.zeros(2), [], optax.sgd(0.3))",
            r"batches=.* yielded nothing in epoch 1",
        ),
    ],
)
def test_errors_of_setup(module: Any, returned: str, message: str) -> None:
    result = run("train", f"{module(SETUP.replace('RETURNED', returned))}:setup")
    assert result.exit_code == 1
    assert re.search(message, result.stderr), result.stderr


def test_train_chapter_on_idx_files(tmp_path: Path) -> None:
    write_split(tmp_path, compressed=True)
    arguments = [
        "--data",
        str(tmp_path),
        "--epochs",
        "2",
        "--batch",
        "10",
        "--hidden",
        "7",
        "--decay",
        "0.01",
    ]
    data = run_json("train", "chapter", *arguments, "--lr", "0.1", "--seed", "3")
    shapes = {variable["name"]: variable["value"]["shape"] for variable in data["variables"]}
    assert shapes["W1"] == [7, 20]
    assert shapes["x"] == [10, 20]
    λ = next(variable for variable in data["variables"] if variable["name"] == "λ")
    np.testing.assert_allclose(λ["value"]["entries"], 0.01, rtol=1e-6)
    assert set(data["epochs"][1]) == {"epoch", "loss", "test_loss", "test_accuracy"}


def drain(terminal: int) -> Iterator[bytes]:
    """What is written to a terminal until its other end is closed, which Linux reports as an error."""
    with os.fdopen(terminal, "rb", buffering=0) as stream, contextlib.suppress(OSError):
        while chunk := stream.read(4096):
            yield chunk


def test_progress_bar_is_on_the_terminal_and_results_in_the_pipe(module: Any, tmp_path: Path) -> None:
    name = module(SETUP.replace("RETURNED", FULL))
    terminal, stderr = pty.openpty()
    command = [sys.executable, "-m", "funcprop.cli", "train", f"{name}:setup"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True, cwd=tmp_path)
    os.close(stderr)
    shown = b"".join(drain(terminal))
    stdout, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert b"5/5" in shown
    assert len(re.findall(r"^epoch \d/5  loss", stdout, re.MULTILINE)) == 5
    assert "\x1b" not in stdout


def test_train_chapter_reaches_96_percent_in_a_pipe() -> None:
    command = [sys.executable, "-W", "error", "-m", "funcprop.cli", "train", "chapter"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert result.stderr == ""
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", result.stdout)
    accuracies = re.findall(r"test_accuracy ([\d.]+) %", result.stdout)
    assert len(accuracies) == 30
    assert float(accuracies[-1]) >= 96
    rows = [line.split()[0] for line in result.stdout.splitlines() if " = " in line]
    assert rows[:7] == ["z", "h", "o", "L", "s", "J", "mean_J"]
    assert {"∂mean_J/∂W1", "∂mean_J/∂W2"} <= set(rows)


def test_a_loss_in_place_of_setup_is_told_what_to_write(module: Any) -> None:
    name = module("def loss(w, x): return w * x")
    result = run("train", f"{name}:loss")
    assert result.exit_code == 1
    assert "needs w, x, but train calls a function of no arguments; define `def setup()" in " ".join(
        result.stderr.split()
    )
