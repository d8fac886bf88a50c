"""Loops that stack the same value twice stack it once.

Differentiated loops often hand back one value under several names: the cotangent of a sum's two operands, a
residual that is also a result. Equal equations of a loop's body are merged, and of equal stacked results only
the first is stacked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax

from funcprop import _compat

Arrays = list[Any]


def without_repeated_stacking(fun: Callable[..., Any]) -> Callable[..., Any]:
    """The same function of arrays, whose loops stack no value twice."""

    def run(*args: Any) -> Any:
        closed, shapes = jax.make_jaxpr(fun, return_shape=True)(*args)
        leaves = jax.tree.leaves(args)
        results = _evaluate(_compat.open_jaxpr(closed), _compat.constants(closed), leaves)
        return jax.tree.unflatten(jax.tree.structure(shapes), results)

    return run


def _evaluate(jaxpr: Any, consts: Arrays, args: Arrays) -> Arrays:
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, _compat.Literal) else values[atom]

    for eqn in jaxpr.eqns:
        run = _scan if eqn.primitive.name == "scan" and not eqn.effects else _call
        values.update(zip(eqn.outvars, run(eqn, [read(v) for v in eqn.invars]), strict=True))
    return [read(v) for v in jaxpr.outvars]


def _call(eqn: Any, operands: Arrays) -> Arrays:
    return _compat.one_equation(eqn)(*operands)


def _scan(eqn: Any, operands: Arrays) -> Arrays:
    params = eqn.params
    body, closed_over = _compat.with_constants_as_inputs(params["jaxpr"])
    body = merged(body)
    consts, carries = _compat.scan_counts(params)
    consts += len(closed_over)
    operands = [*closed_over, *operands]
    constants, init, xs = operands[:consts], operands[consts : consts + carries], operands[consts + carries :]
    stacked: list[Any] = list(body.outvars[carries:])
    distinct = list(dict.fromkeys(v for v in stacked if not isinstance(v, _compat.Literal)))
    if len(distinct) == len(stacked):
        return _call(eqn, operands[len(closed_over) :])
    outvars = [*body.outvars[:carries], *distinct]
    step_jaxpr = _compat.with_results(body, outvars)

    def step(carry: Arrays, x: Arrays) -> tuple[Arrays, Arrays]:
        results = _compat.evaluate(step_jaxpr, (), [*constants, *carry, *x])
        return results[:carries], results[carries:]

    final, ys = lax.scan(
        step, init, xs, length=params["length"], reverse=params["reverse"], unroll=params["unroll"]
    )
    found = dict(zip(distinct, ys, strict=True))
    repeated = [
        jax.numpy.broadcast_to(v.val, (params["length"], *jax.numpy.shape(v.val)))
        if isinstance(v, _compat.Literal)
        else found[v]
        for v in stacked
    ]
    return [*final, *repeated]


def merged(jaxpr: Any) -> Any:
    """A jaxpr in which equal equations without side effects are one."""
    same: dict[Any, Any] = {}
    seen: dict[Any, Sequence[Any]] = {}
    eqns = []

    def now(atom: Any) -> Any:
        return atom if isinstance(atom, _compat.Literal) else same.get(atom, atom)

    for eqn in jaxpr.eqns:
        invars = [now(v) for v in eqn.invars]
        key = _key(eqn, invars)
        if key is not None and key in seen:
            same.update(zip(eqn.outvars, seen[key], strict=True))
            continue
        if key is not None:
            seen[key] = eqn.outvars
        eqns.append(eqn.replace(invars=invars))
    return jaxpr.replace(eqns=eqns, outvars=[now(v) for v in jaxpr.outvars])


def _key(eqn: Any, invars: Sequence[Any]) -> Any:
    """What makes two equations equal; None for one that cannot be compared."""
    if eqn.effects:
        return None
    operands = tuple(
        (v.val.item() if hasattr(v.val, "item") else v.val, str(v.aval))
        if isinstance(v, _compat.Literal)
        else v
        for v in invars
    )
    key = (eqn.primitive, operands, tuple(sorted(eqn.params.items(), key=lambda item: item[0])))
    try:
        hash(key)
    except TypeError:
        return None
    return key
