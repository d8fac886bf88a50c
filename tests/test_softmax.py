"""Softmax and its logarithm: found where they are computed, and derivatives as autodiff has them."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import compiled
from flax import linen as nn
from hypothesis import given, settings
from hypothesis import strategies as st

import funcprop as fp
from funcprop.rules.patterns.softmax import log_rule

RULES = fp.rules.default.replace({fp.layers.log_softmax: log_rule(everywhere=True)})
X = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 4)))
FUNCTIONS = {"softmax": jax.nn.softmax, "log_softmax": jax.nn.log_softmax}


def operators(fun, *args):
    """The operators with a rule that fires."""
    return [m.operator for m in fp.matches(fun, RULES)(*args) if m.reason is None]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_recognised(name):
    fun = FUNCTIONS[name]
    assert operators(lambda x: fun(2 * x) + 1, X) == [name]
    assert operators(lambda x: fun(x, (0, 2)).T, X) == [name]
    for axis in range(3):
        mapped = jax.vmap(partial(fun, axis=0), in_axes=axis, out_axes=2)
        assert operators(jax.jit(mapped), X) == [name]
        assert_as_autodiff(mapped, X)
    assert operators(lambda x: jax.lax.scan(lambda c, row: (c, fun(row)), 0, x)[1], X) == [name]
    left_alone = fp.matches(fun, RULES.replace({getattr(fp.layers, name): None}))(X)
    assert left_alone == []


def test_recognised_in_attention():
    q = X[..., None, :]
    causal = partial(jax.nn.dot_product_attention, is_causal=True)
    for attention in (nn.dot_product_attention, jax.nn.dot_product_attention, causal):
        assert operators(lambda q, f=attention: f(q, q, q), q) == ["softmax"]
    assert operators(lambda x: jax.nn.softmax(x.astype(jnp.bfloat16)), X) == ["softmax"]


def with_moving_largest(x):
    e = jnp.exp(x - x.max(-1, keepdims=True, initial=-jnp.inf))
    return e / e.sum(-1, keepdims=True)


def over_another_axis(x):
    largest = jax.lax.stop_gradient(x.max(-1, keepdims=True, initial=-jnp.inf))
    e = jnp.exp(x - largest)
    return e / e.sum(-2, keepdims=True)


def of_another(x):
    largest = jax.lax.stop_gradient(x.max(-1, keepdims=True, initial=-jnp.inf))
    shifted = x - largest
    return shifted - jnp.log(jnp.exp(2 * shifted).sum(-1, keepdims=True))


def read_twice(x):
    largest = jax.lax.stop_gradient(x.max(-1, keepdims=True, initial=-jnp.inf))
    e = jnp.exp(x - largest)
    return e / e.sum(-1, keepdims=True), e


@pytest.mark.parametrize("fun", [
    with_moving_largest, over_another_axis, of_another, read_twice, lambda x: jax.nn.softmax(x, where=x > 0),
    lambda x: jax.nn.log_softmax(x, where=x > 0), jax.nn.logsumexp,
])  # fmt: skip
def test_what_is_another_function(fun):
    assert operators(jax.jit(fun), X) == []


@pytest.mark.parametrize(
    "fun", [read_twice, lambda x: read_twice(x)[::-1], lambda x: (*read_twice(x)[:1], x)]
)
def test_several_results_of_an_inlined_jit(fun):
    """Its last operator may be a softmax's; what it returns is more."""
    inlined = jax.jit(fun, inline=True)
    loss = lambda fun: lambda x: sum(jnp.sum(y**3) for y in fun(x))  # noqa: E731
    actual = fp.grad(loss(inlined), rules=RULES)(X)
    np.testing.assert_allclose(actual, jax.grad(loss(fun))(X), rtol=1e-12)


@settings(max_examples=8)
@given(st.data())
def test_random_shapes_and_axes(data):
    fun = FUNCTIONS[data.draw(st.sampled_from(sorted(FUNCTIONS)))]
    shape = data.draw(st.lists(st.integers(0, 4), min_size=1, max_size=3))
    axes = tuple(data.draw(st.sets(st.integers(0, len(shape) - 1), min_size=1)))
    assert_as_autodiff(partial(fun, axis=axes), jnp.asarray(np.random.default_rng(1).normal(size=shape)))


