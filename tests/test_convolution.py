"""Convolution by products of patches against XLA's, over random geometries; what is left to XLA."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import compiled
from hypothesis import example, given, settings
from hypothesis import strategies as st

import funcprop as fp
from funcprop.rules.primitives import convolution, patches

PATCHES = convolution.ConvolutionPlan(margin=True, weight=True, input=True)
TURNED = PATCHES._replace(input=False, turned=True)  # The input's cotangent as it is computed in loops.


def everywhere(plan):
    return fp.rules.autodiff.replace({"conv_general_dilated": convolution.rule(lambda geometry: plan)})


RULES = everywhere(PATCHES)
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
    batch, inputs, outputs = draw(st.integers(1, 5)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    layout = draw(st.sampled_from(LAYOUTS[rank]))
    spatial = [c for c in layout[0] if c not in "NC"]
    named = dict(zip(spatial, sizes, strict=True)) | {"N": batch, "C": inputs}
    named_kernel = dict(zip(spatial, kernel, strict=True)) | {"I": inputs, "O": outputs}
    x, w = tuple(named[c] for c in layout[0]), tuple(named_kernel[c] for c in layout[1])
    return geometry(x, w, strides, padding, dilation, layout)


def geometry(x, w, strides, padding, dilation, layout):
    return x, w, {
        "window_strides": strides, "padding": padding, "rhs_dilation": dilation, "dimension_numbers": layout,
    }  # fmt: skip


@settings(max_examples=20)
@given(convolutions(), st.sampled_from([PATCHES, TURNED]))
# Strides that leave entries unread, a kernel as wide as the padded input, padding on one side alone.
@example(geometry((2, 6, 5, 2), (3, 2, 2, 3), [3, 2], [(0, 0), (0, 0)], [1, 1], LAYOUTS[2][0]), TURNED)
@example(geometry((1, 2, 3), (3, 3, 1), [1], [(1, 0)], [1], LAYOUTS[1][0]), PATCHES)
@example(geometry((3, 1, 4, 4), (2, 1, 2, 3), [1, 1], [(0, 2), (1, 0)], [2, 1], LAYOUTS[2][1]), TURNED)
def test_equals_xla(case, plan):
    assert_equals_xla(*case, everywhere(plan))


@pytest.mark.parametrize("batch", [4, 5])
def test_chunks_of_two_examples(batch):
    """Also where one example remains, which the last chunk shares with the one before."""
    case = geometry(
        (batch, 64, 64, 2), (3, 3, 2, 9), [1, 1], [(1, 1), (1, 1)], [1, 1], ("NHWC", "HWIO", "NHWC")
    )
    sizes = patches.Geometry(batch, (64, 64), (64, 64), (3, 3), 2, 9, (1, 1), True, 8)
    assert patches.chunk(sizes) == 2
    assert_equals_xla(*case)


@pytest.mark.parametrize(("batch", "size"), [(5, 2), (7, 3), (5, 4), (6, 2), (4, 4), (3, 1)])
def test_sums_and_maps_over_chunks_are_those_over_the_batch(batch, size):
    a, b = np.random.default_rng(0).normal(size=(2, batch, 3))
    total = patches.summed_over_chunks(lambda a, b: a.T @ b, size, a, b)
    np.testing.assert_allclose(total, a.T @ b, rtol=1e-13)
    np.testing.assert_allclose(patches.mapped_in_chunks(lambda a: 2 * a + 1, size, jnp.asarray(a)), 2 * a + 1)


def assert_equals_xla(x_shape, w_shape, options, rules=RULES):
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=x_shape), rng.normal(size=w_shape)

    def fun(x, w):
        return jax.lax.conv_general_dilated(x, w, **options)

    @compiled
    def both(x, w, g):
        expected, pullback = jax.vjp(fun, x, w)
        actual, ours = fp.vjp(fun, x, w, rules=rules)
        return [actual, *ours(g)], [expected, *pullback(g)]

    actual, expected = both(x, w, rng.normal(size=jax.eval_shape(fun, x, w).shape))
    for a, e in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-12, atol=1e-12 * max(1, np.abs(e).max(initial=0)))


@pytest.mark.parametrize(("padding", "row"), [("SAME", 2), ("VALID", 0)])
def test_what_is_not_finite_spreads_as_in_xla(padding, row):
    """An infinity or NaN in the input, in the kernel, or in a row of the cotangent that met no padding."""
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(3, 8, 8, 2)), rng.normal(size=(3, 3, 2, 4))

    def fun(x, w):
        return jax.lax.conv_general_dilated(x, w, (1, 1), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))

    @jax.jit
    def both(x, w, g):
        expected, pullback = jax.vjp(fun, x, w)
        actual, ours = fp.vjp(fun, x, w, rules=RULES)
        return [actual, *ours(g)], [expected, *pullback(g)]

    operands = x, w, rng.normal(size=jax.eval_shape(fun, x, w).shape)
    for i, place in enumerate([(1, 0, 3, 1), (0, 2, 1, 3), (1, row, 3, 2)]):
        for value in (np.inf, np.nan):
            broken = [a.copy() for a in operands]
            broken[i][place] = value
            actual, expected = both(*broken)
            assert not all(np.isfinite(e).all() for e in expected)
            for a, e in zip(actual, expected, strict=True):
                np.testing.assert_allclose(a, e, rtol=1e-12, atol=1e-12)


def reasons(fun, *args):
    return [m.reason for m in fp.matches(fun, fp.rules.handwritten)(*args)]


def test_what_the_rule_leaves_alone():
    def conv(x, w, **options):
        layout = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            x, w, (1, 1), ((1, 1), (1, 1)), dimension_numbers=layout, **options
        )

    big, kernel = jnp.ones((64, 16, 16, 32)), jnp.ones((3, 3, 32, 64))
    assert reasons(conv, big, kernel) == [None]
    assert reasons(conv, big[:0], kernel) == ["the input or the result is empty"]
    assert reasons(conv, big[:1, :8, :8], kernel) == ["XLA's convolution is as fast at this size"]
    grouped = reasons(lambda x, w: conv(x, w, feature_group_count=2), big, kernel[:, :, :16])
    assert grouped == ["the convolution has groups"]
    dilated = reasons(lambda x, w: conv(x, w, lhs_dilation=(2, 2)), big, kernel)
    assert dilated == ["the input is dilated"]
    assert reasons(conv, big.astype(complex), kernel.astype(complex)) == [
        "the operands are complex128 and complex128"
    ]


# Sizes, and which of margin, kernel's and input's cotangent are computed another way than XLA's.
CHOICES = {
    "images": ({"inputs": 3, "outputs": 64}, (False, True, True)),
    "images with strides": ({"inputs": 3, "outputs": 64, "strides": (2, 2)}, (False, True, False)),
    "many channels": ({"inputs": 32, "outputs": 64}, (False, True, False)),
    "few channels": ({"inputs": 32, "outputs": 8}, (False, False, False)),
    "few positions": ({"inputs": 32, "outputs": 64, "output": (8, 8)}, (False, False, False)),
    "without padding": ({"inputs": 32, "outputs": 16, "padded": False}, (True, True, False)),
    "short rows": ({"inputs": 32, "outputs": 16, "padded": False, "output": (64, 7)}, (False, True, False)),
    "one chunk is too small": ({"inputs": 256, "outputs": 64}, (False, False, False)),
    "pointwise": ({"kernel": (1, 1), "inputs": 16, "outputs": 64, "padded": False}, (False, True, True)),
    "pointwise to few": ({"kernel": (1, 1), "inputs": 64, "outputs": 16}, (False, True, False)),
    "pointwise, few rows": (
        {"kernel": (1, 1), "inputs": 16, "outputs": 64, "output": (5, 5)}, (False, False, False),
    ),
    "pointwise, wider by strides": (
        {"kernel": (1, 1), "inputs": 16, "outputs": 64, "strides": (2, 2)}, (False, True, False),
    ),
    "pointwise by strides, beside a convolution of XLA's": (
        {"kernel": (1, 1), "inputs": 16, "outputs": 32, "strides": (2, 2)}, (False, False, False),
    ),
    "pointwise, narrower by strides": (
        {"kernel": (1, 1), "inputs": 64, "outputs": 16, "strides": (2, 2)}, (False, False, True),
    ),
    "narrower by strides": (
        {"inputs": 48, "outputs": 32, "strides": (2, 2), "output": (9, 9)}, (False, False, True),
    ),
    "narrower by strides, few rows": (
        {"inputs": 48, "outputs": 32, "strides": (2, 2), "output": (7, 8)}, (False, False, False),
    ),
    "narrower by strides, small batch": (
        {"batch": 16, "inputs": 48, "outputs": 32, "strides": (2, 2), "output": (16, 16)},
        (False, False, False),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CHOICES)
def test_what_is_computed_another_way(name):
    """What `experiments/convolution_costs.py` measured; a choice that changes is to be measured again."""
    sizes, expected = CHOICES[name]
    usual = patches.Geometry(40, (32, 32), (32, 32), (3, 3), 1, 1, (1, 1), True, 4)
    found = convolution.plan(usual._replace(**sizes))
    assert (found.margin, found.weight, found.input) == expected


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_low_precision_is_no_worse_than_autodiffs(dtype):
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(4, 8, 8, 8)), rng.normal(size=(3, 3, 8, 8))
    low = jnp.asarray(x, dtype), jnp.asarray(w, dtype)

    def loss(x, w):
        y = jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return jnp.sum(y.astype(float) ** 2)

    exact = jax.grad(loss, 1)(*(a.astype(float) for a in low))
    theirs, ours = jax.grad(loss, 1)(*low), fp.grad(loss, 1, rules=RULES)(*low)
    assert ours.dtype == dtype
    error = lambda a: np.max(np.abs(np.asarray(a, float) - exact)) / np.max(np.abs(exact))  # noqa: E731
    assert error(ours) <= max(1.1 * error(theirs), 1e-6)


@pytest.mark.nightly
def test_gradients_above_the_threshold():
    """Strided, pointwise and grouped convolutions, with the plan that the library makes."""

    def loss(x, w, stride, **options):
        layout = ("NHWC", "HWIO", "NHWC")
        return jnp.sum(
            jnp.sin(
                jax.lax.conv_general_dilated(
                    x, w, (stride, stride), "VALID", dimension_numbers=layout, **options
                )
            )
        )

    rng = np.random.default_rng(0)
    x = rng.normal(size=(33, 33, 33, 16))
    for kernel, stride, groups in ((3, 2, 1), (1, 1, 1), (3, 2, 4)):
        w = rng.normal(size=(kernel, kernel, 16 // groups, 48))
        conv = lambda x, w: loss(x, w, stride, feature_group_count=groups)  # noqa: B023, E731
        assert [reason is None for reason in reasons(conv, x, w)] == [groups == 1]
        expected, actual = (jax.jit(grad(conv, (0, 1)))(x, w) for grad in (jax.grad, fp.grad))
        for a, e in zip(actual, expected, strict=True):
            np.testing.assert_allclose(a, e, rtol=1e-12, atol=1e-12 * np.max(np.abs(e)))


@pytest.mark.parametrize("stem", [False, True])
def test_holds_no_more_than_autodiff(stem):
    """Temporary bytes of a residual block's gradient; a chunk of patches is all that is added."""

    def block(x, kernels):
        def conv(x, w, stride):
            layout = ("NHWC", "HWIO", "NHWC")
            return jax.lax.conv_general_dilated(x, w, (stride, stride), "SAME", dimension_numbers=layout)

        *before, first, second, short = kernels
        for w in before:
            x = jax.nn.relu(conv(x, w, 1))
        y = jax.nn.relu(conv(x, first, 2))
        return jnp.mean(jax.nn.relu(conv(y, second, 1) + conv(x, short, 2)) ** 2)

    x = jax.ShapeDtypeStruct((16, 32, 32, 3) if stem else (64, 32, 32, 32), jnp.float32)
    shapes = [(3, 3, 32, 64), (3, 3, 64, 64), (1, 1, 32, 64)]
    shapes = [(3, 3, 3, 32), (3, 3, 32, 32), *shapes] if stem else shapes
    kernels = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    assert sum(m.reason is None for m in fp.matches(block)(x, kernels)) == (1 if stem else 3)
    theirs, ours = (
        jax.jit(grad(block, 1)).lower(x, kernels).compile().memory_analysis().temp_size_in_bytes
        for grad in (jax.grad, fp.grad)
    )
    assert ours <= 1.02 * theirs


