"""`fp.second_order_cost`: the laws of the chapter's exercise, in the jaxpr and in what XLA made of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from command import module as module  # the fixture
from command import run, run_json
from flax import nnx
from jax.flatten_util import ravel_pytree

import funcprop as fp
from funcprop.cost.programs import programs
from funcprop.cost.timing import Rates
from funcprop.cost.work import Product, Work, of_compiled, of_jaxpr
from funcprop.graph.objective import trace_objective


def mlp(weights: Any, x: Any) -> Any:
    for w in weights:
        x = jnp.tanh(x @ w)
    return fp.layers.mean_squared_error(x, jnp.zeros_like(x))


def laws(layers: int, parameters: int) -> dict[str, int]:
    """Matrix products, by the closed forms of the chapter's exercise 4."""
    return {
        "value": layers,
        "gradient": 3 * layers - 1,
        "HVP forward-over-reverse": 8 * layers - 5,
        "HVP reverse-over-reverse": 8 * layers - 5,
        "Gauss-Newton product": 5 * layers - 2,
        "dense Hessian": 2 * layers - 1 + parameters * (6 * layers - 4),
    }


@cache
def cost(layers: int, width: int, batch: int) -> fp.SecondOrderCost:
    square = jax.ShapeDtypeStruct((width, width), jnp.float32)
    return fp.second_order_cost(mlp)([square] * layers, jax.ShapeDtypeStruct((batch, width), jnp.float32))


@pytest.mark.parametrize(("layers", "width", "batch"), [(1, 6, 4), (2, 8, 5), (3, 5, 7), (5, 4, 6)])
def test_the_laws_hold_in_the_jaxpr_and_in_the_compiled_program(layers: int, width: int, batch: int) -> None:
    found = cost(layers, width, batch)
    expected = laws(layers, layers * width**2)
    assert found.parameters == layers * width**2
    assert {row.name: row.predicted.products for row in found.rows} == expected
    assert {row.name: row.measured.products for row in found.rows} == expected
    assert found["gradient"].measured.seconds is None


PROGRAM = """
import json, os, jax, jax.numpy as jnp, funcprop as fp
from flax import linen as nn
from test_second_order_cost import mlp

class CNN(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.max_pool(nn.relu(nn.Conv(16, (3, 3))(x)), (2, 2), (2, 2))
        return nn.Dense(10)(nn.relu(nn.Conv(24, (3, 3))(x)).mean((1, 2)))

def loss(params, x, y):
    return fp.layers.softmax_cross_entropy(CNN().apply(params, x), y).mean()

s, x = (jax.ShapeDtypeStruct(dims, "float32") for dims in ((16, 16), (24, 16, 16, 3)))
y = jax.ShapeDtypeStruct((24,), "int32")
params = jax.eval_shape(CNN().init, jax.random.key(0), x)
many = jax.ShapeDtypeStruct((512, 16), "float32")
found = {"CNN": fp.second_order_cost(loss)(params, x, y)}
if os.environ.get("FUNCPROP_NIGHTLY"):
    found["mlp"] = fp.second_order_cost(mlp)([s] * 3, many)
print(json.dumps({name: cost.as_dict()["rows"] for name, cost in found.items()}))
"""


