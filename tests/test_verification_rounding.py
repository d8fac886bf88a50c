"""`verify` where gradients cancel to rounding: what is right passes, and what is wrong by 0.1 % does not."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import funcprop as fp
from funcprop.equations.deviations import deviation
from funcprop.equations.rounding import spread
from funcprop.equations.verification import DerivationError
from funcprop.rules.equations import Equations, apply

DTYPES = ["float32", "float64"]


def numbers(*shape, dtype="float64", seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def rows_scanned(x):
    return jax.lax.scan(lambda c, r: (c + jnp.sum(fp.layers.layer_norm(r) ** 2), None), x[0, 0] * 0, x)[0]


def with_key_bias(x):
    q, k, v = x, x[::-1], x * 2
    return lambda b: jnp.sum(jnp.tanh(jax.nn.softmax(q @ (k + b).T, -1) @ v))


# Functions of a matrix whose gradient is zero, or of which a part is.
CANCELLING = {
    "layer norm squared": lambda x: jnp.sum(fp.layers.layer_norm(x) ** 2),
    "large layer norm squared": lambda x: 1e6 * jnp.sum(fp.layers.layer_norm(x) ** 2),
    "small layer norm squared": lambda x: 1e-9 * jnp.sum(fp.layers.layer_norm(x) ** 2),
    "norm of a unit vector": lambda x: jnp.linalg.norm(x / jnp.linalg.norm(x)),
    "sum of softmax": lambda x: jnp.sum(jax.nn.softmax(x)),
    "sum of the layer softmax": lambda x: jnp.sum(fp.layers.softmax(x)),
    "log of the sum of softmax": lambda x: jnp.sum(jax.nn.logsumexp(jax.nn.log_softmax(x), -1)),
    "shifted": lambda x: jnp.sum(1e4 * x - jnp.mean(1e4 * x)),
    "sine and cosine": lambda x: jnp.sum(jnp.sin(9 * x) ** 2 + jnp.cos(9 * x) ** 2),
    "product and logarithm": lambda x: jnp.sum(jnp.log(jnp.exp(x) * jnp.exp(-x))),
    "loop": rows_scanned,
    "branch": lambda x: jax.lax.cond(x[0, 0] > -9, lambda x: jnp.sum(jax.nn.softmax(x)), jnp.sum, x),
    "checkpoint": jax.checkpoint(lambda x: jnp.sum(fp.layers.rms_norm(x) ** 2)),
    "bias of the keys": lambda x: with_key_bias(jax.lax.stop_gradient(x))(x[0]),
    "mean of batch norm": lambda x: jnp.mean(fp.layers.batch_norm(x)[0] * 3),
    "saturated cross-entropy": lambda x: jnp.sum(fp.layers.softmax_cross_entropy(60 * x, jnp.argmax(x, -1))),
    "optax": lambda x: jnp.sum(optax.softmax_cross_entropy_with_integer_labels(60 * x, jnp.argmax(x, -1))),
    "projected": lambda x: jnp.sum(jnp.linalg.qr(x)[0] ** 2),
    "spectral": lambda x: jnp.sum(jnp.linalg.eigh(x @ x.T)[1] ** 2),
    "fitted": lambda x: jnp.sum((x - (jax.lax.stop_gradient(x) + 1e-6)) ** 2),
}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CANCELLING)
def test_a_gradient_that_cancels_is_no_deviation(case, dtype):
    verified = fp.derive(CANCELLING[case])(numbers(4, 6, dtype=dtype)).verify()
    assert max(verified.errors.values()) < 100 * jnp.finfo(dtype).eps


# A layer that takes the mean away, with its cotangent `ḡ − mean(ḡ)` in several wrong versions.
CENTRED = {
    "one term": lambda g: 1.001 * g - jnp.mean(g),
    "the other term": lambda g: g - 0.999 * jnp.mean(g),
    "one entry": lambda g: (g - jnp.mean(g)).at[1].add(1e-3 * g[1]),
    "order": lambda g: (g - jnp.mean(g))[::-1] + 2e-3 * g,
    "forgotten": lambda g: g,
}


def centred(backward):
    rule = fp.Rule(
        lambda x: (x - jnp.mean(x), ()),
        lambda r, g, needs: (g - jnp.mean(g),),
        lambda op: Equations(
            apply("centred", lambda x: x - jnp.mean(x), op.args[0]),
            (apply("back", backward, op.cotangent),),
        ),
    )
    return fp.layer(rule=rule)(lambda x: x - jnp.mean(x))


@pytest.mark.sampled(3)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1.0, 1e-12, 1e12])
@pytest.mark.parametrize("mistake", [None, *CENTRED])
def test_a_mistake_of_a_tenth_of_a_percent_is_found_where_the_gradient_is_zero(mistake, scale, dtype):
    layer = centred(CENTRED.get(mistake, lambda g: g - jnp.mean(g)))
    # The cotangent is the same for all entries but for rounding.
    derivation = fp.derive(lambda x: scale * jnp.sum(layer(x) * (jnp.sin(x) ** 2 + jnp.cos(x) ** 2) / 3))(
        numbers(5, dtype=dtype)
    )
    if mistake is None:
        derivation.verify()
    else:
        with pytest.raises(DerivationError, match=r"form 2 of `∂J/∂x = .*` deviates from autodiff"):
            derivation.verify()


def softened(backward):
    rule = fp.Rule(
        lambda x: (jax.nn.softmax(x), ()),
        lambda r, g, needs: (g,),
        lambda op: Equations(
            apply("softened", jax.nn.softmax, op.args[0]),
            (apply("back", lambda x, g: backward(jax.nn.softmax(x), g), *op.args, op.cotangent),),
        ),
    )
    return fp.layer(rule=rule)(lambda x: jax.nn.softmax(x))


SOFTENED = {
    None: lambda y, g: y * (g - jnp.sum(y * g)),
    "differently computed": lambda y, g: y * g - y * jnp.sum(y * g),
    "one term": lambda y, g: y * (1.001 * g - jnp.sum(y * g)),
    "the other term": lambda y, g: y * (g - 1.001 * jnp.sum(y * g)),
    "whole": lambda y, g: 1.001 * y * (g - jnp.sum(y * g)),
    "small entry": lambda y, g: (y * (g - jnp.sum(y * g))).at[jnp.argmin(y)].multiply(1.001),
}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mistake", SOFTENED)
def test_small_mistakes_are_found_whatever_the_size_of_an_entry(mistake, dtype):
    layer = softened(SOFTENED[mistake])
    x = jnp.asarray([0.5, -3.0, 2.0, 1.0], dtype)
    derivation = fp.derive(lambda x: jnp.sum(layer(x) * jnp.array([1.0, -2.0, 0.5, 3.0], dtype)))(x)
    if mistake in (None, "differently computed"):
        derivation.verify()
    else:
        with pytest.raises(DerivationError, match=r"deviates from autodiff by .* relative to the largest"):
            derivation.verify()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_passes_and_a_factor_of_two_does_not(dtype):
    def loss(factor):
        rule = fp.Rule(
            lambda x: (jnp.tanh(x), ()),
            lambda r, g, needs: (g,),
            lambda op: Equations(
                apply("bounded", jnp.tanh, *op.args),
                (factor * op.cotangent * apply("slope", lambda x: 1 - jnp.tanh(x) ** 2, *op.args),),
            ),
        )
        layer = fp.layer(rule=rule)(lambda x: jnp.tanh(x))
        return lambda x: jnp.sum(layer(x).astype(jnp.float32))

    x = jnp.asarray([0.5, -0.25, 1.0, 0.125], dtype)
    fp.derive(loss(1.0))(x).verify()
    with pytest.raises(DerivationError, match="deviates"):
        fp.derive(loss(2.0))(x).verify()


FP8 = ["float8_e4m3fn", "float8_e5m2"]


@pytest.mark.parametrize("dtype", FP8)
def test_floats_of_eight_bits(dtype):
    w, x = (numbers(*shape, seed=i).astype(dtype) for i, shape in enumerate([(3, 2), (4, 3)]))

    def product(x, w, **options):
        return jax.lax.dot_general(x, w, (((1,), (0,)), ((), ())), **options)

    wide = {"preferred_element_type": jnp.float32}
    for fun in (
        lambda w, x: jnp.sum(w.astype(jnp.float32) ** 2),
        lambda w, x: jnp.sum(jnp.tanh(product(x, w, **wide))),
        lambda w, x: jnp.sum(product(x.astype(FP8[0]), w.astype(FP8[1]), **wide) ** 2),
        lambda w, x: jnp.sum(
            product(x.astype(jnp.float32), w.astype(jnp.float32)).astype(dtype).astype(float)
        ),
        lambda w, x: jnp.sum((w * w - 2 * w).astype(jnp.bfloat16)).astype(float),
    ):
        derivation = fp.derive(fun, (0, 1))(w, x)
        assert "TypePromotionError" not in str(derivation)
        derivation.verify()


# --- the parts --------------------------------------------------------------------------------


def test_spread_is_that_of_the_terms():
    eps = np.finfo(np.float32).eps
    x = numbers(1000, dtype="float32")
    # A sum of random terms, each of which is changed by a unit in its last place: a standard deviation of
    # `eps ‖x‖`, of which the largest of eight is seen.
    found = spread(jnp.sum, x) / (eps * np.linalg.norm(x))
    assert 0.5 < found < 5
    cancelled = spread(lambda x: jnp.sum(x * 1.5 - x * 1.5 * jnp.float32(1)), x)
    assert cancelled > 10 * eps
    exact = {
        "moved": lambda x: x[::-1].reshape(10, 100).T,
        "largest": lambda x: jnp.max(x),
        "chosen": lambda x: jnp.where(x > 0, x, -x),
        "wider": lambda x: x.astype(jnp.float64),
        "integers": lambda x: jnp.sum(x > 0),
    }
    for fun in exact.values():
        assert not np.any(spread(fun, x))
    assert np.all(spread(lambda x: x.astype(jnp.bfloat16), x) > 0.002 * np.abs(x))


def test_ties_are_not_broken():
    x = jnp.array([2.0, 1.0, 2.0, 0.0])
    for fun in (jnp.max, lambda x: jnp.sum(jnp.sort(x)[2:]), lambda x: jnp.sum(jax.nn.relu(x))):
        assert np.all(spread(jax.grad(fun), x) < 1e-15)


def test_a_tolerance_is_relative_to_the_terms_that_cancel():
    truth, value = jnp.array([1e-9, 0.0]), jnp.array([1e-9, 3e-7])
    rounding = lambda: np.array([0.0, 1e-3 * np.finfo(float).eps])  # noqa: E731
    assert deviation(value, truth, None, rounding).error == pytest.approx(3e-4)
    assert not deviation(value, truth, 1e-4, rounding).is_allowed
    assert deviation(value, truth, 1e-3, rounding).is_allowed
    assert deviation(truth, truth, 0.0, rounding).is_allowed
