"""How large the intermediates of a program are."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax

from funcprop import _jax


def shapes(fun: Callable[..., Any], *args: Any) -> set[tuple[int, ...]]:
    """The shapes of the arrays that the equations of `fun(*args)` make, at any depth."""
    closed = jax.make_jaxpr(fun)(*args)
    jaxpr = _jax.open_jaxpr(closed)
    needed, _ = _jax.without_unread_inputs(jaxpr, [False] * len(jaxpr.invars))
    made = [v.aval for eqn in _jax.equations(needed) for v in eqn.outvars]
    return {tuple(aval.shape) for aval in made if hasattr(aval, "shape")}


def largest_intermediate(fun: Callable[..., Any], *args: Any) -> int:
    """The number of entries of the largest array that any equation of `fun(*args)` makes, at any depth."""
    return max(map(math.prod, shapes(fun, *args)))
