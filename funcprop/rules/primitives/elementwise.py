"""Elementwise primitives whose derivative follows from one array: their output or their input.

With `y = φ(x)`, autodiff of `φ` may save several arrays or recompute `φ`; these rules save one, the output
where that loses no accuracy.

| primitive  | saves | φ′                              |
|------------|-------|---------------------------------|
| `tanh`     | `y`   | `1 − y²`                        |
| `logistic` | `y`   | `y (1 − y)`                     |
| `exp`      | `y`   | `y`                             |
| `sqrt`     | `x`   | `1 / (2√x)`                     |
| `rsqrt`    | `x`   | `−1 / (2x√x)`; not `−y³ / 2`, which has three times the rounding error of `y` |

Floats of 16 bits and less are differentiated in single precision, and rounded once.

Reference: Griewank and Walther, *Evaluating Derivatives*, table 2.3 (elemental tangents).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from funcprop.rules.equations import Equations, OperatorSymbols, apply
from funcprop.rules.rule import Rule
from funcprop.rules.rule_set import OperatorKey


class SavedArray(NamedTuple):
    """The one array that the derivative is computed from: the output or the input; or the derivative."""

    value: Any


def elementwise_rule(
    function: Callable[..., Any],
    derivative: Callable[..., Any],
    *,
    saves: str,
    platforms: frozenset[str] | None = frozenset(),
) -> Rule:
    """The rule of `y = φ(x)` from `φ` and its derivative.

    `derivative(value, **static)` is `φ′` as a function of the output (`saves="output"`) or of the input
    (`saves="input"`); with `saves="all"`, also of the input, it is computed in the forward.
    """
    from_output = saves == "output"

    def forward(x: Any, **static: Any) -> tuple[Any, SavedArray]:
        y = function(x, **static)
        if saves == "all":
            return y, SavedArray(derivative(_wide(x), **static).astype(x.dtype))
        return y, SavedArray(y if from_output else x)

    def backward(residuals: SavedArray, g: Any, needs: Any, **static: Any) -> tuple[Any]:
        value = _wide(residuals.value)
        slope = value if saves == "all" else derivative(value, **static)
        return ((_wide(g) * slope).astype(g.dtype),)

    def equations(op: OperatorSymbols) -> Equations:
        (x,) = op.args

        def slope(x: Any) -> Any:
            value = function(x, **op.static) if from_output else x
            return derivative(_wide(value), **op.static).astype(x.dtype)

        written = apply(op.name, lambda value: function(value, **op.static), x, type_=x.type)
        derived = written if op.name == "exp" else apply(f"{op.name}′", slope, x, type_=x.type)
        return Equations(written, (op.cotangent * derived,))

    return Rule(forward, backward, equations, platforms=platforms, pure=True)


def _wide(x: Any) -> Any:
    """A real array in single precision at least."""
    is_narrow = jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize < 4
    return x.astype(jnp.float32) if is_narrow else x


def _from_output(primitive: Callable[..., Any], derivative: Callable[[Any], Any]) -> Rule:
    return elementwise_rule(primitive, lambda y, **_: derivative(y), saves="output")


RULES: dict[OperatorKey, Rule] = {
    # Not `1 − y²`, which cancels where y is close to 1.
    "tanh": _from_output(lax.tanh, lambda y: (1 - y) * (1 + y)),
    "logistic": _from_output(lax.logistic, lambda y: y * (1 - y)),
    "exp": _from_output(lax.exp, lambda y: y),
    "sqrt": elementwise_rule(lax.sqrt, lambda x, **_: 0.5 * lax.rsqrt(x), saves="input"),
    "rsqrt": elementwise_rule(lax.rsqrt, lambda x, **_: -0.5 * lax.rsqrt(x) / x, saves="input"),
}
