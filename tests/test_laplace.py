"""The Laplace posterior against Bayesian linear regression, dense formulas, and sampling."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import compiled
from jax.flatten_util import ravel_pytree
from jax.scipy.stats import multivariate_normal
from scipy.linalg import block_diag

from funcprop.curvature import laplace

N, D = 8, 3
X = jax.random.normal(jax.random.key(0), (N, D))
Y = jax.random.normal(jax.random.key(1), (N,))
NEW = jax.random.normal(jax.random.key(2), (4, D))
PRIOR, NOISE = 0.7, 0.6


def linear(w: Any, x: Any) -> Any:
    return x @ w["w"]


def posterior_mean(x: Any, prior: Any, noise: Any) -> Any:
    return jnp.linalg.solve(x.T @ x / noise**2 + prior * jnp.eye(D), x.T @ Y / noise**2)


@jax.jit
def evidence(x: Any, prior: Any, noise: Any) -> Any:
    """The density of the targets of Bayesian linear regression, all in one formula."""
    covariance = noise**2 * jnp.eye(N) + x @ x.T / prior
    return multivariate_normal.logpdf(Y, jnp.zeros(N), covariance)


# Orthogonal columns have a diagonal Gauss-Newton matrix.
ORTHOGONAL = jnp.linalg.qr(X)[0] * jnp.array([3.0, 1.0, 0.5])
EXACT = [
    ("full", X, {}),
    ("low-rank", X, {"rank": D}),
    ("diagonal", ORTHOGONAL, {}),
    ("kronecker", X, {}),
]


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("structure", "x", "options"), EXACT)
def test_bayesian_linear_regression_in_closed_form(structure: str, x: Any, options: Any) -> None:
    params = {"w": posterior_mean(x, PRIOR, NOISE)}
    found = laplace(linear, "gaussian", structure=structure, **options)(params, x, Y)
    value = found.log_marginal_likelihood(PRIOR, NOISE)
    np.testing.assert_allclose(value, evidence(x, PRIOR, NOISE), rtol=1e-10)
    covariance = jnp.linalg.inv(x.T @ x / NOISE**2 + PRIOR * jnp.eye(D))
    predicted = found.predictive(NEW, PRIOR, NOISE)
    np.testing.assert_allclose(predicted.mean[:, 0], NEW @ params["w"], rtol=1e-10)
    np.testing.assert_allclose(
        predicted.covariance[:, 0, 0], jnp.einsum("ni,ij,nj->n", NEW, covariance, NEW), rtol=1e-9
    )
    draws = jax.vmap(lambda key: found.sample(key, PRIOR, NOISE)["w"])(
        jax.random.split(jax.random.key(3), 4000)
    )
    np.testing.assert_allclose(jnp.cov(draws.T), covariance, atol=0.1 * float(covariance.max()))
    np.testing.assert_allclose(draws.mean(0), params["w"], atol=0.1)


@pytest.mark.parametrize("structure", ["full", "kronecker"])
def test_linear_regression_of_several_targets(structure: str) -> None:
    """Every target has a regression of its own: the evidences multiply, no two are correlated."""
    targets = jnp.stack([Y, jnp.cos(3 * Y), Y**2 - 1], 1)
    precision = X.T @ X / NOISE**2 + PRIOR * jnp.eye(D)
    params = {"w": jnp.linalg.solve(precision, X.T @ targets / NOISE**2)}
    found = laplace(linear, "gaussian", structure=structure)(params, X, targets)
    noisy = NOISE**2 * jnp.eye(N) + X @ X.T / PRIOR
    expected = sum(multivariate_normal.logpdf(y, jnp.zeros(N), noisy) for y in targets.T)
    np.testing.assert_allclose(found.log_marginal_likelihood(PRIOR, NOISE), expected, rtol=1e-10)
    variance = jnp.einsum("ni,ij,nj->n", NEW, jnp.linalg.inv(precision), NEW)
    covariance = variance[:, None, None] * jnp.eye(3)
    np.testing.assert_allclose(found.predictive(NEW, PRIOR, NOISE).covariance, covariance, atol=1e-9)


def test_gradient_of_the_evidence() -> None:
    # At the posterior mean the evidence does not change with the parameters, to first order.
    params = {"w": posterior_mean(X, PRIOR, NOISE)}
    found = laplace(linear, "gaussian", structure="full")(params, X, Y)
    ours = jax.jit(jax.grad(lambda *h: found.log_marginal_likelihood(*h), (0, 1)))(PRIOR, NOISE)
    expected = jax.grad(lambda p, n: evidence(X, p, n), (0, 1))(PRIOR, NOISE)
    np.testing.assert_allclose(ours, expected, rtol=1e-8)


def test_methods_are_jitted_with_the_posterior_as_their_argument() -> None:
    params = {"w": posterior_mean(ORTHOGONAL, 1.0, 1.0)}
    found = laplace(linear, "gaussian")(params, ORTHOGONAL, Y)
    predicted = jax.jit(lambda posterior, x: posterior.predictive(x))(found, NEW)
    expected = jnp.einsum("ni,i->n", NEW**2, 1 / (1 + jnp.sum(ORTHOGONAL**2, 0)))
    np.testing.assert_allclose(predicted.covariance[:, 0, 0], expected, rtol=1e-10)


def network(p: Any, x: Any) -> Any:
    return jnp.tanh(x @ p["a"]) @ p["b"] + p["c"]


PARAMS = {
    "a": jax.random.normal(jax.random.key(4), (D, 4)),
    "b": jax.random.normal(jax.random.key(5), (4, 3)),
    "c": jnp.array([0.1, -0.2, 0.3]),
}
LABELS = jnp.arange(N) % 3


@pytest.fixture(scope="module")
def dense() -> Any:
    """The summed Gauss-Newton matrix of the classifier, and Jacobians at the new inputs."""
    flat, unravel = ravel_pytree(PARAMS)

    def parts(flat: Any, x: Any) -> Any:
        J = jax.vmap(lambda x: jax.jacrev(lambda v: network(unravel(v), x))(flat))(x)
        p = jax.nn.softmax(jax.vmap(lambda x: network(unravel(flat), x))(x))
        inner = jax.vmap(jnp.diag)(p) - p[:, :, None] * p[:, None]
        return jnp.einsum("nap,nab,nbq->pq", J, inner, J), J

    program = compiled(parts)
    return program(flat, X)[0], program(flat, NEW)[1]


def kronecker_products() -> Any:
    """KFAC's blocks of `network`, each the sum of the examples' `A` times the mean of their `G`, in NumPy."""
    x, a, b, c = map(np.asarray, (X, *PARAMS.values()))
    hidden = np.tanh(x @ a)
    p = np.asarray(jax.nn.softmax(hidden @ b + c))
    of_outputs = np.stack([np.diag(row) - np.outer(row, row) for row in p])
    back = b[None] * (1 - hidden**2)[:, :, None]  # the outputs' Jacobian in what tanh is applied to
    of_hidden = np.einsum("nic,ncd,njd->ij", back, of_outputs, back) / N
    G = of_outputs.mean(0)
    return block_diag(np.kron(x.T @ x, of_hidden), np.kron(hidden.T @ hidden, G), N * G)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("structure", ["full", "diagonal", "low-rank", "kronecker"])
def test_classifier_with_a_prior_for_every_leaf(dense: Any, structure: str) -> None:
    H, J = dense
    if structure == "diagonal":
        H = jnp.diag(jnp.diag(H))
    if structure == "low-rank":
        values, vectors = jnp.linalg.eigh(H)
        H = vectors[:, -5:] * values[-5:] @ vectors[:, -5:].T
    if structure == "kronecker":
        H = kronecker_products()
    options = {"rank": 5} if structure == "low-rank" else {}
    prior: dict[str, Any] = {"a": 0.5, "b": jnp.array([1.0, 2.0, 4.5]), "c": 4.0}
    found = laplace(network, "categorical", structure=structure, **options)(PARAMS, X, LABELS)
    posterior = found.predictive(NEW, prior), found.log_marginal_likelihood(prior)
    if structure == "kronecker":
        # The precision of a leaf is one number, the mean; the prior's own density is of all that were given.
        lost = (prior["b"].mean() - prior["b"]) * PARAMS["b"] ** 2 - jnp.log(prior["b"].mean() / prior["b"])
        posterior = posterior[0], posterior[1] - jnp.sum(lost) / 2
        prior["b"] = prior["b"].mean()
    δ = ravel_pytree(jax.tree.map(lambda d, p: jnp.broadcast_to(d, p.shape), prior, PARAMS))[0]
    precision = H + jnp.diag(δ)
    covariance = jnp.einsum("nap,pq,nbq->nab", J, jnp.linalg.inv(precision), J)
    np.testing.assert_allclose(posterior[0].covariance, covariance, rtol=1e-8)
    flat = ravel_pytree(PARAMS)[0]
    fit = jnp.sum(jax.nn.log_softmax(jax.vmap(network, (None, 0))(PARAMS, X))[jnp.arange(N), LABELS])
    expected = (
        fit - 0.5 * jnp.sum(δ * flat**2) + 0.5 * jnp.sum(jnp.log(δ)) - 0.5 * jnp.linalg.slogdet(precision)[1]
    )
    np.testing.assert_allclose(posterior[1], expected, rtol=1e-9)


def test_last_layer(dense: Any) -> None:
    H, J = dense
    last = slice(3 * 4, None)
    found = laplace(network, "categorical", structure="full", where=["b", "c"])(PARAMS, X, LABELS)
    precision = H[last, last] + 2 * jnp.eye(15)
    expected = jnp.einsum("nap,pq,nbq->nab", J[..., last], jnp.linalg.inv(precision), J[..., last])
    np.testing.assert_allclose(found.predictive(NEW, 2.0).covariance, expected, rtol=1e-9)
    drawn = found.sample(jax.random.key(0))
    np.testing.assert_array_equal(drawn["a"], PARAMS["a"])
    assert not np.allclose(drawn["b"], PARAMS["b"])


def test_probabilities_are_less_certain_than_the_network() -> None:
    found = laplace(network, "categorical")(PARAMS, X, LABELS)
    plain = jax.nn.softmax(jax.vmap(network, (None, 0))(PARAMS, NEW))
    unsure = found.probabilities(NEW, 0.01)
    np.testing.assert_allclose(unsure.sum(1), 1, rtol=1e-12)
    assert unsure.max(1).mean() < plain.max(1).mean() - 0.05
    np.testing.assert_allclose(found.probabilities(NEW, 1e9), plain, rtol=1e-6)
    one = laplace(lambda p, x: network(p, x)[0], "bernoulli")(PARAMS, X, (LABELS == 0).astype(float))
    expected = jax.nn.sigmoid(jax.vmap(network, (None, 0))(PARAMS, NEW)[:, :1])
    np.testing.assert_allclose(one.probabilities(NEW, 1e9), expected, rtol=1e-6)
    # The sigmoid's mean over the outputs, by quadrature; MacKay's formula is within 0.02 of it.
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    mean, covariance = one.predictive(NEW, 0.5)
    expected = jax.nn.sigmoid(mean + jnp.sqrt(covariance[:, 0]) * nodes) @ weights / weights.sum()
    np.testing.assert_allclose(one.probabilities(NEW, 0.5)[:, 0], expected, atol=0.02)


def test_errors() -> None:
    with pytest.raises(ValueError, match="likelihood='poisson' is not known"):
        laplace(linear, "poisson")
    with pytest.raises(
        ValueError, match="structure='block'; choose one of full, diagonal, low-rank, kronecker"
    ):
        laplace(linear, "gaussian", structure="block")
    with pytest.raises(ValueError, match=r"rank=3 with structure='diagonal'; a rank"):
        laplace(linear, "gaussian", rank=3)
    with pytest.raises(ValueError, match=rf"rank={D + 1}, but there are {D} parameters"):
        laplace(linear, "gaussian", structure="low-rank", rank=D + 1)({"w": jnp.ones(D)}, X, Y)
    with pytest.raises(
        ValueError, match=r"gaussian: the target of one example has shape \(2,\), but its out"
    ):
        laplace(linear, "gaussian")({"w": jnp.ones(D)}, X, jnp.stack([Y, Y], 1))
    with pytest.raises(ValueError, match=r"categorical: the output of one example is a scalar"):
        laplace(linear, "categorical")({"w": jnp.ones(D)}, X, LABELS)
    found = laplace(linear, "gaussian")({"w": jnp.ones(D)}, X, Y)
    with pytest.raises(ValueError, match=r"prior_precision is -1\.0; it must be positive"):
        found.log_marginal_likelihood(-1.0)
    with pytest.raises(ValueError, match=r"prior_precision has shape \(2,\) for 'w', which has shape"):
        found.log_marginal_likelihood(jnp.ones(2))
    with pytest.raises(ValueError, match="noise is 0; it must be positive"):
        found.log_marginal_likelihood(1.0, 0)
    with pytest.raises(
        ValueError, match=r"prior_precision is PyTreeDef\(\[\*, \*\]\), but the parameters are"
    ):
        found.predictive(NEW, [1.0, 2.0])
    with pytest.raises(ValueError, match="'gaussian', which has none"):
        found.probabilities(NEW)
    classifier = laplace(network, "categorical")(PARAMS, X, LABELS)
    with pytest.raises(ValueError, match="noise=2, but the likelihood is 'categorical'"):
        classifier.predictive(NEW, 1.0, 2)
    with pytest.raises(ValueError, match="prior_precision of 'b' is 0"):
        classifier.predictive(NEW, {"a": 1.0, "b": 0, "c": 1.0})
    with pytest.raises(FloatingPointError, match="'w'"):
        laplace(linear, "gaussian")({"w": jnp.ones(D)}, X.at[0, 0].set(jnp.nan), Y)
