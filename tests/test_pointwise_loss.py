"""Focal and Huber loss: values of optax, and derivatives where the formulas have an edge."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compiling import compiled

import funcprop as fp

X = jnp.array([-800.0, -30.0, -1.0, 0.0, 2.0, 40.0, 800.0])


def both(loss, *args, argnums=0):
    """Value and gradients by the rule and by autodiff."""
    return (
        compiled(fp.value_and_grad(lambda *a: loss(*a).sum(), argnums, rules=rules))(*args)
        for rules in (fp.rules.handwritten, fp.rules.autodiff)
    )


@pytest.mark.sampled(5)
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("alpha", [None, 0.25])
@pytest.mark.parametrize("target", [0, 1])
def test_focal_loss_of_extreme_logits(gamma, alpha, target):
    labels = jnp.full(X.shape, target)
    loss = lambda x: fp.layers.focal_loss(x, labels, alpha=alpha, gamma=gamma)  # noqa: E731
    np.testing.assert_array_equal(loss(X), optax.sigmoid_focal_loss(X, labels, alpha=alpha, gamma=gamma))
    (value, gradient), (expected_value, expected) = both(loss, X)
    assert value == expected_value
    assert np.all(np.isfinite(gradient))
    np.testing.assert_allclose(gradient, expected, rtol=1e-12, atol=1e-300)


def test_huber_loss_at_its_edges():
    e = jnp.array([0.0, 0.5, 1.0, -1.0, 1.5, -jnp.inf, jnp.inf, jnp.nan])
    zeros = jnp.zeros_like(e)
    np.testing.assert_array_equal(fp.layers.huber_loss(e, zeros), optax.huber_loss(e, zeros))
    (_, actual), (_, expected) = both(fp.layers.huber_loss, e, zeros, argnums=(0, 1))
    np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_cotangents_have_the_dtypes_of_their_arguments(dtype):
    x, t = jnp.ones(3, dtype), jnp.zeros(3)
    for loss in (fp.layers.huber_loss, fp.layers.focal_loss):
        gradient = jax.grad(fp.with_rules(lambda *a, f=loss: f(*a).sum(), fp.rules.handwritten), (0, 1))(x, t)
        assert [g.dtype for g in gradient] == [dtype, jnp.float64]


@pytest.mark.parametrize("loss", [fp.layers.huber_loss, fp.layers.focal_loss])
def test_nothing_is_broadcast(loss):
    with pytest.raises(ValueError, match=r"has shape \(3, 1\) but (target|labels) has \(3,\); reshape one"):
        loss(jnp.ones((3, 1)), jnp.ones(3))


def test_equations_are_true():
    x, t = jnp.array([0.3, -2.0, 1.0]), jnp.array([0, 1, 1])
    fp.derive(lambda x: jnp.sum(fp.layers.focal_loss(x, t, alpha=0.3)))(x).verify()
    fp.derive(lambda x, t: jnp.sum(fp.layers.huber_loss(x, t, delta=0.5)), (0, 1))(x, x * 2).verify()
