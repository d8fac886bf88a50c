"""Operators, posteriors and estimates of minibatches merge, or are refused."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from curvature_models import linear, squared
from flax import nnx

import funcprop as fp
from funcprop.curvature import accumulate, laplace, merge

W, X, Y = jnp.ones((2, 2)), jnp.arange(10.0).reshape(5, 2), jnp.zeros((5, 2))
PARTS = [(X[:2], Y[:2]), (X[2:], Y[2:])]


def test_kronecker_factors_accumulate() -> None:
    kfac = fp.kfac(linear, squared, kind="exact")
    found = accumulate(lambda x, y: {"k": kfac(W, x, y)}, PARTS).mean["k"]
    np.testing.assert_allclose(found.dense(), kfac(W, X, Y).dense(), rtol=1e-12)
    np.testing.assert_allclose(found.inverse(0.1).dense(), kfac(W, X, Y).inverse(0.1).dense(), rtol=1e-12)


@pytest.mark.parametrize("structure", ["full", "diagonal", "kronecker"])
def test_laplace_posteriors_add_up(structure: str) -> None:
    fitted = laplace(linear, "gaussian", structure=structure)
    found = accumulate(lambda x, y: fitted(W, x, y), PARTS).mean
    whole = fitted(W, X, Y)
    np.testing.assert_allclose(
        found.log_marginal_likelihood(2.0, 0.5), whole.log_marginal_likelihood(2.0, 0.5), rtol=1e-12
    )
    np.testing.assert_allclose(found.predictive(X).covariance, whole.predictive(X).covariance, rtol=1e-10)


def test_estimates_accumulate() -> None:
    of = lambda x, y, key: fp.ggn(linear, squared)(W, x, y).trace(samples=6, key=key)  # noqa: E731
    found = accumulate(lambda x, y: of(x, y, jax.random.key(0)), PARTS).mean
    # The same random vectors in every minibatch are those of the whole, and its error bar is no wider.
    whole = of(X, Y, jax.random.key(0))
    np.testing.assert_allclose(found.value, whole.value, rtol=1e-12)
    assert found.error >= whole.error * (1 - 1e-12)


def test_gradients_of_an_nnx_module_accumulate() -> None:
    net = nnx.Linear(2, 2, rngs=nnx.Rngs(0))

    def gradient(x: Any, y: Any) -> Any:
        return jax.grad(lambda net: jnp.mean((net(x) - y) ** 2))(net)

    found, whole = accumulate(gradient, PARTS).mean, gradient(X, Y)
    for ours, expected in zip(jax.tree.leaves(found), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-6)


def test_what_has_no_mean_is_refused() -> None:
    loss = lambda w, x, y: squared(x @ w, y)  # noqa: E731
    refused = {
        lambda x, y: fp.hessian(loss)(
            W, x, y
        ): r"a Hessian of one minibatch has no mean with others; use fp\.c",
        lambda x, y: {"g": 2 * fp.ggn(linear, squared)(W, x, y)}: "a Scaled of one minibatch has no mean",
        lambda x, y: fp.ekfac(linear, squared, kind="exact")(W, x, y): r"in its eigenbasis .*fp\.ekfac",
        lambda x, y: fp.hessian(loss)(W, x, y).spectrum(samples=2): "spectra of minibatches have no mean",
        lambda x, y: laplace(linear, "gaussian", structure="low-rank", rank=1)(
            W, x, y
        ): "no sum of that rank",
    }
    for quantity, message in refused.items():
        for parts in (PARTS, PARTS[:1]):
            with pytest.raises(ValueError, match=message):
                accumulate(quantity, parts)
    influence = fp.curvature.influence(lambda w, x, y: squared(x @ w, y), damping=1.0)
    with pytest.raises(TypeError, match=r"the quantity has a Influence, .* fp\.curvature\.over\(batches\)"):
        accumulate(lambda x, y: influence(W, x, y), PARTS)
    fitted = laplace(linear, "gaussian")
    a, b = (accumulate(lambda x, y, w=w: fitted(w, x, y), PARTS[:1]) for w in (W, 2 * W))
    with pytest.raises(ValueError, match="merge: the posteriors are at different values of the parameters"):
        merge(a, b)
