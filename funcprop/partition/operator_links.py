"""How the axes of an operator's operands and results belong together, from one table.

An operator that the table does not know blocks everything that it reads and makes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from funcprop import _jax
from funcprop.partition.index_places import own_places
from funcprop.partition.links import Links, rank, shape
from funcprop.program.facts import facts_of


def links_of(eqn: Any, made: Mapping[Any, Any]) -> Links:
    """What an equation without bodies says of axes; loops and calls are walked through elsewhere.

    `made` has the equations that make variables.
    """
    found, name, facts = Links(), eqn.primitive.name, facts_of(eqn)
    if name in _INDEXED:
        _INDEXED[name](eqn, found, made)
    elif name in _TABLE:
        _TABLE[name](eqn, found)
    elif facts.elementwise or facts.identity:
        _elementwise(eqn, found)
    elif facts.reduces:
        _reduction(eqn, found)
    elif facts.cumulative:
        _along(eqn, found, [eqn.params["axis"]], f"runs along it in `{name}`")
    elif name not in _MAKERS:
        found.block_all([*eqn.invars, *eqn.outvars], f"`{name}` is not known to the partitioner")
    return found


# Operators whose results have entries that depend on their place alone: each device makes its own.
_MAKERS = frozenset({"iota", "create_token", "after_all", "empty", "debug_callback", "debug_print"})


def _elementwise(eqn: Any, found: Links) -> None:
    if len(eqn.outvars) > 1:
        for v, result in zip(eqn.invars, eqn.outvars, strict=True):  # A barrier: each is its own.
            found.together(v, result)
        return
    for result in eqn.outvars:
        for v in eqn.invars:
            if rank(v):
                found.together(v, result)


def _along(eqn: Any, found: Links, axes: Sequence[int], why: str) -> None:
    """All arrays have the same axes, of which some cannot be split."""
    for result in eqn.outvars:
        for v in eqn.invars:
            if rank(v) == rank(result):
                for d in range(rank(v)):
                    if d in axes or shape(v)[d] != shape(result)[d]:
                        found.block(v, d, why)
                        found.block(result, d, why)
                    else:
                        found.link(v, d, result, d)


def _reduction(eqn: Any, found: Links) -> None:
    operand, axes = eqn.invars[0], eqn.params["axes"]
    for result in eqn.outvars:
        kept = [d for d in range(rank(operand)) if d not in axes]
        for place, d in enumerate(kept):
            found.link(operand, d, result, place)
    if eqn.primitive.name.startswith("arg"):
        for d in axes:
            found.block(operand, d, f"`{eqn.primitive.name}` compares places along it")
    else:
        found.total(operand, axes)


def _dot(eqn: Any, found: Links) -> None:
    (left_summed, right_summed), (left_batch, right_batch) = eqn.params["dimension_numbers"]
    left, right = eqn.invars
    result = eqn.outvars[0]
    for i, j in zip(left_summed, right_summed, strict=True):
        found.link(left, i, right, j)
    place = 0
    for i, j in zip(left_batch, right_batch, strict=True):
        found.link(left, i, result, place)
        found.link(right, j, result, place)
        place += 1
    for operand, batch, summed in ((left, left_batch, left_summed), (right, right_batch, right_summed)):
        for d in range(rank(operand)):
            if d not in batch and d not in summed:
                found.link(operand, d, result, place)
                place += 1
    found.total(left, left_summed)
    if isinstance(left, _jax.Literal):
        found.total(right, right_summed)


def _convolution(eqn: Any, found: Links) -> None:
    numbers, (image, kernel), result = eqn.params["dimension_numbers"], eqn.invars, eqn.outvars[0]
    specs = ((image, numbers.lhs_spec), (kernel, numbers.rhs_spec), (result, numbers.out_spec))
    groups = eqn.params["feature_group_count"], eqn.params["batch_group_count"]
    if max(groups) > 1:
        if groups[1] == 1:
            found.link(image, numbers.lhs_spec[0], result, numbers.out_spec[0])
        elif groups[0] == 1:  # The cotangent of a kernel: its features are the examples, which are summed.
            found.link(image, numbers.lhs_spec[1], kernel, numbers.rhs_spec[1])
            found.total(image, [numbers.lhs_spec[1]])
        free = {(0, 0), (2, 0)} if groups[1] == 1 else {(0, 1), (1, 1)} if groups[0] == 1 else set()
        for i, (v, spec) in enumerate(specs):
            for k, d in enumerate(spec):
                if (i, k) not in free:
                    found.block(v, d, "a grouped convolution")
        return
    found.link(image, numbers.lhs_spec[0], result, numbers.out_spec[0])
    found.link(kernel, numbers.rhs_spec[0], result, numbers.out_spec[1])
    found.link(image, numbers.lhs_spec[1], kernel, numbers.rhs_spec[1])
    found.total(image, [numbers.lhs_spec[1]])
    for v, spec in specs:
        for d in spec[2:]:
            found.block(v, d, "space of a convolution: neighbours are on another device")


def _broadcast(eqn: Any, found: Links) -> None:
    operand, result = eqn.invars[0], eqn.outvars[0]
    for d, place in enumerate(eqn.params["broadcast_dimensions"]):
        if shape(operand)[d] == shape(result)[place]:
            found.link(operand, d, result, place)


def _transpose(eqn: Any, found: Links) -> None:
    for place, d in enumerate(eqn.params["permutation"]):
        found.link(eqn.invars[0], d, eqn.outvars[0], place)


def _reshape(eqn: Any, found: Links) -> None:
    """Axes of one size are the same; of those that are merged, the major one is split with the merged one."""
    a, b = eqn.invars[0], eqn.outvars[0]
    s, t = shape(a), shape(b)
    if not all(s) or not all(t):
        found.block_all([a, b], "a reshape without entries")
        return
    i = j = 0
    while i < len(s) or j < len(t):
        if i < len(s) and s[i] == 1 and (j >= len(t) or t[j] != 1):
            i += 1
        elif j < len(t) and t[j] == 1 and (i >= len(s) or s[i] != 1):
            j += 1
        elif s[i] == t[j]:
            found.link(a, i, b, j)
            i, j = i + 1, j + 1
        else:
            last_i, last_j, x, y = i, j, s[i], t[j]
            while x != y:
                if x < y:
                    last_i += 1
                    x *= s[last_i]
                else:
                    last_j += 1
                    y *= t[last_j]
            found.link(a, i, b, j)
            for v, first, last in ((a, i, last_i), (b, j, last_j)):
                for d in range(first + 1, last + 1):
                    if shape(v)[d] > 1:
                        found.block(v, d, "the minor factor of a reshape: its entries are strided")
            i, j = last_i + 1, last_j + 1


def _gather(eqn: Any, found: Links, made: Mapping[Any, Any]) -> None:
    numbers, (operand, indices), result = eqn.params["dimension_numbers"], eqn.invars[:2], eqn.outvars[0]
    gone = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
    whole = [d for d in range(rank(operand)) if d not in gone]
    for d, place in zip(whole, numbers.offset_dims, strict=True):
        if eqn.params["slice_sizes"][d] == shape(operand)[d] and d not in numbers.start_index_map:
            found.link(operand, d, result, place)
        else:
            found.block(operand, d, "a slice of it is taken by an index")
            found.block(result, place, "a slice that is taken by an index")
    rest = [d for d in range(rank(result)) if d not in numbers.offset_dims]
    for d, place in enumerate(rest):
        found.link(indices, d, result, place)
    pairs = zip(numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True)
    for d, place in pairs:
        found.link(operand, d, indices, place)
    own = own_places(indices, numbers.start_index_map, shape(operand), made)
    for d, place in own.items():
        found.link(operand, d, indices, place)
    found.total(operand, [d for d in numbers.collapsed_slice_dims if d not in own])


def _scatter(eqn: Any, found: Links, made: Mapping[Any, Any]) -> None:
    numbers, (operand, indices, updates) = eqn.params["dimension_numbers"], eqn.invars[:3]
    result = eqn.outvars[0]
    found.together(operand, result)
    gone = {*numbers.inserted_window_dims, *numbers.operand_batching_dims}
    whole = [d for d in range(rank(operand)) if d not in gone]
    for d, place in zip(whole, numbers.update_window_dims, strict=True):
        if shape(result)[d] == shape(updates)[place]:
            found.link(result, d, updates, place)
        else:
            found.block(result, d, "a slice of it is written by an index")
            found.block(updates, place, "a slice that is written by an index")
    batching = dict(zip(numbers.scatter_indices_batching_dims, numbers.operand_batching_dims, strict=True))
    own = own_places(indices, numbers.scatter_dims_to_operand_dims, shape(operand), made)
    batching |= {place: d for d, place in own.items()}
    rest = [d for d in range(rank(updates)) if d not in numbers.update_window_dims]
    for d, place in enumerate(rest):
        found.link(indices, d, updates, place)
        if d in batching:
            found.link(updates, place, result, batching[d])
        elif eqn.primitive.name in _ADDS:
            found.total(updates, [place])
        else:
            found.block(updates, place, f"`{eqn.primitive.name}` writes in order")


_ADDS = frozenset({"scatter-add", "scatter-sub", "scatter_add"})


def _window(eqn: Any, found: Links) -> None:
    windows, result = eqn.params["window_dimensions"], eqn.outvars[0]
    for v in [*eqn.invars, *eqn.outvars]:
        if rank(v) == len(windows):
            for d in range(rank(v)):
                if windows[d] != 1:
                    found.block(v, d, f"windows of `{eqn.primitive.name}`: neighbours are on another device")
                elif v is not result and shape(v)[d] == shape(result)[d]:
                    found.link(v, d, result, d)


def _sort(eqn: Any, found: Links) -> None:
    axis = eqn.params.get("dimension", rank(eqn.invars[0]) - 1)
    why = f"`{eqn.primitive.name}` compares places along it"
    for v, result in zip(eqn.invars, eqn.outvars, strict=False):
        found.together(v, result)
    _along(eqn, found, [axis], why)


def _stack(eqn: Any, found: Links) -> None:
    """Each of some arrays is one place along a new axis of the other."""
    axis, parts, whole = eqn.params["axis"], eqn.invars, eqn.outvars[0]
    if eqn.primitive.name == "unstack":
        parts, whole = eqn.outvars, eqn.invars[0]
    found.block(whole, axis, f"arrays are joined along it (`{eqn.primitive.name}`)")
    for part in parts:
        for d in range(rank(part)):
            found.link(part, d, whole, d + (d >= axis))


def _leading(eqn: Any, found: Links) -> None:
    """The leading axes are the same: of bytes, of keys, and of what is drawn by them."""
    for result in eqn.outvars:
        for v in eqn.invars:
            for d in range(min(rank(v), rank(result))):
                if shape(v)[d] == shape(result)[d]:
                    found.link(v, d, result, d)


def _parts(what: str) -> Callable[[Any, Links], None]:
    def links(eqn: Any, found: Links) -> None:
        axes = [eqn.params["dimension"]] if "dimension" in eqn.params else []
        axes = [eqn.params["axis"]] if eqn.primitive.name == "split" else axes
        axes = list(eqn.params["dimensions"]) if eqn.primitive.name == "rev" else axes
        _along(eqn, found, axes, what)

    return links


def _spectrum(eqn: Any, found: Links) -> None:
    count = len(eqn.params["fft_lengths"])
    _along(eqn, found, range(rank(eqn.outvars[0]))[-count:], "a Fourier transform runs along it")


_TABLE: dict[str, Callable[[Any, Links], None]] = {
    "dot_general": _dot,
    "conv_general_dilated": _convolution,
    "broadcast_in_dim": _broadcast,
    "transpose": _transpose,
    **dict.fromkeys(("reshape", "squeeze", "expand_dims"), _reshape),
    **dict.fromkeys(
        ("reduce_window_sum", "reduce_window_max", "reduce_window_min", "reduce_window"), _window
    ),
    **dict.fromkeys(("select_and_scatter_add", "select_and_gather_add", "select_and_scatter"), _window),
    **dict.fromkeys(("sort", "top_k"), _sort),
    "concatenate": _parts("parts are joined along it (`concatenate`), such as gates in one weight"),
    "split": _parts("it is cut into parts (`split`), such as a fused QKV or gates in one weight"),
    "slice": _parts("a part of it is taken (`slice`)"),
    "pad": _parts("it is padded (`pad`)"),
    "dynamic_slice": _parts("a part of it is taken by an index (`dynamic_slice`)"),
    "dynamic_update_slice": _parts("a part of it is written by an index (`dynamic_update_slice`)"),
    "tile": _parts("it is repeated as a whole (`tile`)"),
    **dict.fromkeys(("stack", "unstack"), _stack),
    **dict.fromkeys(("bitcast_convert_type", "threefry2x32", "random_bits", "random_seed"), _leading),
    **dict.fromkeys(("random_wrap", "random_unwrap", "random_split", "random_fold_in"), _leading),
    "rev": _parts("it is reversed (`rev`)"),
    "fft": _spectrum,
}
_INDEXED: dict[str, Callable[[Any, Links, Mapping[Any, Any]], None]] = {
    "gather": _gather,
    **dict.fromkeys(("scatter-add", "scatter_add", "scatter-sub", "scatter", "scatter-mul"), _scatter),
    **dict.fromkeys(("scatter-min", "scatter-max"), _scatter),
}
