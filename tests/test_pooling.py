"""Max-pooling against JAX's, over random windows, with ties, infinities and NaNs."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import compiled
from flax import linen as nn
from holding import largest_intermediate
from hypothesis import example, given, settings
from hypothesis import strategies as st

import funcprop as fp
from funcprop.rules.primitives import pooling

RULES = fp.rules.autodiff.replace(
    {
        "reduce_window_max": pooling.rule(everywhere=True),
        "reduce_window_min": pooling.rule(minimum=True, everywhere=True),
        fp.layers.relu_max_pool: pooling.rule(relu=True, everywhere=True),
    }
)


@st.composite
def windows(draw):
    rank = draw(st.integers(1, 4))
    each = lambda low, high: [draw(st.integers(low, high)) for _ in range(rank)]  # noqa: E731
    window, strides, padding = each(1, 3), each(1, 3), list(zip(each(0, 2), each(0, 2), strict=True))
    shape = [
        max(w - lo - hi, 1) + draw(st.integers(0, 4)) for w, (lo, hi) in zip(window, padding, strict=True)
    ]
    return tuple(shape), window, strides, padding, draw(st.sampled_from(["distinct", "ties", "nan", "-inf"]))


def data(shape, kind):
    rng = np.random.default_rng(0)
    x = rng.integers(0, 2, shape).astype(float) if kind == "ties" else rng.normal(size=shape)
    special = {"nan": np.nan, "-inf": -np.inf}
    return np.where(rng.random(shape) < 0.4, special[kind], x) if kind in special else x


def assert_equal_jax(pools):
    """Of several pools at once: one program compiles in less time than one for each."""
    xs = [data(shape, kind) for _, shape, kind in pools]
    gs = [
        np.random.default_rng(1).normal(size=jax.eval_shape(pool, x).shape)
        for (pool, *_), x in zip(pools, xs, strict=True)
    ]

    @compiled
    def found(xs, gs):
        results = []
        for (pool, *_), x, g in zip(pools, xs, gs, strict=True):
            (expected, pullback), (actual, ours) = jax.vjp(pool, x), fp.vjp(pool, x, rules=RULES)
            results.append((expected, actual, pullback(g), ours(g)))
        return results

    for pool, (expected, actual, (expected_cotangent,), (cotangent,)) in zip(
        pools, found(xs, gs), strict=True
    ):
        np.testing.assert_array_equal(actual, expected, err_msg=str(pool))
        np.testing.assert_allclose(cotangent, expected_cotangent, rtol=1e-13, atol=1e-14, err_msg=str(pool))


# One entry; a window as wide as the padded input; entries between windows; nothing but −∞ and NaN beside 0.
CORNERS = [
    ((1,), [1], [1], [(0, 0)], "distinct"),
    ((2, 2), [3, 4], [2, 1], [(1, 0), (0, 2)], "ties"),
    ((7, 1), [1, 1], [3, 2], [(0, 0), (0, 0)], "-inf"),
    ((1, 5, 4, 1), [1, 2, 3, 1], [1, 2, 1, 1], [(0, 0), (1, 1), (2, 2), (0, 0)], "nan"),
]


def max_pool(window, strides, padding, before=lambda x: x):
    return lambda x: jax.lax.reduce_window(before(x), -jnp.inf, jax.lax.max, window, strides, padding)


def relu_max_pool(*geometry):
    return max_pool(*geometry, jax.nn.relu)


def min_pool(window, strides, padding):
    return lambda x: jax.lax.reduce_window(x, jnp.inf, jax.lax.min, window, strides, padding)


@settings(max_examples=6)
@given(st.lists(windows(), min_size=5, max_size=5))
@example(CORNERS)
def test_maximum_and_minimum_and_maximum_of_a_relu_equal_jax(cases):
    assert_equal_jax([
        (pool(window, strides, padding), shape, kind)
        for shape, window, strides, padding, kind in cases
        for pool in (max_pool, relu_max_pool, min_pool)
    ])  # fmt: skip


def test_dilated_windows_which_jax_cannot_differentiate():
    x = np.random.default_rng(0).normal(size=(9, 8))

    def pool(x):
        return jax.lax.reduce_window(
            x, -jnp.inf, jax.lax.max, (3, 2), (2, 1), "VALID", window_dilation=(2, 3)
        )

    def by_slices(x):
        taps = [x[2 * i : 2 * i + 5 : 2, 3 * j : 3 * j + 5] for i, j in itertools.product(range(3), range(2))]
        return jnp.max(jnp.stack(taps), axis=0)

    with pytest.raises(NotImplementedError, match="window dilation"):
        jax.grad(lambda x: pool(x).sum())(x)
    np.testing.assert_array_equal(pool(x), by_slices(x))
    actual = fp.grad(lambda x: jnp.sum(pool(x) ** 2), rules=RULES)(x)
    np.testing.assert_allclose(actual, jax.grad(lambda x: jnp.sum(by_slices(x) ** 2))(x), rtol=1e-13)


def test_saves_one_byte_for_each_output():
    def pool(x):
        return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")

    saved = jax.tree.leaves(jax.eval_shape(lambda x: fp.vjp(pool, x, rules=RULES)[1], jnp.ones((4, 8, 8, 3))))
    assert [(s.shape, s.dtype) for s in saved] == [((4, 4, 4, 3), jnp.int8)]


@pytest.mark.parametrize(("window", "stride"), [(2, 2), (3, 2), (3, 3)])
def test_nothing_larger_than_the_input_is_made(window, stride):
    pool = max_pool((1, window, window, 1), (1, stride, stride, 1), "VALID")
    x = jnp.ones((3, 12, 12, 16))
    assert largest_intermediate(fp.grad(lambda x: jnp.sum(pool(x) ** 2), rules=RULES), x) == x.size


def test_a_relu_before_it_saves_nothing():
    pool = max_pool((1, 3, 3, 1), (1, 2, 2, 1), "VALID", jax.nn.relu)
    saved = jax.tree.leaves(jax.eval_shape(lambda x: fp.vjp(pool, x, rules=RULES)[1], jnp.ones((4, 9, 9, 3))))
    assert [(s.shape, s.dtype) for s in saved] == [((4, 4, 4, 3), jnp.int8)]


def test_what_the_rule_leaves_alone():
    def reason(window, **options):
        def pool(x):
            return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, window, (1, 1), "VALID", **options)

        return fp.matches(pool, RULES)(jnp.ones((20, 20)))[0].reason

    assert reason((9, 9)) == "the window has more than 64 taps, which are unrolled"
    assert reason((2, 2), base_dilation=(2, 1)) == "the input is dilated"


def test_windows_larger_than_the_input_are_left_to_jax():
    def pool(x):
        return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (4,), (1,), "VALID").sum()

    np.testing.assert_array_equal(fp.grad(pool, rules=RULES)(jnp.ones(2)), jnp.zeros(2))


@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("shape", [(2, 17, 7, 7), (17, 3, 8, 6), (1, 16, 5, 9)])
def test_channels_first_are_moved_last_and_back(shape, padding):
    def pool(x):
        edges = ((0, 0), (0, 0), (padding, padding), (padding, padding))
        return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 1, 3, 3), (1, 1, 2, 2), edges)

    x = jnp.round(2 * jnp.asarray(np.random.default_rng(0).normal(size=shape)))
    loss = lambda x: jnp.sum(pool(x) * jnp.cos(jnp.arange(pool(x).size)).reshape(pool(x).shape))  # noqa: E731
    expected = jax.value_and_grad(loss)(x)
    actual = fp.value_and_grad(loss, rules=RULES)(x)
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-12, atol=1e-12), actual, expected)


def test_overlapping_windows_need_a_long_axis_beside_them():
    wide = fp.rules.default.on(fp.Machine("cpu", caches=(2**15, 2**20), vector=64))

    def reason(shape, padding="VALID"):
        pool = lambda x: nn.max_pool(x, (3, 3), (2, 2), padding)  # noqa: E731
        return fp.matches(pool, wide)(jax.ShapeDtypeStruct(shape, "float32"))[0].reason

    assert reason((32, 9, 9, 16)) is None
    assert reason((1024, 9, 9, 4)) is None
    for small in ((16, 9, 9, 16), (512, 9, 9, 4)):
        assert reason(small) == "its windows overlap, and it is too small to gain"
    assert reason((4, 9, 9, 4)) == "its windows overlap, and no axis beside them has 16 entries"
    odd = "its windows overlap, and its axes would have to be moved while padded ones are odd"
    assert reason((16, 9, 9, 4), "SAME") == odd


def test_taps_are_made_once_and_the_input_is_not_held():
    """In a program compiled as users have it: what is held is a byte for each output, and no input."""
    code = """
