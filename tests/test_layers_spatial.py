"""Convolution and pooling as layers: Flax's numbers, every layout, and the primitives' rules inside."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import compiled
from flax import linen as nn

import funcprop as fp

L = fp.layers
RNG = np.random.default_rng(0)


def numbers(*shape):
    return jax.device_put(RNG.standard_normal(shape))


X, W, B = numbers(2, 7, 6, 4), numbers(3, 2, 4, 6), numbers(6)


def assert_same(ours, theirs, *args):
    """Values and cotangents by all rules, and of the other by autodiff."""

    @compiled
    def both(*args):
        found = []
        for function in (fp.with_rules(ours, fp.rules.handwritten), theirs):
            y, pullback = jax.vjp(function, *args)
            found.append((y, pullback(jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape))))
        return found

    actual, expected = both(*args)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"padding": "VALID", "strides": (2, 1)},
        {"padding": ((1, 0), 2), "dilation": (1, 2)},
        {"padding": 1, "groups": 2},
    ],
)
def test_convolution_is_that_of_flax(options):
    groups, (x, w) = options.get("groups", 1), (X, W[:, :, :2] if "groups" in options else W)
    names = {"strides": "strides", "padding": "padding", "dilation": "kernel_dilation"}
    theirs = {names[k]: v for k, v in options.items() if k in names}
    module = nn.Conv(6, (3, 2), feature_group_count=groups, **theirs)
    flax = lambda x, w, b: module.apply({"params": {"kernel": w, "bias": b}}, x)  # noqa: E731
    assert_same(partial(L.conv, **options), flax, x, w, B)

    def first(x, w, b):
        x, w = jnp.moveaxis(x, -1, 1), jnp.moveaxis(w, (-1, -2), (0, 1))
        return jnp.moveaxis(L.conv(x, w, b, channels_last=False, **options), 1, -1)

    assert_same(first, flax, x, w, B)


@pytest.mark.parametrize(
    ("shape", "kernel"), [((5, 4), (3,)), ((2, 3, 5, 4), (3,)), ((2, 4, 5, 3, 4), (2, 3, 1))]
)
def test_convolution_over_any_axes(shape, kernel):
    w = numbers(*kernel, 4, 2)
    module = nn.Conv(2, kernel, use_bias=False)
    assert_same(L.conv, lambda x, w: module.apply({"params": {"kernel": w}}, x), numbers(*shape), w)


@pytest.mark.parametrize(
    "options", [{"window": (2, 2)}, {"window": (3, 2), "strides": 2, "padding": "SAME"}, {"window": (3,)}]
)
def test_pooling_is_that_of_flax(options):
    x = X if len(options["window"]) == 2 else X[0]
    rank = len(options["window"])
    strides = options.get("strides", options["window"])
    theirs = {
        "window_shape": options["window"],
        "strides": (strides,) * rank if isinstance(strides, int) else strides,
        "padding": options.get("padding", "VALID"),
    }
    flax = partial(nn.max_pool, **theirs)
    assert_same(partial(L.max_pool, **options), flax, x)
    for count in (True, False):
        ours = partial(L.avg_pool, count_padding=count, **options)
        assert_same(ours, partial(nn.avg_pool, count_include_pad=count, **theirs), x)

    def first(x):
        y = L.max_pool(jnp.moveaxis(x, -1, -1 - rank), channels_last=False, **options)
        return jnp.moveaxis(y, -1 - rank, -1)

    assert_same(first, flax, x)


def test_pooling_pads_with_nothing():
    x = -jnp.ones((4, 1))
    np.testing.assert_array_equal(L.max_pool(x, window=(3,), strides=1, padding=((2, 0),)), -jnp.ones((4, 1)))
    assert L.max_pool(x.astype(jnp.bfloat16), window=(2,)).dtype == jnp.bfloat16


@pytest.mark.parametrize("rules", [fp.rules.default, fp.rules.handwritten])
def test_the_primitives_rule_is_what_the_layer_uses(rules):
    x = numbers(2, 4, 4, 3)
    loss = lambda x: jnp.sum(L.max_pool(x, window=(2, 2)) ** 2)  # noqa: E731
    gradient = str(jax.make_jaxpr(fp.grad(loss, rules=rules))(x))
    assert "select_and_scatter" not in gradient
    assert "select_and_scatter" in str(jax.make_jaxpr(jax.grad(loss))(x))
    fired = [m.operator for m in fp.matches(loss, rules)(x)]
    assert fired == ["reduce_window_max" if rules is fp.rules.default else "max_pool"]


KERNEL_FIRST = numbers(3, 7, 2, 2)


@pytest.mark.parametrize("call", [
    lambda x: L.conv(x, W, B, strides=2), lambda x: L.max_pool(x, window=(2, 3)),
    lambda x: L.conv(x, KERNEL_FIRST, B[:3], channels_last=False),
    lambda x: L.avg_pool(x, window=(2, 2), padding="SAME"),
])  # fmt: skip
def test_equations(call):
    target = call(X) * 0 + 1
    loss = lambda x: L.mean_squared_error(fp.name(call(fp.name(x * 2, "z")), "y"), target)  # noqa: E731
    derivation = fp.derive(loss)(X)
    derivation.verify()
    assert "prod(∂J/∂y, ∂y/∂z) = " in derivation.text()


def test_parameters_of_a_convolution_have_equations():
    loss = lambda w, b: L.mean_squared_error(fp.name(L.conv(X, w, b), "y"), jnp.zeros((2, 7, 6, 6)))  # noqa: E731
    derivation = fp.derive(loss, (0, 1))(W, B)
    derivation.verify()
    assert "corr(" in derivation.text()
    assert "sum(∂J/∂y, axes 0, 1, 2)" in derivation.text()


def test_initialisers():
    params = L.conv.init(jax.random.key(0), (3, 3), 64, 32)
    assert (params["w"].shape, params["b"].shape) == ((3, 3, 64, 32), (32,))
    np.testing.assert_allclose(np.std(params["w"]), np.sqrt(2 / (9 * 64)), rtol=0.03)
    first = L.conv.init(jax.random.key(0), (3, 2), 4, 6, groups=2, channels_last=False, bias=False)
    assert {k: v.shape for k, v in first.items()} == {"w": (6, 2, 3, 2)}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: L.conv(X, W[:, :, :3]),
            r"x has 4 channels, but w of shape \(3, 2, 3, 6\) with groups=1",
        ),
        (lambda: L.conv(X[0, 0], W), r"a kernel of 2 spatial axes, but x has shape \(6, 4\)"),
        (lambda: L.conv(X, W, padding="foo"), r"padding='foo' is not known; use 'SAME', 'VALID', a number"),
        (lambda: L.avg_pool(X, window=(2, 2), padding="foo"), "padding='foo' is not known"),
        (lambda: L.max_pool(X[0, 0], window=(2, 2)), r"window=\(2, 2\) has more axes than x"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
