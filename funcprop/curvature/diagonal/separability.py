"""Along which axes of a variable a scalar function is a sum of functions of one slice each.

If `L(z) = Σ_n ℓ_n(z_n)` along an axis of `z`, its Hessian is block-diagonal along it, and one Hessian-vector
product gives a column of every block: examples of a batch share their columns, and so do tokens until
something mixes them. The axis is followed through the equations from `z` to `L`; whatever is not known to
keep the slices apart counts as mixing them.

Reference: Powell and Toint, "On the estimation of sparse Hessian matrices", SIAM J. Numer. Anal. 16, 1979.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from funcprop import _jax
from funcprop.curvature.diagonal.dependence import propagate

SUMMED = -1  # a sum over slices, in which only linear operators may follow
MIXED = -2

_LINEAR = frozenset(
    {"add", "add_any", "sub", "neg", "convert_element_type", "copy", "copy_p", "name", "reduce_precision"}
)
_ELEMENTWISE = _LINEAR | frozenset(
    {"mul", "div", "max", "min", "abs", "exp", "exp2", "expm1", "log", "log1p", "tanh", "logistic", "sqrt"}
    | {"rsqrt", "cbrt", "square", "integer_pow", "pow", "sin", "cos", "tan", "asin", "acos", "atan", "atan2"}
    | {"sinh", "cosh", "asinh", "acosh", "atanh", "erf", "erfc", "erf_inv", "lgamma", "digamma", "select_n"}
    | {"clamp", "rem", "nextafter", "real", "imag"}
)
_SHAPING = frozenset({"reshape", "transpose", "broadcast_in_dim", "squeeze", "expand_dims", "reduce_sum"})
_REDUCTIONS = frozenset(
    {"reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "argmax", "argmin", "reduce_and", "reduce_or"}
)
_ALONG_AXIS = frozenset({"cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp"})


class Separability:
    """The analysis: the axis along which slices lie, SUMMED, or MIXED."""

    def operator(self, eqn: Any, states: Sequence[Any]) -> int:
        """The axis of the results."""
        if eqn.primitive.name == "dot_general" and None not in states and min(states) >= 0:
            return _through_batched_product(eqn, *states)
        found = {s for s in states if s is not None}
        if len(found) != 1:
            return MIXED
        (axis,) = found
        if axis == SUMMED:
            return SUMMED if _linear(eqn, states) else MIXED
        return MIXED if axis == MIXED else _moved(eqn, states, axis)

    def opaque(self, eqn: Any) -> int:
        """Nothing is known."""
        return MIXED

    def join(self, a: Any, b: Any) -> int:
        """Both, if they are the same."""
        return a if a == b else MIXED

    def custom(self, given: Any, result: Any, pulled: Any) -> bool:
        """A pullback that keeps the slices apart."""
        return given >= 0 and result >= 0 and pulled(given, result) == given

    def into_loop(self, state: Any) -> int:
        """One axis less, if it is not the one that is looped over."""
        return state if state < 0 else (state - 1 if state else MIXED)

    def out_of_loop(self, state: Any) -> int:
        """One axis more."""
        return state if state < 0 else state + 1


def is_separable(jaxpr: Any, position: int, axis: int) -> bool:
    """Whether the one scalar result is a sum over slices of an input along an axis."""
    count = len(_jax.open_jaxpr(jaxpr).invars)
    (state,) = propagate(Separability(), jaxpr, [axis if i == position else None for i in range(count)])
    return state is None or state == SUMMED


class Entries(Separability):
    """The analysis: the number of the input of which the results are elementwise functions, SUMMED, or MIXED.

    Entries of two inputs, or of one in different places, meet nowhere but in a sum.
    """

    def operator(self, eqn: Any, states: Sequence[Any]) -> int:
        """The input of the results."""
        found = {s for s in states if s is not None}
        if found == {SUMMED}:
            return SUMMED if _linear(eqn, states) else MIXED
        if len(found) != 1 or MIXED in found:
            return MIXED
        name, shape = eqn.primitive.name, eqn.outvars[0].aval.shape
        if name == "reduce_sum":
            return SUMMED
        moved = [v for v, s in zip(eqn.invars, states, strict=True) if s is not None]
        return found.pop() if name in _ELEMENTWISE and all(v.aval.shape == shape for v in moved) else MIXED

    def into_loop(self, state: Any) -> int:
        """A slice has other places."""
        return MIXED if state >= 0 else state

    out_of_loop = into_loop


def adds_up_entries(jaxpr: Any, count: int) -> bool:
    """Whether the one scalar result is a sum of functions of single entries of the first inputs."""
    others = len(_jax.open_jaxpr(jaxpr).invars) - count
    (state,) = propagate(Entries(), jaxpr, [*range(count), *[None] * others])
    return state != MIXED


def _linear(eqn: Any, states: Sequence[Any]) -> bool:
    """Whether an operator is linear in the operands that depend on the input."""
    name, where = eqn.primitive.name, [i for i, s in enumerate(states) if s is not None]
    return (
        name in _LINEAR
        or name in _SHAPING
        or name in ("slice", "concatenate", "pad", "rev", "cumsum")
        or (name in ("mul", "dot_general") and len(where) == 1)
        or (name == "div" and where == [0])
        or (name == "select_n" and 0 not in where)
        or (name == "integer_pow" and eqn.params["y"] == 1)
    )


def _moved(eqn: Any, states: Sequence[Any], axis: int) -> int:
    """Where the axis is in the result of an operator."""
    name, params = eqn.primitive.name, eqn.params
    where = [i for i, s in enumerate(states) if s is not None]
    shape, result = eqn.invars[where[0]].aval.shape, eqn.outvars[0].aval.shape
    if name in _ELEMENTWISE:
        shapes = [eqn.invars[i].aval.shape for i in where]
        kept = all(len(s) == len(result) and s[axis] == result[axis] for s in shapes)
        return axis if kept else MIXED
    if name in _REDUCTIONS:
        if axis in params["axes"]:
            return SUMMED if name == "reduce_sum" else MIXED
        return axis - sum(a < axis for a in params["axes"])
    if name in _ALONG_AXIS:
        return MIXED if params["axis"] == axis else axis
    if name == "transpose":
        return list(params["permutation"]).index(axis)
    if name == "broadcast_in_dim":
        to = params["broadcast_dimensions"][axis]
        return to if result[to] == shape[axis] else MIXED
    if name == "squeeze":
        return axis - sum(d < axis for d in params["dimensions"])
    if name == "expand_dims":
        return _reshaped(shape, result, axis)
    if name == "reshape":
        return _reshaped(shape, result, axis) if params["dimensions"] is None else MIXED
    if name == "concatenate":
        return MIXED if params["dimension"] == axis else axis
    if name in ("slice", "dynamic_slice", "dynamic_update_slice"):
        kept = all(eqn.invars[i].aval.shape[axis] == result[axis] for i in where)
        return axis if kept and not any(i > 1 for i in where) else MIXED
    if name == "pad":
        return axis if where == [0] and tuple(params["padding_config"][axis]) == (0, 0, 0) else MIXED
    if name == "rev":
        return MIXED if axis in params["dimensions"] else axis
    if name == "sort":
        return MIXED if params["dimension"] == axis else axis
    if name == "dot_general":
        return _through_product(eqn, where, axis)
    if name == "conv_general_dilated":
        numbers = params["dimension_numbers"]
        kept = where == [0] and numbers.lhs_spec[0] == axis and params["batch_group_count"] == 1
        return numbers.out_spec[0] if kept else MIXED
    if name.startswith("reduce_window_"):
        single = params["window_dimensions"][axis] == 1 and params["window_strides"][axis] == 1
        return axis if single and tuple(params["padding"][axis]) == (0, 0) else MIXED
    if name == "gather":
        return _through_gather(eqn, where, axis)
    return MIXED


def _reshaped(shape: Sequence[int], result: Sequence[int], axis: int) -> int:
    """The axis of the same length with as many entries before it."""
    before = math.prod(shape[:axis])
    for i, size in enumerate(result):
        if size == shape[axis] and math.prod(result[:i]) == before:
            return i
    return MIXED


def _through_batched_product(eqn: Any, left: int, right: int) -> int:
    _, batched = eqn.params["dimension_numbers"]
    pairs = list(zip(*batched, strict=True))
    return pairs.index((left, right)) if (left, right) in pairs else MIXED


def _through_product(eqn: Any, where: Sequence[int], axis: int) -> int:
    contracted, batched = eqn.params["dimension_numbers"]
    (side,) = where
    if axis in contracted[side]:
        return SUMMED
    if axis in batched[side]:
        return list(batched[side]).index(axis)
    taken = (*contracted[side], *batched[side])
    own = [d for d in range(len(eqn.invars[side].aval.shape)) if d not in taken]
    other = eqn.invars[1 - side].aval.shape
    before = len(batched[0])
    if side == 1:
        before += len(other) - len(contracted[0]) - len(batched[0])
    return before + own.index(axis)


def _through_gather(eqn: Any, where: Sequence[int], axis: int) -> int:
    """A batched axis stays one; an axis that is taken whole is an offset of the result."""
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    shape, rank = eqn.invars[0].aval.shape, len(eqn.outvars[0].aval.shape)
    if list(where) != [0]:
        return MIXED
    if axis in numbers.operand_batching_dims:
        place = list(numbers.operand_batching_dims).index(axis)
        index = numbers.start_indices_batching_dims[place]  # the last axis of the indices is their vector
        return [d for d in range(rank) if d not in numbers.offset_dims][index]
    dropped = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
    if axis in dropped or axis in numbers.start_index_map or sizes[axis] != shape[axis]:
        return MIXED
    return numbers.offset_dims[[d for d in range(len(shape)) if d not in dropped].index(axis)]
