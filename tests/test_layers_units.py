"""Gated units, feed-forward networks, activations' policies, embedding, dropout and rotary embedding."""

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

L = fp.layers
RNG = np.random.default_rng(0)
RULES = fp.rules.handwritten


def numbers(*shape):
    return jax.device_put(RNG.standard_normal(shape))


def assert_same_gradients(ours, plain, *args, rtol=1e-12):
    """Values and cotangents of all arguments by the rules, and of another formula by autodiff."""
    g = numbers(*jax.eval_shape(plain, *args).shape)

    def both(*args):
        pairs = [jax.vjp(function, *args) for function in (fp.with_rules(ours, RULES), plain)]
        return [(value, pullback(g)) for value, pullback in pairs]

    actual, expected = compiled(both)(*args)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, e, rtol=rtol, atol=rtol * np.max(np.abs(e), initial=1.0))


def saved_bytes(function, *args):
    """What the rules keep, without the arguments themselves."""
    rules = fp.with_rules(function, RULES)
    pullback = jax.vjp(rules, *args)[1]
    own = {id(a) for a in args}
    return sum(leaf.nbytes for leaf in jax.tree.leaves(pullback) if id(leaf) not in own)


X, W1, W2, B1, B2 = numbers(3, 4), numbers(4, 6), numbers(6, 4), numbers(6), numbers(4)
KEY = jax.random.key(0)
POLICIES = ("input", "preactivation", "all")
FUNCTIONS = {
    "relu": jax.nn.relu, "tanh": jnp.tanh, "sigmoid": jax.nn.sigmoid, "softplus": jax.nn.softplus,
    "silu": jax.nn.silu, "gelu": jax.nn.gelu,
}  # fmt: skip


@pytest.mark.parametrize("save", POLICIES)
def test_feed_forward(save):
    for name in ("gelu", "relu"):
        ours = partial(L.feed_forward, activation=name, save=save)
        plain = lambda x, w1, w2, b1, b2: FUNCTIONS[name](x @ w1 + b1) @ w2 + b2  # noqa: B023, E731
        assert_same_gradients(ours, plain, X, W1, W2, B1, B2)
    size = saved_bytes(lambda x: L.feed_forward(x, W1, W2, B1, B2, save=save), X)
    parameters = sum(p.nbytes for p in (W1, W2, B1, B2) if save == "input" or p.ndim == 2)
    assert size <= parameters + {"input": 0, "preactivation": 1, "all": 2}[save] * 3 * 6 * 8 + X.nbytes


@pytest.mark.parametrize("save", POLICIES)
def test_gated_units(save):
    v = numbers(4, 6)
    swiglu = lambda x, w, v, w2: (jax.nn.silu(x @ w) * (x @ v)) @ w2  # noqa: E731
    assert_same_gradients(partial(L.swiglu, save=save), swiglu, X, W1, v, W2)
    geglu = lambda x, w, v: jax.nn.gelu(x @ w, approximate=False) * (x @ v)  # noqa: E731
    assert_same_gradients(partial(L.geglu, save=save, approximate=False), geglu, X[None], W1, v)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_activations_by_every_policy(name):
    layer = getattr(L, name)
    x = jnp.array([-30.0, -1.5, 0.3, 2.0, 30.0])
    for save in ("input", "all") if name in ("silu", "gelu") else ("output", "input", "all"):
        assert_same_gradients(partial(layer, save=save), FUNCTIONS[name], x)


@pytest.mark.parametrize(
    ("layer", "matrices", "kept"), [("feed_forward", 2, (0, 1, 2)), ("swiglu", 3, (0, 2, 3))]
)
def test_under_scan_what_is_kept_is_what_the_policy_says(layer, matrices, kept):
    def entries_of(save):
        def loss(params, x):
            step = lambda x, p: (x + getattr(L, layer)(x, *p, save=save), None)  # noqa: E731
            return jnp.sum(jax.lax.scan(step, x, params)[0])

        ws = [numbers(5, 4, 64), numbers(5, 4, 64), numbers(5, 64, 4)][
            -2 if layer == "feed_forward" else -3 :
        ]
        pullback = jax.eval_shape(lambda *a: jax.vjp(fp.with_rules(loss, RULES), *a)[1], ws, numbers(32, 4))
        return sum(leaf.size for leaf in jax.tree.leaves(pullback) if leaf.shape[-2:] == (32, 64))

    assert tuple(entries_of(save) / (5 * 32 * 64) for save in POLICIES) == kept


