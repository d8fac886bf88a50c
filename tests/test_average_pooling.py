"""Sums of windows against JAX's, over random windows of any kind, with infinities and NaNs."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import compiled
from flax import linen as nn
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax import lax

import funcprop as fp
from funcprop.rules.primitives import average_pooling

RULES = fp.rules.autodiff.replace({"reduce_window_sum": average_pooling.rule(everywhere=True)})


@st.composite
def windows(draw):
    rank = draw(st.integers(1, 4))
    each = lambda low, high: tuple(draw(st.integers(low, high)) for _ in range(rank))  # noqa: E731
    shape, window = each(0, 6), each(1, 3)
    padding = tuple(zip(each(-1, 2), each(-1, 2), strict=True))
    dilations = {"base_dilation": each(1, 2), "window_dilation": each(1, 2)}
    kept = all((n - 1) * 2 + 1 + lo + hi >= 0 for n, (lo, hi) in zip(shape, padding, strict=True))
    padding = padding if kept else ((0, 0),) * rank
    return shape, (window, each(1, 3), padding), dilations, draw(st.sampled_from([0.0, np.nan, np.inf]))


def sum_pool(geometry, **dilations):
    return lambda x: lax.reduce_window(x, np.zeros((), x.dtype), lax.add, *geometry, **dilations)


# Nothing to sum; one entry under padding alone; a window on every second entry, cut by negative padding.
CORNERS = [
    ((0, 3), ((1, 2), (1, 1), ((0, 0), (0, 0))), {}, 0.0),
    ((1,), ((3,), (3,), ((2, 2),)), {}, np.inf),
    ((6, 5), ((2, 3), (3, 1), ((-1, -1), (2, -1))), {"window_dilation": (2, 1)}, np.nan),
    ((3,), ((2,), (1,), ((-1, 1),)), {"base_dilation": (2,)}, 0.0),
]


@settings(max_examples=8)
@given(st.lists(windows(), min_size=5, max_size=5))
@example(CORNERS)
def test_equals_jax(cases):
    """Of several windows at once: one program compiles in less time than one for each."""
    pools = [sum_pool(geometry, **dilations) for _, geometry, dilations, _ in cases]
    inputs = []
    for (shape, _, _, special), pool in zip(cases, pools, strict=True):
        rng = np.random.default_rng(0)
        x, v = rng.normal(size=(2, *shape))
        g = rng.normal(size=jax.eval_shape(pool, x).shape)
        inputs.append(tuple(np.where(rng.random(a.shape) < 0.1, special, a) for a in (x, v, g)))

    def derivatives(pool, x, v, g):
        (y, pull), (_, tangent) = jax.vjp(pool, x), jax.jvp(pool, (x,), (v,))
        return y, pull(g)[0], tangent

    @compiled
    def both(inputs):
        pairs = list(zip(pools, inputs, strict=True))
        by_rule = [derivatives(fp.with_rules(pool, rules=RULES), *arrays) for pool, arrays in pairs]
        return by_rule, [derivatives(pool, *arrays) for pool, arrays in pairs]

    for case, actual, expected in zip(cases, *both(inputs), strict=True):
        for a, e in zip(actual, expected, strict=True):
            np.testing.assert_allclose(a, e, rtol=1e-12, atol=1e-12, err_msg=str(case))


@pytest.mark.parametrize("window", [(2, 2), (3, 3)])
def test_second_order_and_vmap_equal_jax(window):
    def loss(x):
        return jnp.sum(jnp.sin(nn.avg_pool(x**2, window, (2, 2), "SAME")))

    x, v = np.random.default_rng(0).normal(size=(2, 3, 5, 4, 2))
    hvp = lambda grad: jax.jit(lambda x, v: jax.jvp(jax.vmap(grad(loss)), (x,), (v,)))  # noqa: E731
    expected = hvp(jax.grad)(x, v)
    actual = hvp(lambda f: fp.grad(f, rules=RULES))(x, v)
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-12, atol=1e-12), actual, expected)


@pytest.mark.parametrize("stride", [2, 4])
def test_bfloat16_is_no_worse_than_autodiff(stride):
    x = np.random.default_rng(0).normal(size=(64, 16)).astype(jnp.bfloat16)
    pool = sum_pool(((4, 1), (stride, 1), "VALID"))

    def both(differentiate, x):
        y, pull = differentiate(pool, x)
        return y, pull(jnp.cos(y))[0]

    def worst(actual, exact):
        return np.max(np.abs(np.asarray(actual, float) - np.asarray(exact)))

    exact = both(jax.vjp, x.astype(float))
    ours = both(lambda f, x: fp.vjp(f, x, rules=RULES), x)
    for a, j, e in zip(ours, both(jax.vjp, x), exact, strict=True):
        assert a.dtype == jnp.bfloat16
        assert worst(a, e) <= worst(j, e)


def test_saves_nothing():
    def pull(x):
        return fp.vjp(sum_pool(((3, 1), (2, 1), "SAME")), x, rules=RULES)[1]

    assert jax.tree.leaves(jax.eval_shape(pull, jnp.ones((9, 4)))) == []


def test_what_is_left_to_autodiff():
    def reason(shape, geometry, **options):
        pool = sum_pool(geometry, **options)
        return fp.matches(pool, fp.rules.default)(jax.ShapeDtypeStruct(shape, "float32"))[0].reason

    edges = ((1, 1), (0, 0))
    assert reason((64, 64), ((2, 2), (2, 2), "VALID")) is None
    assert reason((2, 4), ((2, 2), (2, 2), "VALID")) is None
    assert reason((256, 64), ((3, 1), (2, 1), edges)) is None
    assert (
        reason((64, 64), ((3, 1), (2, 1), edges))
        == "its windows overlap, and its result has fewer than 4096 entries"
    )
    assert (
        reason((99, 99), ((5, 5), (1, 1), "SAME"))
        == "its windows overlap so much that the cotangent would be shifted 25 times"
    )
    strange = "the input is dilated, or cropped by a negative padding"
    assert reason((99, 99), ((2, 2), (2, 2), ((-1, 0), (0, 0)))) == strange
    assert reason((99, 99), ((2, 2), (2, 2), "VALID"), base_dilation=(2, 1)) == strange
