"""One flat jaxpr in which every variable is defined once.

JAX keeps traced bodies, so that two calls of one function share the variables of their bodies; what is found
of the variables of one call would then hold for the other. Here every call and every body of a loop has
variables of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax

from funcprop import _jax
from funcprop.program.equal_equations import merged
from funcprop.program.facts import CALLS, CHECKPOINTS, CUSTOM_RULES

# Whatever only calls its one body.
# Of a function in two forms (`by_platform`) the body is the form of the platform of this process.
EVERY_CALL = CALLS | CHECKPOINTS | CUSTOM_RULES | {"by_platform", "custom_lin", "funcprop_linear"}


def is_every_call(eqn: Any) -> bool:
    """Whether an equation does nothing but call its one body."""
    return eqn.primitive.name in EVERY_CALL and any(True for _ in _jax.sub_jaxprs(eqn))


def flattened(closed: Any, opens: Callable[[Any], bool] = is_every_call) -> tuple[Any, list[Any]]:
    """Inline the calls that `opens` accepts, also inside loops: an open jaxpr, and its constants.

    The constants are those of the leading inputs of the jaxpr.
    """
    consts = list(_jax.constants(closed))
    jaxpr, more = _renewed(_jax.open_jaxpr(closed), opens)
    return jaxpr, consts + more


def _renewed(jaxpr: Any, opens: Callable[[Any], bool]) -> tuple[Any, list[Any]]:
    """The jaxpr with new variables, whose constants are inputs, and the constants of the calls in it."""
    equations: list[Any] = []
    inputs = [_jax.Var(v.aval) for v in [*jaxpr.constvars, *jaxpr.invars]]
    count = len(jaxpr.constvars)
    captured: list[Any] = []
    consts: list[Any] = []

    def body(inner: Any, given: Sequence[Any], outer: Any) -> list[Any]:
        atoms = dict(zip([*inner.constvars, *inner.invars], given, strict=True))
        for eqn in inner.eqns:
            operands = [v if isinstance(v, _jax.Literal) else atoms[v] for v in eqn.invars]
            stack = _jax.scopes_of(eqn, outer)
            if opens(eqn):
                called = next(called for _, called in _jax.sub_jaxprs(eqn))
                opened = _jax.open_jaxpr(called)
                closed_over = [_jax.Var(v.aval) for v in opened.constvars]
                captured.extend(closed_over)
                consts.extend(_jax.constants(called))
                if eqn.params.get("differentiated") and eqn.params.get("prevent_cse"):
                    operands = _behind_barrier(equations, eqn, operands, stack)
                results = body(opened, [*closed_over, *operands[: len(opened.invars)]], stack)
            else:
                results = [_jax.Var(v.aval) for v in eqn.outvars]
                params = _jax.map_jaxprs(eqn.params, lambda nested: _renewed_body(nested, opens))
                equations.append(_jax.placed(eqn.replace(params=params), operands, results, stack))
            atoms.update(zip(eqn.outvars, results, strict=True))
        return [v if isinstance(v, _jax.Literal) else atoms[v] for v in inner.outvars]

    results: list[Any] = body(jaxpr, inputs, None)
    variables = [*inputs[:count], *captured, *inputs[count:]]
    return _jax.jaxpr_of(equations, variables, results, "flat"), consts


def barrier(variables: Sequence[Any]) -> Any:
    """The equation of a barrier in front of arrays like these."""
    types = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in variables]
    (eqn,) = _jax.open_jaxpr(jax.make_jaxpr(jax.lax.optimization_barrier)(types)).eqns
    return eqn


def _behind_barrier(equations: list[Any], eqn: Any, operands: list[Any], stack: Any) -> list[Any]:
    """What a checkpoint reads that is computed again: values that the compiler takes for others."""
    places = [i for i, v in enumerate(operands) if not isinstance(v, _jax.Literal)]
    given = [operands[i] for i in places]
    results = [_jax.Var(v.aval) for v in given]
    equations.append(_jax.placed(barrier(given), given, results, stack))
    renamed = dict(zip(places, results, strict=True))
    return [renamed.get(i, v) for i, v in enumerate(operands)]


def _renewed_body(nested: Any, opens: Callable[[Any], bool]) -> Any:
    """A body of a loop or a branch in the same form, with constants where they were."""
    opened = _jax.open_jaxpr(nested)
    jaxpr, consts = _renewed(opened, opens)
    if consts or opened.constvars:
        # The constants of a body, and of what it calls, are rare and small; they stay where they are.
        return nested
    return _jax.closed_like(nested, jaxpr)


def simplified(jaxpr: Any) -> Any:
    """The jaxpr without what no result needs, in which equal equations are one, as in a compiled program."""
    pruned, _ = _jax.without_unread_inputs(jaxpr, [True] * len(jaxpr.invars))
    return merged(pruned, lambda eqn: not any(True for _ in _jax.sub_jaxprs(eqn)))


def with_makers_apart(jaxpr: Any) -> Any:
    """The jaxpr in which every reader of an array that is made of no other has its own copy of it.

    Two layers that start from equal zeros have no axis in common for that.
    """
    made = {v: eqn for eqn in jaxpr.eqns if _is_maker(eqn) for v in eqn.outvars}
    equations = []
    for eqn in jaxpr.eqns:
        operands = []
        for v in eqn.invars:
            maker = None if isinstance(v, _jax.Literal) else made.get(v)
            if maker is not None:
                own = [_jax.Var(w.aval) for w in maker.outvars]
                equations.append(maker.replace(outvars=own))
                v = own[maker.outvars.index(v)]
            operands.append(v)
        equations.append(eqn.replace(invars=operands))
    return _jax.without_unread_inputs(
        _jax.jaxpr_of(equations, jaxpr.invars, jaxpr.outvars, "flat"), [True] * len(jaxpr.invars)
    )[0]


def _is_maker(eqn: Any) -> bool:
    """Whether an equation makes arrays of numbers, or of nothing, without effects."""
    no_arrays = all(not getattr(v.aval, "shape", ()) for v in eqn.invars)
    return no_arrays and not eqn.effects and eqn.primitive.name in ("broadcast_in_dim", "iota")