import jax, jax.numpy as jnp, funcprop as fp
def loss(x, b, w):
    y = jax.nn.relu(x * b)  # of the size that must not be held
    y = jax.lax.reduce_window(y, -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, 2, 2, 1), "VALID")
    return jnp.sum(jnp.dot(y, w) ** 2)
x = jax.ShapeDtypeStruct((8, 33, 33, 64), "float32")
args = x, jax.ShapeDtypeStruct((64,), "float32"), jax.ShapeDtypeStruct((64, 1), "float32")
compiled = jax.jit(fp.value_and_grad(loss, (0, 2))).lower(*args).compile()
print(compiled.memory_analysis().temp_size_in_bytes)
"""
    clean = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    done = subprocess.run([sys.executable, "-c", code], env=clean, capture_output=True, text=True, check=True)
    outputs = 8 * 16 * 16 * 64
    # The taps, and a few arrays of the outputs' size.
    assert int(done.stdout) < 3 * 4 * outputs < 8 * 33 * 33 * 64 * 4


def test_shifted_cotangents_are_not_made_where_several_kernels_read_their_sum():
    """Of 4 × 4 windows by 1 after a normalisation, whose derivative reads the sum of 16 copies thrice."""
    code = """
import jax, jax.numpy as jnp, funcprop as fp
def loss(x, w):
    y = x - x.mean((0, 1, 2))
    y = jax.nn.relu(y * jax.lax.rsqrt((y**2).mean((0, 1, 2)) + 1e-6))
    y = jax.lax.reduce_window(y, -jnp.inf, jax.lax.max, (1, 4, 4, 1), (1, 1, 1, 1), "VALID")
    return jnp.sum(jnp.dot(y, w) ** 2)
