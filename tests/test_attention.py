"""Attention in blocks: against the plain function on random shapes, at its edges, and what it holds."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import compiled
from holding import largest_intermediate
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

import funcprop as fp
from funcprop.layers import attention
from funcprop.layers.tiling import Tiling
from funcprop.rules.machine import Machine, attention_blocks


def numbers(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape))


def operands(queries, keys, heads=2, kv=1, d=3, batch=()):
    return (
        numbers(*batch, queries, heads, d),
        numbers(*batch, keys, kv, d, seed=1),
        numbers(*batch, keys, kv, d, seed=2),
    )


def gradients(transformation, args, mask=None, **static):
    """Value and gradients of a weighted sum of the result, in all arguments that have a derivative."""

    def loss(*args):
        y = attention(*args, *([None] * (4 - len(args))), mask, **static)
        return jnp.sum(y * numbers(*y.shape, seed=9).astype(y.dtype))

    return compiled(transformation(loss, tuple(range(len(args)))))(*args)


by_rule = partial(gradients, partial(fp.value_and_grad, rules=fp.rules.handwritten))
by_autodiff = partial(gradients, jax.value_and_grad)


def assert_same(actual, expected, tolerance=1e-12):
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == e.dtype
        largest = np.max(np.abs(e), initial=1.0, where=np.isfinite(e))
        np.testing.assert_allclose(a, e, rtol=0, atol=tolerance * largest)


@st.composite
def cases(draw):
    size = st.integers(1, 7)
    queries, keys, kv, group, d = (
        draw(s) for s in (size, size, st.sampled_from([1, 2]), st.integers(1, 2), size)
    )
    batch = draw(st.sampled_from([(), (2,), (1, 2)]))
    args = operands(queries, keys, kv * group, kv, d, batch)
    shape = (*batch, kv * group, queries, keys)
    some = [n if draw(st.booleans()) else 1 for n in shape]
    if draw(st.booleans()):
        args = (*args, numbers(*some[draw(st.integers(0, len(some))) :], seed=3))
    seen = np.random.default_rng(4).random(shape) < 0.7
    mask = seen if draw(st.booleans()) else None
    static = {
        "causal": draw(st.booleans()),
        "window": draw(st.sampled_from([None, 1, (2, 0), (0, 3)])),
        "offset": draw(st.sampled_from([0, keys - queries, 2])),
        "scale": draw(st.sampled_from([None, 0.7])),
        "blocks": (draw(st.integers(1, 4)), draw(st.integers(1, 4))),
    }
    return args, mask, static


@settings(max_examples=8)
@given(cases())
# A block larger than both lengths; one query; a window of a query's own key; all keys to its right.
@example((operands(3, 2), None, {"blocks": (9, 9), "causal": True}))
@example((operands(1, 7), None, {"blocks": (1, 2), "causal": True, "offset": 6}))
@example((operands(5, 5), None, {"blocks": (2, 3), "window": 0}))
@example((operands(2, 3), None, {"blocks": (1, 1), "causal": True, "offset": -2}))
def test_gradients_are_autodiff_s(case):
    args, mask, static = case
    assert_same(by_rule(args, mask, **static), by_autodiff(args, mask, **static))


@pytest.mark.parametrize("window", [None, (2, 1)])
def test_value_is_jax_s(window):
    q, k, v = operands(5, 5, heads=4, kv=2, batch=(2,))
    bias, mask = numbers(2, 4, 5, 5), np.tri(5, k=1, dtype=bool)[None, None]
    ours = attention(q, k, v, bias, mask, causal=True, window=window, scale=0.3)
    theirs = jax.nn.dot_product_attention(
        q, k, v, bias, mask, is_causal=True, scale=0.3, local_window_size=window
    )
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6)  # its softmax is in float32


def test_a_query_that_sees_nothing_has_result_and_gradients_zero():
    q, k, v = operands(4, 6)
    mask = np.ones((4, 6), bool)
    mask[1] = False
    bias = jnp.where(jnp.arange(4)[:, None] == 2, -jnp.inf, numbers(4, 6))
    for function in (by_rule, by_autodiff):
        _, (dq, dk, dv, dbias) = function((q, k, v, bias), mask, blocks=(3, 2))
        assert not np.any(dq[1:3])
        assert not np.any(dbias[1:3])
        assert np.all(dq[0] != 0)
        assert all(np.all(np.isfinite(x)) for x in (dq, dk, dv, dbias))
    assert not np.any(fp.with_rules(lambda *a: attention(*a, mask, blocks=(3, 2)))(q, k, v, bias)[1:3])
    # Every key is to the right of all queries.
    value, cotangents = by_rule((q, k, v), causal=True, offset=-9, blocks=(2, 2))
    assert value == 0
    assert not any(np.any(x) for x in cotangents)


def test_no_queries_no_keys_no_batch():
    for args in (operands(0, 3), operands(3, 0), operands(3, 3, batch=(0,)), operands(2, 2, d=0)):
        assert_same(by_rule(args, causal=True), by_autodiff(args, causal=True))
    assert not np.any(attention(*operands(3, 0)))


def test_nan_and_infinity_are_where_autodiff_has_them():
    q, k, v = operands(5, 4)
    for args in (
        (q.at[1, 0, 0].set(jnp.nan), k, v),
        (q, k, v.at[2].set(jnp.inf)),
        (q, k.at[0].set(jnp.inf), v),
    ):
        actual, expected = by_rule(args, blocks=(2, 2)), by_autodiff(args, blocks=(2, 2))
        for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
            np.testing.assert_array_equal(np.isfinite(a), np.isfinite(e))


def test_bfloat16_is_as_accurate_as_autodiff():
    args = [x.astype(jnp.bfloat16) for x in operands(40, 40, d=8)]
    exact = by_autodiff([x.astype(float) for x in args], causal=True)
    actual, autodiff = (f(args, causal=True, blocks=(16, 16)) for f in (by_rule, by_autodiff))
    for a, b, e in zip(*(jax.tree.leaves(x)[1:] for x in (actual, autodiff, exact)), strict=True):
        error, of_autodiff = (np.linalg.norm(np.asarray(x, float) - e) for x in (a, b))
        assert a.dtype == jnp.bfloat16
        assert error <= 1.05 * of_autodiff


def test_the_hessian_product_is_jax_s():
    primals = operands(5, 4)
    loss = lambda q, k, v: jnp.sum(attention(q, k, v, causal=True, blocks=(2, 3)) ** 3)  # noqa: E731
    tangents = operands(5, 4)[::-1][2:] + operands(5, 4)[1:]
    actual, expected = (
        compiled(fp.hvp(loss, (0, 1, 2), rules=rules))(primals, tangents)
        for rules in (fp.rules.handwritten, fp.rules.autodiff)
    )
    assert_same(actual, expected)


def test_nothing_of_the_size_of_the_logits_is_held():
    args = operands(256, 256, heads=1, d=2)
    loss = lambda *a: jnp.sum(attention(*a, causal=True) ** 2)  # noqa: E731
    by_rules = partial(fp.grad, rules=fp.rules.default)
    assert largest_intermediate(jax.grad(loss, (0, 1, 2)), *args) == 256 * 256
    block = 128 * 128
    assert largest_intermediate(by_rules(loss, (0, 1, 2)), *args) == block
    assert largest_intermediate(lambda *a: fp.hvp(loss, (0, 1, 2))(a, a), *args) == block
    pushed = lambda *a: jax.jvp(fp.with_rules(loss), a, a)  # noqa: E731
    assert largest_intermediate(pushed, *args) == block


def test_derivatives_of_the_sweeps_hold_no_block_for_later():
    """Reverse derivatives of the backward and of a tangent: each block is computed again."""
    args = operands(256, 256, heads=1, d=2)
    causal = partial(attention, causal=True)
    pull = fp.vjp(causal, *args)[1]
    backward = lambda g: sum(jnp.sum(x**2) for x in pull(g))  # noqa: E731
    tangent = lambda *a: jnp.sum(jax.jvp(fp.with_rules(causal), a, a)[1] ** 2)  # noqa: E731
    block = 128 * 128
    assert largest_intermediate(jax.grad(backward), causal(*args)) == block
    assert largest_intermediate(jax.grad(tangent, (0, 1, 2)), *args) == block


def test_blocks_that_nobody_sees_are_not_visited():
    tiling = partial(Tiling, 64, 64, (8, 8))
    assert len(tiling((None, None), 0).pairs()[0]) == 64
    assert len(tiling((None, 0), 0).pairs()[0]) == 8 * 9 // 2
    assert len(tiling((8, 0), 0).pairs()[0]) == 8 + 7
    assert len(tiling((None, 0), -64).pairs()[0]) == 0


@pytest.mark.parametrize("length", [0, 1, 100, 129, 1000, 1024, 2048, 2049, 10_000])
def test_default_blocks_cover_the_length(length):
    rows, cols = attention_blocks(length, 2048, Machine("cpu"))
    assert cols == 256
    assert rows == max(length, 1) or 64 <= rows <= 512


def test_small_logits_are_left_to_autodiff():
    small, large = (fp.matches(attention)(*operands(n, n))[0] for n in (32, 300))
    assert small.reason == "the logits of a head are only 32 × 32; blocks would save little and cost time"
    assert large.reason is None


def test_a_bias_that_a_batch_shares():
    q, k, v = operands(5, 4, batch=(3,))
    bias = numbers(2, 1, 4)

    def loss(q, bias):
        return jnp.sum(jax.vmap(lambda q, k, v: attention(q, k, v, bias, blocks=(2, 3)))(q, k, v) ** 2)

    actual, expected = (
        compiled(fp.grad(loss, (0, 1), rules=rules))(q, bias)
        for rules in (fp.rules.handwritten, fp.rules.autodiff)
    )
    assert_same(actual, expected)


def test_under_shard_map():
    mesh = jax.make_mesh((2,), ("b",), axis_types=(jax.sharding.AxisType.Auto,))
    args = operands(5, 4, batch=(2,))

    def loss(q, k, v):
        y = attention(q, k, v, causal=True, blocks=(2, 3))
        return jax.lax.psum(jnp.sum(y**2), "b")

    sharded = jax.shard_map(loss, mesh=mesh, in_specs=(P("b"), P("b"), P("b")), out_specs=P())
    actual = compiled(fp.grad(sharded, (0, 1, 2), rules=fp.rules.handwritten))(*args)
    expected = compiled(jax.grad(lambda *a: jnp.sum(attention(*a, causal=True) ** 2), (0, 1, 2)))(*args)
    assert_same(actual, expected)


@pytest.mark.parametrize(
    ("args", "static", "message"),
    [
        ((numbers(4, 2, 3), numbers(5, 2, 3), numbers(6, 2, 3)), {}, r"v \(6, 2, 3\) do not fit; pass q as"),
        ((numbers(4, 3, 3), numbers(5, 2, 3), numbers(5, 2, 3)), {}, "heads must be a multiple of kv_heads"),
        (
            (*operands(4, 5), numbers(3, 5)),
            {},
            r"bias has shape \(3, 5\), which does not broadcast to .* = \(2, 4, 5\)",
        ),
        (operands(4, 5), {"blocks": (0, 1)}, r"blocks=\(0, 1\); block sizes are at least 1"),
    ],
)
def test_errors(args, static, message):
    with pytest.raises(ValueError, match=message):
        attention(*args, **static)


def test_an_additive_mask_is_a_bias():
    with pytest.raises(TypeError, match=r"mask has dtype float64; pass booleans .* additive mask .* as bias"):
        attention(*operands(2, 2), None, jnp.zeros((2, 2)))


def test_equations_are_true():
    args = (*operands(4, 4, d=2), numbers(1, 4, seed=3))
    loss = lambda q, k, v, b: jnp.sum(attention(q, k, v, b, causal=True, window=3) ** 2)  # noqa: E731
    fp.derive(loss, (0, 1, 2, 3))(*args).verify()
