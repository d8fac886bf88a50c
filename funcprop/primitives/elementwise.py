"""Elementwise primitives whose derivative follows from their output.

With `y = φ(x)`, autodiff of `φ` may save `x` or recompute `φ`; these rules save `y` alone.

| primitive  | φ′ in terms of y |
|------------|------------------|
| `tanh`     | `1 − y²`         |
| `logistic` | `y (1 − y)`      |
| `exp`      | `y`              |
| `sqrt`     | `1 / (2y)`       |
| `rsqrt`    | `−y³ / 2`        |

Reference: Griewank and Walther, *Evaluating Derivatives*, table 2.3 (elemental tangents).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from jax import lax

from funcprop.expressions import Equations, OperatorSymbols, apply
from funcprop.registry import OperatorKey, Rule


class Saved(NamedTuple):
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

    def forward(x: Any, **static: Any) -> tuple[Any, Saved]:
        y = function(x, **static)
        return y, Saved(y if from_output else x if saves == "input" else derivative(x, **static))

    def backward(residuals: Saved, g: Any, needs: Any, **static: Any) -> tuple[Any]:
        slope = residuals.value if saves == "all" else derivative(residuals.value, **static)
        return ((g * slope).astype(g.dtype),)

    def equations(op: OperatorSymbols) -> Equations:
        (x,) = op.args

        def slope(value: Any) -> Any:
            return derivative(function(value, **op.static) if from_output else value, **op.static)

        written = apply(op.name, lambda value: function(value, **op.static), x)
        return Equations(written, (op.cotangent * apply(f"{op.name}′", slope, x),))

    return Rule(forward, backward, equations, platforms=platforms)


def _from_output(primitive: Callable[..., Any], derivative: Callable[[Any], Any]) -> Rule:
    return elementwise_rule(primitive, lambda y, **_: derivative(y), saves="output")


RULES: dict[OperatorKey, Rule] = {
    # Not `1 − y²`, which cancels where y is close to 1.
    "tanh": _from_output(lax.tanh, lambda y: (1 - y) * (1 + y)),
    "logistic": _from_output(lax.logistic, lambda y: y * (1 - y)),
    "exp": _from_output(lax.exp, lambda y: y),
    "sqrt": _from_output(lax.sqrt, lambda y: 0.5 / y),
    "rsqrt": _from_output(lax.rsqrt, lambda y: -0.5 * y * y * y),
}
