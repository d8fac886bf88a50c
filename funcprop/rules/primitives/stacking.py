"""What a loop stacks for its backward sweep: as few and as small values as determine the residuals.

Autodiff stacks every residual: `1 − s` beside `s`, a mask beside what it was made from, a result that is
stacked already, one value under several names. Here equal equations are merged, constants, scanned inputs
and results serve as they are, and what a cheap operator makes of stacked values is made again, backwards.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from funcprop import _jax
from funcprop.program.facts import facts_of
from funcprop.program.sizes import nbytes


def to_stack(jaxpr: Any, wanted: Sequence[Any], pinned: Sequence[Any], free: Collection[Any]) -> list[Any]:
    """The variables to stack so that all `wanted` can be computed from them and from the `free` ones.

    Starting from the wanted ones, a value that a cheap operator makes is replaced by that operator's operands
    where these are smaller together. `pinned` variables are stacked in any case, unless they are free.
    """
    maker = {v: eqn for eqn in jaxpr.eqns for v in eqn.outvars}
    fixed = {v for v in pinned if v not in free}
    stacked = dict.fromkeys(v for v in [*fixed, *wanted] if v not in free)
    known = set(free) | set(stacked)
    changed = True
    while changed:
        changed = False
        for v in reversed(list(stacked)):
            eqn = maker.get(v)
            # Cheap are not `exp`, `tanh` and their like: they are computed once and stacked, which measured
            # faster than stacking what they are made from.
            if v in fixed or eqn is None or not facts_of(eqn).cheap or eqn.effects:
                continue
            missing = list(dict.fromkeys(a for a in _jax.variables(eqn.invars) if a not in known))
            grows = sum(map(nbytes, missing)) - nbytes(v)
            if grows < 0 or (grows == 0 and len(missing) == 1):
                del stacked[v]
                stacked.update(dict.fromkeys(missing))
                known.update(missing)
                changed = True
    return list(stacked)


def merged(jaxpr: Any) -> Any:
    """A jaxpr in which equal equations without side effects are one."""
    same: dict[Any, Any] = {}
    seen: dict[Any, Sequence[Any]] = {}
    eqns = []

    def now(atom: Any) -> Any:
        return atom if isinstance(atom, _jax.Literal) else same.get(atom, atom)

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
        (v.val.item() if hasattr(v.val, "item") else v.val, str(v.aval)) if isinstance(v, _jax.Literal) else v
        for v in invars
    )
    key = (eqn.primitive, operands, tuple(sorted(eqn.params.items(), key=lambda item: item[0])))
    try:
        hash(key)
    except TypeError:
        return None
    return key
