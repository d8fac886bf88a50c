"""How a compiler arranges products: matrices, and copies of operands whose axes are in another order."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

# A library leaves alone what is smaller.
_SMALLEST_PRODUCT = 8
_NARROWEST_CONVOLUTION = 16


def matrices(eqn: Any) -> list[Sequence[int] | None]:
    """The shapes in which operands and result of a matrix product are computed; None stands for their own."""
    if eqn.primitive.name != "dot_general":
        return [None, None, None]
    summed, batch = eqn.params["dimension_numbers"]
    shapes = [v.aval.shape for v in eqn.invars]
    of_batch, found, rows = [shapes[0][d] for d in batch[0]], [], []
    for k, shape in enumerate(shapes):
        kept = [d for d in range(len(shape)) if d not in summed[k] and d not in batch[k]]
        rows.append(math.prod(shape[d] for d in kept))
        sizes = [rows[k], math.prod(shape[d] for d in summed[k])]
        merged = len(kept) > 1 or len(summed[k]) > 1
        found.append([*of_batch, *(sizes if k == 0 else sizes[::-1])] if merged else None)
    return [*found, [*of_batch, *rows] if len(eqn.outvars[0].aval.shape) > 2 + len(of_batch) else None]


def orders(eqn: Any) -> list[Any]:
    """For both operands of a product, and a convolution's result, the order to which they are copied.

    None stands for one that is read as it is. In order are batch axes in front and one axis besides the
    summed ones; for a convolution `NHWC` and `HWIO`.
    """
    shapes, found = [a.aval.shape for a in (*eqn.invars, *eqn.outvars)], []
    if eqn.primitive.name == "dot_general":
        for k, (summed, batch) in enumerate(zip(*eqn.params["dimension_numbers"], strict=True)):
            rest = [d for d in range(len(shapes[k])) if d not in summed and d not in batch]
            order = [*batch, *rest, *summed] if k == 0 else [*batch, *summed, *rest]
            kept = [d for d in order if shapes[k][d] > 1]
            leads = list(batch) == list(range(len(batch))) and len(summed) == len(rest) == 1
            is_read = leads or kept == sorted(kept) or (not batch and len(kept) == 2)
            found.append(None if is_read else order)
        return found
    lhs, rhs, out = eqn.params["dimension_numbers"]
    wanted = [[lhs[0], *lhs[2:], lhs[1]], [*rhs[2:], rhs[1], rhs[0]], [out[0], *out[2:], out[1]]]
    for shape, order in zip(shapes, wanted, strict=True):
        kept = [d for d in order if shape[d] > 1]
        found.append(None if kept == sorted(kept) else order)
    return found


def with_all_channels(eqn: Any) -> Sequence[int] | None:
    """The shape in which a CPU computes the kernel's cotangent of a depthwise convolution.

    It is computed for every pair of channels, and copied into the order of the kernel; then the pairs of
    equal ones are picked out.
    """
    if eqn.primitive.name == "dot_general":
        return None
    batch, channels, *_ = eqn.params["dimension_numbers"].out_spec
    groups, shape = eqn.params["batch_group_count"], list(eqn.outvars[0].aval.shape)
    if groups == 1 or groups != shape[channels]:
        return None
    shape[batch] *= groups
    return shape


def is_in_library(eqn: Any) -> bool:
    """Whether the library that computes sums computes a product together with them, as it is."""
    shapes, out = [a.aval.shape for a in eqn.invars], eqn.outvars[0].aval.shape
    if eqn.primitive.name == "dot_general":
        summed, batch = eqn.params["dimension_numbers"]
        axes = zip(shapes, summed, batch, strict=True)
        kept = [[d for d in range(len(shape)) if d not in {*c, *b}] for shape, c, b in axes]
        rows, columns = (math.prod(shape[d] for d in k) for shape, k in zip(shapes, kept, strict=True))
        terms = math.prod(shapes[0][d] for d in summed[0])
        in_rows = orders(eqn)[0] is not None or max(kept[0], default=-1) < min(summed[0], default=0)
        return in_rows and min(rows, columns) > 1 and max(rows, columns, terms) >= _SMALLEST_PRODUCT
    places, (image, kernel) = eqn.params["dimension_numbers"], shapes
    if len(image) != 4 or eqn.params["batch_group_count"] != 1 or set(eqn.params["lhs_dilation"]) != {1}:
        return False
    last = (0, 3, 1, 2)
    channels_last = (places.lhs_spec, places.rhs_spec, places.out_spec) == (last, (3, 2, 0, 1), last)
    shrinks = all(max(out[d], kernel[d - 1]) <= image[d] for d in (1, 2))
    return channels_last and shrinks and max(image[3], out[3]) > _NARROWEST_CONVOLUTION


def windows_are_apart(eqn: Any) -> bool:
    """Whether windows that are summed neither overlap nor leave entries out."""
    params = eqn.params
    pairs = zip(params["window_dimensions"], params["window_strides"], strict=True)
    dilated = {*params["base_dilation"], *params["window_dilation"]} != {1}
    return not dilated and all(size in (1, stride) for size, stride in pairs)
