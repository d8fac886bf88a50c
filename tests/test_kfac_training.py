"""Optimizers by Kronecker factors and by Gauss-Newton diagonals, against closed forms, and on digits."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from digits_training import by_sgd, cross_entropy, digits, network, trained

import funcprop as fp
from funcprop.training import gauss_newton_diagonal, kfac

X = jax.random.normal(jax.random.key(0), (9, 3))
Y = jax.random.normal(jax.random.key(1), (9, 2))
W = jax.random.normal(jax.random.key(2), (3, 2))


def linear(w: Any, x: Any) -> Any:
    return x @ w


def squared(output: Any, y: Any) -> Any:
    return jnp.sum((output - y) ** 2) / 2


def mean_squared(w: Any, x: Any, y: Any) -> Any:
    return jnp.mean(jax.vmap(squared)(x @ w, y))


GRADIENT = jax.grad(mean_squared)(W, X, Y)


# --- Kronecker factors ------------------------------------------------------------------------


def test_one_step_of_kfac_solves_least_squares() -> None:
    # Here A ⊗ G is the Hessian: A = XᵀX / N, G = I.
    chain = optax.chain(
        optax.clip_by_global_norm(1e6),
        kfac(linear, squared, 1.0, (X, Y), damping=0.0, kind="exact"),
    )
    step = fp.training.make_step(mean_squared, chain)
    w, _, _ = step(jnp.array(W), chain.init(W), (X, Y))
    np.testing.assert_allclose(w, jnp.linalg.lstsq(X, Y)[0], rtol=1e-9)


@pytest.mark.parametrize("method", ["pi", "eigenvalue"])
def test_damping(method: str) -> None:
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), (X, Y))
    optimizer = kfac(linear, squared, 1.0, shapes, damping=0.3, kind="exact", method=method)
    u, _ = optimizer.update(GRADIENT, optimizer.init(W), W, batch=(X, Y))
    A, G = X.T @ X / len(X), jnp.eye(2)
    if method == "eigenvalue":
        expected = jnp.linalg.solve(A + 0.3 * jnp.eye(3), GRADIENT)
    else:
        π = jnp.sqrt((jnp.trace(A) / 3) / (jnp.trace(G) / 2))
        left = jnp.linalg.inv(A + π * jnp.sqrt(0.3) * jnp.eye(3))
        expected = left @ GRADIENT @ jnp.linalg.inv(G + jnp.sqrt(0.3) / π * jnp.eye(2))
    np.testing.assert_allclose(u, -expected, rtol=1e-9)


def test_average_of_factors_over_minibatches() -> None:
    optimizer = kfac(linear, squared, 1.0, (X, Y), damping=0.1, decay=0.6, every=2, kind="exact")
    state, grams = optimizer.init(W), []
    update = jax.jit(optimizer.update)
    for k in range(5):
        x = X * (k + 1)
        _, state = update(GRADIENT, state, W, batch=(x, Y))
        grams.append(x.T @ x / len(x))
        ((A, _),) = state[0].average.factors.values()
        # Updates 0, 2 and 4 count; the first is an average by itself, the second weighs as much.
        expected = [grams[0], (grams[0] + grams[min(k, 2)]) / 2][k >= 2]
        if k == 4:
            expected = 0.6 * (grams[0] + grams[2]) / 2 + 0.4 * grams[4]
        np.testing.assert_allclose(A, expected, rtol=1e-9)


def test_accumulated_steps_get_the_minibatch() -> None:
    """Of two minibatches that are the same, the second's update is that without accumulation."""
    one = kfac(linear, squared, 1.0, (X, Y), damping=0.1, kind="exact")
    many = optax.MultiSteps(one, 2)
    w, state, values = W, many.init(W), []
    step = fp.training.make_step(mean_squared, many)
    for _ in range(2):
        w, state, value = step(jnp.array(w), state, (X, Y))
        values.append(value)
    gradient = jax.grad(mean_squared)(W, X, Y)
    expected = optax.apply_updates(W, one.update(gradient, one.init(W), W, batch=(X, Y))[0])
    np.testing.assert_allclose(w, expected, rtol=1e-6)  # optax accumulates in float32
    assert values[0] == values[1]


