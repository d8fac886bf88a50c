"""Convolution as a product of patches, where that is faster than XLA's own convolution.

    y[n, i, o]  = Σ_{k, c} x[n, i·s + k·d − p, c] w[k, c, o]        a product  patches(x) · w
    w̄[k, c, o] = Σ_{n, i} x[n, i·s + k·d − p, c] ȳ[n, i, o]        a product  patches(x)ᵀ · ȳ
    x̄          = the transposed convolution of ȳ with w            left to XLA

`patches(x)` (im2col) has a row for each output position and a column for each tap and input channel. It is
made anew for each product and never saved: what is saved is `x` and `w`, as by autodiff. Which of the two
ways is taken for the value and for the weight gradient is decided by `plan`, from shapes alone.

Source: Chellapilla et al., "High performance convolutional neural networks for document processing", 2006.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from funcprop.expressions import Equations, OperatorSymbols, apply
from funcprop.registry import OperatorKey, Rule


class Operands(NamedTuple):
    """The input and the kernel."""

    x: Any
    w: Any


class Geometry(NamedTuple):
    """The sizes of a convolution, whatever its layout."""

    batch: int
    output: tuple[int, ...]
    kernel: tuple[int, ...]
    inputs: int
    outputs: int
    strides: tuple[int, ...]

    @property
    def rows(self) -> int:
        """Output positions over the whole batch."""
        return self.batch * math.prod(self.output)

    @property
    def columns(self) -> int:
        """Entries of one patch."""
        return math.prod(self.kernel) * self.inputs


class Plan(NamedTuple):
    """Which results are computed as products of patches; the others are XLA's convolutions."""

    value: bool
    weight: bool


Chooser = Callable[[Geometry], Plan]


def plan(geometry: Geometry) -> Plan:
    """The cost model: a threshold, from a few shapes measured on two x86 cores.

    A convolution of 1 × 1 is a product already. Making patches costs one pass over `rows × columns` numbers,
    which a product of enough output channels hides.
    """
    if math.prod(geometry.kernel) == 1:
        return Plan(False, False)
    work = geometry.rows * geometry.columns * geometry.outputs
    large = work > 1 << 24
    return Plan(value=large and geometry.inputs >= 16, weight=large)


def _geometry(x: Any, w: Any, static: Any) -> Geometry:
    lhs, rhs, _ = static["dimension_numbers"]
    kernel = tuple(w.shape[a] for a in rhs[2:])
    spatial = [x.shape[a] for a in lhs[2:]]
    output = tuple(
        max(0, (n + lo + hi - (k - 1) * d - 1) // s + 1)
        for n, (lo, hi), k, d, s in zip(
            spatial, static["padding"], kernel, static["rhs_dilation"], static["window_strides"], strict=True
        )
    )
    strides = tuple(static["window_strides"])
    return Geometry(x.shape[lhs[0]], output, kernel, x.shape[lhs[1]], w.shape[rhs[0]], strides)


def _patches(x: Any, static: Any, geometry: Geometry) -> Any:
    """The input as a matrix: a row for each output position, a column for each tap and channel."""
    lhs = static["dimension_numbers"].lhs_spec
    x = lax.transpose(x, (lhs[0], *lhs[2:], lhs[1]))
    x = lax.pad(
        x, np.array(0, x.dtype), [(0, 0, 0), *((lo, hi, 0) for lo, hi in static["padding"]), (0, 0, 0)]
    )
    slices = []
    for tap in itertools.product(*map(range, geometry.kernel)):
        start = [k * d for k, d in zip(tap, static["rhs_dilation"], strict=True)]
        limit = [
            a + (n - 1) * s + 1 for a, n, s in zip(start, geometry.output, geometry.strides, strict=True)
        ]
        slices.append(
            lax.slice(x, (0, *start, 0), (x.shape[0], *limit, x.shape[-1]), (1, *geometry.strides, 1))
        )
    return lax.concatenate(slices, x.ndim - 1).reshape(geometry.rows, geometry.columns)


def _product(a: Any, b: Any, contracted: tuple[int, int], static: Any) -> Any:
    return lax.dot_general(
        a,
        b,
        (((contracted[0],), (contracted[1],)), ((), ())),
        precision=static["precision"],
        preferred_element_type=static["preferred_element_type"],
    )


def _forward(choose: Chooser, x: Any, w: Any, **static: Any) -> tuple[Any, Operands]:
    geometry = _geometry(x, w, static)
    if not choose(geometry).value:
        return lax.conv_general_dilated(x, w, **static), Operands(x, w)
    _, rhs, out = static["dimension_numbers"]
    matrix = lax.transpose(w, (*rhs[2:], rhs[1], rhs[0])).reshape(geometry.columns, geometry.outputs)
    y = _product(_patches(x, static, geometry), matrix, (1, 0), static)
    y = y.reshape(geometry.batch, *geometry.output, geometry.outputs)
    return lax.transpose(y, _inverse((out[0], *out[2:], out[1]))), Operands(x, w)


def _backward(choose: Chooser, residuals: Operands, g: Any, needs: Any, **static: Any) -> tuple[Any, Any]:
    x, w = residuals
    need_x, need_w = needs

    def convolve(x: Any, w: Any) -> Any:
        return lax.conv_general_dilated(x, w, **static)

    x_cotangent = w_cotangent = None
    if need_x:
        (x_cotangent,) = jax.linear_transpose(lambda x: convolve(x, w), x)(g)
    if need_w:
        geometry = _geometry(x, w, static)
        if choose(geometry).weight:
            w_cotangent = _weight_cotangent(x, g, static, geometry).astype(w.dtype)
        else:
            (w_cotangent,) = jax.linear_transpose(lambda w: convolve(x, w), w)(g)
    return x_cotangent, w_cotangent


def _weight_cotangent(x: Any, g: Any, static: Any, geometry: Geometry) -> Any:
    _, rhs, out = static["dimension_numbers"]
    g = lax.transpose(g, (out[0], *out[2:], out[1])).reshape(geometry.rows, geometry.outputs)
    # Patches first: the other order makes XLA's CPU backend copy a transpose.
    matrix = _product(_patches(x, static, geometry), g, (0, 0), static)
    kernel = matrix.reshape(*geometry.kernel, geometry.inputs, geometry.outputs)
    return lax.transpose(kernel, _inverse((*rhs[2:], rhs[1], rhs[0])))


def _inverse(permutation: Sequence[int]) -> tuple[int, ...]:
    return tuple(int(i) for i in np.argsort(permutation))


def _applies(choose: Chooser, x: Any, w: Any, **static: Any) -> bool | str:
    if static["feature_group_count"] != 1 or static["batch_group_count"] != 1:
        return "the convolution has groups"
    if any(d != 1 for d in static["lhs_dilation"]):
        return "the input is dilated"
    if any(lo < 0 or hi < 0 for lo, hi in static["padding"]):
        return "the padding is negative"
    if x.dtype != w.dtype or not jnp.issubdtype(x.dtype, jnp.floating):
        return f"the operands are {x.dtype} and {w.dtype}"
    if not any(choose(_geometry(x, w, static))):
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
    )


RULES: dict[OperatorKey, Rule] = {"conv_general_dilated": rule()}
