"""A function that is linear in one argument, split into what does not depend on it and the rest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from funcprop import _jax

# What is made again for every vector instead of kept: constants, and copies of fewer numbers.
MADE_AGAIN = frozenset({"broadcast_in_dim", "iota"})


def split(
    fun: Callable[[Sequence[Any], Sequence[Any]], Sequence[Any]], known: Sequence[Any], like: Sequence[Any]
) -> tuple[list[Any], Any]:
    """For `fun(known, v)`, the residuals that `v ↦ fun(known, v)` reads, and its jaxpr on residuals and `v`.

    `jax.linearize` would keep the zeros that a relu selects; here they are made again. `like` has the shapes
    and dtypes of `v`.
    """
    closed = jax.make_jaxpr(fun)(known, like)
    jaxpr = _jax.open_jaxpr(closed)
    inputs = jaxpr.invars[len(known) :]
    dependent = set(inputs)
    once: list[Any] = []
    each: list[Any] = []
    again: dict[Any, Any] = {}
    for eqn in jaxpr.eqns:
        if any(not isinstance(v, _jax.Literal) and v in dependent for v in eqn.invars):
            each.append(eqn)
            dependent.update(eqn.outvars)
            continue
        once.append(eqn)
        if eqn.primitive.name in MADE_AGAIN:
            again.update((v, eqn) for v in eqn.outvars)
    each = [*_needed(each, again), *each]
    read = dict.fromkeys(v for v in _jax.free_variables(each) if v not in dependent)
    given = {*jaxpr.constvars, *jaxpr.invars, *(v for eqn in once for v in eqn.outvars)}
    read.update((v, None) for v in jaxpr.outvars if v in given - set(inputs))
    names = list(read)
    invars = [*jaxpr.constvars, *jaxpr.invars[: len(known)]]
    first = _jax.jaxpr_of(once, invars, names, "residuals")
    residuals = _jax.evaluate(first, (), [*_jax.array_constants(closed), *known])
    linear = _jax.jaxpr_of(each, [*names, *inputs], jaxpr.outvars, "linear")
    return [jnp.asarray(x) for x in residuals], linear


def _needed(equations: Sequence[Any], again: dict[Any, Any]) -> list[Any]:
    """Select from `again` the equations that `equations` depend on, in their order."""
    needed: dict[int, Any] = {}
    pending = [v for v in _jax.free_variables(equations) if v in again]
    while pending:
        eqn = again[pending.pop()]
        needed[id(eqn)] = eqn
        pending += [v for v in _jax.free_variables([eqn]) if v in again and id(again[v]) not in needed]
    return [eqn for eqn in dict.fromkeys(again.values()) if id(eqn) in needed]