def assert_as_autodiff(fun, x):
    def loss(x):
        y = fun(2 * x)
        return jnp.sum(jnp.where(jnp.isneginf(y), 0, y**3) * jnp.cos(jnp.arange(y.size)).reshape(y.shape))

    @compiled
    def found(x):
        gradients = jax.grad(loss), fp.grad(loss, rules=RULES)
        return [
            (fp.with_rules(loss, RULES)(x), *jax.jvp(gradient, (x,), (jnp.sin(x + 1),)))
            for gradient in gradients
        ]

    assert len(operators(loss, x)) == 1
    for expected, actual in zip(*found(x), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("row", [
    [-jnp.inf, 1.0, 2.0], [-jnp.inf] * 3, [jnp.inf, 1.0, 0.0], [jnp.nan, 1.0, 0.0], [1e4, -1e4, 0.0],
    [jnp.inf, -jnp.inf, 0.0], [-800.0, 0.0, 0.0],
])  # fmt: skip
def test_infinities_and_nan_are_where_autodiff_has_them(name, row):
    x = jnp.array([row, [0.3, -0.2, 0.1]])
    g = jnp.array([[1.0, 2.0, -3.0]] * 2)

    @compiled
    def pulled(x, g):
        return [
            pull(g)[0]
            for pull in (jax.vjp(FUNCTIONS[name], x)[1], fp.vjp(FUNCTIONS[name], x, rules=RULES)[1])
        ]

    for cotangent in (g, g.at[0, 0].set(jnp.inf)):
        expected, actual = pulled(x, cotangent)
        np.testing.assert_allclose(actual, expected, rtol=1e-12, atol=1e-300)
        assert np.all(np.isfinite(actual[1]))


def test_bfloat16_is_as_accurate_as_autodiff():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(64, 50)) * 3, jnp.bfloat16)
    g = jnp.asarray(np.random.default_rng(1).normal(size=(64, 50)), jnp.bfloat16)
    for fun in FUNCTIONS.values():
        exact = jax.vjp(fun, x.astype(float))[1](g.astype(float))[0]
        ours, theirs = (vjp(fun, x)[1](g)[0] for vjp in (partial(fp.vjp, rules=RULES), jax.vjp))
        error, of_autodiff = (np.linalg.norm(np.asarray(a, float) - exact) for a in (ours, theirs))
        assert ours.dtype == jnp.bfloat16
        assert error <= 1.02 * of_autodiff


def test_what_is_left_to_autodiff():
    def reason(layer, *shape, dtype="float32"):
        return fp.matches(layer)(jax.ShapeDtypeStruct(shape, dtype))[0].reason

    log_softmax, softmax = fp.layers.log_softmax, fp.layers.softmax
    assert reason(log_softmax, 2**10, 2**12) is None
    few = "the exponentials of 256000 entries stay in the cache, and need not be computed again"
    assert reason(log_softmax, 256, 1000) == few
    (listed,) = fp.matches(lambda x: jax.nn.log_softmax(2 * x))(jax.ShapeDtypeStruct((256, 1000), "float32"))
    assert (listed.operator, listed.reason) == ("log_softmax", few)
    inaccurate = "the exponential of a result of bfloat16 is less accurate than autodiff's"
    assert reason(log_softmax, 2**10, 2**12, dtype="bfloat16") == inaccurate
    assert reason(softmax, 8, dtype="bfloat16") is None


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_result_alone_is_saved(name):
    pull = lambda x: fp.vjp(FUNCTIONS[name], x, rules=RULES)[1]  # noqa: E731
    assert [leaf.shape for leaf in jax.tree.leaves(jax.eval_shape(pull, X))] == [X.shape]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_equations_are_true(name):
    layer = partial(getattr(fp.layers, name), axis=(0, -1))
    derivation = fp.derive(lambda x: fp.layers.mean_squared_error(fp.name(layer(x), "y"), X))(X)
    derivation.verify()
    assert "softmax(" in derivation.text()
