"""Floating-point operations of one equation, counted as XLA's cost analysis counts them.

A product of `m × k` and `k × n` is `2mnk`; an elementwise operation is one per element of its result; a
reduction one per element of its operand; moving data is free. Loops count every iteration where their length
is known; a `while` counts one iteration, a `cond` its most expensive branch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from funcprop import _jax
from funcprop.program.facts import Cost, facts_of


def flops(eqn: Any) -> int:
    """Floating-point operations of an equation, its bodies included."""
    facts, name = facts_of(eqn), eqn.primitive.name
    bodies = [of_jaxpr(body) for _, body in _jax.sub_jaxprs(eqn)]
    if name == "scan":
        return eqn.params["length"] * bodies[0]
    if name == "cond":
        return max(bodies)
    if bodies and not facts.combines:
        return sum(bodies)
    return _COUNTED[facts.cost](eqn) * (sum(bodies) or 1)


def of_jaxpr(jaxpr: Any) -> int:
    """Floating-point operations of all equations of a jaxpr."""
    return sum(flops(eqn) for eqn in _jax.open_jaxpr(jaxpr).eqns)


def _size(atom: Any) -> int:
    return math.prod(getattr(atom.aval, "shape", ()))


def _product(eqn: Any) -> int:
    (contracted, _), _ = eqn.params["dimension_numbers"]
    lhs = eqn.invars[0].aval.shape
    return 2 * _size(eqn.outvars[0]) * math.prod(lhs[axis] for axis in contracted)


def _convolution(eqn: Any) -> int:
    kernel = eqn.invars[1].aval.shape
    output_features = eqn.params["dimension_numbers"].rhs_spec[0]
    taps = math.prod(size for axis, size in enumerate(kernel) if axis != output_features)
    return 2 * _size(eqn.outvars[0]) * taps


def _of_result(eqn: Any) -> int:
    return max((_size(v) for v in eqn.outvars), default=0)


def _of_windows(eqn: Any) -> int:
    return _size(eqn.outvars[0]) * math.prod(eqn.params.get("window_dimensions", (1,)))


_COUNTED: dict[Cost, Callable[[Any], int]] = {
    "free": lambda eqn: 0,
    "result": _of_result,
    "operand": lambda eqn: _size(eqn.invars[0]),
    "updates": lambda eqn: _size(eqn.invars[-1]),
    "windows": _of_windows,
    "product": lambda eqn: _product(eqn) if eqn.primitive.name == "dot_general" else _convolution(eqn),
}
