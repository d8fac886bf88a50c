"""Convolution: where XLA's own is slow, another way to the same numbers.

    y[n, i, o]  = Σ_{k, c} x[n, i·s + k·d − p, c] w[k, c, o]
    w̄[k, c, o] = Σ_{n, i} x[n, i·s + k·d − p, c] ȳ[n, i, o]        patches(x)ᵀ · ȳ
    x̄[n, j, c] = Σ {ȳ[n, i, o] w[k, c, o] : i·s + k·d − p = j}     the patches of ȳ · wᵀ, added up

`patches(x)` (im2col) has a row for each output position and a column for each tap and input channel. The two
cotangents are products with it, or with its transpose (col2im), which are made and used up in chunks of a few
examples: a chunk's patches stay in the cache, and never more than one chunk is held. What is saved is `x` and
`w`, as by autodiff.

The value has another way. XLA's CPU backend convolves without padding two to four times more slowly than
with it (batch 128, 15×15, 64→96 channels, 3×3: 63 against 155 GFLOP/s). So one position more is computed at
the end of one axis, and dropped: that *margin* is cheaper than any product of patches.

Which way is taken is decided by `plan`, from shapes alone.

Source: Chellapilla et al., "High performance convolutional neural networks for document processing", 2006,
for the products of patches; the chunks and the margin are our own.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from funcprop import _compat
from funcprop.expressions import Equations, OperatorSymbols, apply
from funcprop.registry import OperatorKey, Rule


class Operands(NamedTuple):
    """The input and the kernel."""

    x: Any
    w: Any


class Geometry(NamedTuple):
    """The sizes of a convolution, whatever its layout."""

    batch: int
    input: tuple[int, ...]
    output: tuple[int, ...]
    kernel: tuple[int, ...]
    inputs: int
    outputs: int
    strides: tuple[int, ...]
    padded: bool
    itemsize: int

    @property
    def rows(self) -> int:
        """Output positions of one example: the rows of its patches."""
        return math.prod(self.output)

    @property
    def columns(self) -> int:
        """Entries of one patch."""
        return math.prod(self.kernel) * self.inputs

    @property
    def bytes_of_example(self) -> int:
        """Bytes of one example's patches and outputs."""
        return self.rows * (self.columns + self.outputs) * self.itemsize


class Plan(NamedTuple):
    """Whether the value is computed with a margin, and each cotangent by patches; otherwise it is XLA's.

    `turned` says that an input's cotangent by XLA is a convolution with a kernel that is turned beforehand.
    In the body of a loop XLA's CPU backend turns it too late, and convolves slowly: 72 × 13×13, 96→64
    channels, 3×3: 29 ms against 5.5.
    """

    margin: bool
    weight: bool
    input: bool
    turned: bool = False


Chooser = Callable[[Geometry], Plan]

# A chunk's patches and outputs, which are to stay in a core's cache.
CHUNK_BYTES = 1 << 21


