"""Influence functions on ridge regression, where everything is known, and against training again."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import funcprop as fp
from funcprop.curvature import Minres, influence

N, D, λ = 30, 3, 0.3
X = jax.random.normal(jax.random.key(0), (N, D))
Y = jax.random.normal(jax.random.key(1), (N,))
TEST = jax.random.normal(jax.random.key(2), (4, D)), jax.random.normal(jax.random.key(3), (4,))


def squared(w: Any, x: Any, y: Any) -> Any:
    return 0.5 * (x @ w - y) ** 2


def penalty(w: Any) -> Any:
    return 0.5 * λ * jnp.sum(w**2)


H = X.T @ X / N + λ * jnp.eye(D)
W = jnp.linalg.solve(H, X.T @ Y / N)


@pytest.fixture(scope="module")
def found() -> Any:
    return influence(squared, regularizer=penalty, solver=Minres(tolerance=1e-13))(W, X, Y)


def test_ridge_regression_in_closed_form(found: Any) -> None:
    gradients = X * (X @ W - Y)[:, None]
    of_test = TEST[0] * (TEST[0] @ W - TEST[1])[:, None]
    expected = of_test @ jnp.linalg.solve(H, gradients.T) / N
    np.testing.assert_allclose(found.on_losses(*TEST), expected, rtol=1e-10)
    np.testing.assert_allclose(found.on_mean_loss(*TEST), expected.mean(0), rtol=1e-10)


def test_leaving_one_out_and_training_again(found: Any) -> None:
    for n in (0, 5):
        kept = jnp.arange(N) != n
        again = jnp.linalg.solve(X[kept].T @ X[kept] / N + λ * jnp.eye(D), X[kept].T @ Y[kept] / N)
        leverage = X[n] @ jnp.linalg.solve(H, X[n]) / N
        moved = found.on_parameters(n) / (1 - leverage)
        np.testing.assert_allclose(W + moved, again, rtol=1e-10)


def test_retraining_a_classifier_agrees_in_rank() -> None:
    labels = (X @ jnp.array([1.0, -1.0, 0.5]) + 0.5 * Y > 0).astype(float)

    def logistic(w: Any, x: Any, y: Any) -> Any:
        return jnp.logaddexp(0, x @ w) - y * (x @ w)

    @jax.jit
    def trained(weights: Any) -> Any:
        def objective(w: Any) -> Any:
            return weights @ jax.vmap(logistic, (None, 0, 0))(w, X, labels) / N + penalty(w)

        def newton(_: Any, w: Any) -> Any:
            return w - jnp.linalg.solve(jax.hessian(objective)(w), jax.grad(objective)(w))

        return jax.lax.fori_loop(0, 20, newton, jnp.zeros(D))

    w = trained(jnp.ones(N))
    predicted = influence(logistic, regularizer=penalty, solver=Minres(tolerance=1e-12))(
        w, X, labels
    ).on_mean_loss(X, labels)
    mean_loss = lambda w: jnp.mean(jax.vmap(logistic, (None, 0, 0))(w, X, labels))  # noqa: E731
    without = [trained(jnp.ones(N).at[n].set(0)) for n in range(N)]
    actual = jnp.array([mean_loss(w_n) - mean_loss(w) for w_n in without])
    assert np.corrcoef(predicted, actual)[0, 1] > 0.99
    # The error is of second order in 1/N.
    assert float(jnp.abs(predicted - actual).max()) < 0.2 * float(jnp.abs(actual).max())


def test_another_curvature_and_its_damping(found: Any) -> None:
    mean = lambda outputs, y: 0.5 * jnp.mean((outputs - y) ** 2)  # noqa: E731
    gauss_newton = fp.ggn(lambda w, x: x @ w, mean, batched=True)(W, X, Y)
    other = influence(squared, curvature=gauss_newton, damping=λ, solver=Minres(tolerance=1e-13))(W, X, Y)
    np.testing.assert_allclose(other.on_losses(*TEST), found.on_losses(*TEST), rtol=1e-9)


def test_errors(found: Any) -> None:
    for options, message in (
        ({"solver": "lu"}, r"influence: solver=.lu. is none; pass fp.curvature.Minres\(\)"),
        ({"damping": np.inf}, "influence: damping=inf is not finite"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            fp.curvature.influence(lambda w, y: (w - y) ** 2, **options)
    with pytest.raises(TypeError, match=r"data/0 is a shape .* but influence needs values"):
        fp.curvature.influence(lambda w, y: (w - y) ** 2)(0.0, jax.ShapeDtypeStruct((3,), "float32"))
    with pytest.raises(ValueError, match=r"influence: damping=-0\.1 is negative"):
        influence(squared, damping=-0.1)
    with pytest.raises(ValueError, match=r"shapes \(30, 3\), \(29,\), but the leading axis"):
        influence(squared)(W, X, Y[1:])
    with pytest.raises(IndexError, match="example=30, but there are 30"):
        found.on_parameters(30)
    with pytest.warns(fp.curvature.ConvergenceWarning, match="solve: the residual"):
        influence(squared, regularizer=penalty, solver=Minres(products=1))(W, X, Y).on_mean_loss(*TEST)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("samples", [2, 4, 10])
@pytest.mark.parametrize("of", ["itself", "losses"])
def test_the_coverage_of_random_projections(of: str, samples: int) -> None:
    """Of 1000 estimates for every example, 93 to 97 in 100 intervals hold the truth."""
    D, N = 100, 30
    x, y = jax.random.normal(jax.random.key(0), (N, D)), jax.random.normal(jax.random.key(1), (N,))
    w, root = jax.random.normal(jax.random.key(2), (D,)), jax.random.normal(jax.random.key(3), (D, D))
    H = root @ root.T / D + 0.1 * jnp.eye(D)
    matrix = fp.hessian(lambda w: w @ H @ w / 2)(w)
    found = influence(squared, curvature=matrix, solver=fp.curvature.DenseSolver())(w, x, y)
    gradients = x * (x @ w - y)[:, None]
    truth = gradients @ jnp.linalg.solve(H, gradients.T) / N

    def inside(key: Any) -> Any:
        if of == "losses":
            low, high = found.on_losses(x[:3], y[:3], samples=samples, key=key).interval()
            return (low <= truth[:3]) & (truth[:3] <= high)
        low, high = found.on_itself(samples=samples, key=key).interval()
        return (low <= jnp.diag(truth)) & (jnp.diag(truth) <= high)

    covered = jax.jit(lambda keys: jax.lax.map(inside, keys, batch_size=100))
    found_share = float(covered(jax.random.split(jax.random.key(7), 1000)).mean())
    assert 0.93 <= found_share <= 0.97


def test_a_loss_of_a_whole_batch_is_refused_by_name() -> None:
    """It fails inside of the model, with words that say nothing about examples."""

    def mean(w, x, y):
        return jnp.mean((jnp.einsum("ni,i->n", x, w) - y) ** 2)

    x, y = jnp.ones((4, 3)), jnp.ones(4)
    with pytest.raises(
        ValueError, match="the loss mean takes a batch and fails for ONE example; write it for"
    ):
        fp.curvature.influence(mean)(jnp.ones(3), x, y)


def test_print_says_what_it_is_of_and_not_the_program(found: Any) -> None:
    assert repr(found) == (
        "influence of 30 training examples on 3 parameters: damping 0, Minres\n"
        "parameter  type\n---------  ----------\n(all)      float64[3]"
    )
    over = fp.curvature.over([(X[:20], Y[:20]), (X[20:], Y[20:])])(influence(squared, damping=0.5))(W)
    assert repr(over).startswith(
        "influence of the training examples of a data set on 3 parameters: damping 0.5\n"
    )


def test_a_loss_whose_examples_mix_is_refused() -> None:
    """Of a batch of one, batch statistics make each influence zero."""

    def centred(w, x, y):
        h = jnp.tanh(x @ w)
        return jnp.mean((h - h.mean(0) - y) ** 2)

    asked = influence(centred, batched=True, damping=1.0)
    x, y = jnp.ones((4, 3)), jnp.ones((4, 2))
    with pytest.raises(
        ValueError, match=r"^influence: the examples mix: in .*leading axis, which has length"
    ):
        asked(jnp.ones((3, 2)), x, y)
    with pytest.raises(ValueError, match=r"^influence: the examples mix"):
        fp.curvature.over([(x, y)])(asked)(jnp.ones((3, 2)))
