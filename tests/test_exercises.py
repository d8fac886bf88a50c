"""The chapter's exercises for any function: predictions and measurements are what they say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import funcprop as fp
from funcprop.graph.objective import trace_objective
from funcprop.reporting import exercises

ROOT = Path(__file__).parents[1]
X = jax.random.normal(jax.random.key(0), (8, 6, 6, 2))
LABELS = jnp.arange(8) % 3


class Net(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = nn.tanh(nn.Conv(4, (3, 3), param_dtype=float)(x))
        return nn.Dense(3, param_dtype=float)(x.mean((1, 2)))


NET = Net()
PARAMS = NET.init(jax.random.key(1), X)


def loss(params: Any, x: Any, y: Any) -> Any:
    return optax.softmax_cross_entropy_with_integer_labels(NET.apply(params, x), y).mean()


def answer(question: Any, fun: Any, *args: Any) -> exercises.Exercise:
    swept = fp.backprop(fun)(*args)
    return trace_objective(lambda o: (question(o, swept), None), fun, 0, args, {})


def numbers(exercise: exercises.Exercise, what: str) -> tuple[float, float]:
    row = next(row for row in exercise.rows if row.what.startswith(what))
    return float(row.predicted), float(row.measured)


def test_the_length_of_a_gradient_is_the_slope_along_it() -> None:
    found = answer(exercises.gradient_shapes, loss, PARAMS, X, LABELS)
    predicted, measured = numbers(found, "length of the gradient")
    expected = optax.tree.norm(jax.grad(loss)(PARAMS, X, LABELS))
    np.testing.assert_allclose([predicted, measured], expected, rtol=1e-3)
    shapes = {row.what: (row.predicted, row.measured) for row in found.rows}
    assert shapes["gradient of params/Conv_0/kernel"] == ("3 × 3 × 2 × 4",) * 2


@pytest.mark.parametrize(
    ("fun", "params", "x"),
    [
        (lambda w, x: jnp.sum(jnp.sin(x @ w)), jnp.ones((2, 3)), X),  # over three axes
        (lambda w, x: jnp.sum(jnp.sin(w @ x.T)), jnp.ones((3, 2)), X[:, 0, 0]),  # units first
        (lambda w, x: jnp.sum(jnp.sin(fp.layers.dense(x, w))), jnp.ones((2, 3)), X[0, 0]),
        (lambda w, x: jnp.sum(jnp.sin(jax.vmap(lambda v: w.T @ v)(x))), jnp.ones((2, 3)), X[:, 0, 0]),
        (lambda w, x: jnp.sum(jnp.sin(x @ w)), jnp.ones(2), X[:, 0, 0]),  # one unit
    ],
)
def test_a_bias_is_added_to_the_first_product(fun: Any, params: Any, x: Any) -> None:
    found = answer(exercises.bias, fun, params, x)
    predicted, measured = numbers(found, "length of ∂J/∂b")
    (shape,) = (row for row in found.rows if row.what == "shape of ∂J/∂b")
    # Every product here has units of one weight, of which sin has the slope cos.
    units = params.shape[-1] if params.ndim == 2 and params.shape[0] == 2 else params.shape[0]
    z = jnp.sum(x, -1)
    expected = jnp.abs(jnp.sum(jnp.cos(z))) * np.sqrt(1 if params.ndim == 1 else 3)
    np.testing.assert_allclose([predicted, measured], expected, rtol=1e-3)
    assert shape.predicted == shape.measured == ("scalar" if params.ndim == 1 else str(units))


def test_a_bias_beside_others() -> None:
    found = answer(exercises.bias, loss, PARAMS, X, LABELS)
    assert "It has biases: params/Conv_0/bias, params/Dense_0/bias." in found.answer
    predicted, measured = numbers(found, "length of ∂J/∂b")
    # The bias that is there already has the same gradient.
    own = jnp.linalg.norm(jax.grad(loss)(PARAMS, X, LABELS)["params"]["Conv_0"]["bias"])
    np.testing.assert_allclose([predicted, measured], own, rtol=1e-3)


def test_biases_are_what_is_added_to_products() -> None:
    def net(layers: Any, x: Any) -> Any:
        for w, b in layers:
            x = jnp.tanh(x @ w + b) + x.sum()
        return jnp.sum(x)

    found = answer(exercises.bias, net, [(jnp.ones((2, 3)), jnp.ones(3)), (jnp.ones((3, 1)), 0.5)], X[0, 0])
    assert "It has biases: layers/0/1, layers/1/1." in found.answer


def test_the_page_has_all_five() -> None:
    page = fp.report(loss)(PARAMS, X, LABELS)
    assert [exercise.number for exercise in page.exercises] == [1, 2, 3, 4, 5]
    assert all(exercise.rows for exercise in page.exercises)
    for exercise in page.exercises:
        assert exercise.question.replace("'", "&#39;") in page.html
        assert all(row.predicted in page.html for row in exercise.rows)
    assert page.as_dict()["exercises"][3]["rows"]
    fourth = {row.what: row for row in page.exercises[3].rows}
    assert fourth["Gauss-Newton product"].measured != "–"


def test_shapes_are_predicted_alone() -> None:
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), (PARAMS, X, LABELS))
    first, second, *_ = fp.report(loss)(*shapes).exercises
    assert {row.measured for row in (*first.rows, *second.rows)} == {"–"}


TARGET = """
import jax, jax.numpy as jnp, optax

def loss(layers, x, y):
    for w, b in layers:
        x = jnp.tanh(x @ w + b)
    return optax.softmax_cross_entropy_with_integer_labels(x, y).mean()

def example():
    layers = [(jnp.eye(4) * 0.5, jnp.zeros(4)), (jnp.ones((4, 3)) * 0.1, jnp.zeros(3))]
    return layers, jax.random.normal(jax.random.key(0), (8, 4)), jnp.arange(8) % 3
"""


@pytest.mark.sampled(1)
@pytest.mark.parametrize("number", range(1, 6))
def test_the_experiments_answer_for_a_target(tmp_path: Path, number: int) -> None:
    (script,) = (ROOT / "experiments").glob(f"exercise_{number}_*.py")
    (tmp_path / "net.py").write_text(TARGET)
    command = [sys.executable, script, tmp_path / "net.py:loss", "--smoke"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    written = json.loads(
        (ROOT / "experiments" / "results" / "smoke" / f"exercise_{number}_target.json").read_text()
    )
    assert written["question"] in done.stdout
    assert len(written["rows"]) >= 2
    assert all(row["what"] in done.stdout for row in written["rows"])
    if number == 5:
        assert all(row["measured"] != "–" for row in written["rows"])


def test_a_target_that_is_not_there_is_said(tmp_path: Path) -> None:
    script = ROOT / "experiments" / "exercise_1_gradient_shape.py"
    done = subprocess.run(
        [sys.executable, script, "nothing.py:loss"], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 1
    assert "there is no file" in done.stderr
    assert "Traceback" not in done.stderr
