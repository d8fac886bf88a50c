"""The checker itself: every planted mistake is caught and named."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
import pytest
from jax import lax
from rules_to_check import (
    COMPLEX,
    MATRIX,
    OBLONG,
    SQUARE,
    Operands,
    Output,
    affine,
    affine_rule,
    bounded,
    bounded_rule,
    product_rule,
    right_slope,
    stale,
    wasteful,
)

import funcprop as fp
from funcprop.testing import CheckError, check_rule


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


@pytest.mark.sampled(8)
@pytest.mark.parametrize("name", MISTAKES)
def test_a_planted_mistake_is_named(name: str) -> None:
    mistake = MISTAKES[name]
    with pytest.raises(CheckError, match=mistake.message):
        check_rule(mistake.rule, *mistake.args, function=mistake.function, **mistake.options)
