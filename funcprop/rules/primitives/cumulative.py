"""Cumulative log-sum-exps, whose cotangents obey a recurrence that runs the other way.

    y_t = log(e^{x_t} + e^{y_{t−1}})    a_t = ȳ_t + e^{y_t − y_{t+1}} a_{t+1}    x̄_t = e^{x_t − y_t} a_t

`a_t` is the cotangent of `y_t` by way of everything that follows it. The recurrence is one parallel scan of
pairs. Autodiff differentiates the parallel scan of the forward instead, level by level, and keeps every
level (64 × 4096 float32 on two x86 cores: 6.4 ms, 6.5 MB; by this rule 4.8 ms, 5.1 MB). The forward is a
parallel scan too: XLA's CPU backend computes every entry of the primitive from all those before it (41 ms).

The other cumulative operators are left to autodiff. `cumsum` it sums the other way round already; `cumprod`
by the like recurrence took 1.4 times its time; and for `cummax` and `cummin` JAX's derivative of entries that
tie depends on the order in which its scan meets them.

Source: Blelloch, "Prefix sums and their applications", 1990.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from funcprop.rules.equations import Equations, OperatorSymbols, apply
from funcprop.rules.rule import Rule
from funcprop.rules.rule_set import OperatorKey


class InputAndOutput(NamedTuple):
    """The operand and the result."""

    x: Any
    y: Any


def _logsumexp(x: Any, *, axis: int, reverse: bool) -> Any:
    return lax.associative_scan(jnp.logaddexp, x, reverse=reverse, axis=axis)


def _forward(x: Any, **static: Any) -> tuple[Any, InputAndOutput]:
    y = _logsumexp(x, **static)
    return y, InputAndOutput(x, y)


def _backward(residuals: InputAndOutput, g: Any, needs: Any, *, axis: int, reverse: bool) -> tuple[Any]:
    # An infinite sum has weight e⁰ and not e^(∞ − ∞), as in the derivative of `jnp.logaddexp`.
    x, y = (jnp.where(jnp.isposinf(v), jnp.zeros_like(v), v) for v in residuals)
    first = -1 if reverse else 0
    ends = lax.slice_in_dim(y, 0, -1, axis=axis), lax.slice_in_dim(y, 1, None, axis=axis)
    before, after = reversed(ends) if reverse else ends
    config = [(0, 0, 0)] * y.ndim
    config[axis] = (1, 0, 0) if reverse else (0, 1, 0)
    decay = lax.pad(jnp.exp(before - after), jnp.zeros((), y.dtype), config)

    def combine(later: Any, earlier: Any) -> Any:
        (later_decay, later_sum), (own_decay, own) = later, earlier
        return later_decay * own_decay, own + own_decay * later_sum

    _, following = lax.associative_scan(combine, (decay, g), reverse=not reverse, axis=axis)
    is_first = lax.broadcasted_iota(int, y.shape, axis) == first % y.shape[axis]
    return (following * jnp.where(is_first, 1, jnp.exp(x - y)),)


def _equations(op: OperatorSymbols) -> Equations:
    (x,) = op.args
    static = dict(op.static)
    back = lambda x, y, g: _backward(InputAndOutput(x, y), g, (True,), **static)[0]  # noqa: E731
    return Equations(
        apply("cumlogsumexp", lambda x: _logsumexp(x, **static), x),
        (apply("cumlogsumexpᵀ", back, x, op.output, op.cotangent),),
    )


def _applies(x: Any, **static: Any) -> bool | str:
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return f"its operand is {x.dtype}"
    return True if x.shape[static["axis"]] > 1 else "there is nothing to accumulate"


RULES: dict[OperatorKey, Rule] = {
    "cumlogsumexp": Rule(
        _forward, _backward, _equations, platforms=frozenset({"cpu"}), applies=_applies, pure=True
    )
}
