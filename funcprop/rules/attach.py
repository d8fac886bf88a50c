"""How a hand-written rule becomes a function that every JAX transformation understands.

`jax.custom_vjp` forbids forward mode, and with it `jvp`, `linearize` and Gauss-Newton products. Here a rule
is a `jax.custom_jvp` whose tangent map is ONE linear primitive that knows its own transpose:

    primal     y, r = forward(x)
    tangent    ẏ = pushforward(r, ẋ)        the primitive: linear in ẋ
    cotangent  x̄ = pullback(r, ȳ)           its transpose: the hand-written backward

Reverse mode transposes the primitive and so runs the hand-written backward. Forward mode evaluates it: the
rule's own `jvp`, or the transpose of the backward. Differentiating the primitive again differentiates the
backward rule by ordinary autodiff, so second order is exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
from jax.custom_derivatives import SymbolicZero

from funcprop import _jax
from funcprop.program.linear_map import Arrays, linear_p
from funcprop.rules import staged
from funcprop.rules.bound_rule import BoundRule
from funcprop.rules.derivative import Derivative


def attach(bound: BoundRule, arguments: Sequence[Any]) -> Arrays:
    """Evaluate an operator so that its derivative is the hand-written one; flat arrays to flat arrays."""
    operator = jax.custom_jvp(lambda *leaves: bound.value(leaves))
    operator.defjvp(partial(_differentiate, bound), symbolic_zeros=True)
    return list(operator(*_jax.align_varying_axes(arguments)))


def _differentiate(bound: BoundRule, primals: Any, tangents: Any) -> tuple[Arrays, Arrays]:
    is_staged = staged.is_staged(bound, primals)
    forward = staged.compiled(bound) if is_staged else bound
    results, result_tree, residuals, residual_tree = forward.forward(primals)
    needs = tuple(not isinstance(t, SymbolicZero) for t in tangents)
    arguments, types = (tuple(map(jax.typeof, values)) for values in (primals, results))
    derivative = Derivative(bound, needs, residual_tree, result_tree, arguments, types)
    if is_staged:
        linear, saved = staged.tangent_map(derivative, residuals)
    else:
        linear, saved = derivative.tangent_map(residuals)
    inputs = [t for t, need in zip(tangents, needs, strict=True) if need]
    pushed = iter(linear_p.bind(*saved, *inputs, linear=linear, residuals=len(saved)))
    return results, [
        next(pushed) if _jax.is_differentiable(a) else SymbolicZero(a.to_tangent_aval()) for a in types
    ]


def why_not(bound: BoundRule, arguments: Sequence[Any]) -> str | None:
    """Why an operator is left to autodiff, or None if its rule applies to arguments of these types."""
    shapes = [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in arguments]
    try:
        answer = bound.applies(shapes)
        if answer is True and any(map(_jax.has_symbolic_size, arguments)):
            jax.eval_shape(partial(_both_sweeps, bound), *shapes)
    except _jax.InconclusiveDimensionOperation:
        return "it compares sizes, and some of these are symbolic"
    return None if isinstance(answer, bool) else answer


def _both_sweeps(bound: BoundRule, *leaves: Any) -> Any:
    smooth = [i for i, x in enumerate(leaves) if _jax.is_differentiable(x)]

    def of_smooth(*values: Any) -> Arrays:
        full = list(leaves)
        for i, value in zip(smooth, values, strict=True):
            full[i] = value
        return [y for y in attach(bound, full) if _jax.is_differentiable(y)]

    values, pullback = jax.vjp(of_smooth, *(leaves[i] for i in smooth))
    return pullback(values)
