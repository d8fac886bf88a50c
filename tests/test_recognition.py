"""Functions of several equations become one operator, and only those that really are this function."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import compiled
from flax import linen as nn

import funcprop as fp

HANDWRITTEN = fp.rules.handwritten
X = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 6, 3)))
FUNCTIONS = {
    "relu": jax.nn.relu,
    "softplus": jax.nn.softplus,
    "silu": jax.nn.silu,
    "tanh_gelu": jax.nn.gelu,
    "exact_gelu": lambda x: jax.nn.gelu(x, approximate=False),
}


def operators(fun, *args, rules=HANDWRITTEN):
    """The operators with a rule that fires."""
    return [m.operator for m in fp.matches(fun, rules)(*args) if m.reason is None]


def pool(x):
    return nn.max_pool(x, (2, 2), (2, 2))


def in_a_scan(fun):
    return lambda x: jax.lax.scan(lambda c, row: (c, fun(row)), 0.0, x)[1]


# --- functions of jax.nn ----------------------------------------------------------------------


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("around", [lambda f: f, jax.vmap, jax.jit], ids=["plain", "vmap", "jit"])
def test_known_functions(name, around):
    function = around(lambda x: FUNCTIONS[name](2 * x) + 1)
    assert operators(function, X) == [name]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_known_functions_keep_their_derivatives(name):
    def loss(x):
        return jnp.sum(jnp.sin(FUNCTIONS[name](2 * x)))

    x = jnp.append(X[0, 0].ravel(), jnp.array([0.0, -0.0, jnp.inf, jnp.nan, 40.0, -40.0]))

    @compiled
    def both(x):
        tangent = jnp.ones_like(x)
        second = lambda grad: jax.jvp(grad, (x,), (tangent,))  # noqa: E731
        return second(jax.grad(loss)), second(fp.grad(loss, rules=HANDWRITTEN))

    for expected, actual in zip(*both(x), strict=True):
        finite = np.isfinite(expected)
        np.testing.assert_allclose(actual[finite], expected[finite], rtol=1e-11, atol=1e-12)


def straight_through():
    """The values of `jax.nn.relu`, with another derivative."""

    @jax.custom_jvp
    def relu(x):
        return jax.nn.relu(x)

    relu.defjvp(lambda primals, tangents: (relu(*primals), tangents[0]))
    return relu


def squared_in_derivative():
    """The values and the first derivative of `jax.nn.relu`, computed otherwise."""

    @jax.custom_jvp
    @jax.jit
    def relu(x):
        return jnp.maximum(x, 0)

    relu.defjvp(lambda primals, tangents: (relu(*primals), tangents[0] * (primals[0] > 0)))
    return relu


def silu(x):
    return x * jax.nn.sigmoid(2 * x)


def gelu(x):
    return 0.5 * x * (1 + jnp.tanh(np.sqrt(2 / np.pi) * (x + 0.0447 * x**3)))


@pytest.mark.parametrize("impostor", [straight_through(), squared_in_derivative(), jax.jit(silu), gelu])
def test_names_and_values_decide_nothing(impostor):
    found = operators(lambda x: impostor(2 * x), X)
    assert not {"relu", "silu", "tanh_gelu"} & set(found)
    assert "relu_max_pool" not in operators(lambda x: pool(impostor(2 * x)), X)


def reads_the_middle(x):
    t = jnp.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))
    return x * (0.5 * (1.0 + t)), t


def test_in_a_body_a_result_read_elsewhere_keeps_the_equations():
    found = operators(jax.jit(reads_the_middle), X)
    assert "tanh" in found
    assert "tanh_gelu" not in found


def read_twice(x):
    y = nn.relu(x)
    return pool(y), y


@pytest.mark.parametrize(("fun", "name"), [(reads_the_middle, "tanh_gelu"), (read_twice, "relu_max_pool")])
def test_who_reads_the_middle_still_gets_it(fun, name):
    """While a function runs, nobody knows what is read later: its derivative stands beside the rule's."""
    assert name in operators(fun, X)

    def loss(x):
        result, middle = fun(2 * x)
        return jnp.sum(jnp.sin(result)) + jnp.sum(jnp.cos(middle))

    @compiled
    def both(x):
        second = lambda grad: jax.jvp(grad, (x,), (jnp.cos(x),))  # noqa: E731
        return second(jax.grad(loss)), second(fp.grad(loss, rules=HANDWRITTEN))

    for expected, actual in zip(*both(X), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-11, atol=1e-12)


# --- relu before a max-pool -------------------------------------------------------------------


@pytest.mark.parametrize(
    "fun",
    [
        lambda x: pool(nn.relu(2 * x)),
        lambda x: pool(fp.layers.relu(2 * x)),
        jax.vmap(lambda x: pool(nn.relu(2 * x))),
        in_a_scan(lambda x: pool(nn.relu(2 * x))),
        jax.jit(lambda x: jax.checkpoint(lambda x: pool(nn.relu(2 * x)))(x)),
        lambda x: pool(jnp.moveaxis(nn.relu(2 * x), 1, -1)[None][0]),
        lambda x: pool(nn.relu(2 * x)[:, 1:]),
    ],
    ids=["plain", "layer", "vmap", "scan", "jit and checkpoint", "moved", "cut"],
)
def test_a_relu_before_a_pool(fun):
    assert operators(fun, X, rules=fp.rules.default) == ["relu_max_pool"]
    loss = lambda x: jnp.sum(jnp.sin(fun(x)))  # noqa: E731

    @compiled
    def both(x):
        second = lambda grad: jax.jvp(grad, (x,), (jnp.cos(x),))  # noqa: E731
        return second(jax.grad(loss)), second(fp.grad(loss))

    for expected, actual in zip(*both(X), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-12, atol=1e-13)


def test_where_relu_and_pool_stay_apart():
    assert operators(jax.jit(read_twice), X, rules=fp.rules.default) == ["reduce_window_max"]

    def in_the_padding(x):
        return jax.lax.reduce_window(nn.relu(x), -jnp.inf, jax.lax.max, (2,), (2,), ((2, 0),))

    assert operators(in_the_padding, jnp.ones(4), rules=fp.rules.default) == ["reduce_window_max"]
    left_alone = fp.rules.default.replace({"reduce_window_max": None})
    assert operators(lambda x: pool(nn.relu(x)), X, rules=left_alone) == []
    unfused = fp.rules.default.replace({fp.layers.relu_max_pool: None})
    assert operators(lambda x: pool(nn.relu(x)), X, rules=unfused) == ["reduce_window_max"]
