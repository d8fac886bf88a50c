"""Largest and smallest entries along axes.

    y = max x      x̄ = (ȳ / n) ⊙ [x = y]      n = the number of entries that are equal to y

Entries that tie share the cotangent equally, as JAX has it. Autodiff saves `[x = y]` as numbers of the size
of `x`, and `n`; the rule saves `x` and `y`. XLA makes the same program of both on the CPU, so the rule is
in no default set.

Source: Griewank and Walther, *Evaluating Derivatives*, chapter 14, for derivatives where there is a kink.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from funcprop.rules.equations import Equations, OperatorSymbols, apply, written
from funcprop.rules.notation import reduction
from funcprop.rules.rule import Rule
from funcprop.rules.rule_set import OperatorKey


class InputAndExtremum(NamedTuple):
    """The operand and the result."""

    x: Any
    y: Any


def _shared(axes: Sequence[int], x: Any, y: Any, g: Any) -> Any:
    """The cotangent, shared equally among the entries that are equal to the result."""
    equal = (x == jnp.expand_dims(y, axes)).astype(x.dtype)
    return jnp.expand_dims(g / equal.sum(axes), axes) * equal


def _rule(reduce: Callable[..., Any], name: str) -> Rule:
    def forward(x: Any, *, axes: Sequence[int], **_: Any) -> tuple[Any, InputAndExtremum]:
        y = reduce(x, axes)
        return y, InputAndExtremum(x, y)

    def backward(
        residuals: InputAndExtremum, g: Any, needs: Any, *, axes: Sequence[int], **_: Any
    ) -> tuple[Any]:
        return (_shared(axes, *residuals, g),)

    def equations(op: OperatorSymbols) -> Equations:
        (x,) = op.args
        axes = tuple(op.static["axes"])
        back = partial(_shared, axes)
        over = None if len(axes) == len(x.shape) else axes
        return Equations(
            written(lambda x: reduce(x, axes), (x,), *reduction(name, over)),
            (apply("share", back, x, op.output, op.cotangent),),
        )

    def applies(x: Any, **_: Any) -> bool | str:
        return True if jnp.issubdtype(x.dtype, jnp.floating) else f"its operand is {x.dtype}"

    # Not `pure`: XLA's product with a cast boolean is a selection, which hides the NaN that autodiff shows.
    return Rule(forward, backward, equations, platforms=frozenset(), applies=applies)


RULES: dict[OperatorKey, Rule] = {
    "reduce_max": _rule(lax.reduce_max, "max"),
    "reduce_min": _rule(lax.reduce_min, "min"),
}
