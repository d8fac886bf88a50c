"""`funcprop rematerialize`: the plan and its proof, as text, JSON and a file, and messages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import pytest
from command import module as module  # the fixture
from command import run, run_json

import funcprop as fp
from funcprop.cli.errors import TargetError
from funcprop.cli.options import parse_budget, parse_bytes

SOURCE = """
    def deep(ws, x):
        for w in ws:
            x = jnp.tanh(x @ w)
        return jnp.mean(x**2), x
    def example():
        square, x = jax.ShapeDtypeStruct((4, 4), "float32"), jax.ShapeDtypeStruct((16, 4), "float32")
        return [square] * 4, x
    """


def deep(ws: Any, x: Any) -> Any:
    for w in ws:
        x = jax.numpy.tanh(x @ w)
    return jax.numpy.mean(x**2)


def test_the_plan_and_its_proof(module: Any, tmp_path: Path) -> None:
    target = f"{module(SOURCE)}:deep"
    shapes = [jax.ShapeDtypeStruct((4, 4), "float32")] * 4, jax.ShapeDtypeStruct((16, 4), "float32")
    path = tmp_path / "plan.json"
    data = run_json("rematerialize", target, "--has-aux", "--budget", "50%", "--out", str(path))
    plan = fp.memory.remat_plan(deep, 0.5)(*shapes)
    beside = {"target": None, "proof": None}
    assert data | beside == json.loads(plan.json()) | beside
    assert data["residual_bytes"] <= data["budget"] == data["plain_residual_bytes"] // 2
    assert data["proof"] == json.loads(json.dumps(plan.prove().as_dict()))
    assert json.loads(path.read_text("utf-8")) == data
    # Without a limit it is a quarter; the proof follows the plan.
    text = run("rematerialize", target, "--has-aux").stdout
    quarter = fp.memory.remat_plan(deep, 0.25)(*shapes)
    assert text == f"{quarter}\n\n{quarter.prove()}\n"
    assert ("give the outermost jit compiler_options=" in text) == bool(quarter.compiler_options)


def test_other_limits(module: Any) -> None:
    target = f"{module(SOURCE)}:deep"
    options = ("--has-aux", "--no-measure")
    by_bytes = run_json("rematerialize", target, "--budget", "0.6kB", *options)
    assert by_bytes["residual_bytes"] <= by_bytes["budget"] == 600
    assert by_bytes["proof"] is None
    by_peak = run_json("rematerialize", target, "--peak", "100%", *options)
    assert by_peak["peak_bytes"] <= by_peak["plain_residual_bytes"]
    assert run_json("rematerialize", target, "--chunks", "2", *options)["segments"] == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--budget", "half"], "--budget 'half': write bytes, such as 100000, 64MB, 25% or 1.5GiB."),
        (["--peak", "x%"], "--peak 'x%': write a share as 25%, or bytes as 64MB."),
        (["--budget", "150%"], "--budget '150%': write a share as 25%, or bytes as 64MB."),
        (["--budget", "1", "--count-arguments"], "BudgetError: budget=1: chapter cannot be differentiated"),
        (
            ["--budget", "25%", "--chunks", "2"],
            "give a budget or a peak .*, or a number of chunks, and not both",
        ),
        (["--out", "/nowhere/plan.json"], "--out '/nowhere/plan.json' cannot be written: No such file"),
    ],
)
def test_what_cannot_be_planned_is_said(options: list[str], message: str) -> None:
    result = run("rematerialize", "chapter", "--no-measure", *options)
    assert result.exit_code == 1
    assert all(part in result.stderr for part in message.split(".*"))
    assert not result.stdout


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("100000", 100_000),
        ("64MB", 64_000_000),
        ("1.5 GiB", 3 * 2**29),
        ("2e3", 2000),
        ("8kB", 8000),
        ("3B", 3),
    ],
)
def test_bytes(text: str, expected: int) -> None:
    assert parse_bytes("--budget", text) == parse_budget("--budget", text) == expected


@pytest.mark.parametrize("text", ["", "MB", "-1", "0", "1.2.3", "64 bytes", "1e999", "nan"])
def test_what_is_no_number_of_bytes(text: str) -> None:
    with pytest.raises(TargetError, match="write bytes, such as 100000, 64MB"):
        parse_bytes("--budget", text)
