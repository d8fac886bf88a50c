"""How large the intermediates of a program are."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax

from funcprop import _compat


def largest_intermediate(fun: Callable[..., Any], *args: Any) -> int:
    """The number of entries of the largest array that any equation of `fun(*args)` makes, at any depth."""
    closed = jax.make_jaxpr(fun)(*args)
    jaxpr = _compat.open_jaxpr(closed)
    needed, _ = _compat.without_unread_inputs(jaxpr, [False] * len(jaxpr.invars))
    return max(_sizes(needed))


def _sizes(jaxpr: Any) -> Iterator[int]:
    for eqn in jaxpr.eqns:
        yield from (math.prod(v.aval.shape) for v in eqn.outvars if hasattr(v.aval, "shape"))
        for _, body in _compat.sub_jaxprs(eqn):
            yield from _sizes(_compat.open_jaxpr(body))
