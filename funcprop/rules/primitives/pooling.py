"""Max-pooling (and min-pooling): `reduce_window_max` with the position of each maximum saved.

    y[i] = max_k x[i·s + k·d − p]          over the taps k of the window; stride s, dilation d, padding p
    x̄[j] = Σ {ȳ[i] : i·s + k(i)·d − p = j}  where k(i) is the tap that was the maximum of window i

Autodiff saves the input and finds the maxima again in the backward (`select_and_scatter`, which XLA's CPU
backend runs element by element). This rule saves `k(i)`, one byte per output. Its backward gathers instead of
scattering: the input is cut into blocks of one stride, and position `a` of block `b` receives from the
windows `b − q` those cotangents whose tap is the one that lies there, one comparison for each. That is a
single fused loop.

Where windows overlap, XLA's loops are quick only if the innermost axis is not pooled and long enough for
vectors. So the rule works with such an axis last (channels, or the batch): 3 × 3 windows of stride 2 with
channels first took 1.2 to 2.9 times autodiff's time without, 0.3 to 0.8 with it (12² to 32², two x86 cores).
Without such an axis the operator is left to autodiff.

Ties go to the first tap and NaNs are treated exactly as by JAX: the value is NaN, and the position is the one
that the comparison `selected ≥ next` leaves. Dilated windows, which JAX cannot differentiate, work too.

The tap is made once, in the forward: XLA would otherwise fuse its comparisons into the backward, which then
reads the whole input again and compares for every entry of it (Flax CNN of the benchmark: 112.6 ms and 82 MB
so, 102.2 ms and 46 MB with taps made once).

Of `maxpool(relu(x))` the rule saves the same byte, and no mask: where the maximum is not above zero, no
cotangent passes, and the position saved is "nowhere".

Source: Chetlur et al., "cuDNN: efficient primitives for deep learning", 2014 (saved indices); the blocked
gather is our own.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax

from funcprop.rules.equations import Equations, OperatorSymbols, apply
from funcprop.rules.machine import Machine, host, lanes, least_pooled
from funcprop.rules.primitives.windows import pool_window
from funcprop.rules.rule import Rule
from funcprop.rules.rule_set import OperatorKey

# XLA makes the shifted copies of a cotangent in memory if several kernels read their sum (16 of the input's
# size for 4 × 4 windows of stride 1), unless the sum ends in a division, which it does not repeat. Autodiff
# makes six such arrays: where the maxima lie along four axes, the padded input, and the result.
_COPIES = 6

# The tap of a window from which no cotangent passes on. What lies outside of all windows is no tap at all.
NOWHERE = -1
_NO_TAP = -2


class Positions(NamedTuple):
    """For every window the tap of its maximum (int8 up to 127 taps), and the input for its type alone."""

    tap: Any
    x: Any


def _forward(
    x: Any, *, relu: bool = False, minimum: bool = False, machine: Machine | None = None, **window: Any
) -> tuple[Any, Positions]:
    window = _of_every_axis(x.shape, window)
    if minimum:
        negated, positions = _forward(lax.neg(x), machine=machine, **window)
        return lax.neg(negated), positions._replace(x=x)
    order, moved, _ = _layout(x.shape, window, machine)
    y, tap = _pooled(lax.transpose(x, order), relu, moved, _reordered(window, order))
    return lax.transpose(y, _inverse(order)), Positions(tap, x)


def _pooled(x: Any, relu: bool, moved: bool, window: dict[str, Any]) -> tuple[Any, Any]:
    """Maxima and their taps, both with the axes of `x`, which may have been `moved`."""
    dimensions, strides, dilation = _window(window)
    lowest = np.array(-np.inf if jnp.issubdtype(x.dtype, jnp.inexact) else jnp.iinfo(x.dtype).min, x.dtype)
    sizes = [n + lo + hi for n, (lo, hi) in zip(x.shape, window["padding"], strict=True)]
    shape = [
        (n - (w - 1) * d - 1) // s + 1
        for n, w, s, d in zip(sizes, dimensions, strides, dilation, strict=True)
    ]
    # One more place at the end, which nobody reads: XLA then moves the axes once, and not for every tap.
    more = [int(moved and w > 1) for w in dimensions]
    config = [(lo, hi + m, 0) for (lo, hi), m in zip(window["padding"], more, strict=True)]
    padded = lax.pad(x, lowest, config)
    dtype = _tap_type(dimensions)
    y: Any = None
    selected: Any = None
    tap: Any = None
    for k, offset in enumerate(_taps(dimensions)):
        start = [o * d for o, d in zip(offset, dilation, strict=True)]
        limit = [a + (n - 1) * s + 1 for a, n, s in zip(start, shape, strides, strict=True)]
        candidate = lax.slice(padded, start, limit, strides)
        if y is None:
            y, selected, tap = candidate, candidate, lax.full(shape, 0, dtype)
        else:
            keep = selected >= candidate
            tap = lax.select(keep, tap, lax.full(shape, k, dtype))
            selected = lax.select(keep, selected, candidate)
            y = lax.max(y, candidate)
    if relu:
        zero = lax.full(shape, 0, x.dtype)
        y = lax.max(y, zero)
        tap = lax.select(selected > zero, tap, lax.full(shape, NOWHERE, dtype))
    return y, _made_once(tap)


def _made_once(tap: Any) -> Any:
    """The same taps, by an operator that XLA's CPU backend counts as too expensive to fuse and repeat.

    Otherwise the backward finds the taps again from the whole input, once for every entry of it.
    """
    return lax.rem(tap, lax.full(tap.shape, jnp.iinfo(tap.dtype).max, tap.dtype))


def _jvp(residuals: Positions, tangents: Any, *, machine: Machine | None = None, **window: Any) -> Any:
    """The tangent at the position of each maximum."""
    (x_dot,) = tangents
    window = _of_every_axis(x_dot.shape, window)
    order = _layout(x_dot.shape, window, machine).order
    y_dot = _taken(residuals.tap, lax.transpose(x_dot, order), _reordered(window, order))
    return lax.transpose(y_dot, _inverse(order))


def _taken(tap: Any, x: Any, window: dict[str, Any]) -> Any:
    """Of every window the entry at its tap; nothing is at no tap."""
    dimensions, strides, dilation = _window(window)
    zero = np.array(0, x.dtype)
    padded = lax.pad(x, zero, [(lo, hi, 0) for lo, hi in window["padding"]])
    total: Any = None
    for k, offset in enumerate(_taps(dimensions)):
        start = [o * d for o, d in zip(offset, dilation, strict=True)]
        limit = [a + (n - 1) * s + 1 for a, n, s in zip(start, tap.shape, strides, strict=True)]
        here = lax.slice(padded, start, limit, strides)
        term = lax.select(
            lax.eq(tap, lax.full(tap.shape, k, tap.dtype)), here, lax.full(tap.shape, 0, x.dtype)
        )
        total = term if total is None else lax.add(total, term)
    return total


def _backward(
    residuals: Positions, g: Any, needs: Any, *, machine: Machine | None = None, **window: Any
) -> tuple[Any]:
    shape = residuals.x.shape
    window = _of_every_axis(shape, window)
    order = _layout(shape, window, machine).order
    own_shape = [shape[a] for a in order]
    x_bar = _unpooled(residuals.tap, lax.transpose(g, order), own_shape, _reordered(window, order))
    return (lax.transpose(x_bar, _inverse(order)),)


def _unpooled(tap: Any, g: Any, shape: Sequence[int], window: dict[str, Any]) -> Any:
    """The cotangent of the input, whose shape is given, with its axes."""
    dimensions, strides, dilation = _window(window)
    padding = window["padding"]
    reach = [(w - 1) * d + 1 for w, d in zip(dimensions, dilation, strict=True)]
    behind = [-(-r // s) for r, s in zip(reach, strides, strict=True)]
    blocks = [
        max(-(-(n + lo + hi) // s), m + q - 1)
        for n, (lo, hi), s, m, q in zip(shape, padding, strides, g.shape, behind, strict=True)
    ]
    # Axes of stride s become two: the block, and the position inside of it.
    full: list[int] = []
    block_axes: list[int] = []
    for b, s in zip(blocks, strides, strict=True):
        block_axes.append(len(full))
        full += [b, s] if s > 1 else [b]

    def shifted(a: Any, by: Sequence[int], fill: int) -> Any:
        config = [(q, b - q - n, 0) for q, b, n in zip(by, blocks, a.shape, strict=True)]
        return lax.broadcast_in_dim(lax.pad(a, np.array(fill, a.dtype), config), full, block_axes)

    total: Any = None
    for by in itertools.product(*map(range, behind)):
        here = _tap_here(by, dimensions, strides, dilation, block_axes, len(full), tap.dtype)
        hit = shifted(tap, by, NOWHERE) == here
        term = lax.select(hit, shifted(g, by, 0), lax.full(full, 0, g.dtype))
        total = term if total is None else lax.add(total, term)
    if math.prod(behind) > _COPIES:
        nowhere = (_NO_TAP - 1 - np.arange(math.prod(full) // math.prod(blocks))).reshape(
            [1 if i in block_axes else n for i, n in enumerate(full)]
        )
        impossible = shifted(tap, [0] * len(blocks), NOWHERE) == nowhere.astype(tap.dtype)
        total = lax.div(total, lax.select(impossible, lax.full_like(total, 2), lax.full_like(total, 1)))
    flat = lax.reshape(total, [b * s for b, s in zip(blocks, strides, strict=True)])
    low = [lo for lo, _ in padding]
    missing = [max(0, lo + n - m) for lo, n, m in zip(low, shape, flat.shape, strict=True)]
    if any(missing):
        flat = lax.pad(flat, np.array(0, g.dtype), [(0, m, 0) for m in missing])
    return lax.slice(flat, low, [lo + n for lo, n in zip(low, shape, strict=True)])


class PoolLayout(NamedTuple):
    """The order of a pool's axes, whether that moves any, and why autodiff was measured to be faster."""

    order: tuple[int, ...]
    moved: bool
    slow: str | None


