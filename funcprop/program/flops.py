"""Floating-point operations of one equation, counted as XLA's cost analysis counts them.

A product of `m × k` and `k × n` is `2mnk`; an elementwise operation is one per element of its result; a
reduction one per element of its operand; moving data is free. Loops count every iteration where their length
is known; a `while` counts one iteration, a `cond` its most expensive branch.
"""

from __future__ import annotations

import math
from typing import Any

from funcprop import _jax

PRODUCTS = frozenset({"dot_general", "conv_general_dilated"})
# Moves, makes or marks data without arithmetic.
_FREE = frozenset(
    {"reshape", "transpose", "broadcast_in_dim", "squeeze", "expand_dims", "slice", "dynamic_slice"}
    | {"dynamic_update_slice", "concatenate", "pad", "gather", "scatter", "rev", "split", "tile", "iota"}
    | {"convert_element_type", "bitcast_convert_type", "copy", "copy_p", "name", "stop_gradient"}
    | {"device_put", "optimization_barrier", "sharding_constraint", "pvary", "pcast", "funcprop_layer"}
    | {"debug_callback", "debug_print", "pure_callback", "io_callback", "get", "swap", "new_ref", "freeze"}
    | {"random_seed", "random_wrap", "random_unwrap", "random_bits", "random_split", "random_fold_in"}
)
_REDUCTIONS = frozenset(
    {"reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or", "reduce_xor"}
    | {"argmax", "argmin", "cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp", "reduce"}
)


def flops(eqn: Any) -> int:
    """Floating-point operations of an equation, its bodies included."""
    name = eqn.primitive.name
    if name == "dot_general":
        return _product(eqn)
    if name == "conv_general_dilated":
        return _convolution(eqn)
    if name in _FREE:
        return 0
    bodies = [of_jaxpr(body) for _, body in _jax.sub_jaxprs(eqn)]
    if name == "scan":
        return eqn.params["length"] * bodies[0]
    if name == "cond":
        return max(bodies)
    if bodies:
        return sum(bodies)
    if name in _REDUCTIONS:
        return _size(eqn.invars[0])
    if name.startswith(("reduce_window", "select_and_scatter", "select_and_gather")):
        return _size(eqn.outvars[0]) * math.prod(eqn.params.get("window_dimensions", (1,)))
    if name.startswith("scatter"):
        return _size(eqn.invars[-1])
    return max((_size(v) for v in eqn.outvars), default=0)


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
