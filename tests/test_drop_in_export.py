"""Gradients are exported with symbolic sizes wherever `jax.grad`'s are, and give its numbers at a size."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drop_in import JAX, RULE_SETS, assert_same_outcome, ours, outcome
from jax import lax

import funcprop as fp


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, "float64")


def pooled(x, window=2, stride=2):
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, window, window, 1), (1, stride, stride, 1), "VALID")


def averaged(x):
    return lax.reduce_window(x, 0.0, lax.add, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")


def convolved(x, w, stride=1):
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, w, (stride, stride), "SAME", dimension_numbers=numbers)


def mean_square(fun):
    return lambda w, x: jnp.mean(fun(w, x) ** 2)


def recurrent(w, x):
    return lax.scan(lambda c, _: (jnp.tanh(c @ w), None), x, None, length=3)[0]


def over_time(w, x):
    """The batch is the second axis, the sequence the first."""
    return lax.scan(lambda c, v: (jnp.tanh(c @ w + v), c), jnp.zeros_like(x[:, 0]), x.swapaxes(0, 1))[1]


def attended(w, x):
    q, k, v = ((x @ w)[:, :, None] * scale for scale in (1.0, 0.5, 2.0))
    return jax.nn.dot_product_attention(q, k, v, is_causal=True)


def normalised(w, x):
    mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) * lax.rsqrt(variance + 1e-6) @ w


def cross_entropy(w, x):
    logits = jax.nn.log_softmax(x @ w)
    labels = jnp.argmax(lax.stop_gradient(x), -1)
    return -jnp.take_along_axis(logits, labels[:, None], -1)


def network(w, x):
    hidden = pooled(jax.nn.relu(convolved(x, w)))
    return hidden.reshape(hidden.shape[0], -1)


IMAGE, SEQUENCE, ROWS = (4, 4, 2), (5, 3), (3,)
# Functions of a weight and of an input whose first size is `b`, with its other sizes.
FUNCTIONS = {
    "softmax": (lambda w, x: jax.nn.softmax(x @ w), shape(3, 2), ROWS),
    "log_softmax": (lambda w, x: jax.nn.log_softmax(x @ w), shape(3, 2), ROWS),
    "cross entropy": (cross_entropy, shape(3, 3), ROWS),
    "relu": (lambda w, x: jax.nn.relu(x @ w), shape(3, 2), ROWS),
    "gelu": (lambda w, x: jax.nn.gelu(x @ w), shape(3, 2), ROWS),
    "tanh and exp": (lambda w, x: jnp.exp(jnp.tanh(x @ w)), shape(3, 2), ROWS),
    "layer norm": (normalised, shape(3, 2), ROWS),
    "embedding": (lambda w, x: jnp.take(w, x.astype(int), axis=0), shape(7, 2), ROWS),
    "scan": (recurrent, shape(3, 3), ROWS),
    "scan over time": (over_time, shape(3, 3), SEQUENCE),
    "cond": (lambda w, x: lax.cond(w[0, 0] > 0, jnp.tanh, jnp.sin, x @ w), shape(3, 2), ROWS),
    "checkpoint": (lambda w, x: jax.checkpoint(lambda v: jnp.tanh(v @ w))(x), shape(3, 2), ROWS),
    "pool": (lambda w, x: pooled(x * w), shape(2), IMAGE),
    "overlapping pool": (lambda w, x: pooled(x * w, 3, 1), shape(2), IMAGE),
    "average pool": (lambda w, x: averaged(x * w), shape(2), IMAGE),
    "convolution": (lambda w, x: convolved(x, w), shape(3, 3, 2, 4), IMAGE),
    "relu before a pool": (network, shape(3, 3, 2, 4), IMAGE),
    "attention": (attended, shape(3, 3), SEQUENCE),
    "fp.layers.dense": (lambda w, x: fp.layers.dense(x, w), shape(3, 2), ROWS),
    "fp.layers.softmax": (lambda w, x: fp.layers.softmax(x @ w), shape(3, 2), ROWS),
    "fp.layers.layer_norm": (lambda w, x: fp.layers.layer_norm(x @ w), shape(3, 2), ROWS),
    "fp.layers.attention": (
        lambda w, x: fp.layers.attention((x @ w)[:, :, None], x[:, :, None], x[:, :, None]),
        shape(3, 3),
        SEQUENCE,
    ),
    "fp.layers.linear_cross_entropy": (
        lambda w, x: fp.layers.linear_cross_entropy(x, w, jnp.argmax(x, -1), save="normalizer"),
        shape(3, 4),
        ROWS,
    ),
    "fp.layers.max_pool": (lambda w, x: fp.layers.max_pool(x * w, window=(2, 2)), shape(2), IMAGE),
    "fp.layers.conv": (lambda w, x: fp.layers.conv(x, w), shape(3, 3, 2, 4), IMAGE),
}


# Functions of a weight and of an input whose batch `b` and length `t` are both symbolic.
TWO_SIZES = {
    "layer norm": (lambda w, x: fp.layers.layer_norm(x @ w), shape(3, 2)),
    "attention": (attended, shape(3, 3)),
    "sum over time": (lambda w, x: jnp.cumsum(jnp.tanh(x @ w), axis=1), shape(3, 2)),
    "scan over time": (over_time, shape(3, 3)),
}


def exported(loss, w, symbolic, size):
    """A function of the transformations: the gradient in both arguments, exported and called at a size."""

    def program(t):
        x = shape(*jax.export.symbolic_shape(symbolic))
        gradient = jax.export.export(jax.jit(t.grad(loss, argnums=(0, 1))))(w, x)
        return gradient.call(filled(w.shape), filled(size))

    return program


def filled(sizes):
    return np.cos(np.arange(1.0, 1 + np.prod(sizes))).reshape(sizes)


# `jax.nn.dot_product_attention` takes its softmax in float32, and the rule rounds in another order.
TOLERANCES = {attended: 1e-9}


def assert_exports_as_jax(program, rtol=1e-12):
    expected = outcome(program, JAX)
    assert not isinstance(expected, Exception), f"JAX itself does not export it: {expected!r}"
    for rules in RULE_SETS:
        assert_same_outcome(outcome(program, ours(rules)), expected, rules.name, rtol)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("row", FUNCTIONS.values(), ids=FUNCTIONS)
def test_symbolic_batch(row):
    fun, w, rest = row
    assert_exports_as_jax(
        exported(mean_square(fun), w, ", ".join(["b", *map(str, rest)]), (4, *rest)),
        TOLERANCES.get(fun, 1e-12),
    )


@pytest.mark.parametrize("row", TWO_SIZES.values(), ids=TWO_SIZES)
def test_symbolic_batch_and_length(row):
    fun, w = row
    assert_exports_as_jax(exported(mean_square(fun), w, "b, t, 3", (4, 5, 3)), TOLERANCES.get(fun, 1e-12))


def test_a_plan_that_compares_sizes_says_so():
    """What cannot be decided for a size without a number is left to autodiff, with that reason."""
    batch = jax.export.symbolic_shape("b")[0]
    loss = mean_square(lambda w, x: convolved(x, w))
    w, x = shape(5, 5, 3, 64), jax.ShapeDtypeStruct((batch, 32, 32, 3), "float64")
    (found,) = (m for m in fp.matches(loss)(w, x) if m.operator == "conv_general_dilated")
    assert found.bound is None
    assert "symbolic" in found.reason
    at_a_size = fp.matches(loss)(w, shape(8, 32, 32, 3))
    assert [m.reason for m in at_a_size if m.operator == "conv_general_dilated"] == [None]
