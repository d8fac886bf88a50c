"""Along which axes of a variable a scalar function is a sum of functions of one slice each.

If `L(z) = Σ_n ℓ_n(z_n)` along an axis of `z`, its Hessian is block-diagonal along it, and one Hessian-vector
product gives a column of every block: examples of a batch share their columns, and so do tokens until
something mixes them. The axis is followed through the equations from `z` to `L`; whatever is not known to
keep the slices apart counts as mixing them.

Reference: Powell and Toint, "On the estimation of sparse Hessian matrices", SIAM J. Numer. Anal. 16, 1979.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from funcprop import _jax
from funcprop.curvature.diagonal.dependence import propagate
from funcprop.program.facts import facts_of, is_linear

SUMMED = -1  # a sum over slices, in which only linear operators may follow
MIXED = -2


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
            return SUMMED if is_linear(eqn, _dependent(states)) else MIXED
        return MIXED if axis == MIXED else _moved(eqn, _dependent(states), axis)

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
            return SUMMED if is_linear(eqn, _dependent(states)) else MIXED
        if len(found) != 1 or MIXED in found:
            return MIXED
        if eqn.primitive.name == "reduce_sum":
            return SUMMED
        shapes = {v.aval.shape for v in (*(eqn.invars[i] for i in _dependent(states)), *eqn.outvars)}
        return found.pop() if facts_of(eqn).elementwise and len(shapes) == 1 else MIXED

    def into_loop(self, state: Any) -> int:
        """A slice has other places."""
        return MIXED if state >= 0 else state

    out_of_loop = into_loop


def adds_up_entries(jaxpr: Any, count: int) -> bool:
    """Whether the one scalar result is a sum of functions of single entries of the first inputs."""
    others = len(_jax.open_jaxpr(jaxpr).invars) - count
    (state,) = propagate(Entries(), jaxpr, [*range(count), *[None] * others])
    return state != MIXED


def _dependent(states: Sequence[Any]) -> list[int]:
    """The operands that depend on the input."""
    return [i for i, s in enumerate(states) if s is not None]


def _moved(eqn: Any, where: Sequence[int], axis: int) -> int:
    """The axis of an operator's results, if it is `axis` of its operands `where`."""
    facts, keeps = facts_of(eqn), _KEEPS.get(eqn.primitive.name)
    if facts.elementwise:
        return _elementwise(eqn, where, axis)
    if facts.reduces:
        return _reduced(eqn, where, axis)
    if facts.cumulative:
        return _along_axis(eqn, where, axis)
    return MIXED if keeps is None else keeps(eqn, where, axis)


# --- one operator each ------------------------------------------------------------------------


def _unless(mixes: bool, axis: int) -> int:
    return MIXED if mixes else axis


def _lengths(eqn: Any, where: Sequence[int], axis: int) -> set[int | None]:
    """The lengths along an axis, which operands and results have in common; None for one of other axes."""
    shapes = [v.aval.shape for v in (*(eqn.invars[i] for i in where), *eqn.outvars)]
    return {shape[axis] if len(shape) == len(shapes[0]) else None for shape in shapes}


def _elementwise(eqn: Any, where: Sequence[int], axis: int) -> int:
    return _unless(len(_lengths(eqn, where, axis)) != 1, axis)


def _reduced(eqn: Any, where: Sequence[int], axis: int) -> int:
    axes = eqn.params["axes"]
    if axis in axes:
        return SUMMED if eqn.primitive.name == "reduce_sum" else MIXED
    return axis - sum(a < axis for a in axes)


def _transposed(eqn: Any, where: Sequence[int], axis: int) -> int:
    return list(eqn.params["permutation"]).index(axis)


def _broadcast(eqn: Any, where: Sequence[int], axis: int) -> int:
    to = eqn.params["broadcast_dimensions"][axis]
    return _unless(eqn.outvars[0].aval.shape[to] != eqn.invars[0].aval.shape[axis], to)


def _squeezed(eqn: Any, where: Sequence[int], axis: int) -> int:
    return axis - sum(d < axis for d in eqn.params["dimensions"])


