"""The checker itself: every planted mistake is caught and named, and right rules pass."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import funcprop as fp
from funcprop.testing import CheckError, check_gradient, check_rule


def numbers(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape))


# --- two functions, whose rules are right until a mistake replaces one of their cotangents ----


class Operands(NamedTuple):
    x: jax.Array
    w: jax.Array


def affine(x: Any, w: Any, b: Any) -> Any:
    return x @ w + b


def affine_rule(**mistakes: Any) -> fp.Rule:
    cotangents = {
        "x": lambda r, g, needs: g @ r.w.T,
        "w": lambda r, g, needs: r.x.T @ g,
        "b": lambda r, g, needs: g.sum(0),
    } | mistakes
    return fp.Rule(
        lambda x, w, b: (affine(x, w, b), Operands(x, w)),
        lambda r, g, needs: tuple(cotangent(r, g, needs) for cotangent in cotangents.values()),
    )


class Output(NamedTuple):
    y: jax.Array


def bounded(x: Any) -> Any:
    return jnp.tanh(x)


def right_slope(r: Output, g: Any) -> Any:
    return g * (1 - r.y**2)


def right_value(x: Any) -> tuple[Any, Output]:
    y = jnp.tanh(x)
    return y, Output(y)


def bounded_rule(
    backward: Callable[[Any, Any], Any] = right_slope, forward: Any = right_value, **options: Any
) -> fp.Rule:
    return fp.Rule(forward, lambda r, g, needs: (backward(r, g),), **options)


def stale() -> fp.Rule:
    last: list[Any] = []

    def forward(x: Any) -> tuple[Any, Output]:
        y, residuals = right_value(x)
        last[:] = [y]
        return y, residuals

    return bounded_rule(lambda r, g: right_slope(Output(last[0]), g), forward)


def wasteful(x: Any) -> tuple[Any, Any]:
    y = jnp.tanh(x)
    return y, {"y": y, "square": y * y, "one": jnp.cosh(x) ** 2 - jnp.sinh(x) ** 2}


def product_rule() -> fp.Rule:
    """Right for matrices; as the rule of a primitive it forgets that `vmap` gives it batch dimensions."""

    def forward(x: Any, w: Any, **static: Any) -> tuple[Any, Operands]:
        return lax.dot_general(x, w, **static), Operands(x, w)

    return fp.Rule(forward, lambda r, g, needs, **static: (g @ r.w.T, r.x.T @ g))


OBLONG = numbers(4, 3, seed=1), numbers(3, 2, seed=2), numbers(2, seed=3)
SQUARE = numbers(3, 3, seed=1), numbers(3, 3, seed=2), numbers(3, seed=3)
MATRIX = numbers(4, 3) / 2
COMPLEX = numbers(3) + 1j * numbers(3, seed=1)


class Mistake(NamedTuple):
    """A wrong rule, and what the error says of it."""

    rule: fp.Rule
    function: Callable[..., Any]
    args: tuple[Any, ...]
    message: str
    options: dict[str, Any] = {}  # noqa: RUF012


def of_affine(message: str, args: tuple[Any, ...] = OBLONG, **mistakes: Any) -> Mistake:
    return Mistake(affine_rule(**mistakes), affine, args, message)


def of_bounded(message: str, *parts: Any, **options: Any) -> Mistake:
    return Mistake(bounded_rule(*parts, **options), bounded, (MATRIX,), message)


MISTAKES = {
    "transposed": of_affine(
        r"cotangent against autodiff: the cotangent of argument 'w' is wrong: it equals the transpose",
        w=lambda r, g, needs: g.T @ r.x,
    ),
    "transposed, square": of_affine(
        r"cotangent against autodiff: the cotangent of argument 'w' .*: it equals the transpose",
        SQUARE,
        w=lambda r, g, needs: g.T @ r.x,
    ),
    "missing factor": of_bounded(
        r"cotangent against autodiff: the cotangent of argument 'x' is wrong: it is 0\.5 × the expected",
        lambda r, g: 0.5 * right_slope(r, g),
    ),
    "wrong sign": of_bounded(
        r"argument 'x' is wrong: it has the wrong sign", lambda r, g: -right_slope(r, g)
    ),
    "forgotten": of_affine(
        r"cotangent of argument 'b' is wrong: it is zero", b=lambda r, g, needs: jnp.zeros(2)
    ),
    "none": of_affine(r"cotangent of argument 'b' is wrong: it is zero", b=lambda r, g, needs: None),
    "wrong axis summed": of_affine(
        r"cotangent against autodiff: the cotangent of argument 'b' .* summed over the wrong axis",
        b=lambda r, g, needs: g.sum(1),
    ),
    "wrong axis summed, square": of_affine(
        r"cotangent against autodiff: the cotangent of argument 'b' .* summed over the wrong axis",
        SQUARE,
        b=lambda r, g, needs: g.sum(1),
    ),
    "reversed": of_affine(
        r"cotangent of argument 'b' is wrong: it has the expected entries in another order",
        b=lambda r, g, needs: g.sum(0)[::-1],
    ),
    "dropped broadcast": of_affine(
        r"the cotangent of argument 'b' is wrong: it misses the broadcast sum.*\n.*shape \(4, 2\), expected",
        b=lambda r, g, needs: g,
    ),
    "swapped": of_affine(
        r"cotangent of argument 'x' is wrong: it equals the cotangent of argument 'w' \(swapped\?\)",
        SQUARE,
        x=lambda r, g, needs: r.x.T @ g,
        w=lambda r, g, needs: g @ r.w.T,
    ),
    "off by 0.1 %": of_bounded(
        r"cotangent of argument 'x' is wrong: it is off by 0\.1 %", lambda r, g: 1.001 * right_slope(r, g)
    ),
    "one entry": of_bounded(
        r"argument 'x' is wrong\.\n  largest deviation 0\.0\d+ \(relative 0\.00\d+, .* at \[2, 1\]: got",
        lambda r, g: right_slope(r, g).at[2, 1].multiply(1.01),
    ),
    "not finite": of_bounded(
        r"cotangent of argument 'x' is wrong: it is not finite",
        lambda r, g: right_slope(r, g) / (r.y - r.y[0]),
    ),
    "conjugated": Mistake(
        fp.Rule(lambda x: (x * x, Output(x)), lambda r, g, needs: (jnp.conj(2 * r.y * g),)),
        lambda x: x * x,
        (COMPLEX,),
        r"cotangent of argument 'x' is wrong: it equals the complex conjugate",
        {"dtypes": ("float32",)},
    ),
    "not linear": of_bounded(
        r"linearity, B\(2a \+ 3b\) .*: the pullback to argument 'x' is wrong",
        lambda r, g: right_slope(r, jnp.clip(g, -3, 3)),
    ),
    "affine in the cotangent": of_bounded(
        r"linearity.*: the pullback to argument 'x' is wrong", lambda r, g: right_slope(r, g) + 1e-3
    ),
    "stop_gradient": of_bounded(
        r"second order, forward over reverse: the cotangent of argument 'x' is wrong",
        lambda r, g: right_slope(Output(lax.stop_gradient(r.y)), g),
    ),
    "wrong dtype": of_bounded(
        r"cotangent against autodiff: the cotangent of argument 'x' .* dtype float32 instead of float64",
        lambda r, g: right_slope(r, g).astype(jnp.float32),
    ),
    "wrong dtype, only in bfloat16": of_bounded(
        r"bfloat16: the cotangent of argument 'x' is wrong: it has dtype float32 instead of bfloat16",
        lambda r, g: right_slope(r, g).astype(jnp.promote_types(g.dtype, jnp.float32)),
    ),
    "inaccurate in float32": of_bounded(
        r"float32: the cotangent of argument 'x' is wrong",
        lambda r, g: right_slope(r, g) if g.dtype == jnp.float64 else right_slope(r, g) * (1 + 1e-3),
    ),
    "stale residual": Mistake(
        stale(),
        bounded,
        (MATRIX,),
        r"stale residual, another forward followed: the cotangent of argument 'x'",
    ),
    "wrong value": of_bounded(
        r"value: the result is wrong: it is off by 0\.1 %",
        right_slope,
        lambda x: (1.001 * jnp.tanh(x), Output(jnp.tanh(x))),
    ),
    "wrong jvp": of_bounded(
        r"jvp, tangent of argument 'x': the tangent of the result is wrong: it is 2 × the expected",
        jvp=lambda r, tangents: 2 * right_slope(r, tangents[0]),
    ),
    "depends on what is needed": of_affine(
        r"needs, only 'w' wanted: the cotangent of argument 'w' is wrong: it is 2 × the expected",
        w=lambda r, g, needs: (1 if needs[0] else 2) * r.x.T @ g,
    ),
    "batch × parameters": of_affine(
        r"batch × parameters, vmap over 'x': the gradient of the shared argument 'w' of shape \(3, 2\)",
        w=lambda r, g, needs: (r.x[:, :, None] * g[:, None, :]).sum(0),
    ),
    "batch dimensions": Mistake(
        product_rule(),
        partial(lax.dot_general, dimension_numbers=(((1,), (0,)), ((), ()))),
        OBLONG[:2],
        r"dot_general: vmap: ",
        {"primitive": "dot_general"},
    ),
    "saves too much": of_bounded(
        r"residual bytes: the rule saves 288 bytes besides the arguments; at most 1\.0 × autodiff's \d+",
        lambda r, g: g * (r["one"] - 0.5 * r["y"] ** 2 - 0.5 * r["square"]),
        wasteful,
    ),
    "python control flow": of_bounded(
        r"needs: TracerBoolConversionError", lambda r, g: right_slope(r, g) if r.y.sum() < 9 else g
    ),
    "not an array": of_affine(
        r"linearity: RuleError: .*cotangent of argument 'b' is 0\.0; return an array",
        b=lambda r, g, needs: 0.0,
    ),
    "too few cotangents": Mistake(
        fp.Rule(lambda x, y: (x * y, Operands(x, y)), lambda r, g, needs: (g * r.w,)),
        lambda x, y: x * y,
        SQUARE[:2],
        r"linearity: RuleError: .*backward returned a tuple of length 1 for 2 arguments \('x', 'y'\)",
    ),
    "plain function not its own derivative": Mistake(
        fp.Rule(lambda x: (x * x, Output(x)), lambda r, g, needs: (g * lax.stop_gradient(r.y),)),
        lambda x: x * lax.stop_gradient(x),
        (MATRIX,),
        r"finite differences: the cotangent of argument 'x' is wrong: it is 0\.5 × the expected",
    ),
    "does not apply": of_bounded(
        r"does not apply to these arguments: too small", applies=lambda x: "too small"
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_planted_mistake_is_named(name: str) -> None:
    mistake = MISTAKES[name]
    with pytest.raises(CheckError, match=mistake.message):
        check_rule(mistake.rule, *mistake.args, function=mistake.function, **mistake.options)


# --- right rules ------------------------------------------------------------------------------


@fp.layer(rule=affine_rule())
def affine_layer(x: Any, w: Any, b: Any) -> Any:
    return affine(x, w, b)


class Weights(NamedTuple):
    params: Any
    x: jax.Array


@fp.layer(
    rule=fp.Rule(
        lambda params, x: (x @ params["w"] + params["b"], Weights(params, x)),
        lambda r, g, needs: ({"w": r.x.T @ g, "b": g.sum(0)}, g @ r.params["w"].T),
    )
)
def of_pytree(params: Any, x: Any) -> Any:
    return x @ params["w"] + params["b"]


class Rows(NamedTuple):
    index: jax.Array
    table: jax.Array


@fp.layer(
    rule=fp.Rule(
        lambda table, index: (table[index], Rows(index, table)),
        lambda r, g, needs: (jnp.zeros_like(r.table).at[r.index].add(g), None),
    )
)
def lookup(table: Any, index: Any) -> Any:
    return table[index]


@fp.layer(
    rule=fp.Rule(
        lambda x, key: (jnp.where(jax.random.bernoulli(key, 0.5, x.shape), x, 0), (key,)),
        lambda r, g, needs: (jnp.where(jax.random.bernoulli(r[0], 0.5, g.shape), g, 0), None),
    )
)
def masked(x: Any, key: Any) -> Any:
    return jnp.where(jax.random.bernoulli(key, 0.5, x.shape), x, 0)


def largest_with_index(x: Any) -> Any:
    return {"value": x.max(), "index": x.argmax(), "sum": x.sum()}


def spread(index: Any, cotangents: Any, size: int) -> Any:
    at_largest = jax.nn.one_hot(index, size, dtype=cotangents["sum"].dtype)
    return (at_largest * cotangents["value"] + cotangents["sum"],)


# The size of the argument is not a residual: a rule may keep the argument itself, which costs nothing.
two_outputs = fp.layer(
    rule=fp.Rule(
        lambda x: (largest_with_index(x), (x.argmax(), x)),
        lambda r, g, needs: spread(r[0], g, r[1].size),
    )
)(largest_with_index)


@fp.layer(
    rule=fp.Rule(
        lambda x, *, slope: (jnp.where(x > 0, x, slope * x), (x,)),
        lambda r, g, needs, *, slope: (jnp.where(r[0] > 0, g, slope * g),),
        jvp=lambda r, tangents, *, slope: jnp.where(r[0] > 0, tangents[0], slope * tangents[0]),
    )
)
def leaky(x: Any, *, slope: float) -> Any:
    return jnp.where(x > 0, x, slope * x)


def unfinished(x: Any) -> Any:
    """Computes in float32 inside, so that a check in float64 needs a wider tolerance."""
    return jnp.sin(x.astype(jnp.float32)).astype(x.dtype)


RIGHT = {
    "layer": (affine_layer, OBLONG, {}),
    "another rule for a layer": (affine_layer, OBLONG, {"rule": affine_rule()}),
    "rule and function": (affine_rule(), OBLONG, {"function": affine}),
    "pytree": (of_pytree, ({"w": OBLONG[1], "b": OBLONG[2]}, OBLONG[0]), {}),
    "integer": (lookup, (numbers(5, 2), jnp.array([4, 0, 4])), {"residual_bytes": None}),
    "key": (masked, (numbers(3, 2), jax.random.key(0)), {"residual_bytes": None}),
    "several outputs": (two_outputs, (numbers(5),), {}),
    "static": (leaky, (numbers(3, 4),), {"slope": 0.25}),
    "python scalar": (leaky, (0.5,), {"slope": 0.25, "residual_bytes": None}),
    "empty": (leaky, (jnp.zeros((0, 2)),), {"slope": 0.25}),
    "complex": (
        fp.Rule(lambda x: (x * x, (x,)), lambda r, g, needs: (2 * r[0] * g,)),
        (COMPLEX,),
        {"function": lambda x: x * x, "dtypes": ("float32",), "residual_bytes": None},
    ),
    "float32 inside": (
        fp.Rule(lambda x: (unfinished(x), (x,)), lambda r, g, needs: (g * jnp.cos(r[0]),)),
        (numbers(3),),
        {"function": unfinished, "tolerance": 1e-5, "residual_bytes": None},
    ),
}


@pytest.mark.parametrize("name", RIGHT)
def test_a_right_rule_passes(name: str) -> None:
    operator, args, options = RIGHT[name]
    report = check_rule(operator, *args, **options)
    terms = {row.term: row for row in report.rows}
    assert {"value", "linearity", "needs", "adjoint", "second order", "vmap", "scan", "float32"} <= set(terms)
    assert terms["cotangent"].error < 1e-4
    assert ("no limit" in terms["residual bytes"].note) == (options.get("residual_bytes", 1) is None)


def test_the_report_is_an_aligned_table() -> None:
    report = check_rule(affine_layer, *OBLONG)
    subject, header, *rows = str(report).splitlines()
    assert subject == "affine_layer"
    assert header.split() == ["term", "comparisons", "largest", "error"]
    assert len(rows) == len(report.rows)
    assert len({len(row[: header.index("error") + 5]) for row in rows}) == 1
    assert report["residual bytes"].note == "0 bytes besides the arguments, autodiff 0"


@pytest.mark.parametrize("enabled", [False, True])
def test_the_configuration_of_jax_is_left_alone(enabled: bool) -> None:
    with jax.enable_x64(enabled):
        report = check_rule(affine_layer, *(jnp.asarray(x, jnp.float32) for x in OBLONG))
        assert report["cotangent"].error < 1e-14
        assert jax.config.jax_enable_x64 == enabled


UNCHECKABLE = {
    "no rule": (fp.layer(lambda x: x), (1.0,), {}, "has no rule"),
    "no function": (bounded_rule(), (1.0,), {}, "pass a layer, or a rule with the plain function"),
    "a function for a layer": (affine_layer, OBLONG, {"function": affine}, "belong to a rule"),
    "static by position": (
        bounded_rule(), ("same",), {"function": bounded}, "argument x='same' is not an array"
    ),
    "nothing differentiable": (
        bounded_rule(), (1,), {"function": lambda x: x}, "no differentiable result|no differentiable argument"
    ),
    "no primitive": (
        bounded_rule(), (1.0,), {"function": jnp.sinc, "primitive": "sin"}, "must be the primitive 'sin'"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", UNCHECKABLE)
def test_what_cannot_be_checked_is_refused(name: str) -> None:
    operator, args, options, message = UNCHECKABLE[name]
    with pytest.raises(ValueError, match=message):
        check_rule(operator, *args, **options)


# --- whole functions --------------------------------------------------------------------------


def loss(params: Any, x: Any, kind: str = "square") -> Any:
    assert kind == "square"
    return jnp.sum(affine_layer(jnp.tanh(x), params["w"], params["b"]) ** 2)


PARAMS = {"w": OBLONG[1], "b": OBLONG[2]}


def with_affine(**mistakes: Any) -> fp.RuleSet:
    return fp.rules.autodiff.replace({affine_layer: affine_rule(**mistakes)})


def test_a_right_gradient_passes() -> None:
    report = check_gradient(loss, PARAMS, OBLONG[0], argnums=(0, 1), rules=with_affine())
    assert [row.term for row in report.rows] == [
        f"argument {path} against {oracle}"
        for path in ("0['b']", "0['w']", "1")
        for oracle in ("autodiff", "finite differences")
    ]
    assert max(row.error for row in report.rows) < 1e-6


WRONG_GRADIENTS = {
    "a rule": (
        loss,
        with_affine(w=lambda r, g, needs: 1.001 * r.x.T @ g),
        r"loss: against autodiff: the gradient of argument 0\['w'\] is wrong: it is off by 0\.1 %",
    ),
    "the function": (
        lambda params, x, kind: loss({**params, "b": lax.stop_gradient(params["b"])}, x),
        fp.rules.autodiff,
        r"against finite differences: the gradient of argument 0\['b'\] is wrong: it is zero",
    ),
}


@pytest.mark.parametrize("name", WRONG_GRADIENTS)
def test_a_wrong_gradient_is_named(name: str) -> None:
    function, rules, message = WRONG_GRADIENTS[name]
    with pytest.raises(CheckError, match=message):
        check_gradient(function, PARAMS, OBLONG[0], "square", rules=rules)