def chunk(geometry: Geometry) -> int:
    """How many examples make a chunk: what 2 MiB hold, if possible a divisor of the batch.

    All of them for a pointwise convolution, whose patches are the input itself.
    """
    if math.prod(geometry.kernel) == 1:
        return geometry.batch
    most = max(1, min(geometry.batch, CHUNK_BYTES // max(1, geometry.bytes_of_example)))
    divisor = max(n for n in range(1, most + 1) if geometry.batch % n == 0)
    return divisor if 2 * divisor > most else most


def plan(g: Geometry) -> Plan:
    """The cost model, read off `experiments/convolution_costs.py` on two x86 cores.

    * The margin pays without padding, from 16 input channels and 8 positions on. (Pointwise and strided, XLA
      is as good; with fewer channels, writing the result takes longer than computing it.)
    * The kernel's cotangent by patches: XLA's is slow where the sum is long, and slowest without padding. The
      product is slow where it has few columns (output channels) for many rows (`columns`).
    * The input's cotangent by patches pays for images (1 to 3 channels), where XLA convolves many channels to
      few, and for strides that lead to fewer channels, where XLA multiplies with the zeros in between.
    * An example whose patches are larger than a chunk is left to XLA: they would be memory, not cache.
    """
    rows, pointwise, strided = g.batch * g.rows, math.prod(g.kernel) == 1, max(g.strides) > 1
    margin = not g.padded and not (pointwise and strided) and g.inputs >= 16 and g.output[-1] >= 8
    if g.bytes_of_example > CHUNK_BYTES and not pointwise:
        return Plan(margin, weight=False, input=False)
    if pointwise:
        return Plan(margin, weight=rows >= 1024, input=rows >= 1024 and g.outputs >= 128 and not strided)
    wide = g.outputs >= (48 if g.padded else 16)
    narrowing = g.inputs >= 48 >= g.outputs and g.batch >= 32 and rows >= 2500
    return Plan(margin, weight=rows >= 8192 and wide, input=narrowing if strided else g.inputs <= 3)


def plan_in_loops(g: Geometry) -> Plan:
    """The plan for convolutions whose cotangents are computed in the body of a loop."""
    return plan(g)._replace(turned=True)


def geometry_of(x: Any, w: Any, static: Any) -> Geometry:
    """The sizes of a convolution of `x` by `w` with these parameters."""
    lhs, rhs, _ = static["dimension_numbers"]
    kernel = tuple(w.shape[a] for a in rhs[2:])
    spatial = tuple(x.shape[a] for a in lhs[2:])
    output = tuple(
        max(0, (n + lo + hi - (k - 1) * d - 1) // s + 1)
        for n, (lo, hi), k, d, s in zip(
            spatial, static["padding"], kernel, static["rhs_dilation"], static["window_strides"], strict=True
        )
    )
    strides = tuple(static["window_strides"])
    inputs, outputs = x.shape[lhs[1]], w.shape[rhs[0]]
    padded = any(map(any, static["padding"]))
    sizes = x.shape[lhs[0]], spatial, output, kernel, inputs, outputs, strides
    return Geometry(*sizes, padded, x.dtype.itemsize)


# --- one chunk --------------------------------------------------------------------------------


def _taps(static: Any, geometry: Geometry) -> Iterator[tuple[list[int], list[int]]]:
    """Where each tap of the kernel meets the padded input: the first position, and one past the last."""
    for tap in itertools.product(*map(range, geometry.kernel)):
        start = [k * d for k, d in zip(tap, static["rhs_dilation"], strict=True)]
        ends = zip(start, geometry.output, geometry.strides, strict=True)
        yield start, [a + (n - 1) * s + 1 for a, n, s in ends]


def patches_of(x: Any, static: Any, geometry: Geometry) -> Any:
    """The input as a matrix: a row for each output position, a column for each tap and channel."""
    zero = np.array(0, x.dtype)
    x = lax.pad(x, zero, [(0, 0, 0), *((lo, hi, 0) for lo, hi in static["padding"]), (0, 0, 0)])
    step = (1, *geometry.strides, 1)
    slices = [
        lax.slice(x, (0, *start, 0), (x.shape[0], *limit, x.shape[-1]), step)
        for start, limit in _taps(static, geometry)
    ]
    return lax.concatenate(slices, x.ndim - 1).reshape(-1, geometry.columns)


def _sum_of_patches(patches: Any, static: Any, geometry: Geometry) -> Any:
    """The transpose of `patches_of` (col2im): every entry of a patch is added where it was taken from."""
    patches = patches.reshape(-1, *geometry.output, geometry.columns)
    padded = [n + lo + hi for n, (lo, hi) in zip(geometry.input, static["padding"], strict=True)]
    zero = np.array(0, patches.dtype)
    total: Any = None
    for k, (start, limit) in enumerate(_taps(static, geometry)):
        here = lax.slice_in_dim(patches, k * geometry.inputs, (k + 1) * geometry.inputs, axis=-1)
        spread = [
            (a, n - b, s - 1) for a, b, n, s in zip(start, limit, padded, geometry.strides, strict=True)
        ]
        here = lax.pad(here, zero, [(0, 0, 0), *spread, (0, 0, 0)])
        total = here if total is None else lax.add(total, here)
    inside = [(-lo, -hi, 0) for lo, hi in static["padding"]]
    return lax.pad(total, zero, [(0, 0, 0), *inside, (0, 0, 0)])


def with_channels_last(x: Any, spec: Sequence[int]) -> Any:
    """The axes of `x` in the order batch, space, channels."""
    return lax.transpose(x, (spec[0], *spec[2:], spec[1]))


def _from_channels_last(x: Any, spec: Sequence[int]) -> Any:
    return lax.transpose(x, np.argsort((spec[0], *spec[2:], spec[1])))


def _kernel_matrix(w: Any, static: Any, geometry: Geometry) -> Any:
    """The kernel with a row for each entry of a patch and a column for each output channel."""
    spec = static["dimension_numbers"].rhs_spec
    return lax.transpose(w, (*spec[2:], spec[1], spec[0])).reshape(geometry.columns, geometry.outputs)


def _product(a: Any, b: Any, contracted: tuple[int, int], static: Any) -> Any:
    dimensions = (((contracted[0],), (contracted[1],)), ((), ()))
    # Sums over chunks and taps follow, which low precision would round one by one.
    wide = jnp.promote_types(jnp.result_type(a, b), jnp.float32)
    return lax.dot_general(a, b, dimensions, precision=static["precision"], preferred_element_type=wide)


# --- all chunks -------------------------------------------------------------------------------


def _chunk_at(i: Any, size: int, arrays: Sequence[Any]) -> tuple[Any, list[Any]]:
    """Where chunk `i` of the batch starts, and its part of each array.

    All chunks have the same size; the last one starts early enough.
    """
    start = jnp.minimum(i * size, len(arrays[0]) - size)
    return start, [lax.dynamic_slice_in_dim(a, start, size) for a in arrays]


def _mapped_in_chunks(fun: Callable[[Any], Any], size: int, a: Any) -> Any:
    """`fun` over the chunks of a batch."""
    if size == len(a):
        return fun(a)
    part = jax.eval_shape(fun, jax.ShapeDtypeStruct((size, *a.shape[1:]), a.dtype))

    def step(result: Any, i: Any) -> tuple[Any, None]:
        # What two chunks share is written twice, alike.
        start, (here,) = _chunk_at(i, size, [a])
        return lax.dynamic_update_slice_in_dim(result, fun(here), start, 0), None

    nothing = jnp.zeros((len(a), *part.shape[1:]), part.dtype)
    return _over_chunks(step, nothing, size, [a])


def _summed_over_chunks(fun: Callable[..., Any], size: int, *arrays: Any) -> Any:
    """The sum of `fun` over the chunks of a batch."""
    if size == len(arrays[0]):
        return fun(*arrays)
    part = jax.eval_shape(fun, *(jax.ShapeDtypeStruct((size, *a.shape[1:]), a.dtype) for a in arrays))

    def step(total: Any, i: Any) -> tuple[Any, None]:
        start, here = _chunk_at(i, size, arrays)
        if len(arrays[0]) % size:
            # The last chunk begins with examples that were counted already.
            fresh = start + np.arange(size) >= i * size
            here = [jnp.where(lax.broadcast_in_dim(fresh, a.shape, [0]), a, 0) for a in here]
        return total + fun(*here), None

    return _over_chunks(step, jnp.zeros(part.shape, part.dtype), size, arrays)


def _over_chunks(step: Callable[..., Any], start: Any, size: int, arrays: Sequence[Any]) -> Any:
    # All of it in the loop: a first chunk before it would be scheduled early, and held.
    start, *_ = _compat.align_varying_axes([start, *arrays])
    return lax.scan(step, start, jnp.arange(-(-len(arrays[0]) // size)))[0]


def _with_margin(x: Any, w: Any, static: Any) -> Any:
    """The convolution, with one position more at the end of the last spatial axis, which is dropped."""
    *before, (low, high) = static["padding"]
    padding = (*before, (low, high + static["window_strides"][-1]))
    y = lax.conv_general_dilated(x, w, **{**static, "padding": padding})
    last = static["dimension_numbers"].out_spec[-1]
    return lax.slice_in_dim(y, 0, y.shape[last] - 1, axis=last)


def _forward(choose: Chooser, x: Any, w: Any, **static: Any) -> tuple[Any, Operands]:
    margin = choose(geometry_of(x, w, static)).margin
    y = _with_margin(x, w, static) if margin else lax.conv_general_dilated(x, w, **static)
    return y, Operands(x, w)


def _backward(choose: Chooser, residuals: Operands, g: Any, needs: Any, **static: Any) -> tuple[Any, Any]:
    x, w = residuals
    need_x, need_w = needs
    geometry = geometry_of(x, w, static)
    chosen = choose(geometry)

    def convolve(x: Any, w: Any) -> Any:
        return lax.conv_general_dilated(x, w, **static)

    x_cotangent = w_cotangent = None
    if need_w and chosen.weight:
        w_cotangent = _weight_cotangent(x, g, static, geometry).astype(w.dtype)
    elif need_w:
        (w_cotangent,) = jax.linear_transpose(lambda w: convolve(x, w), w)(g)
    if need_x and chosen.input:
        x_cotangent = _input_cotangent(w, g, static, geometry).astype(x.dtype)
    elif need_x and chosen.turned:
        x_cotangent = _by_turned_kernel(w, g, static, geometry).astype(x.dtype)
    elif need_x:
        (x_cotangent,) = jax.linear_transpose(lambda x: convolve(x, w), x)(g)
    return x_cotangent, w_cotangent


def _jvp(choose: Chooser, residuals: Operands, tangents: Any, **static: Any) -> Any:
    """Linear in each operand: as the value is computed, so are the tangents."""
    (x, w), (x_dot, w_dot) = residuals, tangents
    pairs = [(a, b) for a, b in ((x_dot, w), (x, w_dot)) if a is not None and b is not None]
    terms = [_forward(choose, *pair, **static)[0] for pair in pairs]
    return terms[0] if len(terms) == 1 else lax.add(*terms)


def _by_turned_kernel(w: Any, g: Any, static: Any, geometry: Geometry) -> Any:
    """The input's cotangent: a convolution of `ȳ`, spread by the strides, with the kernel turned around."""
    lhs, rhs, out = static["dimension_numbers"]
    padding = [
        ((k - 1) * d - lo, n + lo - 1 - (o - 1) * s)
        for n, o, (lo, _), k, d, s in zip(
            geometry.input, geometry.output, static["padding"], geometry.kernel, static["rhs_dilation"],
            geometry.strides, strict=True,
        )
    ]  # fmt: skip
    # Channels change places, so that what is turned lies as a kernel that convolves forwards.
    order = list(range(w.ndim))
    order[rhs[0]], order[rhs[1]] = rhs[1], rhs[0]
    turned = lax.transpose(lax.rev(w, rhs[2:]), order)
    return lax.conv_general_dilated(
        g,
        turned,
        window_strides=(1,) * len(padding),
        padding=padding,
        lhs_dilation=geometry.strides,
        rhs_dilation=static["rhs_dilation"],
        dimension_numbers=lax.ConvDimensionNumbers(out, rhs, lhs),
        precision=static["precision"],
        preferred_element_type=static["preferred_element_type"],
    )


def _input_cotangent(w: Any, g: Any, static: Any, geometry: Geometry) -> Any:
    lhs, _, out = static["dimension_numbers"]
    matrix = _kernel_matrix(w, static, geometry)

    def of_chunk(g: Any) -> Any:
        patches = _product(g.reshape(-1, geometry.outputs), matrix, (1, 1), static)
        return _sum_of_patches(patches, static, geometry).astype(w.dtype)

    x = _mapped_in_chunks(of_chunk, chunk(geometry), with_channels_last(g, out))
    return _from_channels_last(x, lhs)


def _weight_cotangent(x: Any, g: Any, static: Any, geometry: Geometry) -> Any:
    lhs, rhs, out = static["dimension_numbers"]

    def of_chunk(x: Any, g: Any) -> Any:
        # Patches first: the other order makes XLA's CPU backend copy a transpose.
        return _product(patches_of(x, static, geometry), g.reshape(-1, geometry.outputs), (0, 0), static)

    # Transposed before the loop, where XLA does so too for its own convolutions, and what is around them.
    channels_last = with_channels_last(x, lhs), with_channels_last(g, out)
    matrix = _summed_over_chunks(of_chunk, chunk(geometry), *channels_last)
    kernel = matrix.reshape(*geometry.kernel, geometry.inputs, geometry.outputs)
    return lax.transpose(kernel, np.argsort((*rhs[2:], rhs[1], rhs[0])))


def _applies(choose: Chooser, x: Any, w: Any, **static: Any) -> bool | str:
    if static["feature_group_count"] != 1 or static["batch_group_count"] != 1:
        return "the convolution has groups"
    if any(d != 1 for d in static["lhs_dilation"]):
        return "the input is dilated"
    if any(lo < 0 or hi < 0 for lo, hi in static["padding"]):
        return "the padding is negative"
    if x.dtype != w.dtype or not jnp.issubdtype(x.dtype, jnp.floating):
        return f"the operands are {x.dtype} and {w.dtype}"
    geometry = geometry_of(x, w, static)
    if not geometry.kernel:
        return "the convolution has no spatial axis"
    if 0 in (geometry.batch, geometry.inputs, geometry.outputs, *geometry.input, *geometry.output):
        return "the input or the result is empty"
    if not any(choose(geometry)):
        return "XLA's convolution is as fast at this size"
    return True


def _equations(choose: Chooser, op: OperatorSymbols) -> Equations:
    x, w = op.args
    static = dict(op.static)

    def back(i: int, g: Any, x: Any, w: Any) -> Any:
        return _backward(choose, Operands(x, w), g, (i == 0, i == 1), **static)[i]

    return Equations(
        apply("conv", lambda x, w: _forward(choose, x, w, **static)[0], x, w),
        (
            apply("convᵀ", lambda g, w: back(0, g, jnp.zeros(x.shape, x.type.dtype), w), op.cotangent, w),
            apply("corr", lambda x, g: back(1, g, x, jnp.zeros(w.shape, w.type.dtype)), x, op.cotangent),
        ),
    )


def rule(choose: Chooser = plan) -> Rule:
    """The rule of a convolution whose ways are chosen by `choose(geometry) -> Plan`."""
    return Rule(
        partial(_forward, choose),
        partial(_backward, choose),
        partial(_equations, choose),
        platforms=frozenset({"cpu"}),
        applies=partial(_applies, choose),
        jvp=partial(_jvp, choose),
    )


RULES: dict[OperatorKey, Rule] = {"conv_general_dilated": rule()}