@pytest.fixture(scope="module")
def compiled() -> dict[str, Any]:
    """The costs of two models with the flags that users have."""
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env={**environment, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.nightly
def test_the_laws_hold_with_the_flags_that_users_have(compiled: dict[str, Any]) -> None:
    assert {row["name"]: row["measured"]["products"] for row in compiled["mlp"]} == laws(3, 3 * 256)


@pytest.mark.parametrize("model", ["CNN", pytest.param("mlp", marks=pytest.mark.nightly)])
def test_bytes_are_near_those_of_the_compiled_program(compiled: dict[str, Any], model: str) -> None:
    """Not those of the value alone, some of which a fused kernel may hide from XLA's own account.

    JAX 0.12 writes the derivative of tanh as one factor, `(1 + y) (1 − y)`, which XLA keeps for all that read
    it in an HVP; with 0.10 what reads it is made from `y` each time.
    """
    rows = {row["name"]: row for row in compiled[model] if row["measured"] is not None}
    del rows["value"]
    assert len(rows) >= 4
    ratios = {name: row["predicted"]["bytes"] / row["measured"]["bytes"] for name, row in rows.items()}
    assert all(abs(ratio - 1) < 0.31 for ratio in ratios.values()), ratios


def test_operations_are_those_of_xlas_own_analysis() -> None:
    """Without loops, XLA counts them itself."""
    args = [jnp.ones((6, 6))] * 2, jnp.ones((5, 6))
    for fun in (mlp, jax.grad(mlp)):
        compiled = jax.jit(fun).lower(*args).compile()
        found = compiled.cost_analysis()
        expected = found["flops"] + found["transcendentals"]
        assert of_compiled(compiled).flops == pytest.approx(expected, rel=0.005)
        assert of_jaxpr(jax.make_jaxpr(fun)(*args)).flops == pytest.approx(expected, rel=0.1)


def test_bytes_of_the_dense_hessian_are_its_square() -> None:
    row = cost(3, 5, 7)["dense Hessian"]
    assert row.measured.bytes == pytest.approx(row.predicted.bytes, rel=0.1)
    assert row.predicted.bytes > 4 * 75**2


def values(fun: Any, *args: Any, output: str | None = None, argnums: Any = 0) -> dict[str, Any]:
    """What the programs compute: products with the parameters themselves as direction."""

    def use(objective: Any) -> Any:
        return {p.name: jax.jit(p.function)(*p.operands) for p in programs(objective, output, None)[0]}, None

    return trace_objective(use, fun, argnums, args, {})


def test_the_programs_compute_what_they_are_called() -> None:
    keys = jax.random.split(jax.random.key(0), 4)
    params = {"W1": jax.random.normal(keys[0], (3, 4)), "W2": jax.random.normal(keys[1], (2, 3))}
    x, y, λ = jax.random.normal(keys[2], (4,)), jnp.array(1), jnp.array(0.3)
    found = values(fp.models.chapter, params, x, y, λ)
    flat, unravel = ravel_pytree(params)
    objective = lambda flat: fp.models.chapter(unravel(flat), x, y, λ)  # noqa: E731
    hessian = jax.jit(jax.hessian(objective))(flat)
    same = lambda a, b: np.testing.assert_allclose(ravel_pytree(a)[0], b, rtol=1e-12, atol=1e-13)  # noqa: E731
    same(found["value"], objective(flat))
    same(found["gradient"], jax.grad(objective)(flat))
    for order in ("forward", "reverse"):
        same(found[f"HVP {order}-over-reverse"], hessian @ flat)
    same(found["dense Hessian"], hessian.ravel())
    # Jᵀ H J of the loss in the logits, and the weight decay's λ I, by definition.
    logits = lambda flat: unravel(flat)["W2"] @ jnp.tanh(unravel(flat)["W1"] @ x)  # noqa: E731
    jacobian, p = jax.jit(jax.jacobian(logits))(flat), jax.nn.softmax(logits(flat))
    gauss_newton = jacobian.T @ (jnp.diag(p) - jnp.outer(p, p)) @ jacobian + λ * jnp.eye(flat.size)
    same(found["Gauss-Newton product"], gauss_newton @ flat)


def foreign(w: Any, x: Any) -> Any:
    o = fp.name(jnp.tanh(x @ w), "o")
    return jnp.sum(jnp.cos(o))


def test_the_models_output_is_told_by_name() -> None:
    w, x = jax.random.normal(jax.random.key(0), (3, 2)), jnp.ones((4, 3))
    found = values(foreign, w, x, output="o")["Gauss-Newton product"]
    flat = w.ravel()
    model = lambda flat: jnp.tanh(x @ flat.reshape(3, 2)).ravel()  # noqa: E731
    jacobian = jax.jit(jax.jacobian(model))(flat)
    expected = jacobian.T @ jnp.diag(-jnp.cos(model(flat))) @ jacobian @ flat
    np.testing.assert_allclose(found[0].ravel(), expected, rtol=1e-12)


def test_without_a_loss_layer_the_row_is_left_out_with_the_reason() -> None:
    shapes = jax.ShapeDtypeStruct((3, 2), jnp.float32), jax.ShapeDtypeStruct((4, 3), jnp.float32)
    found = fp.second_order_cost(foreign)(*shapes)
    assert "Gauss-Newton product" not in [row.name for row in found.rows]
    assert "left out, it is no loss of fp.layers, and past its last parameter convex in no value" in str(
        found
    )
    with pytest.raises(KeyError, match="there are value, gradient"):
        found["Gauss-Newton product"]
    with pytest.raises(ValueError, match=r"output='oo' is no value that foreign computes .*; did you mean o"):
        fp.second_order_cost(foreign, output="oo")(*shapes)
    with pytest.raises(ValueError, match="repeats=0; every program has to run"):
        fp.second_order_cost(foreign, repeats=0)
    with pytest.raises(TypeError, match="gradients are of one real scalar"):
        fp.second_order_cost(jnp.sin)(jnp.ones(3))


def test_what_jax_cannot_differentiate_twice_is_left_out_with_the_reason() -> None:
    """A custom_vjp has no forward mode, a gamma's derivative no reverse mode; the page has the other rows."""
    square = jax.custom_vjp(lambda x: x**2)
    square.defvjp(lambda x: (square(x), x), lambda x, g: (2 * x * g,))
    both = {
        "HVP forward-over-reverse": (lambda w: jnp.sum(square(w) * w), "can't apply forward-mode autodiff"),
        "HVP reverse-over-reverse": (
            lambda w: jnp.sum(jax.random.gamma(jax.random.key(0), w)),
            "Reverse-mode differentiation does not work for",
        ),
    }
    for name, (loss, why) in both.items():
        cost = fp.second_order_cost(loss)(jnp.arange(1.0, 4.0))
        assert cost.left[name].startswith(why)
        assert {"value", "gradient", *both} - {row.name for row in cost.rows} == {name}
        assert f"{name}: left out, {why}" in str(cost)
    report = fp.report(both["HVP forward-over-reverse"][0])(jnp.arange(1.0, 4.0))
    np.testing.assert_allclose(report.spectrum.values, [18, 12, 6])


def test_a_large_hessian_is_predicted_and_not_measured() -> None:
    square = jax.ShapeDtypeStruct((512, 512), jnp.float32)
    found = fp.second_order_cost(mlp)([square] * 2, square)
    row = found["dense Hessian"]
    assert row.measured is None
    assert row.predicted.products == laws(2, 2 * 512**2)["dense Hessian"]
    assert row.predicted.bytes > 4 * (2 * 512**2) ** 2
    assert "dense Hessian: not measured, it needs 1" in str(found)
    args = [jnp.ones((4, 4))] * 2, jnp.ones((4, 4))
    impatient = fp.second_order_cost(mlp, patience=1e-9, repeats=1)(*args)
    assert "and the limit is 1e-09 s" in impatient["dense Hessian"].reason


def test_loops_and_rules_count_as_often_as_they_run() -> None:
    """A rule hoists products out of the loop; the tangent map of a rule is counted as what it computes."""

    def loop(w: Any, x: Any) -> Any:
        step = lambda c, _: (jnp.tanh(c @ w), None)  # noqa: E731
        return fp.layers.mean_squared_error(jax.lax.scan(step, x, None, length=6)[0], x)

    args = jax.ShapeDtypeStruct((4, 4), jnp.float32), jax.ShapeDtypeStruct((3, 4), jnp.float32)
    for rules in (fp.rules.autodiff, fp.rules.handwritten):
        found = fp.second_order_cost(loop, rules=rules)(*args)
        assert all(row.predicted.products == row.measured.products for row in found.rows)
        assert found["value"].measured.products == 6


TEXT = """\
HloModule m

%branch (p: f32[2,3]) -> f32[2,3] {
  ROOT %p = f32[2,3]{1,0} parameter(0)
}

ENTRY %main (a: f32[2,3], b: f32[3,4]) -> f32[2,4] {
  %a = f32[2,3]{1,0} parameter(0)
  %b = f32[3,4]{1,0} parameter(1)
  %c = f32[2,3]{1,0} conditional(%p, %a, %a), branch_computations={%branch, %branch}
  %k = f32[3,3,4,8]{3,2,1,0} broadcast(%b), dimensions={}
  %i = f32[1,5,5,4]{3,2,1,0} broadcast(%b), dimensions={}
  %v = f32[1,3,3,8]{3,2,1,0} convolution(%i, %k), window={size=3x3}, dim_labels=b01f_01io->b01f
  ROOT %d = (f32[2,4]{1,0}, s8[64]{0}) custom-call(%a, %b), custom_call_target="__cublas$gemm", \
backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}}
}
"""


def test_products_in_libraries_and_convolutions_are_counted() -> None:
    """As a GPU's program writes them."""
    sizes = SimpleNamespace(
        argument_size_in_bytes=7, output_size_in_bytes=5, temp_size_in_bytes=3, alias_size_in_bytes=1
    )
    found = of_compiled(SimpleNamespace(as_text=lambda: TEXT, memory_analysis=lambda: sizes))
    assert (found.products, found.bytes) == (2, 14)
    assert found.flops == 2 * 8 * 3 + 2 * (9 * 8) * (3 * 3 * 4)


@pytest.mark.nightly
def test_times_are_measured_and_models_are_taken_as_they_are() -> None:
    net = nnx.Linear(3, 2, rngs=nnx.Rngs(0))

    def costs(sines: int) -> Any:
        def loss(net: Any, x: Any) -> Any:
            return jnp.sum(jax.lax.fori_loop(0, sines, lambda _, y: jnp.sin(y), net(x)) ** 2)

        return fp.second_order_cost(loss, repeats=1)(net, jnp.ones((4, 3)))

    found = costs(1)
    assert found.parameters == 8
    for quick, slow in zip(found.rows, costs(100_000).rows, strict=True):
        # A row stands for its own program: the one with so many sines takes milliseconds.
        assert quick.measured.seconds < slow.measured.seconds / 5
        assert quick.predicted.seconds < slow.predicted.seconds / 5
        assert slow.time == slow.measured.seconds / slow.predicted.seconds
    assert found.worst >= 1
    assert "µs a call" in str(found)
    json.dumps(found.as_dict(), allow_nan=False)


def test_products_are_of_one_kind_if_they_are_alike_and_run_alike() -> None:
    def fun(w: Any, x: Any) -> Any:
        x = jax.lax.fori_loop(0, 5, lambda _, x: jnp.tanh(x @ w), x)
        return x @ w, w @ x, jnp.sin(x) @ w

    square = jax.ShapeDtypeStruct((8, 8), jnp.float32)
    tall = jax.ShapeDtypeStruct((9, 8), jnp.float32)
    kinds = of_jaxpr(jax.make_jaxpr(fun)(square, square)).kinds
    assert {(k.looped, k.flops): times for k, times in kinds.items()} == {(True, 1024): 5, (False, 1024): 3}
    other = of_jaxpr(jax.make_jaxpr(lambda w, x: x @ w)(square, tall)).kinds
    assert not set(kinds) & set(other)


def test_predicted_times_are_sums_in_proportion_to_the_gradients() -> None:
    """By hand: what was timed takes that, other products their operations, all else its bytes."""
    timed, other, small = (Product(str(i), False, flops, None) for i, flops in enumerate((40, 20, 1)))
    rates = Rates({timed: 2.0}, 10.0, 100.0, 1.0, 0.5)
    work = Work(kinds={timed: 3, other: 1, small: 2}, moved=50)
    assert rates.seconds(work) == pytest.approx(1 + 3 * 2 + 20 / 10 + 2 * 0.5 + 50 / 100)
    scaled, large = rates.calibrated(work, 20.0), rates.calibrated(work, 1e6)
    assert scaled.seconds(work) == pytest.approx(20)
    assert scaled.scale == pytest.approx((19 + 4) / (9.5 + 4))
    assert scaled.seconds(Work(moved=50)) == pytest.approx(20 - 9 * scaled.scale)
    assert large.seconds(work) == pytest.approx(1e6)
    assert rates.calibrated(work, 1.0).call_seconds == 1  # never less than a call
    assert rates.calibrated(Work(), 20.0) == rates


# --- the command ------------------------------------------------------------------------------


def test_the_command(tmp_path: Any) -> None:
    data = run_json("second", "chapter", "--repeats", "1", "--out", str(tmp_path / "cost.json"))
    assert data == json.loads((tmp_path / "cost.json").read_text())
    assert (data["target"], data["output"], data["parameters"]) == ("chapter", "o", 18)
    assert [row["predicted"]["products"] for row in data["rows"]] == list(laws(2, 18).values())
    text = run("second", "chapter", "--repeats", "1", "--out", str(tmp_path / "cost.txt")).stdout
    written = (tmp_path / "cost.txt").read_text()
    assert text == f"{tmp_path / 'cost.txt'}: the table of chapter\n\n{written}"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--out", "cost.svg"], "its suffix does not say what to write; use .txt or .json"),
        (["--out", "/nowhere/cost.txt", "--repeats", "1"], "cannot be written: No such file or directory"),
        (["--output", "ö"], "output='ö' is no value that chapter computes"),
        (["--argnums", "7"], "argnums=7, but the function was called with 4 positional arguments"),
    ],
)
def test_what_cannot_be_counted_is_said(options: list[str], message: str) -> None:
    result = run("second", "chapter", *options)
    assert result.exit_code == 1
    assert message in result.stderr


def test_the_users_own_lines_are_shown(module: Any) -> None:
    name = module("""
        def broken(x):
            return x if x > 0 else -x
        def example():
            return (jnp.array(1.0),)
        """)
    result = run("second", f"{name}:broken")
    assert result.exit_code == 1
    assert "return x if x > 0" in result.stderr
    assert "/funcprop/cli/" not in result.stderr


def test_bytes_are_moved_where_xla_does_not_fuse():
    """A rounding is fused with what surrounds it; a sum into places reads and writes all of its operand."""
    x = jax.ShapeDtypeStruct((4, 5), "float32")

    def moved(fun):
        return of_jaxpr(jax.make_jaxpr(fun)(x)).moved

    assert moved(lambda x: jnp.sin(jax.lax.reduce_precision(jnp.cos(x), 8, 10))) == 2 * 80
    rows = np.array([[0], [2]], "int32")
    numbers = jax.lax.ScatterDimensionNumbers((1,), (0,), (0,))
    added = moved(lambda x: jax.lax.scatter_add(jnp.sin(x), rows, x[:2], numbers))
    # sin reads and writes; the slice writes; the sum reads both and the places, and writes.
    assert added == (80 + 80) + 40 + (80 + 40 + 8) + 80
