"""What the results of a jaxpr are as functions of one of its inputs, by propagation through its equations.

An analysis gives every variable a state, None for what does not depend on the input. This module carries
states through calls, loops and branches; `separability` and `.piecewise` say what single
operators do to them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import jax
import numpy as np

from funcprop import _jax
from funcprop.program.facts import CALLS, CHECKPOINTS, CUSTOM_RULES, facts_of

State = Any


class Analysis(Protocol):
    """How states arise. States are compared by `==`; every chain of joins must come to an end."""

    def operator(self, eqn: Any, states: Sequence[State]) -> State:
        """The state of all results of an operator without a body; at least one state is not None."""

    def opaque(self, eqn: Any) -> State:
        """The state of what cannot be followed."""

    def join(self, a: State, b: State) -> State:
        """The state of a value that is in one of two states."""

    def custom(self, given: State, result: State, pulled: Any) -> bool:
        """Whether a custom derivative is what the states say.

        `pulled(given, result)` is the state of the cotangents, as functions of operands in the first state
        and of cotangents in the second.
        """

    def into_loop(self, state: State) -> State:
        """The state of one slice along the first axis."""

    def out_of_loop(self, state: State) -> State:
        """The state of slices stacked along a new first axis."""


def propagate(
    analysis: Analysis, jaxpr: Any, states: Sequence[State], trusted: frozenset[Any] = frozenset()
) -> list[State]:
    """The states of the results of a jaxpr, given those of its inputs.

    `trusted` are functions with a derivative of their own whose derivative is being looked into.
    """
    jaxpr = _jax.open_jaxpr(jaxpr)
    known: dict[Any, State] = dict(zip(jaxpr.invars, states, strict=True))

    def read(atom: Any) -> State:
        return None if isinstance(atom, _jax.Literal) else known.get(atom)

    for eqn in jaxpr.eqns:
        operands = [read(atom) for atom in eqn.invars]
        if any(state is not None for state in operands):
            known.update(zip(eqn.outvars, _results(analysis, eqn, operands, trusted), strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _results(analysis: Analysis, eqn: Any, states: list[State], trusted: frozenset[Any]) -> list[State]:
    name, bodies = eqn.primitive.name, [body for _, body in _jax.sub_jaxprs(eqn)]
    count = len(eqn.outvars)
    facts = facts_of(eqn)
    if facts.flat:
        return [None] * count
    if name == "funcprop_layer":  # the identity on a layer's results, which stand last
        return states[len(states) - count :]
    if name in CALLS | CHECKPOINTS and len(bodies) == 1:
        return propagate(analysis, bodies[0], states, trusted)
    if name in CUSTOM_RULES and bodies:
        return _custom(analysis, eqn, bodies[0], states, trusted)
    if name == "scan":
        return _scan(analysis, eqn, bodies[0], states, trusted)
    if name == "cond":
        branches = [propagate(analysis, body, states[1:], trusted) for body in bodies]
        if states[0] is not None:
            return [analysis.opaque(eqn)] * count
        return [_join(analysis, column) for column in zip(*branches, strict=True)]
    if eqn.effects or (bodies and not facts.combines):
        return [analysis.opaque(eqn)] * count
    return [analysis.operator(eqn, states)] * count


def _join(analysis: Analysis, states: Sequence[State]) -> State:
    found: State = None
    for state in states:
        if state is not None:
            found = state if found is None else analysis.join(found, state)
    return found


def _scan(
    analysis: Analysis, eqn: Any, body: Any, states: list[State], trusted: frozenset[Any]
) -> list[State]:
    constants, carried = _jax.scan_counts(eqn.params)
    fixed, carry = states[:constants], states[constants : constants + carried]
    sliced = [None if s is None else analysis.into_loop(s) for s in states[constants + carried :]]
    while True:
        results = propagate(analysis, body, [*fixed, *carry, *sliced], trusted)
        joined = [_join(analysis, pair) for pair in zip(carry, results[:carried], strict=True)]
        if joined == carry:
            break
        carry = joined
    stacked = [None if s is None else analysis.out_of_loop(s) for s in results[carried:]]
    return [*carry, *stacked]


def _custom(
    analysis: Analysis, eqn: Any, body: Any, states: list[State], trusted: frozenset[Any]
) -> list[State]:
    """A function with a derivative of its own: what its pullback does must be what its body says."""
    opaque = [analysis.opaque(eqn)] * len(eqn.outvars)
    open_body = _jax.open_jaxpr(body)
    if len(open_body.invars) != len(states):
        return opaque
    results = propagate(analysis, body, states, trusted)
    this = _jax.function_name(eqn), tuple(e.primitive.name for e in open_body.eqns)
    if this in trusted:
        return results
    given, result = _join(analysis, states), _join(analysis, results)
    smooth = [_jax.is_differentiable(v.aval) for v in eqn.invars]
    chosen = [i for i, state in enumerate(states) if state is not None]
    if result is None or not all(smooth[i] for i in chosen):
        return opaque
    if not all(_jax.is_differentiable(v.aval) for v in eqn.outvars):
        return opaque
    call = _jax.one_equation(eqn)

    def pull(operands: Sequence[Any], cotangents: Sequence[Any]) -> Any:
        def of_chosen(*values: Any) -> list[Any]:
            all_operands = list(operands)
            for i, value in zip(chosen, values, strict=True):
                all_operands[i] = value
            return call(*all_operands)

        return jax.vjp(of_chosen, *[operands[i] for i in chosen])[1](list(cotangents))

    shapes = [_shape(v.aval) for v in eqn.invars], [_shape(v.aval) for v in eqn.outvars]
    closed = jax.make_jaxpr(pull)(*shapes)
    pullback, constants = _jax.with_constants_as_inputs(closed)
    pullback, _ = _jax.without_unread_inputs(pullback, [True] * len(pullback.invars))

    def pulled(of_operands: State, of_cotangents: State) -> State:
        inputs = [None] * len(constants) + [of_operands if s is not None else None for s in states]
        inputs += [of_cotangents] * len(eqn.outvars)
        return _join(analysis, propagate(analysis, pullback, inputs, trusted | {this}))

    return results if analysis.custom(given, result, pulled) else opaque


def _shape(aval: Any) -> Any:
    return jax.ShapeDtypeStruct(aval.shape, np.dtype(aval.dtype))
