"""An input as patches, chunk by chunk of the batch: what a convolution's cotangents are products of.

`patches(x)` (im2col) has a row for each output position and a column for each tap and input channel; its
transpose (col2im) adds every entry of a patch where it was taken from. Both are made and used up in chunks of
a few examples, so that a chunk's patches stay in the cache, and never more than one chunk is held.

Source: Chellapilla et al., "High performance convolutional neural networks for document processing", 2006;
the chunks are our own.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from funcprop import _jax
from funcprop.program.dtypes import single_at_least
from funcprop.rules.machine import Machine, host, near_cache


class Geometry(NamedTuple):
    """The sizes of a convolution, whatever its layout, for one of the devices over which the batch is split.

    There are `parts` of these; `batch` is that of one. `beside` is that of another of the same input.
    """

    batch: int
    input: tuple[int, ...]
    output: tuple[int, ...]
    kernel: tuple[int, ...]
    inputs: int
    outputs: int
    strides: tuple[int, ...]
    padded: bool
    itemsize: int
    machine: Machine | None = None
    parts: int = 1
    beside: Any = None

    @property
    def chunk_bytes(self) -> int:
        """Bytes of a chunk's patches and outputs, which are to stay in a core's cache."""
        return near_cache(self.machine or host())

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


def chunk(geometry: Geometry) -> int:
    """How many examples make a chunk: what the near cache holds, if possible a divisor of the batch.

    All of them for a pointwise convolution, whose patches are the input itself. On several devices each has
    an equal part of every chunk.
    """
    if math.prod(geometry.kernel) == 1:
        return geometry.batch * geometry.parts
    most = max(1, min(geometry.batch, geometry.chunk_bytes // max(1, geometry.bytes_of_example)))
    divisor = max(n for n in range(1, most + 1) if geometry.batch % n == 0)
    return divisor * geometry.parts if 2 * divisor > most or geometry.parts > 1 else most


def geometry_of(x: Any, w: Any, static: Any, machine: Machine | None = None, devices: int = 1) -> Geometry:
    """The sizes of a convolution of `x` by `w` with these parameters, its batch split over some devices."""
    lhs, rhs, _ = static["dimension_numbers"]
    batch = x.shape[lhs[0]]
    parts = math.gcd(devices, batch) if isinstance(batch, int) else 1  # A symbolic size may not divide.
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
    sizes = batch // parts, spatial, output, kernel, inputs, outputs, strides
    return Geometry(*sizes, padded, x.dtype.itemsize, machine, parts)


# --- one chunk --------------------------------------------------------------------------------


def _taps(static: Any, geometry: Geometry) -> Iterator[tuple[list[int], list[int]]]:
    """Where each tap of the kernel meets the padded input: the first position, and one past the last."""
    for tap in itertools.product(*map(range, geometry.kernel)):
        start = [k * d for k, d in zip(tap, static["rhs_dilation"], strict=True)]
        ends = zip(start, geometry.output, geometry.strides, strict=True)
        yield start, [a + (n - 1) * s + 1 for a, n, s in ends]


def patches_of(x: Any, static: Any, geometry: Geometry) -> Any:
    """The input as a matrix: a row for each output position, a column for each tap and channel.

    Axis by axis: 5 + 5 slices and not 25, which XLA compiles in a quarter of the time.
    """
    zero = np.array(0, x.dtype)
    x = lax.pad(x, zero, [(0, 0, 0), *((lo, hi, 0) for lo, hi in static["padding"]), (0, 0, 0)])
    spatial = len(geometry.kernel)
    for i in reversed(range(spatial)):
        dilation, stride = static["rhs_dilation"][i], geometry.strides[i]
        span = (geometry.output[i] - 1) * stride + 1
        starts = [k * dilation for k in range(geometry.kernel[i])]
        slices = [lax.slice_in_dim(x, a, a + span, stride, axis=1 + i) for a in starts]
        x = jnp.stack(slices, 1 + spatial)
        x = x.reshape(*x.shape[: 1 + spatial], -1)
    return x.reshape(-1, geometry.columns)


def sum_of_patches(patches: Any, static: Any, geometry: Geometry) -> Any:
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


def from_channels_last(x: Any, spec: Sequence[int]) -> Any:
    """The inverse of `with_channels_last`."""
    return lax.transpose(x, np.argsort((spec[0], *spec[2:], spec[1])))


def kernel_matrix(w: Any, static: Any, geometry: Geometry) -> Any:
    """The kernel with a row for each entry of a patch and a column for each output channel."""
    spec = static["dimension_numbers"].rhs_spec
    return lax.transpose(w, (*spec[2:], spec[1], spec[0])).reshape(geometry.columns, geometry.outputs)


def product(a: Any, b: Any, contracted: tuple[int, int], static: Any) -> Any:
    """The contraction of two matrices over an axis of each, in single precision at least."""
    dimensions = (((contracted[0],), (contracted[1],)), ((), ()))
    # Sums over chunks and taps follow, which low precision would round one by one.
    wide = single_at_least(a, b)
    return lax.dot_general(a, b, dimensions, precision=static["precision"], preferred_element_type=wide)


# --- all chunks -------------------------------------------------------------------------------


class _Chunks:
    """Parts of equal size of a batch.

    If the batch can be divided, chunk i has the examples i, i + count, i + 2 count …: where the batch is
    spread over devices, each has a part of every chunk. Otherwise chunks follow each other, and the last one
    starts early enough.
    """

    def __init__(self, size: int, batch: int) -> None:
        self.size, self.batch, self.count = size, batch, -(-batch // size)
        self.divided = batch % size == 0

    def cut(self, a: Any) -> Any:
        """An array in the form that `at` reads and `put` writes."""
        return a.reshape(self.size, self.count, *a.shape[1:]) if self.divided else a

    def start(self, i: Any) -> Any:
        """Where chunk `i` starts."""
        return i if self.divided else jnp.minimum(i * self.size, self.batch - self.size)

    def at(self, a: Any, i: Any) -> Any:
        """Chunk `i`."""
        if self.divided:
            return lax.dynamic_index_in_dim(a, i, 1, keepdims=False)
        return lax.dynamic_slice_in_dim(a, self.start(i), self.size)

    def put(self, a: Any, part: Any, i: Any) -> Any:
        """The array with another chunk `i`."""
        if self.divided:
            return lax.dynamic_update_index_in_dim(a, part, i, 1)
        return lax.dynamic_update_slice_in_dim(a, part, self.start(i), 0)


def mapped_in_chunks(fun: Callable[[Any], Any], size: int, a: Any) -> Any:
    """`fun` over the chunks of a batch."""
    if size == len(a):
        return fun(a)
    part = jax.eval_shape(fun, jax.ShapeDtypeStruct((size, *a.shape[1:]), a.dtype))

    chunks = _Chunks(size, len(a))

    def step(result: Any, i: Any) -> tuple[Any, None]:
        # What two chunks share is written twice, alike.
        return chunks.put(result, fun(chunks.at(chunks.cut(a), i)), i), None

    nothing = chunks.cut(jnp.zeros((len(a), *part.shape[1:]), part.dtype))
    return _over_chunks(step, nothing, chunks, [a]).reshape(len(a), *part.shape[1:])


def summed_over_chunks(fun: Callable[..., Any], size: int, *arrays: Any) -> Any:
    """The sum of `fun` over the chunks of a batch."""
    if size == len(arrays[0]):
        return fun(*arrays)
    part = jax.eval_shape(fun, *(jax.ShapeDtypeStruct((size, *a.shape[1:]), a.dtype) for a in arrays))

    chunks = _Chunks(size, len(arrays[0]))

    def step(total: Any, i: Any) -> tuple[Any, None]:
        # Cut in the loop: XLA would compute twice what is read in one form here and in another elsewhere.
        here = [chunks.at(chunks.cut(a), i) for a in arrays]
        if not chunks.divided:
            # The last chunk begins with examples that were counted already.
            fresh = chunks.start(i) + np.arange(size) >= i * size
            here = [jnp.where(lax.broadcast_in_dim(fresh, a.shape, [0]), a, 0) for a in here]
        return total + fun(*here), None

    return _over_chunks(step, jnp.zeros(part.shape, part.dtype), chunks, arrays)


def _over_chunks(step: Callable[..., Any], start: Any, chunks: _Chunks, arrays: Sequence[Any]) -> Any:
    # All of it in the loop: a first chunk before it would be scheduled early, and held.
    start, *_ = _jax.align_varying_axes([start, *arrays])
    return lax.scan(step, start, jnp.arange(chunks.count))[0]
