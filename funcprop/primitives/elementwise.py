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

import jax
from jax import lax

from funcprop.registry import OperatorKey, Rule


class Output(NamedTuple):
    """The output, from which the derivative follows."""

    y: jax.Array


def _rule(primitive: Callable[..., Any], derivative_of_output: Callable[[Any], Any]) -> Rule:
    def forward(x: Any, **static: Any) -> tuple[Any, Output]:
        y = primitive(x, **static)
        return y, Output(y)

    def backward(residuals: Output, cotangent: Any, needs: Any, **static: Any) -> tuple[Any]:
        return (cotangent * derivative_of_output(residuals.y),)

    return Rule(forward, backward, platforms=frozenset())


RULES: dict[OperatorKey, Rule] = {
    "tanh": _rule(lax.tanh, lambda y: 1 - y * y),
    "logistic": _rule(lax.logistic, lambda y: y * (1 - y)),
    "exp": _rule(lax.exp, lambda y: y),
    "sqrt": _rule(lax.sqrt, lambda y: 0.5 / y),
    "rsqrt": _rule(lax.rsqrt, lambda y: -0.5 * y * y * y),
}
