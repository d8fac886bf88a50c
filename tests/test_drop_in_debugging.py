"""What people do to find a mistake: they take jit away, and print."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drop_in import RULE_SETS, assert_as_jax, assert_differentiates_as_jax, ours
from jax import lax

import funcprop as fp

S, X = jnp.array(2.5), jnp.linspace(-1.0, 2.0, 12).reshape(3, 4)
IMAGE, KERNEL = jnp.sin(jnp.arange(72.0)).reshape(1, 6, 6, 2), jnp.cos(jnp.arange(54.0)).reshape(3, 3, 2, 3)
WEIGHTS = jnp.cos(jnp.arange(16.0)).reshape(4, 4) / 2


def pooled(x):
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")


def convolved(x):
    return lax.conv_general_dilated(x, KERNEL, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def recurrent(x):
    return lax.scan(lambda c, v: (jnp.tanh(c @ WEIGHTS + v), c), x[0], x)[0]


def layer_norm(x):
    return (x - x.mean(-1, keepdims=True)) * lax.rsqrt(x.var(-1, keepdims=True) + 1e-6)


# Functions that JAX keeps together as one jitted or custom function, and those with bodies.
FUNCTIONS = {
    "relu": (jax.nn.relu, X),
    "relu6": (jax.nn.relu6, X),
    "leaky_relu": (jax.nn.leaky_relu, X),
    "gelu": (jax.nn.gelu, X),
    "exact gelu": (functools.partial(jax.nn.gelu, approximate=False), X),
    "silu": (jax.nn.silu, X),
    "sigmoid": (jax.nn.sigmoid, X),
    "softplus": (jax.nn.softplus, X),
    "elu": (jax.nn.elu, X),
    "softmax": (jax.nn.softmax, X),
    "log_softmax": (jax.nn.log_softmax, X),
    "logsumexp": (jax.nn.logsumexp, X),
    "layer norm": (layer_norm, X),
    "dense": (lambda x: jnp.tanh(x @ WEIGHTS), X),
    "relu before a pool": (lambda x: pooled(jax.nn.relu(x)), IMAGE),
    "pool": (pooled, IMAGE),
    "convolution": (convolved, IMAGE),
    "scan": (recurrent, X),
    "map": (lambda x: lax.map(jnp.tanh, x), X),
    "cond": (lambda x: lax.cond(x[0, 0] > 0, jnp.tanh, jnp.sin, x), X),
    "switch": (lambda x: lax.switch(1, [jnp.sin, jnp.tanh], x), X),
    "fori_loop": (lambda x: lax.fori_loop(0, 3, lambda _, c: jnp.tanh(c), x), X),
    "checkpoint": (jax.checkpoint(lambda x: jnp.tanh(jnp.tanh(x))), X),
    "vmap": (jax.vmap(jax.nn.relu), X),
    "jit": (jax.jit(lambda x: jnp.tanh(x) * 2), X),
    "fp.layers.silu": (fp.layers.silu, X),
    "fp.layers.layer_norm": (fp.layers.layer_norm, X),
    "fp.layers.dense": (lambda x: fp.layers.dense(x, WEIGHTS, X[0]), X),
}


def to_scalar(fun):
    """A sum in which no two results weigh the same, so that the cotangents differ."""

    def loss(x):
        y = fun(x)
        return jnp.sum(y * np.linspace(1, 2, y.size).reshape(y.shape))

    return loss


@pytest.mark.sampled(8)
@pytest.mark.parametrize("row", FUNCTIONS.values(), ids=FUNCTIONS)
def test_functions_without_jit(row):
    fun, x = row
    assert_differentiates_as_jax("disable_jit", to_scalar(fun), x)


@pytest.mark.parametrize("name", ["relu", "softmax", "relu before a pool"])
def test_everything_else_without_jit(name):
    """Products with the Hessian, values, the list of matches, and a jitted call made before."""
    fun, x = FUNCTIONS[name]
    loss = to_scalar(fun)

    def program(t):
        before = jax.jit(t.grad(loss))(x)
        with jax.disable_jit():
            return before, t.hvp(loss)(x, x), t.with_rules(loss)(x)

    assert_as_jax(program)
    with jax.disable_jit():
        assert str(fp.matches(loss)(x))


DISABLED = {
    "if in a jitted function": lambda x: jax.jit(lambda x: jnp.tanh(x) if x > 0 else x)(x),
    "while_loop": lambda x: lax.while_loop(lambda c: c < 10, lambda c: c * 2, x),
    "if in a scan": lambda x: lax.scan(lambda c, i: (jnp.sin(c) if i > 1 else c, c), x, jnp.arange(3))[0],
    "item in a cond": lambda x: lax.cond(x > 0, lambda x: x * x.item(), jnp.sin, x),
    "float of an intermediate of a loop": lambda x: lax.fori_loop(0, 3, lambda i, c: c * int(c + i), x),
    "mask in a jitted function": lambda x: jax.jit(lambda v: jnp.sum(v[v > 0] ** 2))(x * jnp.arange(-2.0, 3)),
    "print in a scan": lambda x: lax.scan(lambda c, _: (print(end="") or jnp.tanh(c), None), x, length=2)[0],
}


@pytest.mark.parametrize("fun", DISABLED.values(), ids=DISABLED)
def test_bodies_are_python_without_jit(fun):
    def program(t):
        with jax.disable_jit():
            return t.value_and_grad(fun)(S), t.hvp(fun)(S, S)

    assert_as_jax(program)


# --- printing ---------------------------------------------------------------------------------


def test_values_are_seen_when_printed():
    """As under `jax.grad` the text of a differentiated value has its number, and under `jit` it has none."""

    def texts(transformation):
        def loss(x):
            found.extend(map(str, (x, x * 2, repr(x + 0.25), [jnp.tanh(x * 0)], f"{x - 1}")))
            return x

        found = []
        transformation(loss)(S)
        return found

    shown = ("2.5", "5.0", "2.75", "0.0", "1.5")
    assert all(number in text for number, text in zip(shown, texts(jax.grad), strict=True))
    for grad in (ours(rules).grad for rules in RULE_SETS):
        eager, jitted = texts(grad), texts(lambda fun, grad=grad: jax.jit(grad(fun)))
        assert all(number in text for number, text in zip(shown, eager, strict=True)), eager
        assert not any(number in text for number, text in zip(shown, jitted, strict=True))