x, w = (jax.ShapeDtypeStruct(shape, "float32") for shape in ((16, 17, 17, 16), (16, 1)))
assert [m.operator for m in fp.matches(loss)(x, w) if m.reason is None] == ["relu_max_pool"]
for grad in (jax.value_and_grad, fp.value_and_grad):
    print(jax.jit(grad(loss)).lower(x, w).compile().memory_analysis().temp_size_in_bytes)
"""
    clean = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    done = subprocess.run([sys.executable, "-c", code], env=clean, capture_output=True, text=True, check=True)
    theirs, ours = map(int, done.stdout.split())
    assert ours <= theirs


@pytest.mark.parametrize(("window", "stride"), [((4, 4), (1, 1)), ((5, 5), (2, 2)), ((3, 7), (1, 2))])
def test_many_overlapping_windows(window, stride):
    """The sum of many shifted cotangents passes through a division by one."""
    pool = max_pool((1, *window, 1), (1, *stride, 1), "SAME", jax.nn.relu)
    x = jnp.asarray(data((2, 11, 12, 3), "ties"))
    loss = lambda x: jnp.sum(jnp.sin(pool(x)) * jnp.arange(pool(x).size).reshape(pool(x).shape))  # noqa: E731
    by_rules = fp.with_rules(loss, RULES)
    expected, actual = (compiled(jax.grad(f))(x) for f in (loss, by_rules))
    np.testing.assert_allclose(actual, expected, rtol=1e-12, atol=1e-12)
    # Between equal entries JAX's own second derivative takes another one than its first.
    x = jnp.asarray(np.random.default_rng(0).normal(size=x.shape))
    v = jnp.cos(jnp.arange(x.size)).reshape(x.shape)
    twice = lambda f: compiled(lambda x: jax.grad(lambda x: jnp.vdot(jax.grad(f)(x), v))(x))(x)  # noqa: E731
    np.testing.assert_allclose(twice(by_rules), twice(loss), rtol=1e-12, atol=1e-12)
