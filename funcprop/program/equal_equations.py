"""Equal equations of a jaxpr made one."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np

from funcprop import _jax


def merged(jaxpr: Any, may: Callable[[Any], bool] = lambda eqn: True) -> Any:
    """A jaxpr in which equal equations without side effects are one, of those that `may` accepts."""
    same: dict[Any, Any] = {}
    seen: dict[Any, Sequence[Any]] = {}
    eqns = []

    def now(atom: Any) -> Any:
        return atom if isinstance(atom, _jax.Literal) else same.get(atom, atom)

    for eqn in jaxpr.eqns:
        eqn = eqn.replace(invars=list(map(now, eqn.invars)))
        key = None if eqn.effects or not may(eqn) else _key(eqn)
        if key is not None and key in seen:
            same.update(zip(eqn.outvars, seen[key], strict=True))
            continue
        if key is not None:
            seen[key] = eqn.outvars
        eqns.append(eqn)
    return jaxpr.replace(eqns=eqns, outvars=list(map(now, jaxpr.outvars)))


def _key(eqn: Any) -> Hashable:
    """What makes two equations equal; None for one that cannot be compared."""
    operands = tuple(_literal(v) if isinstance(v, _jax.Literal) else v for v in eqn.invars)
    function = function_key(eqn)
    return None if function is None else (function, operands)


def function_key(eqn: Any) -> Hashable:
    """What makes two equations the same function of their operands; None for one that cannot be compared."""
    key = (eqn.primitive, tuple(sorted(eqn.params.items(), key=lambda item: item[0])))
    try:
        hash(key)
    except TypeError:
        return None
    return key


def _literal(literal: Any) -> Hashable:
    """By its bits: 0 and −0 are equal numbers, but not the same."""
    return np.asarray(literal.val).tobytes(), str(literal.aval)