def _layout(shape: Sequence[int], window: dict[str, Any], machine: Machine | None) -> PoolLayout:
    """Put an axis last along which overlapping windows are quick, if there is one.

    Loops along the innermost axis are quick where it is long enough for vectors, and not pooled itself.
    """
    machine = machine or host()
    vector = lanes(machine)
    axes, dimensions, strides, dilation = tuple(range(len(shape))), *_window(window)
    if not any((w - 1) * d + 1 > s for w, s, d in zip(dimensions, strides, dilation, strict=True)):
        return PoolLayout(axes, False, None)
    padded = [any(padding) for padding in window["padding"]]
    quick = [a for a in axes if shape[a] >= vector and dimensions[a] == strides[a] == 1 and not padded[a]]
    order = (*(a for a in axes if a not in quick[-1:]), *quick[-1:])
    moved, slow = order != axes, None
    if not quick:
        slow = f"no axis beside them has {vector} entries"
    elif moved and any(shape[a] % 2 and padded[a] for a in axes):
        # XLA then moves the axes anew for every tap: measured, 2 times autodiff's time.
        slow = "its axes would have to be moved while padded ones are odd"
    elif math.prod(shape) < least_pooled(machine, moved):  # Moved axes cost what stands beside the pool, too.
        slow = "it is too small to gain"
    return PoolLayout(order, moved, slow and f"its windows overlap, and {slow}")


