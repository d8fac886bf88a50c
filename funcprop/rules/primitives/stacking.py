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
