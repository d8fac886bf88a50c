"""A budget as a `jax.checkpoint` policy, which sees of an operator its kind and the types of its operands."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from funcprop import _jax
from funcprop.memory.remat.chain import StepChain
from funcprop.memory.remat.saving import Residuals, residuals
from funcprop.memory.remat.schedule import Segment
from funcprop.program.facts import CALLS
from funcprop.program.flops import flops
from funcprop.program.sizes import nbytes

Kind = tuple[str, tuple[tuple[tuple[int, ...], str], ...]]


@dataclass(frozen=True)
class SaveOperators:
    """Save the results of these kinds of operators, each the name of a primitive and its operands' types."""

    kinds: frozenset[Kind]

    def __call__(self, primitive: Any, *avals: Any, **params: Any) -> bool:
        """Whether `jax.checkpoint` saves what the primitive makes."""
        return _kind(primitive, avals) in self.kinds


def _kind(primitive: Any, avals: Any) -> Kind:
    types = ((tuple(getattr(a, "shape", ())), str(getattr(a, "dtype", ""))) for a in avals)
    return primitive.name, tuple(types)


def policy_within(program: StepChain, budget: int) -> tuple[SaveOperators, Residuals]:
    """The policy for a function given by its program, and what it holds.

    Only what a recomputation of everything would run again is worth saving. Kinds are taken by the FLOPs that
    a saved byte spares, the most first, and left out again, the last first, until what `jax.vjp` holds
    fits the budget.
    """
    spared: dict[Kind, int] = {}
    held: dict[Kind, int] = {}
    for eqn, times in _run_again(program):
        kind = _kind(eqn.primitive, [v.aval for v in eqn.invars])
        spared[kind] = spared.get(kind, 0) + times * flops(eqn)
        held[kind] = held.get(kind, 0) + times * sum(nbytes(v) for v in eqn.outvars)
    ranked = sorted((k for k in held if spared[k] and held[k]), key=lambda k: -spared[k] / held[k])
    chosen: list[Kind] = []
    room = budget
    for kind in ranked:
        if held[kind] <= room:
            chosen.append(kind)
            room -= held[kind]
    jaxpr, consts = _jax.open_jaxpr(program.closed), _jax.array_constants(program.closed)
    avals = [v.aval for v in jaxpr.invars]
    while True:
        policy = SaveOperators(frozenset(chosen))
        saving: Any = jax.checkpoint(lambda *values: _jax.evaluate(jaxpr, consts, values), policy=policy)
        found = residuals(saving, avals)
        if found.computed <= budget or not chosen:
            return policy, found
        chosen.pop()


def _run_again(program: StepChain) -> Iterator[tuple[Any, int]]:
    """The equations of the program, and how often each is run, that are needed to recompute it."""
    whole = Segment(0, len(program.points) - 1, True, 0, 0, 0, 0)
    jaxpr = _jax.open_jaxpr(program.closed)
    again = program.run_again(whole)
    yield from _equations([eqn for eqn, flops in zip(jaxpr.eqns, again, strict=True) if flops], 1)


def _equations(equations: Sequence[Any], times: int) -> Iterator[tuple[Any, int]]:
    for eqn in equations:
        if eqn.primitive.name in CALLS | {"scan"}:
            for _, body in _jax.sub_jaxprs(eqn):
                yield from _equations(_jax.open_jaxpr(body).eqns, times * eqn.params.get("length", 1))
        elif not eqn.effects:
            yield eqn, times