def _reshaped(eqn: Any, where: Sequence[int], axis: int) -> int:
    """The axis of the same length with as many entries before it."""
    shape, result = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    before = math.prod(shape[:axis])
    found = (i for i, n in enumerate(result) if n == shape[axis] and math.prod(result[:i]) == before)
    return MIXED if eqn.params["dimensions"] is not None else next(found, MIXED)


def _tiled(eqn: Any, where: Sequence[int], axis: int) -> int:
    return _unless(eqn.params["reps"][axis] != 1, axis)


def _along_axis(eqn: Any, where: Sequence[int], axis: int) -> int:
    return _unless(axis == eqn.params["axis"], axis)


def _along_dimension(eqn: Any, where: Sequence[int], axis: int) -> int:
    return _unless(axis == eqn.params["dimension"], axis)


def _stacked(eqn: Any, where: Sequence[int], axis: int) -> int:
    return axis + (eqn.params["axis"] <= axis)


def _unstacked(eqn: Any, where: Sequence[int], axis: int) -> int:
    return _unless(axis == eqn.params["axis"], axis - (eqn.params["axis"] < axis))


def _cut(eqn: Any, where: Sequence[int], axis: int) -> int:
    """Of a slice, or of what is written into another array: an axis that is taken whole."""
    return _unless(any(i > 1 for i in where) or len(_lengths(eqn, where, axis)) != 1, axis)


def _padded(eqn: Any, where: Sequence[int], axis: int) -> int:
    return _unless(list(where) != [0] or tuple(eqn.params["padding_config"][axis]) != (0, 0, 0), axis)


def _reversed(eqn: Any, where: Sequence[int], axis: int) -> int:
    return _unless(axis in eqn.params["dimensions"], axis)


def _fourier(eqn: Any, where: Sequence[int], axis: int) -> int:
    """The last axes are transformed."""
    return _unless(axis >= len(eqn.invars[0].aval.shape) - len(eqn.params["fft_lengths"]), axis)


def _windowed(eqn: Any, where: Sequence[int], axis: int) -> int:
    """An axis along which every window is one entry."""
    single = eqn.params["window_dimensions"][axis] == 1 and eqn.params["window_strides"][axis] == 1
    return _unless(not single or tuple(eqn.params["padding"][axis]) != (0, 0), axis)


def _convolved(eqn: Any, where: Sequence[int], axis: int) -> int:
    """The batch of what is convolved, or the results' features of the kernel."""
    numbers, params = eqn.params["dimension_numbers"], eqn.params
    if list(where) == [1]:
        return _unless(axis != numbers.rhs_spec[0], numbers.out_spec[1])
    is_batch = list(where) == [0] and numbers.lhs_spec[0] == axis
    return _unless(not is_batch or params["batch_group_count"] != 1, numbers.out_spec[0])


def _through_batched_product(eqn: Any, left: int, right: int) -> int:
    _, batched = eqn.params["dimension_numbers"]
    pairs = list(zip(*batched, strict=True))
    return pairs.index((left, right)) if (left, right) in pairs else MIXED


def _multiplied(eqn: Any, where: Sequence[int], axis: int) -> int:
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


def _gathered(eqn: Any, where: Sequence[int], axis: int) -> int:
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


# Where an operator has an axis of its operands that it keeps apart; all others mix.
_KEEPS: dict[str, Callable[[Any, Sequence[int], int], int]] = {
    "broadcast_in_dim": _broadcast,
    "concatenate": _along_dimension,
    "conv_general_dilated": _convolved,
    "dot_general": _multiplied,
    "dynamic_slice": _cut,
    "dynamic_update_slice": _cut,
    "fft": _fourier,
    "gather": _gathered,
    "pad": _padded,
    "reduce_window_max": _windowed,
    "reduce_window_min": _windowed,
    "reduce_window_sum": _windowed,
    "reshape": _reshaped,
    "rev": _reversed,
    "slice": _cut,
    "sort": _along_dimension,
    "split": _along_axis,
    "squeeze": _squeezed,
    "stack": _stacked,
    "tile": _tiled,
    "top_k": _along_axis,
    "transpose": _transposed,
    "unstack": _unstacked,
}
