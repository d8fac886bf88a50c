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

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from funcprop import _jax
from funcprop.program.by_platform import Forms
from funcprop.program.linear_map import Arrays, LinearMap, linear_p
from funcprop.rules import staged
from funcprop.rules.bound_rule import BoundRule
from funcprop.rules.derivative import Derivative


def attach(bound: BoundRule, arguments: Sequence[Any]) -> Arrays:
    """Evaluate an operator so that its derivative is the hand-written one; flat arrays to flat arrays."""
    value: Callable[..., Arrays] = partial(_value, bound)
    if bound.elsewhere is not None:
        value = Forms(_platforms(bound), value, bound.elsewhere)
    operator = jax.custom_jvp(value)
    operator.defjvp(partial(_differentiate, bound), symbolic_zeros=True)
    return list(operator(*_jax.align_varying_axes(arguments)))


def _value(bound: BoundRule, *leaves: Any) -> Arrays:
    return bound.value(leaves)


def _differentiate(bound: BoundRule, primals: Any, tangents: Any) -> tuple[Arrays, Arrays]:
    is_staged = staged.is_staged(bound, primals)
    forward = staged.compiled(bound) if is_staged else bound
    run = forward.forward if bound.elsewhere is None else partial(_forward_by_platform, bound)
    results, result_tree, residuals, residual_tree = run(primals)
    needs = tuple(not isinstance(t, SymbolicZero) for t in tangents)
    arguments, types = (tuple(map(jax.typeof, values)) for values in (primals, results))
    derivative = Derivative(bound, needs, residual_tree, result_tree, arguments, types)
    if is_staged:
        linear, saved = staged.tangent_map(derivative, residuals)
    else:
        linear, saved = derivative.tangent_map(residuals)
    if bound.elsewhere is not None:
        linear, saved = _map_by_platform(bound, linear, saved, primals, needs)
    inputs = [t for t, need in zip(tangents, needs, strict=True) if need]
    pushed = iter(linear_p.bind(*saved, *inputs, linear=linear, residuals=len(saved)))
    return results, [
        next(pushed) if _jax.is_differentiable(a) else SymbolicZero(a.to_tangent_aval()) for a in types
    ]


# --- where the platform is known when the program is lowered ----------------------------------


def _platforms(bound: BoundRule) -> frozenset[str]:
    assert bound.rule.platforms is not None
    return bound.rule.platforms


def _forward_by_platform(bound: BoundRule, primals: Arrays) -> tuple[Arrays, Any, Arrays, Any]:
    """As the rule's forward; on other platforms the operator, and residuals that nobody reads."""
    found: list[Any] = []

    def by_rule(*leaves: Any) -> Arrays:
        results, result_tree, residuals, residual_tree = bound.forward(leaves)
        found[:] = result_tree, residual_tree, len(results), [jax.typeof(jnp.asarray(r)) for r in residuals]
        return [*results, *residuals]

    def elsewhere(*leaves: Any) -> Arrays:
        assert bound.elsewhere is not None
        return [*bound.elsewhere(*leaves), *map(_jax.zeros_like_aval, found[3])]

    values = Forms(_platforms(bound), by_rule, elsewhere)(*primals)
    result_tree, residual_tree, count, _ = found
    return values[:count], result_tree, values[count:], residual_tree


def _map_by_platform(
    bound: BoundRule, linear: LinearMap, saved: Arrays, primals: Sequence[Any], needs: Sequence[bool]
) -> tuple[LinearMap, Arrays]:
    """The rule's tangent map; on other platforms the operator's, from the operands, which are saved, too.

    XLA drops those that the form of the platform does not read.
    """
    given, count = len(saved), len(primals)

    def of_needed(leaves: Sequence[Any], *values: Any) -> Arrays:
        assert bound.elsewhere is not None
        rest = iter(values)
        full = [next(rest) if need else x for x, need in zip(leaves, needs, strict=True)]
        return [y for y in bound.elsewhere(*full) if _jax.is_differentiable(jax.typeof(y))]

    def chosen(by_rule: Callable[..., Arrays], derive: Callable[..., Any]) -> Callable[..., Arrays]:
        def elsewhere(*values: Any) -> Arrays:
            leaves = values[given : given + count]
            wanted = [x for x, need in zip(leaves, needs, strict=True) if need]
            return list(derive(partial(of_needed, leaves), wanted, list(values[given + count :])))

        def here(*values: Any) -> Arrays:
            return by_rule(list(values[:given]), list(values[given + count :]))

        forms = Forms(_platforms(bound), here, elsewhere)
        return lambda saved, inputs: forms(*saved, *inputs)

    pullback = chosen(linear.pullback, lambda fun, at, cts: jax.vjp(fun, *at)[1](cts))
    pushforward = chosen(linear.pushforward, lambda fun, at, dots: jax.jvp(fun, tuple(at), tuple(dots))[1])
    own = None if linear.custom_pushforward is None else pushforward
    return LinearMap(pullback, own, linear.results), [*saved, *primals]


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
