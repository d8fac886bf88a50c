"""Functions with a custom derivative (`jax.custom_jvp`, `jax.custom_vjp`) whose rules are jaxprs.

JAX keeps such a rule as the user's python function, which may read and hold anything, and calls it whenever
the function is differentiated. Here it is called once, and the same function is made of what it traced.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax

from funcprop import _jax
from funcprop.program.linear_map import LinearMap, linear_p

FORWARD, REVERSE, TANGENT = "custom_jvp_call", "custom_vjp_call", "custom_lin"
Arrays = list[Any]


def traced_rule(eqn: Any) -> list[Any]:
    """The rule of an equation: one jaxpr of a `custom_jvp`, or forwards and backwards of a `custom_vjp`.

    From operands and tangents of the differentiable ones to results and tangents of the differentiable ones;
    or from operands to results and residuals, and from these and cotangents to cotangents.

    Raises:
        whatever the rule raises.
    """
    call = _jax.one_equation(eqn)
    inputs, outputs = ([v.aval for v in atoms] for atoms in (eqn.invars, eqn.outvars))

    def chosen(values: Sequence[Any], avals: Sequence[Any]) -> Arrays:
        return [x for x, a in zip(values, avals, strict=True) if _jax.is_differentiable(a)]

    if eqn.primitive.name == FORWARD:

        def pushed(primals: Arrays, tangents: Arrays) -> Arrays:
            results, moved = jax.jvp(call, primals, _jax.with_zero_tangents(tangents, inputs))
            return [*results, *chosen(moved, outputs)]

        return [_traced(pushed, inputs, [a.to_tangent_aval() for a in chosen(inputs, inputs)])]

    trees: list[Any] = []

    def forward(*primals: Any) -> Arrays:
        def of_smooth(*smooth: Any) -> Arrays:
            given = iter(smooth)
            return call(*(next(given) if _jax.is_differentiable(jax.typeof(p)) else p for p in primals))

        results, pullback = jax.vjp(of_smooth, *chosen(primals, inputs))
        residuals, tree = jax.tree.flatten(pullback)
        trees.append(tree)
        return [*results, *residuals]

    def backward(residuals: Arrays, cotangents: Arrays) -> Arrays:
        return list(jax.tree.unflatten(trees[-1], residuals)(_jax.with_zero_tangents(cotangents, outputs)))

    there = _traced(forward, *inputs)
    residuals = [v.aval for v in _jax.open_jaxpr(there).outvars[len(outputs) :]]
    cotangents = [a.to_tangent_aval() for a in chosen(outputs, outputs)]
    return [there, _traced(backward, residuals, cotangents)]


def tangent_map(eqn: Any) -> Any:
    """The tangent map of a `custom_vjp`, which JAX can only transpose: its transpose, transposed, as a jaxpr.

    Raises:
        whatever the rule raises.
    """
    residuals, avals = eqn.params["num_res"], [v.aval for v in eqn.invars]
    tangents, results = avals[residuals:], [v.aval for v in eqn.outvars]

    def pushed(*operands: Any) -> Arrays:
        def whole(*moved: Any) -> Arrays:
            return _jax.one_equation(eqn)(*operands[:residuals], *moved)

        pullback = jax.linear_transpose(whole, *tangents)
        forward = jax.linear_transpose(lambda *cotangents: pullback(list(cotangents)), *results)
        return list(forward(tuple(operands[residuals:])))

    return _traced(pushed, *avals)


def _traced(fun: Callable[..., Any], *avals: Any) -> Any:
    jaxpr = jax.make_jaxpr(fun)(*avals)
    for value in _jax.constants(jaxpr):
        if isinstance(value, jax.core.Tracer):
            jax.lax.optimization_barrier(value)  # raises if it belongs to a trace that has ended
    return jaxpr


def python_rule(eqn: Any) -> Any | None:
    """Identify the python rule of a `custom_jvp` call at this moment; None where nothing does.

    The rule, and its arguments that are not arrays: two calls of which they are the same, at the same types,
    have the same derivative, until python runs again.
    """
    try:
        return _rule_within(eqn.params["jvp_jaxpr_fun"])
    except (AttributeError, KeyError, TypeError, ValueError):
        return None


def _rule_within(wrapped: Any) -> Any:
    (traced,) = _cells(wrapped.f, "fn")
    (rule,) = _cells(traced, "jvp")
    # A rule in a jaxpr that was evaluated again is wrapped once more, to leave out the constants it is given.
    again = _cells(rule.f, "jvp_jaxpr_fun")
    if again:
        constants, same = _cells(rule.f, "num_consts"), _rule_within(again[0])
        return (constants, same) if any(constants) else same
    trees = [a for _, args in rule.transforms for a in args if isinstance(a, jax.tree_util.PyTreeDef)]
    static = [x.val for _, args in rule.transforms for a in args if isinstance(a, tuple) for x in a]
    return rule.f, tuple(trees), tuple((type(x), x) for x in static if hash(x) is not None)


def _cells(function: Any, name: str) -> tuple[Any, ...]:
    pairs = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    return tuple(cell.cell_contents for free, cell in pairs if free == name)


@dataclass(eq=False)
class CustomRule:
    """A function with a custom derivative, made of jaxprs.

    The leading inputs of `call` and of each of the `programs` are arrays that they close over, `counts` says
    how many; the function takes them all, before its own operands. The tangent map of a `custom_vjp` is a
    linear map whose transpose is its backward, so that it has forward mode, too. A function without programs
    refuses to be differentiated, for the reason `refusal`.
    """

    name: str
    call: Any
    counts: tuple[int, ...]
    inputs: Sequence[Any]
    outputs: Sequence[Any]
    programs: Sequence[Any] = ()
    refusal: str = ""

    def equation(self, closed_over: Sequence[Any]) -> Any:
        """A call of the function at its types; `closed_over` has the types of the arrays."""
        return _jax.open_jaxpr(jax.make_jaxpr(self._function)(*closed_over, *self.inputs)).eqns[-1]

    @cached_property
    def _function(self) -> Callable[..., Any]:
        def primal(*operands: Any) -> Arrays:
            return self._evaluated(0, operands)

        primal.__name__ = primal.__qualname__ = self.name
        function = jax.custom_jvp(primal)
        function.defjvp(self._rule)
        return function

    def _evaluated(self, which: int, operands: Sequence[Any], further: Sequence[Any] = ()) -> Arrays:
        """One of the jaxprs, of its own arrays, the function's own operands and further ones."""
        first, arrays = sum(self.counts[:which]), sum(self.counts)
        given = [*operands[first : first + self.counts[which]], *operands[arrays:], *further]
        return _jax.evaluate([self.call, *self.programs][which], (), given)

    def _rule(self, primals: Sequence[Any], tangents: Sequence[Any]) -> tuple[Arrays, Arrays]:
        if not self.programs:
            raise TypeError(self.refusal)
        own = zip(tangents[sum(self.counts) :], self.inputs, strict=True)
        smooth = [t for t, aval in own if _jax.is_differentiable(aval)]
        count = len(self.outputs)
        if len(self.programs) == 1:
            found = self._evaluated(1, primals, smooth)
            results, moved = found[:count], found[count:]
        else:
            found = self._evaluated(1, primals)
            closed_over = primals[sum(self.counts[:2]) : sum(self.counts)]
            results, residuals = found[:count], [*closed_over, *found[count:]]
            moved = linear_p.bind(*residuals, *smooth, linear=self._pullback(), residuals=len(residuals))
        return results, _jax.with_zero_tangents(moved, self.outputs)

    def _pullback(self) -> LinearMap:
        avals = tuple(a.to_tangent_aval() for a in self.outputs if _jax.is_differentiable(a))

        def pullback(residuals: Arrays, cotangents: Arrays) -> Arrays:
            return _jax.evaluate(self.programs[1], (), [*residuals, *cotangents])

        return LinearMap(pullback, None, avals)
