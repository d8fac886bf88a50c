"""Convolution: where XLA's own is slow, another way to the same numbers.

    y[n, i, o]  = Σ_{k, c} x[n, i·s + k·d − p, c] w[k, c, o]
    w̄[k, c, o] = Σ_{n, i} x[n, i·s + k·d − p, c] ȳ[n, i, o]        patches(x)ᵀ · ȳ
    x̄[n, j, c] = Σ {ȳ[n, i, o] w[k, c, o] : i·s + k·d − p = j}     the patches of ȳ · wᵀ, added up

The two cotangents are products with the patches of an input, or with their transpose, chunk by chunk of the
batch (`funcprop.rules.primitives.patches`). What is saved is `x` and `w`, as by autodiff.

The value has another way. XLA's CPU backend convolves without padding two to four times more slowly than
with it (batch 128, 15×15, 64→96 channels, 3×3: 63 against 155 GFLOP/s). So one position more is computed at
the end of one axis, and dropped: that *margin* is cheaper than any product of patches.

An infinity or NaN goes where autodiff's goes, but for one in `ȳ` beside the padding: in `w̄` its products with
the zeros of the padding are NaN, which XLA leaves out.

Which way is taken is decided by `plan`, from shapes alone.

Source: Chellapilla et al., "High performance convolutional neural networks for document processing", 2006,
for the products of patches; the margin is our own.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from funcprop.rules.equations import Equations, OperatorSymbols, apply
from funcprop.rules.machine import Machine
from funcprop.rules.primitives.patches import (
    Geometry,
    chunk,
    from_channels_last,
    geometry_of,
    kernel_matrix,
    mapped_in_chunks,
    patches_of,
    product,
    sum_of_patches,
    summed_over_chunks,
    with_channels_last,
)
from funcprop.rules.rule import Rule
from funcprop.rules.rule_set import OperatorKey


class ConvolutionOperands(NamedTuple):
    """The input and the kernel."""

    x: Any
    w: Any


class ConvolutionPlan(NamedTuple):
    """Whether the value is computed with a margin, and each cotangent by patches; otherwise it is XLA's.

    `turned` says that an input's cotangent by XLA is a convolution with a kernel that is turned beforehand.
    In the body of a loop XLA's CPU backend turns it too late, and convolves slowly: 72 × 13×13, 96→64
    channels, 3×3: 29 ms against 5.5.
    """

    margin: bool
    weight: bool
    input: bool
    turned: bool = False


Chooser = Callable[[Geometry], ConvolutionPlan]


class _Ways(NamedTuple):
    """The chooser of ways, and over how many devices a batch is split, of which each has its own sizes."""

    choose: Chooser
    devices: int

    def geometry(self, x: Any, w: Any, static: Any, machine: Machine | None, beside: Any) -> Geometry:
        found = geometry_of(x, w, static, machine, self.devices)
        if beside is None:
            return found
        (x, w), params = beside
        return found._replace(beside=self.geometry(x, w, dict(params), machine, None))


# Where a part took less time by another way than XLA's: the part, its least sizes and its greatest.
_REGIONS: tuple[tuple[str, dict[str, int], dict[str, int]], ...] = (
    ("margin", {"taps": 2, "width": 8, "inputs": 32}, {"padded": 0}),
    ("margin", {"taps": 2, "width": 8, "outputs": 32, "columns": 128}, {"padded": 0}),
    ("weight", {"rows": 1024}, {"taps": 1, "stride": 1}),
    ("weight", {"taps": 2, "rows": 6144, "outputs": 64}, {"chunks": 1}),
    ("weight", {"taps": 2, "rows": 8192, "outputs": 48}, {"chunks": 1}),
    ("weight", {"taps": 2, "rows": 8192, "outputs": 16}, {"chunks": 1, "padded": 0}),
    ("input", {"rows": 1024, "outputs": 32}, {"taps": 1, "stride": 1}),
    ("input", {"rows": 1024, "stride": 2, "narrowing": 0}, {"taps": 1}),
    ("input", {"taps": 2}, {"stride": 1, "chunks": 1, "inputs": 3}),
    ("input", {"batch": 32, "rows": 2500, "stride": 2, "inputs": 48},
     {"taps": 9, "chunks": 1, "outputs": 48}),
    ("input", {"taps": 2, "batch": 32, "stride": 2, "inputs": 32, "narrowing": 0},
     {"taps": 9, "chunks": 1, "padded": 0}),
)  # fmt: skip


def plan(g: Geometry) -> ConvolutionPlan:
    """The cost model, a table read off `experiments/convolution_costs.py` on two x86 cores.

    * The margin: pointwise, XLA is as good; where sums are short, writing takes longer than computing.
    * The kernel's cotangent: XLA's is slow where the sum is long, and slowest without padding. The product is
      slow where it has few columns (output channels) for many rows (`columns`).
    * The input's: XLA convolves many channels to few slowly, and with strides multiplies with the zeros in
      between. (Other padded strides took 0.80 to 0.99 of its time, which is not worth a chunk of memory.)
    * An example larger than a chunk is left to XLA. By patches the kernel's cotangent took 0.35 to 0.64 of
      the time there (3 to 6 MB), but networks of 128 and 256 channels held 1.04 of the bytes.

    Seed 101, drawn when all this had been read off: chosen in 12 of 42 parts and never slower than XLA's way;
    values, kernels' and inputs' cotangents took 0.55, 0.75 and 0.53 of its time, the best choices 0.49, 0.53
    and 0.52. What is missed are examples larger than a chunk, and margins for a few padded or small shapes.

    A pointwise convolution with strides is a shortcut beside another of the same input, one of 3×3 if it is
    not known, and its kernel's cotangent goes the way of that one's. XLA's reads a transposed copy of the
    input, which both share. By patches it took 0.2 to 0.5 of the time, but its part of the input is made
    early, where nothing holds it back: beside XLA's copy, residual networks held 1.02 to 1.06 of autodiff's
    bytes; without that copy 0.70. A copy beside patches is the other way to lose: where blocks begin with a
    pointwise convolution, networks held 1.03 to 1.10.
    """
    sizes = {
        "batch": g.batch, "rows": g.batch * g.rows, "columns": g.columns, "taps": math.prod(g.kernel),
        "width": g.output[-1], "inputs": g.inputs, "outputs": g.outputs, "narrowing": g.inputs - g.outputs,
        "stride": max(g.strides), "padded": g.padded, "chunks": g.bytes_of_example / g.chunk_bytes,
    }  # fmt: skip

    def inside(least: dict[str, int], most: dict[str, int]) -> bool:
        return all(sizes[k] >= n for k, n in least.items()) and all(sizes[k] <= n for k, n in most.items())

    chosen = {part for part, *bounds in _REGIONS if inside(*bounds)}
    weight = "weight" in chosen
    if sizes["taps"] == 1 < sizes["stride"]:
        weight = plan(g.beside or g._replace(kernel=(3,) * len(g.kernel), padded=True)).weight
    return ConvolutionPlan("margin" in chosen, weight, "input" in chosen)


def plan_in_loops(g: Geometry) -> ConvolutionPlan:
    """The plan for convolutions whose cotangents are computed in the body of a loop."""
    return plan(g)._replace(turned=True)


def _with_margin(x: Any, w: Any, static: Any) -> Any:
    """The convolution, with one position more at the end of the last spatial axis, which is dropped."""
    *before, (low, high) = static["padding"]
    padding = (*before, (low, high + static["window_strides"][-1]))
    y = lax.conv_general_dilated(x, w, **{**static, "padding": padding})
    last = static["dimension_numbers"].out_spec[-1]
    return lax.slice_in_dim(y, 0, y.shape[last] - 1, axis=last)


def _forward(
    ways: _Ways, x: Any, w: Any, *, machine: Machine | None = None, beside: Any = None, **static: Any
) -> tuple[Any, ConvolutionOperands]:
    margin = ways.choose(ways.geometry(x, w, static, machine, beside)).margin
    y = _with_margin(x, w, static) if margin else lax.conv_general_dilated(x, w, **static)
    return y, ConvolutionOperands(x, w)


def _backward(
    ways: _Ways, residuals: ConvolutionOperands, g: Any, needs: Any, *, machine: Machine | None = None,
    beside: Any = None, **static: Any,
) -> tuple[Any, Any]:  # fmt: skip
    x, w = residuals
    need_x, need_w = needs
    geometry = ways.geometry(x, w, static, machine, beside)
    chosen = ways.choose(geometry)

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


def _jvp(ways: _Ways, residuals: ConvolutionOperands, tangents: Any, **static: Any) -> Any:
    """Linear in each operand: as the value is computed, so are the tangents."""
    (x, w), (x_dot, w_dot) = residuals, tangents
    pairs = [(a, b) for a, b in ((x_dot, w), (x, w_dot)) if a is not None and b is not None]
    terms = [_forward(ways, *pair, **static)[0] for pair in pairs]
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
    matrix = kernel_matrix(w, static, geometry)

    def of_chunk(g: Any) -> Any:
        patches = product(g.reshape(-1, geometry.outputs), matrix, (1, 1), static)
        return sum_of_patches(patches, static, geometry).astype(w.dtype)

    x = mapped_in_chunks(of_chunk, chunk(geometry), with_channels_last(g, out))
    return from_channels_last(x, lhs)


def _weight_cotangent(x: Any, g: Any, static: Any, geometry: Geometry) -> Any:
    lhs, rhs, out = static["dimension_numbers"]

    def of_chunk(x: Any, g: Any) -> Any:
        # Patches first: the other order makes XLA's CPU backend copy a transpose.
        return product(patches_of(x, static, geometry), g.reshape(-1, geometry.outputs), (0, 0), static)

    # Transposed before the loop, where XLA does so too for its own convolutions, and what is around them.
    channels_last = with_channels_last(x, lhs), with_channels_last(g, out)
    matrix = summed_over_chunks(of_chunk, chunk(geometry), *channels_last)
    kernel = matrix.reshape(*geometry.kernel, geometry.inputs, geometry.outputs)
    return lax.transpose(kernel, np.argsort((*rhs[2:], rhs[1], rhs[0])))


def _applies(
    ways: _Ways, x: Any, w: Any, *, machine: Machine | None = None, beside: Any = None, **static: Any
) -> bool | str:
    if static["feature_group_count"] != 1 or static["batch_group_count"] != 1:
        return "the convolution has groups"
    if any(d != 1 for d in static["lhs_dilation"]):
        return "the input is dilated"
    if any(lo < 0 or hi < 0 for lo, hi in static["padding"]):
        return "the padding is negative"
    if x.dtype != w.dtype or not jnp.issubdtype(x.dtype, jnp.floating):
        return f"the operands are {x.dtype} and {w.dtype}"
    geometry = ways.geometry(x, w, static, machine, beside)
    if not geometry.kernel:
        return "the convolution has no spatial axis"
    if 0 in (geometry.batch, geometry.inputs, geometry.outputs, *geometry.input, *geometry.output):
        return "the input or the result is empty"
    if not any(ways.choose(geometry)):
        return "XLA's convolution is as fast at this size"
    return True


def _equations(ways: _Ways, op: OperatorSymbols) -> Equations:
    x, w = op.args
    static = dict(op.static)

    def back(i: int, g: Any, x: Any, w: Any) -> Any:
        return _backward(ways, ConvolutionOperands(x, w), g, (i == 0, i == 1), **static)[i]

    return Equations(
        apply("conv", lambda x, w: _forward(ways, x, w, **static)[0], x, w),
        (
            apply("convᵀ", lambda g, w: back(0, g, jnp.zeros(x.shape, x.type.dtype), w), op.cotangent, w),
            apply("corr", lambda x, g: back(1, g, x, jnp.zeros(w.shape, w.type.dtype)), x, op.cotangent),
        ),
    )


def rule(choose: Chooser = plan, devices: int = 1) -> Rule:
    """The rule of a convolution whose ways are chosen by `choose(geometry) -> Plan`.

    Of a batch that is split over `devices`, the sizes are those of one.
    """
    ways = _Ways(choose, devices)
    return Rule(
        partial(_forward, ways),
        partial(_backward, ways),
        partial(_equations, ways),
        platforms=frozenset({"cpu"}),
        applies=partial(_applies, ways),
        jvp=partial(_jvp, ways),
        pure=True,
        sized=True,
        neighbourly=True,
        ways=_ways,
    )


@functools.cache
def _ways() -> dict[str, Rule]:
    """Each choice between XLA's and the other way to the value and to both cotangents."""
    found = {}
    for parts in itertools.product((False, True), repeat=3):
        if any(parts):
            names = [name for name, is_in in zip(ConvolutionPlan._fields, parts, strict=False) if is_in]
            found[f"another way to {', '.join(names)}"] = replace(rule(_Always(*parts)), ways=None)
    return found


@dataclass(frozen=True)
class _Always:
    """The chooser of one plan for all sizes."""

    margin: bool
    weight: bool
    input: bool

    def __call__(self, geometry: Geometry) -> ConvolutionPlan:
        return ConvolutionPlan(self.margin, self.weight, self.input)


RULES: dict[OperatorKey, Rule] = {"conv_general_dilated": rule()}