def _reordered(window: dict[str, Any], order: Sequence[int]) -> dict[str, Any]:
    return {key: tuple(value[a] for a in order) for key, value in window.items()}


def _inverse(order: Sequence[int]) -> tuple[int, ...]:
    return tuple(order.index(a) for a in range(len(order)))


def _tap_here(
    by: Sequence[int],
    dimensions: Sequence[int],
    strides: Sequence[int],
    dilation: Sequence[int],
    block_axes: Sequence[int],
    rank: int,
    dtype: Any,
) -> np.ndarray:
    """The tap of the window `by` blocks back that lies on each position of a block; −2 where none does."""
    code, lies = np.zeros([1] * rank, np.int64), np.ones([1] * rank, bool)
    for axis, (q, w, s, d) in enumerate(zip(by, dimensions, strides, dilation, strict=True)):
        offset = np.arange(s) + q * s
        inside = (offset % d == 0) & (offset // d < w)
        shape = [1] * rank
        if s > 1:
            shape[block_axes[axis] + 1] = s
        code = code + (offset // d * math.prod(dimensions[axis + 1 :])).reshape(shape)
        lies = lies & inside.reshape(shape)
    return np.where(lies, code, _NO_TAP).astype(dtype)


def _of_every_axis(shape: Sequence[int], window: dict[str, Any]) -> dict[str, Any]:
    """The parameters of the primitive, if these are a layer's."""
    return window if "window_dimensions" in window else pool_window(shape, **window)


def _window(window: dict[str, Any]) -> tuple[Sequence[int], Sequence[int], Sequence[int]]:
    return window["window_dimensions"], window["window_strides"], window["window_dilation"]


def _taps(dimensions: Sequence[int]) -> itertools.product[tuple[int, ...]]:
    return itertools.product(*map(range, dimensions))


def _tap_type(dimensions: Sequence[int]) -> Any:
    taps = math.prod(dimensions)
    return np.int8 if taps <= 127 else np.int16 if taps <= 32767 else np.int32


def _applies(
    x: Any, *, relu: bool = False, everywhere: bool = False, machine: Machine | None = None, **window: Any
) -> bool | str:
    window = _of_every_axis(x.shape, window)
    if any(d != 1 for d in window.get("base_dilation", ())):
        return "the input is dilated"
    if any(lo < 0 or hi < 0 for lo, hi in window["padding"]):
        return "the padding is negative"
    if math.prod(window["window_dimensions"]) > 64:
        return "the window has more than 64 taps, which are unrolled"
    dimensions, _, dilation = _window(window)
    reach = [(w - 1) * d + 1 for w, d in zip(dimensions, dilation, strict=True)]
    padded = [n + lo + hi for n, (lo, hi) in zip(x.shape, window["padding"], strict=True)]
    if 0 in x.shape or any(r > n for r, n in zip(reach, padded, strict=True)):
        return "the input or the result is empty"
    if not everywhere and (slow := _layout(x.shape, window, machine).slow) is not None:
        return slow
    if relu and not all(
        _meets_input(*axis) for axis in zip(x.shape, *_window(window), window["padding"], strict=True)
    ):
        return "a window lies in the padding alone, whose maximum is not the input's"
    return True


def _meets_input(size: int, taps: int, stride: int, dilation: int, padding: tuple[int, int]) -> bool:
    """Whether every window along an axis has a tap inside of the input."""
    if not any(padding):
        return True
    windows = (size + sum(padding) - (taps - 1) * dilation - 1) // stride + 1
    places = np.arange(int(windows))[:, None] * stride + np.arange(taps) * dilation - padding[0]
    return bool(np.all(np.any((places >= 0) & (places < size), axis=1)))


def _equations(op: OperatorSymbols, *, relu: bool = False, minimum: bool = False) -> Equations:
    (x,) = op.args
    static = {**op.static, "relu": relu, "minimum": minimum}
    forward = apply(
        "maxpool∘relu" if relu else "minpool" if minimum else "maxpool", lambda v: _forward(v, **static)[0], x
    )
    back = apply(
        "unpool",
        lambda v, g: _backward(_forward(v, **static)[1], g, (True,), **op.static)[0],
        x,
        op.cotangent,
    )
    return Equations(forward, (back,))


def rule(*, relu: bool = False, minimum: bool = False, everywhere: bool = False) -> Rule:
    """The rule of max-pooling, of max-pooling a relu, or of min-pooling (the maximum of `−x`).

    `everywhere` is also where autodiff was measured to be faster.
    """
    return Rule(
        partial(_forward, relu=relu, minimum=minimum),
        _backward,
        partial(_equations, relu=relu, minimum=minimum),
        platforms=frozenset({"cpu", "gpu"}),
        applies=partial(_applies, relu=relu, everywhere=everywhere),
        jvp=_jvp,
        pure=True,
        sized=True,
        ways=None
        if everywhere
        else lambda: {"also where autodiff is usually faster": _everywhere(relu, minimum)},
    )


@functools.cache
def _everywhere(relu: bool, minimum: bool) -> Rule:
    return rule(relu=relu, minimum=minimum, everywhere=True)


RULES: dict[OperatorKey, Rule] = {"reduce_window_max": rule(), "reduce_window_min": rule(minimum=True)}
