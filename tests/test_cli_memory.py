"""`funcprop memory`: text, JSON, the file, a budget, and messages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from command import module as module  # the fixture
from command import run, run_json

import funcprop as fp
from funcprop.cli.target import chapter_example

SOURCE = """
    import equinox as eqx, optax
    from flax import linen as nn
    net = nn.Dense(3)
    def flax(params, x, y):
        return optax.softmax_cross_entropy_with_integer_labels(net.apply(params, x), y).mean()
    def equinox(net, x, y):
        return optax.softmax_cross_entropy_with_integer_labels(jax.vmap(net)(x), y).mean()
    def example():
        x, y = jax.ShapeDtypeStruct((8, 4), "float32"), jax.ShapeDtypeStruct((8,), "int32")
        return {params}, x, y
    """


def test_the_chapter() -> None:
    data = run_json("memory", "chapter", "--no-measure")
    found = fp.memory.footprint(fp.models.chapter, measure=False)(*chapter_example())
    assert data["target"] == "chapter"
    assert {**data, "target": None} == {**json.loads(found.json()), "target": None}
    assert run("memory", "chapter", "--no-measure").stdout == f"{found}\n"


@pytest.mark.parametrize(
    ("function", "params", "name"),
    [
        ("flax", "jax.eval_shape(net.init, jax.random.key(0), x)", "params/kernel"),
        ("equinox", "eqx.nn.Linear(4, 3, key=jax.random.key(0), dtype='float32')", "weight"),
    ],
)
def test_models_through_the_target(module: Any, function: str, params: str, name: str) -> None:
    target = f"{module(SOURCE.replace('{params}', params))}:{function}"
    data = run_json("memory", target, "--optimizer", "adam", "--budget", "100000", "--no-measure")
    rows = {row["name"]: row for row in data["training"]["rows"]}
    assert (rows[name]["category"], rows[name]["nbytes"]) == ("parameters", 48)
    assert sum(row["category"] == "optimizer state" for row in rows.values()) == 5
    assert data["batch_limit"]["inference"] > data["batch_limit"]["training"] > 8


def test_a_function_that_is_no_loss_has_no_steps(module: Any) -> None:
    name = module("""
        def predict(w, x):
            return x @ w
        def example():
            return jax.ShapeDtypeStruct((2, 3), "float32"), jax.ShapeDtypeStruct((5, 2), "float32")
        """)
    result = run("memory", f"{name}:predict", "--optimizer", "adam", "--no-measure")
    assert result.exit_code == 1
    assert "accounting with --optimizer adam failed" in result.stderr
    assert (
        "predict returns (float32[5,3]), but optimizer= needs the gradient of one real scalar; return the "
        "loss, other results as auxiliary data (has_aux), or leave optimizer= out."
    ) in result.stderr


def test_the_file(module: Any, tmp_path: Path) -> None:
    """It has everything that `--json` prints, the largest batch too."""
    path = tmp_path / "memory.json"
    assert run("memory", "chapter", "--no-measure", "--out", str(path)).stdout.startswith(f"{path}: ")
    assert json.loads(path.read_text("utf-8"))["target"] == "chapter"
    target = f"{module(SOURCE.replace('{params}', 'jax.eval_shape(net.init, jax.random.key(0), x)'))}:flax"
    data = run_json("memory", target, "--no-measure", "--budget", "100000", "--out", str(path))
    assert json.loads(path.read_text("utf-8")) == data
    assert data["batch_limit"]["training"] > 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--optimizer", "newton"], "--optimizer 'newton' is not known; choose one of sgd, momentum"),
        (["--argnums", "9"], "argnums=9, but the function was called with 4 positional arguments"),
        (["--out", "/nowhere/memory.json"], "cannot be written: No such file or directory"),
        (["--budget", "10%"], "--budget '10%': write bytes, such as 100000, 64MB or 1.5GiB."),
    ],
)
def test_what_cannot_be_accounted_is_said(options: list[str], message: str) -> None:
    result = run("memory", "chapter", "--no-measure", *options)
    assert result.exit_code == 1
    assert message in result.stderr
    assert not result.stdout


def test_a_budget_that_nothing_fits_leaves_the_table() -> None:
    result = run("memory", "chapter", "--no-measure", "--budget", "10")
    assert result.exit_code == 0
    assert "bytes held at the peak" in result.stdout
    assert "largest batch within 10 bytes, training: " in result.stdout
