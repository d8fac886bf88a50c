"""Curvature of losses that are not convex in the outputs: named, with remedies."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from curvature_models import linear

import funcprop as fp
from funcprop.curvature import laplace


def nll(o: Any, y: Any) -> Any:
    """Of a Gaussian whose outputs are mean and logarithm of the variance."""
    return (o[1] + (o[0] - y) ** 2 * jnp.exp(-o[1])) / 2


HETEROSCEDASTIC = fp.curvature.Likelihood(
    nll,
    lambda key, o: o[0] + jnp.exp(o[1] / 2) * jax.random.normal(key),
    lambda o, u: jnp.stack([jnp.exp(-o[1]) * u[0], u[1] / 2]),
)
NX, NY = jax.random.normal(jax.random.key(0), (8, 2)), jax.random.normal(jax.random.key(1), (8,))
NW = 0.1 * jnp.ones((2, 2))


def mean_nll(w: Any, x: Any, y: Any) -> Any:
    return jax.vmap(lambda x, y: nll(linear(w, x), y))(x, y).mean()


@pytest.mark.parametrize("kind", ["exact", "mc"])
def test_a_loss_that_is_not_convex_is_named(kind: str) -> None:
    said = (
        r"the loss is not convex in the model's output at 8 of 8 examples \(0, 1, .*kind='empirical', or pass"
    )
    key = jax.random.key(0)
    for of in (fp.kfac, fp.ekfac):
        with pytest.raises(ValueError, match=said):
            of(linear, nll, kind=kind)(NW, NX, NY, key)
    optimizers = {
        "kfac": fp.training.kfac(linear, nll, 0.01, (NX, NY), kind=kind),
        "gauss_newton_diagonal": fp.training.gauss_newton_diagonal(linear, nll, 0.01, kind=kind),
    }
    for name, optimizer in optimizers.items():
        step = fp.training.make_step(mean_nll, optimizer)
        with pytest.raises(Exception, match=f"{name}: {said}"):
            jax.block_until_ready(step(NW.copy(), optimizer.init(NW), (NX, NY)))


def test_the_remedies_work() -> None:
    batch = NX, NY
    for optimizer in (
        fp.training.kfac(linear, HETEROSCEDASTIC, 0.01, batch),
        fp.training.kfac(linear, nll, 0.01, batch, kind="empirical"),
        fp.training.gauss_newton_diagonal(linear, HETEROSCEDASTIC, 0.01),
        fp.training.gauss_newton_diagonal(linear, nll, 0.01, kind="empirical"),
    ):
        new, _, value = fp.training.make_step(mean_nll, optimizer)(NW.copy(), optimizer.init(NW), batch)
        assert mean_nll(new, *batch) < value


def test_the_fisher_matrix_of_any_likelihood() -> None:
    F = fp.fisher(linear, HETEROSCEDASTIC)(NW, NX)
    find = fp.per_example(linear, HETEROSCEDASTIC, samples=500)
    found = find(NW, NX, None, {"diag_ggn", "trace_ggn", "diag_ggn_mc"}, jax.random.key(0))
    np.testing.assert_allclose(found["diag_ggn"], F.diagonal(), rtol=1e-12)
    np.testing.assert_allclose(found["trace_ggn"], F.trace(), rtol=1e-12)
    np.testing.assert_allclose(found["diag_ggn_mc"], F.diagonal(), rtol=0.15)
    one = fp.kfac(linear, HETEROSCEDASTIC, kind="exact")(NW, NX[:1])
    np.testing.assert_allclose(
        one.dense(), fp.fisher(linear, HETEROSCEDASTIC)(NW, NX[:1]).dense(), atol=1e-12
    )
    posterior = laplace(linear, HETEROSCEDASTIC, structure="full")(NW, NX, NY)
    H = 8 * F.dense()
    expected = -8 * mean_nll(NW, NX, NY) - (jnp.sum(NW**2) + jnp.linalg.slogdet(H + jnp.eye(4))[1]) / 2
    np.testing.assert_allclose(posterior.log_marginal_likelihood(1.0), expected, rtol=1e-12)
    with pytest.raises(ValueError, match=r"y=None: gradients, and kind='empirical', are at the targets"):
        fp.kfac(linear, HETEROSCEDASTIC, kind="empirical")(NW, NX)
    with pytest.raises(ValueError, match="probabilities: the likelihood is one of your own, which has none"):
        posterior.probabilities(NX)
