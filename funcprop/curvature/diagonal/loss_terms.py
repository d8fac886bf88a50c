"""A loss taken apart into terms: weight decay is added to what the data say, and neither bends the other.

A penalty that is a sum over the entries of the parameters has a diagonal Hessian, so one product gives all of
it; the rest of the loss then uses each weight where the model does, and not once more.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from funcprop import _jax
from funcprop.curvature.diagonal.separability import is_separable
from funcprop.program.facts import SUMS, is_linear


def terms(jaxpr: Any, leaves: Sequence[int]) -> list[Any]:
    """Jaxprs with the same inputs whose one results add up to the result, each penalty by itself.

    `leaves` are the positions of the parameters among the inputs.
    """
    for at in _sums(jaxpr, leaves):
        parts = [_without(jaxpr, at, side) for side in (0, 1)]
        penalties = [_is_penalty(part, leaves) for part in parts]
        if any(penalties):
            pairs = zip(parts, penalties, strict=True)
            return [term for part, done in pairs for term in ([part] if done else terms(part, leaves))]
    return [jaxpr]


def _sums(jaxpr: Any, leaves: Sequence[int]) -> list[int]:
    """The equations that add two scalars, both dependent on parameters, in which the result is linear."""
    dependent = {jaxpr.invars[i] for i in leaves}
    for eqn in jaxpr.eqns:
        if any(_is_in(v, dependent) for v in eqn.invars):
            dependent.update(eqn.outvars)
    uses = Counter(v for eqn in jaxpr.eqns for v in eqn.invars if not isinstance(v, _jax.Literal))
    found = []
    linear = {v for v in jaxpr.outvars if not isinstance(v, _jax.Literal)}
    for k in range(len(jaxpr.eqns) - 1, -1, -1):
        eqn = jaxpr.eqns[k]
        if eqn.outvars[0] not in linear or eqn.outvars[0].aval.shape != ():
            continue
        given = [i for i, v in enumerate(eqn.invars) if _is_in(v, dependent)]
        if eqn.primitive.name in SUMS and len(given) == 2:
            found.append(k)
        if len(eqn.outvars) == 1 and is_linear(eqn, given):
            linear.update(eqn.invars[i] for i in given if uses[eqn.invars[i]] == 1)
    return found


def _without(jaxpr: Any, at: int, side: int) -> Any:
    """The jaxpr with a zero in place of one operand of a sum, and without what only that needed."""
    equations = list(jaxpr.eqns)
    operands = list(equations[at].invars)
    aval = operands[side].aval
    operands[side] = _jax.Literal(aval.dtype.type(0), aval)
    equations[at] = equations[at].replace(invars=operands)
    needed = _jax.needed_equations(equations, jaxpr.outvars)
    return _jax.jaxpr_of(needed, jaxpr.invars, jaxpr.outvars, "term")


def _is_penalty(jaxpr: Any, leaves: Sequence[int]) -> bool:
    """Whether the result is a sum over single entries of each leaf."""
    shapes = {i: jaxpr.invars[i].aval.shape for i in leaves}
    return all(
        size == 1 or is_separable(jaxpr, i, axis)
        for i, shape in shapes.items()
        for axis, size in enumerate(shape)
    )


def _is_in(atom: Any, variables: set[Any]) -> bool:
    return not isinstance(atom, _jax.Literal) and atom in variables