@pytest.mark.parametrize("call", [
    lambda x: L.feed_forward(x, W1, W2, B1, activation="silu"), lambda x: L.swiglu(x, W1, W1 + 1, W2),
    lambda x: L.geglu(x, W1, W1 + 1), lambda x: L.embedding(jnp.array([0, 2, 0]), x),
    lambda x: L.dropout(x, KEY, rate=0.3), lambda x: L.gelu(x, save="all"),
    lambda x: L.rotary(x, L.rotary_angles(jnp.arange(3), 4), pairing="interleaved"),
])  # fmt: skip
def test_equations(call):
    target = call(X) * 0 + 1

    def loss(x):
        return L.mean_squared_error(fp.name(call(fp.name(x * 2, "z")), "y"), target)

    derivation = fp.derive(loss)(X)
    derivation.verify()
    assert "prod(∂J/∂y, ∂y/∂z) = " in derivation.text(width=1000)


# --- embedding --------------------------------------------------------------------------------


@settings(max_examples=8)
@given(st.data())
def test_embedding_is_indexing(data):
    rows, shape = data.draw(st.integers(1, 5)), data.draw(st.lists(st.integers(0, 3), max_size=2))
    drawn = st.integers(-8, 8)
    flat = data.draw(st.lists(drawn, min_size=int(np.prod(shape)), max_size=int(np.prod(shape))))
    indices = jnp.array(flat, int).reshape(shape)
    assert_same_gradients(lambda t: L.embedding(indices, t), lambda t: t[indices], numbers(rows, 2))
    clip = partial(L.embedding, indices, mode="clip")
    assert_same_gradients(clip, lambda t: t.at[indices].get(mode="clip"), numbers(rows, 2))
    fill = lambda t: jnp.nan_to_num(L.embedding(indices, t, mode="fill"))  # noqa: E731
    taken = lambda t: jnp.nan_to_num(jnp.take(t, indices, axis=0))  # noqa: E731
    assert_same_gradients(fill, taken, numbers(rows, 2))


def test_a_tied_embedding_receives_both_cotangents():
    indices = jnp.array([1, 3, 3])

    def ours(table):
        return L.dense(jnp.tanh(L.embedding(indices, table)), table.T)

    assert_same_gradients(ours, lambda table: jnp.tanh(table[indices]) @ table.T, numbers(5, 4))


def test_embedding_starts_as_in_flax():
    table = L.embedding.init(jax.random.key(0), 300, 64)["table"]
    theirs = nn.Embed(300, 64).init(jax.random.key(0), jnp.array([0]))["params"]["embedding"]
    np.testing.assert_allclose(np.std(table), np.std(theirs), rtol=0.02)


# --- dropout ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("rate", "axes"), [(0.0, ()), (0.4, ()), (0.4, (0,)), (1.0, ())])
def test_dropout_is_that_of_flax(rate, axes):
    key = jax.random.key(3)
    module = nn.Dropout(rate, broadcast_dims=axes, deterministic=False)
    theirs = lambda x: module.apply({}, x, rngs={"dropout": key}, rng=key)  # noqa: E731
    for save in ("mask", "key"):
        ours = partial(L.dropout, key=key, rate=rate, broadcast_axes=axes, save=save)
        assert_same_gradients(ours, theirs, X)


def test_dropout_keeps_its_key_alone():
    x = numbers(50, 40)
    assert saved_bytes(lambda x: L.dropout(x, jax.random.key(0), rate=0.5, save="key"), x) <= 16
    assert saved_bytes(lambda x: L.dropout(x, jax.random.key(0), rate=0.5), x) >= x.size


def test_a_dropped_infinity_is_zero_and_so_is_its_gradient():
    x = jnp.full(64, jnp.inf)
    loss = lambda x: jnp.sum(L.dropout(x, jax.random.key(0), rate=0.5, save="key") * 0.1)  # noqa: E731
    y = L.dropout(x, jax.random.key(0), rate=0.5)
    gradient = fp.grad(loss)(x)
    assert set(np.asarray(y)) == {0.0, np.inf}
    np.testing.assert_allclose(gradient, np.where(y == 0, 0, 0.2))


