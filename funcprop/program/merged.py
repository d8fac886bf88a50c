"""A jaxpr in which what is computed twice is computed once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from funcprop import _jax


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
        (np.asarray(v.val).tobytes(), str(v.aval)) if isinstance(v, _jax.Literal) else v for v in invars
    )
    key = (eqn.primitive, operands, tuple(sorted(eqn.params.items(), key=lambda item: item[0])))
    try:
        hash(key)
    except TypeError:
        return None
    return key
