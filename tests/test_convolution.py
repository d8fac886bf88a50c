"""Convolution by products of patches against XLA's, over random geometries; what is left to XLA."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import compiled
from hypothesis import given, settings
from hypothesis import strategies as st

import funcprop as fp
from funcprop.primitives import convolution

BY_PATCHES = fp.rules.autodiff.replace(
    {"conv_general_dilated": convolution.rule(lambda geometry: convolution.Plan(True, True))}
)
LAYOUTS = {
    1: [("NHC", "HIO", "NHC"), ("NCH", "OIH", "NCH")],
    2: [
        ("NHWC", "HWIO", "NHWC"),
        ("NCHW", "OIHW", "NCHW"),
        ("NHWC", "OIHW", "NCHW"),
        ("CHWN", "IHWO", "HWNC"),
    ],
    3: [("NDHWC", "DHWIO", "NDHWC")],
}


@st.composite
def convolutions(draw):
    rank = draw(st.integers(1, 3))
    each = lambda low, high: [draw(st.integers(low, high)) for _ in range(rank)]  # noqa: E731
    kernel, strides, dilation, padding = (
        each(1, 3),
        each(1, 3),
        each(1, 2),
        list(zip(each(0, 2), each(0, 2), strict=True)),
    )
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]
    sizes = [
        max(r - lo - hi, 1) + draw(st.integers(0, 4)) for r, (lo, hi) in zip(reach, padding, strict=True)
    ]
    batch, inputs, outputs = (draw(st.integers(1, 3)) for _ in range(3))
    layout = draw(st.sampled_from(LAYOUTS[rank]))
    spatial = [c for c in layout[0] if c not in "NC"]
    named = dict(zip(spatial, sizes, strict=True)) | {"N": batch, "C": inputs}
    named_kernel = dict(zip(spatial, kernel, strict=True)) | {"I": inputs, "O": outputs}
    x, w = tuple(named[c] for c in layout[0]), tuple(named_kernel[c] for c in layout[1])
    return x, w, {
        "window_strides": strides, "padding": padding, "rhs_dilation": dilation, "dimension_numbers": layout,
    }  # fmt: skip


@settings(max_examples=15, deadline=None, derandomize=True)
@given(convolutions())
def test_equals_xla(case):
    x_shape, w_shape, options = case
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=x_shape), rng.normal(size=w_shape)

    def fun(x, w):
        return jax.lax.conv_general_dilated(x, w, **options)

    @compiled
    def both(x, w, g):
        expected, pullback = jax.vjp(fun, x, w)
        actual, ours = fp.vjp(fun, x, w, rules=BY_PATCHES)
        return [actual, *ours(g)], [expected, *pullback(g)]

    g = rng.normal(size=jax.eval_shape(fun, x, w).shape)
    for a, e in zip(*both(x, w, g), strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-12, atol=1e-12)


def reasons(fun, *args):
    return [m.reason for m in fp.matches(fun, fp.rules.handwritten)(*args)]


def test_what_the_rule_leaves_alone():
    def conv(x, w, **options):
        layout = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            x, w, (1, 1), ((1, 1), (1, 1)), dimension_numbers=layout, **options
        )

    big, kernel = jnp.ones((64, 32, 32, 32)), jnp.ones((3, 3, 32, 32))
    assert reasons(conv, big, kernel) == [None]
    assert reasons(conv, big[:1, :8, :8], kernel) == ["XLA's convolution is as fast at this size"]
    grouped = reasons(lambda x, w: conv(x, w, feature_group_count=2), big, kernel[:, :, :16])
    assert grouped == ["the convolution has groups"]
    dilated = reasons(lambda x, w: conv(x, w, lhs_dilation=(2, 2)), big, kernel)
    assert dilated == ["the input is dilated"]
    assert reasons(conv, big.astype(complex), kernel.astype(complex)) == [
        "the operands are complex128 and complex128"
    ]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_low_precision_is_no_worse_than_autodiffs(dtype):
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(4, 8, 8, 8)), rng.normal(size=(3, 3, 8, 8))
    low = jnp.asarray(x, dtype), jnp.asarray(w, dtype)

    def loss(x, w):
        y = jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return jnp.sum(y.astype(float) ** 2)

    exact = jax.grad(loss, 1)(*(a.astype(float) for a in low))
    theirs, ours = jax.grad(loss, 1)(*low), fp.grad(loss, 1, rules=BY_PATCHES)(*low)
    assert ours.dtype == dtype
    error = lambda a: np.max(np.abs(np.asarray(a, float) - exact)) / np.max(np.abs(exact))  # noqa: E731
    assert error(ours) <= max(1.1 * error(theirs), 1e-6)