def test_random_signs_are_drawn_anew() -> None:
    optimizer = kfac(linear, squared, 1.0, (X, Y), damping=0.1, decay=0.0)
    _, first = optimizer.update(GRADIENT, optimizer.init(W), W, batch=(X, Y))
    _, second = optimizer.update(GRADIENT, first, W, batch=(X, Y))
    ((_, G),) = first[0].average.factors.values()
    ((_, H),) = second[0].average.factors.values()
    np.testing.assert_allclose(jnp.diag(G), 1, rtol=1e-12)  # signs squared
    assert not np.allclose(G, H)


# --- Gauss-Newton diagonals -------------------------------------------------------------------


def test_gauss_newton_diagonal_of_a_linear_model() -> None:
    chain = optax.chain(gauss_newton_diagonal(linear, squared, 0.5, damping=0.2))
    u, _ = chain.update(GRADIENT, chain.init(W), W, batch=(X, Y))
    expected = -0.5 * GRADIENT / (jnp.mean(X**2, 0)[:, None] + 0.2)
    np.testing.assert_allclose(u, expected, rtol=1e-10)
    sampled = gauss_newton_diagonal(linear, squared, 1.0, damping=0.2, decay=0.0, kind="mc")
    first, state = sampled.update(GRADIENT, sampled.init(W), W, batch=(X, Y))
    second, _ = sampled.update(GRADIENT, state, W, batch=(X, Y))
    assert np.all(np.sign(first) == -np.sign(GRADIENT))
    assert first.shape == second.shape


# --- digits -----------------------------------------------------------------------------------


@pytest.mark.nightly
def test_kfac_beats_sgd_on_digits() -> None:
    optimizer = kfac(network, cross_entropy, 1.0, digits(), damping=0.01)
    assert trained(optimizer, 40) < by_sgd(120) / 4


def test_gauss_newton_diagonal_beats_sgd_on_digits() -> None:
    optimizer = gauss_newton_diagonal(network, cross_entropy, 0.1, damping=0.03, kind="mc")
    assert trained(optimizer, 120) < by_sgd(120)


# --- errors -----------------------------------------------------------------------------------


def test_errors() -> None:
    with pytest.raises(ValueError, match="kfac: method='foo' is not known; choose one of pi, eigenvalue"):
        kfac(linear, squared, 1.0, (X, Y), method="foo")
    with pytest.raises(ValueError, match="kfac: damping=nan is not finite"):
        kfac(linear, squared, 1.0, (X, Y), damping=float("nan"))
    with pytest.raises(ValueError, match="kfac: damping=-1 is negative"):
        kfac(linear, squared, 1.0, (X, Y), damping=-1)
    with pytest.raises(ValueError, match=r"kfac: decay=1\.5"):
        kfac(linear, squared, 1.0, (X, Y), decay=1.5)
    with pytest.raises(ValueError, match="kfac: every=0"):
        kfac(linear, squared, 1.0, (X, Y), every=0)
    with pytest.raises(ValueError, match="kind='all' is not known"):
        kfac(linear, squared, 1.0, (X, Y), kind="all")
    with pytest.raises(ValueError, match="gauss_newton_diagonal: kind='all'; choose"):
        gauss_newton_diagonal(linear, squared, 1.0, kind="all")
    for optimizer in (kfac(linear, squared, 1.0, (X, Y)), gauss_newton_diagonal(linear, squared, 1.0)):
        with pytest.raises(ValueError, match=r"update\(\) lacks batch; call .*make_step"):
            optimizer.update(GRADIENT, optimizer.init(W), W)