@pytest.mark.parametrize("implementation", ["threefry2x32", "rbg"])
def test_dropout_draws_the_same_mask_again_under_vmap_and_scan(implementation):
    x, keys = numbers(4, 8), jax.random.split(jax.random.key(1, impl=implementation), 4)

    def mapped(x, save):
        return jnp.sum(jax.vmap(lambda x, k: L.dropout(x, k, rate=0.5, save=save))(x, keys) ** 3)

    def looped(x, save):
        step = lambda c, xk: (c, L.dropout(*xk, rate=0.5, save=save))  # noqa: E731
        return jnp.sum(jax.lax.scan(step, None, (x, keys))[1] ** 3)

    for loss in (mapped, looped):
        gradients = [fp.grad(loss)(x, save) for save in ("key", "mask")]
        np.testing.assert_allclose(*gradients, rtol=1e-12)
        assert np.sum(gradients[0] == 0) in range(4, 29)


# --- rotary embedding -------------------------------------------------------------------------


@pytest.mark.parametrize("pairing", ["half", "interleaved"])
def test_rotary_is_a_complex_product(pairing):
    x, angles = numbers(5, 2, 6), L.rotary_angles(jnp.arange(5.0), 6)[:, None]

    def plain(x, angles):
        a, b = (x[..., :3], x[..., 3:]) if pairing == "half" else (x[..., 0::2], x[..., 1::2])
        z = (a + 1j * b) * jnp.exp(1j * angles)
        y = jnp.concatenate([z.real, z.imag], -1)
        return y if pairing == "half" else y[..., jnp.array([0, 3, 1, 4, 2, 5])]

    assert_same_gradients(partial(L.rotary, pairing=pairing), plain, x, angles)
    size = saved_bytes(lambda x: L.rotary(x, angles, pairing=pairing), x)
    assert size <= angles.nbytes


def test_rotated_products_depend_on_the_distance_alone():
    q, k = numbers(8), numbers(8)
    at = lambda x, t: L.rotary(x, L.rotary_angles(t, 8))  # noqa: E731
    np.testing.assert_allclose(at(q, 3.0) @ at(k, 7.0), at(q, 103.0) @ at(k, 107.0), rtol=1e-12)
    assert L.rotary(q.astype(jnp.bfloat16), L.rotary_angles(3, 8)).dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: L.feed_forward(X, W1, W2, activation="swish"),
            ValueError,
            r"activation='swish' is not one of",
        ),
        (
            lambda: L.feed_forward(X, W1, W2, save="output"),
            ValueError,
            r"save='output' is not a saving",
        ),
        (lambda: L.swiglu(X, W1, W1, save="z"), ValueError, r"swiglu: save='z' is not a saving policy"),
        (
            lambda: L.gelu(X, save="output"),
            ValueError,
            r"gelu: save='output' is not one of its saving",
        ),
        (lambda: L.embedding(X, W1), TypeError, r"indices are float64; give integers"),
        (lambda: L.embedding(jnp.array(0), W1, mode="wrap"), ValueError, r"mode='wrap' is unknown"),
        (lambda: L.dropout(X, rate=1.5), ValueError, r"rate=1.5 is not a probability"),
        (lambda: L.dropout(X, rate=0.5), ValueError, r"rate=0.5 needs a PRNG key"),
        (lambda: L.dropout(X, rate=0.0, save="x"), ValueError, r"save='x' is not a saving policy"),
        (lambda: L.rotary(X, X), ValueError, r"x has 4 features and the angles \(4,\)"),
        (lambda: L.rotary(X, X[:, :2], pairing="neox"), ValueError, r"pairing='neox' is unknown"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_initialisers():
    params = L.feed_forward.init(jax.random.key(0), 4, 8)
    assert L.feed_forward(X, **params).shape == X.shape
    assert L.swiglu(X, **L.swiglu.init(jax.random.key(0), 4, 8, 3)).shape == (3, 3)
    assert L.geglu(X, **L.geglu.init(jax.random.key(0), 4, 8, down=False)).shape == (3, 8)