def test_a_shortcut_goes_the_way_of_the_convolution_beside_it():
    """Of a bottleneck's input nothing is copied: both pointwise convolutions read it as it is."""

    def block(x, kernels):
        def conv(x, w, stride=1, groups=1):
            layout = {"dimension_numbers": ("NHWC", "HWIO", "NHWC"), "feature_group_count": groups}
            return jax.lax.conv_general_dilated(x, w, (stride, stride), "SAME", **layout)

        stem, narrow, grouped, wide, short = kernels
        x = jax.nn.relu(conv(x, stem))
        y = jax.nn.relu(conv(jax.nn.relu(conv(x, narrow)), grouped, 2, 4))
        return jnp.mean(jax.nn.relu(conv(y, wide) + conv(x, short, 2)) ** 2)

    x = jax.ShapeDtypeStruct((16, 32, 32, 3), jnp.float32)
    shapes = [(3, 3, 3, 32), (1, 1, 32, 16), (3, 3, 4, 16), (1, 1, 16, 48), (1, 1, 32, 48)]
    kernels = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    assert [m.reason is None for m in fp.matches(block)(x, kernels)] == [True, True, False, True, True]
    theirs, ours = (
        jax.jit(grad(block, 1)).lower(x, kernels).compile().memory_analysis().temp_size_in_bytes
        for grad in (jax.grad, fp.grad)
    )
    assert ours <= 1.02 * theirs


def test_equations_are_true():
    def loss(x, w):
        y = jax.lax.conv_general_dilated(x, w, (2, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return jnp.sum(y**2)

    rng = np.random.default_rng(0)
    fp.derive(loss, (0, 1))(rng.normal(size=(2, 5, 4, 2)), rng.normal(size=(3, 2, 2, 3))).verify()
