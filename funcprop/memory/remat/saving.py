"""What reverse mode holds between its sweeps: of a whole function exactly, and of one operator with reasons.

What `jax.vjp` holds are the arrays in its pullback, the leaves of `jax.vjp(f, *x)[1]`. Some are arguments or
constants of the function and exist anyway (they are *given*); the others were computed for the backward
sweep.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from funcprop import _jax
from funcprop.program import flops
from funcprop.program.sizes import nbytes


class Residuals(NamedTuple):
    """Bytes that a pullback holds: of arrays computed for it, and of arguments and constants."""

    computed: int
    given: int

    @property
    def all(self) -> int:
        """What the leaves of `jax.eval_shape(lambda *x: jax.vjp(f, *x)[1], *x)` sum to."""
        return self.computed + self.given


def residuals(fun: Callable[..., Sequence[Any]], avals: Sequence[Any]) -> Residuals:
    """Measure what `jax.vjp` of a function of flat arrays holds, differentiated in all that can be.

    A value that is held twice counts twice, as the leaves do.
    """
    smooth = [i for i, aval in enumerate(avals) if _jax.is_differentiable(aval)]

    def leaves(*values: Any) -> list[Any]:
        return jax.tree.leaves(vjp_of_some(fun, values, smooth)[1])

    jaxpr = _jax.open_jaxpr(jax.make_jaxpr(leaves)(*avals))
    given = {*jaxpr.invars, *jaxpr.constvars}
    held = [0, 0]
    for v in jaxpr.outvars:
        held[isinstance(v, _jax.Literal) or v in given] += nbytes(v)
    return Residuals(*held)


def vjp_of_some(
    fun: Callable[..., Sequence[Any]], values: Sequence[Any], which: Sequence[int]
) -> tuple[list[Any], Callable[..., Any]]:
    """`jax.vjp` of a function of flat arrays in the values at some positions, the others as they are."""

    def of_some(*chosen: Any) -> list[Any]:
        every = list(values)
        for i, value in zip(which, chosen, strict=True):
            every[i] = value
        return list(fun(*every))

    return jax.vjp(of_some, *(values[i] for i in which))


class Reads(NamedTuple):
    """What the derivative of one operator reads.

    `operands` and `results` are the positions of those that it reads as they are; `derived` the bytes of
    what it makes for itself (a mask, a cosine, the stacked values of a loop). To make these again needs the
    operands at `sources` and `again` more FLOPs than making them in the forward sweep did; `active` says
    which results depend on what is differentiated.
    """

    operands: tuple[int, ...] = ()
    results: tuple[int, ...] = ()
    derived: int = 0
    sources: tuple[int, ...] = ()
    again: int = 0
    active: tuple[bool, ...] = ()


def reads(eqn: Any, perturbed: Sequence[bool]) -> Reads:
    """Find what reverse mode keeps of one equation; `perturbed` are the differentiated operands."""
    differentiable = [_jax.is_differentiable(v.aval) for v in eqn.outvars]
    if not any(perturbed) or not any(differentiable):
        return Reads(active=(False,) * len(eqn.outvars))
    variables = [i for i, v in enumerate(eqn.invars) if not isinstance(v, _jax.Literal)]
    if eqn.effects:
        # Its meaning depends on its surroundings, so it is not traced alone; at most it holds all it touches.
        return Reads(tuple(variables), tuple(range(len(eqn.outvars))), active=tuple(differentiable))
    smooth = [i for i in variables if perturbed[i]]
    counts: list[int] = []

    def both_sweeps(values: Sequence[Any], seeds: Sequence[Any]) -> list[Any]:
        given = iter(values)
        every = [v.val if isinstance(v, _jax.Literal) else next(given) for v in eqn.invars]
        results, pullback = vjp_of_some(_jax.one_equation(eqn), every, smooth)
        leaves = jax.tree.leaves(pullback)
        counts[:] = len(results), len(leaves)
        cotangents = _jax.with_zero_tangents(seeds, [v.aval for v in eqn.outvars])
        # A while loop has no transpose, so it must not be asked which of its results are active.
        wanted = [] if eqn.primitive.name == "while" else jax.tree.leaves(pullback(cotangents))
        return [*results, *leaves, *wanted]

    seeds = [v.aval.to_tangent_aval() for v, d in zip(eqn.outvars, differentiable, strict=True) if d]
    jaxpr, _ = _jax.with_constants_as_inputs(
        jax.make_jaxpr(both_sweeps)([eqn.invars[i].aval for i in variables], seeds)
    )
    return _classified(eqn, jaxpr, variables, differentiable, *counts)


def _classified(
    eqn: Any, jaxpr: Any, variables: Sequence[int], differentiable: Sequence[bool], results: int, leaves: int
) -> Reads:
    constants = len(jaxpr.invars) - len(variables) - sum(differentiable)
    operands = dict(zip(jaxpr.invars[constants:], variables, strict=False))
    made = {v: k for k, v in enumerate(jaxpr.outvars[:results]) if not isinstance(v, _jax.Literal)}
    read: set[int] = set()
    reread: set[int] = set()
    derived: list[Any] = []
    for v in dict.fromkeys(
        v for v in jaxpr.outvars[results : results + leaves] if not isinstance(v, _jax.Literal)
    ):
        if v in operands:
            read.add(operands[v])
        elif v in made:
            reread.add(made[v])
        elif v not in jaxpr.invars:
            derived.append(v)

    def needed(outvars: Sequence[Any]) -> tuple[int, list[bool]]:
        wanted = _jax.with_results(jaxpr, outvars)
        pruned, used = _jax.without_unread_inputs(wanted, [False] * len(jaxpr.invars))
        return flops.of_jaxpr(pruned), used[constants:]

    sources, again = [False] * len(variables), 0
    if derived:
        alone, used = needed(derived)
        sources = used[: len(variables)]
        outputs = list(jaxpr.outvars[:results])
        again = max(0, alone - needed([*outputs, *derived])[0] + needed(outputs)[0])
    active = list(differentiable)
    if eqn.primitive.name != "while":
        asked = iter(needed(jaxpr.outvars[results + leaves :])[1][len(variables) :])
        active = [d and next(asked) for d in differentiable]
    return Reads(
        tuple(sorted(read)),
        tuple(sorted(reread)),
        sum(nbytes(v) for v in derived),
        tuple(i for i, used in zip(variables, sources, strict=True) if used),
        again,
        tuple(active),
    )
