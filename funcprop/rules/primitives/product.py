"""Products of a batch of rows with a matrix: the weight gradient in the order that XLA computes fastest.

    y = x W        x: … × i,  W: i × o
    x̄ = ȳ Wᵀ      as by autodiff
    W̄ = Σ xᵀ ȳ    ONE contraction over all leading axes, activations first

Autodiff writes the last line as `(Σ ȳᵀ x)ᵀ`. For a matrix of rows XLA turns one into the other; for rows with
two or more leading axes (batch and time) it does not, and its CPU backend computes and transposes an `o × i`
matrix. Measured on two x86 cores, float32, ms by autodiff and by this rule:

| rows     | i    | o    | autodiff | rule |
|----------|------|------|----------|------|
| 4 × 256  | 256  | 1024 | 6.8      | 2.0  |
| 4 × 512  | 256  | 1024 | 14.0     | 4.1  |
| 4 × 256  | 256  | 4096 | 36.8     | 7.2  |
| 8 × 197  | 192  | 768  | 2.8      | 1.8  |
| 4 × 256  | 256  | 256  | 1.0      | 0.7  |
| 4 × 256  | 1024 | 256  | 2.4      | 2.4  |
| 1024     | 256  | 1024 | 2.1      | 2.1  |

Whole gradients of two products with a tanh between, 2 × 8 rows of 32 → 32 up to 4 × 128 of 256 → 512, took
0.81 to 0.97 of autodiff's time: there is no size below which it loses.

So the rule is for widening matrices (`o ≥ i`) and two or more leading axes. Kernels of three axes
(projections to heads) and products with batch axes (attention) were no faster in another order.

Source: Goodfellow et al., *Deep Learning*, section 6.5.6, for the rule of a product; the order is our own.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from funcprop.rules.primitives.arithmetic import EQUATIONS
from funcprop.rules.primitives.row_products import contraction
from funcprop.rules.rule import Rule
from funcprop.rules.rule_set import OperatorKey


class DotOperands(NamedTuple):
    """Both operands; each is read by the other's cotangent."""

    x: Any
    w: Any


def _forward(x: Any, w: Any, **static: Any) -> tuple[Any, DotOperands]:
    return lax.dot_general(x, w, **static), DotOperands(x, w)


def _backward(residuals: DotOperands, g: Any, needs: Any, **static: Any) -> tuple[Any, Any]:
    x, w = residuals
    need_x, need_w = needs
    x_cotangent = None
    if need_x:
        (x_cotangent,) = jax.linear_transpose(lambda x: lax.dot_general(x, w, **static), x)(g)
    return x_cotangent, contraction(x, g, static["precision"]) if need_w else None


def _applies(x: Any, w: Any, **static: Any) -> bool | str:
    (x_axes, w_axes), (batch, _) = static["dimension_numbers"]
    rows_times_matrix = w.ndim == 2 and tuple(w_axes) == (0,) and tuple(x_axes) == (x.ndim - 1,)
    if batch or not rows_times_matrix:
        return "it is not a product of rows with a matrix"
    # An axis of one is none: XLA drops it. (A symbolic size is not known to be one.)
    if sum(n != 1 for n in x.shape[:-1]) < 2 or w.shape[1] < w.shape[0]:
        return "XLA finds the best order of this product itself"
    result = static["preferred_element_type"]
    if x.dtype != w.dtype or result not in (None, x.dtype) or not jnp.issubdtype(x.dtype, jnp.floating):
        return f"its operands are {x.dtype} and {w.dtype}, its result {result}"
    return True


RULES: dict[OperatorKey, Rule] = {
    "dot_general": Rule(
        _forward,
        _backward,
        EQUATIONS["dot_general"],
        platforms=frozenset({"cpu"}),
        applies=_applies,
        pure=True,
    )
}
