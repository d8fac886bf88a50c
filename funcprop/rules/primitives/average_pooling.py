"""Average-pooling: `reduce_window_sum`, the sum of every window.

    y[i] = Σ_k x[i·s + k·d − p]            over the taps k of the window; stride s, dilation d, padding p
    x̄[j] = Σ {ȳ[i] : j = i·s + k·d − p for a tap k}

The mean is this sum and a division, which is left to autodiff. The operator is linear, so nothing is saved,
and forward mode is the operator itself.

Autodiff dilates and pads the cotangent to the size of the input and slides the whole window over it, one
entry at a time, so that most of what it adds are zeros. Here the input is cut into blocks of one stride,
and position `a` of block `b` receives the cotangents of the windows `b − q` that have a tap there: a sum of
⌈reach / s⌉ shifted copies along each axis, in a single fused loop (value and gradient of 3 × 3 windows with
stride 2 over the square of a relu, 64×32×32×64, two x86 cores: 0.28 of autodiff's time).

Windows that lie side by side inside of the input are also summed forwards as strided slices, one for each
tap, which XLA fuses with what stands around them (2 × 2: 0.25 of the time, 0.2 of the temporary bytes).
Where windows overlap or reach into padding, XLA would hold slices of its own: their forward is XLA's.

Cotangents that are shifted often gain nothing (4 × 4 taps with stride 1: 1.07 and 1.13 of the time, 4³ taps
1.17), and of few outputs XLA holds the cotangent twice: there the operator is left to autodiff.

Source: Dumoulin and Visin, "A guide to convolution arithmetic for deep learning", 2016 (the transpose of a
strided window); the blocked gather is our own, as in `pooling`.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from jax import lax

from funcprop.rules.equations import Equations, OperatorSymbols, apply
from funcprop.rules.machine import Machine, host, least_summed
from funcprop.rules.rule import Rule
from funcprop.rules.rule_set import OperatorKey


class Input(NamedTuple):
    """The input, of which only the type is read: nothing is saved."""

    x: Any


# What is unrolled: taps in the forward, shifted copies of the cotangent in the backward.
_MOST_SLICES = 64
_MOST_COPIES = 9


def _window_sum(x: Any, **window: Any) -> Any:
    return lax.reduce_window(x, np.zeros((), x.dtype), lax.add, **window)


def _sliced_sum(x: Any, **window: Any) -> Any:
    """Sum windows that lie side by side inside of `x`: strided slices, one for each tap."""
    dimensions, strides, dilation = _window(window)
    axes = list(zip(x.shape, dimensions, strides, dilation, strict=True))
    extent = [(n - (w - 1) * d - 1) // s * s + 1 for n, w, s, d in axes]
    total: Any = None
    for tap in itertools.product(*map(range, dimensions)):
        start = [k * d for k, d in zip(tap, dilation, strict=True)]
        term = lax.slice(x, start, [a + e for a, e in zip(start, extent, strict=True)], strides)
        total = term if total is None else lax.add(total, term)
    return total


def _forward(x: Any, *, machine: Machine | None = None, **window: Any) -> tuple[Any, Input]:
    total = _sliced_sum if _lie_side_by_side(x.shape, window) else _window_sum
    return total(x, **window), Input(x)


def _lie_side_by_side(shape: Sequence[int], window: dict[str, Any]) -> bool:
    """Whether all windows lie inside of the input and no two overlap."""
    axes = zip(shape, *_window(window), strict=True)
    return (
        _copies(window) == 1
        and _is_plain(window)
        and not any(hi for edges in window["padding"] for hi in edges)
        and all((w - 1) * d < n for n, w, _, d in axes)
        and math.prod(window["window_dimensions"]) <= _MOST_SLICES
    )


def _is_plain(window: dict[str, Any]) -> bool:
    """Whether the input is neither dilated nor cropped."""
    cropped = any(edge < 0 for edges in window["padding"] for edge in edges)
    return not cropped and all(d == 1 for d in window["base_dilation"])


def _jvp(residuals: Input, tangents: Any, *, machine: Machine | None = None, **window: Any) -> Any:
    return _window_sum(tangents[0], **window)


def _backward(
    residuals: Input, g: Any, needs: Any, *, machine: Machine | None = None, **window: Any
) -> tuple[Any]:
    return (_spread(g, residuals.x.shape, window),)


def _behind(window: dict[str, Any]) -> list[int]:
    """How many windows in a row reach over the same place, along each axis."""
    return [-(-((w - 1) * d + 1) // s) for w, s, d in zip(*_window(window), strict=True)]


def _copies(window: dict[str, Any]) -> int:
    """Shifted copies of the cotangent that the backward adds; 1 where no two windows overlap."""
    return math.prod(_behind(window))


def _spread(g: Any, shape: Sequence[int], window: dict[str, Any]) -> Any:
    """Every entry of an input of this shape receives the cotangents of the windows that hold it."""
    if 0 in shape or 0 in g.shape:
        return lax.full(shape, 0, g.dtype)
    zero = np.zeros((), g.dtype)
    strides, behind = window["window_strides"], _behind(window)
    blocks = [m + n - 1 for m, n in zip(g.shape, behind, strict=True)]
    # Axes of stride s become two: the block, and the position inside of it.
    full: list[int] = []
    block_axes: list[int] = []
    for b, s in zip(blocks, strides, strict=True):
        block_axes.append(len(full))
        full += [b, s] if s > 1 else [b]
    total: Any = None
    for by in itertools.product(*map(range, behind)):
        lies = _has_tap(by, window, block_axes, len(full))
        if not lies.any():
            continue
        config = [(q, b - q - m, 0) for q, b, m in zip(by, blocks, g.shape, strict=True)]
        term = lax.broadcast_in_dim(lax.pad(g, zero, config), full, block_axes)
        if not lies.all():
            # Selected and not multiplied, because a cotangent may be infinite.
            mask = lax.broadcast_in_dim(lies, full, range(len(full)))
            term = lax.select(mask, term, lax.full(full, 0, g.dtype))
        total = term if total is None else lax.add(total, term)
    flat = lax.reshape(total, [b * s for b, s in zip(blocks, strides, strict=True)])
    dilated = [(n - 1) * d + 1 for n, d in zip(shape, window["base_dilation"], strict=True)]
    ends = zip(window["padding"], dilated, flat.shape, strict=True)
    whole = lax.pad(flat, zero, [(-lo, lo + n - m, 0) for (lo, _), n, m in ends])
    return lax.slice(whole, [0] * len(shape), dilated, window["base_dilation"])


def _has_tap(by: Sequence[int], window: dict[str, Any], block_axes: Sequence[int], rank: int) -> np.ndarray:
    """Whether the window `by` blocks back has a tap on each position of a block."""
    lies = np.ones([1] * rank, bool)
    for axis, q, w, s, d in zip(block_axes, by, *_window(window), strict=True):
        offset = np.arange(s) + q * s
        shape = [1] * rank
        if s > 1:
            shape[axis + 1] = s
        lies = lies & ((offset % d == 0) & (offset // d < w)).reshape(shape)
    return lies


def _window(window: dict[str, Any]) -> tuple[Sequence[int], Sequence[int], Sequence[int]]:
    return window["window_dimensions"], window["window_strides"], window["window_dilation"]


def _applies(
    x: Any, *, everywhere: bool = False, machine: Machine | None = None, **window: Any
) -> bool | str:
    if everywhere:
        return True
    if not _is_plain(window):
        return "the input is dilated, or cropped by a negative padding"
    if (copies := _copies(window)) > _MOST_COPIES:
        return f"its windows overlap so much that the cotangent would be shifted {copies} times"
    least = least_summed(machine or host())
    if copies > 1 and math.prod(_result_shape(x.shape, window)) < least:  # XLA holds it twice.
        return f"its windows overlap, and its result has fewer than {least} entries"
    return True


def _result_shape(shape: Sequence[int], window: dict[str, Any]) -> list[int]:
    axes = zip(shape, window["padding"], *_window(window), strict=True)
    return [max(0, (n + lo + hi - (w - 1) * d - 1) // s + 1) for n, (lo, hi), w, s, d in axes]


def _equations(op: OperatorSymbols) -> Equations:
    (x,) = op.args
    window = dict(op.static)
    return Equations(
        apply("sumpool", lambda x: _window_sum(x, **window), x),
        (apply("unsumpool", lambda x, g: _spread(g, x.shape, window), x, op.cotangent),),
    )


def rule(*, everywhere: bool = False) -> Rule:
    """The rule of sums over windows; `everywhere` is also where autodiff was measured to be faster."""
    return Rule(
        _forward,
        _backward,
        _equations,
        platforms=frozenset({"cpu"}),
        applies=partial(_applies, everywhere=everywhere),
        jvp=_jvp,
        pure=True,
        sized=True,
        ways=None if everywhere else _ways,
    )


@functools.cache
def _ways() -> dict[str, Rule]:
    return {"also where autodiff is usually faster": rule(everywhere=True)}


RULES: dict[OperatorKey, Rule] = {"reduce_window_sum": rule()}
