"""Laplace posteriors: outputs of any shape, noise of each output, priors from earlier data."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from curvature_models import linear
from jax.flatten_util import ravel_pytree

import funcprop as fp
from funcprop.curvature import laplace

# --- shapes -----------------------------------------------------------------------------------


TAGGER = jnp.array([[1.0, 0.0, -1.0], [0.0, 2.0, 0.0]])
TOKENS, TAGS = jnp.arange(16.0).reshape(2, 4, 2) / 10, jnp.array([[0, 1, 2, 0], [2, 2, 1, 1]])


def test_a_sequence_keeps_its_shape() -> None:
    posterior = laplace(linear, "categorical", structure="full")(TAGGER, TOKENS, TAGS)
    expected = jax.nn.softmax(TOKENS @ TAGGER)
    np.testing.assert_allclose(posterior.probabilities(TOKENS, 1e12), expected, rtol=1e-6)
    found = posterior.predictive(TOKENS, 0.5)
    assert found.mean.shape == (2, 4, 3)
    assert found.covariance.shape == (2, 4, 3, 4, 3)
    J = jax.vmap(jax.jacobian(linear), (None, 0))(TAGGER, TOKENS).reshape(2, 12, 6)
    p = expected.reshape(8, 3)
    inner = jax.vmap(jnp.diag)(p) - p[:, :, None] * p[:, None]
    H = jnp.einsum("tap,tab,tbq->pq", J.reshape(8, 3, 6), inner, J.reshape(8, 3, 6))
    covariance = jnp.einsum("nap,pq,nbq->nab", J, jnp.linalg.inv(H + 0.5 * jnp.eye(6)), J)
    np.testing.assert_allclose(found.covariance.reshape(2, 12, 12), covariance, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(found.variance.reshape(2, 12), jnp.diagonal(covariance, axis1=1, axis2=2))
    drawn = posterior.probabilities(TOKENS, 20.0, samples=4000, key=jax.random.key(0))
    np.testing.assert_allclose(drawn.sum(-1), 1, rtol=1e-9)
    np.testing.assert_allclose(drawn, posterior.probabilities(TOKENS, 20.0), atol=0.01)


def test_a_noise_that_is_no_number_is_refused_and_one_for_each_output_is_fitted() -> None:
    x = jnp.arange(8.0).reshape(4, 2) / 4
    w = jnp.ones((2, 3))
    y = x @ w + 0.1
    noise = jnp.array([0.1, 0.5, 1.0])
    plain = laplace(linear, "gaussian", structure="full")(w, x, y)
    with pytest.raises(
        ValueError, match=r"noise has shape \(3,\), but it is one number; a noise for each out"
    ):
        plain.log_marginal_likelihood(1.0, noise)
    for structure in ("full", "kronecker", "diagonal"):
        one = lambda i, s=structure: laplace(linear, "gaussian", structure=s)(w[:, i], x, y[:, i])  # noqa: E731
        expected = sum(one(i).log_marginal_likelihood(1.0, noise[i]) for i in range(3))
        found = laplace(linear, "gaussian", structure=structure, noise=noise)(w, x, y)
        if structure != "kronecker":
            np.testing.assert_allclose(found.log_marginal_likelihood(1.0), expected, rtol=1e-10)
            variances = [one(i).predictive(x, 1.0, noise[i]).variance[:, 0] for i in range(3)]
            np.testing.assert_allclose(found.predictive(x).variance, jnp.stack(variances, 1), rtol=1e-10)
        half = laplace(linear, "gaussian", structure=structure, noise=noise / 2)(w, x, y)
        np.testing.assert_allclose(half.log_marginal_likelihood(1.0, 2.0), found.log_marginal_likelihood(1.0))
    with pytest.raises(ValueError, match=r"gaussian: noise has shape \(2,\), but the outputs .* \(3,\)"):
        laplace(linear, "gaussian", noise=noise[:2])(w, x, y)
    with pytest.raises(ValueError, match=r"laplace: noise=0\.1, but the likelihood is 'categorical'"):
        laplace(linear, "categorical", noise=0.1)


def test_outputs_that_are_matrices_with_a_noise_of_each_entry() -> None:
    noise = jnp.array([[0.5, 1.0], [2.0, 0.7]])
    model = lambda w, x: jnp.outer(jnp.tanh(x @ w["a"]), jnp.array([1.0, 2.0])) + w["b"]  # noqa: E731
    normal = lambda i, *shape: jax.random.normal(jax.random.key(i), shape)  # noqa: E731
    w, x, y = {"a": normal(0, 3, 2), "b": normal(1, 2, 2)}, normal(2, 6, 3), normal(3, 6, 2, 2)
    flat, unravel = ravel_pytree(w)
    J = jax.jit(jax.vmap(lambda x: jax.jacobian(lambda f: model(unravel(f), x).ravel())(flat)))(x)
    σ = 1.3 * noise.ravel()
    precision = jnp.einsum("nop,o,noq->pq", J, σ**-2, J) + 0.7 * jnp.eye(10)
    misfits = (jax.vmap(model, (None, 0))(w, x) - y).reshape(6, 4) / σ
    likelihood = -jnp.sum(misfits**2 / 2 + jnp.log(σ * jnp.sqrt(2 * jnp.pi)))
    prior = 5 * jnp.log(0.7) - 0.35 * flat @ flat
    for structure in ("full", "diagonal"):
        posterior = laplace(model, "gaussian", structure=structure, noise=noise)(w, x, y)
        precision = precision if structure == "full" else jnp.diag(jnp.diag(precision))
        expected = likelihood + prior - jnp.linalg.slogdet(precision)[1] / 2
        np.testing.assert_allclose(posterior.log_marginal_likelihood(0.7, 1.3), expected, rtol=1e-10)
        found = posterior.predictive(x[:2], 0.7, 1.3)
        assert found.mean.shape == (2, 2, 2)
        covariance = jnp.einsum("nop,pq,nrq->nor", J[:2], jnp.linalg.inv(precision), J[:2])
        np.testing.assert_allclose(found.covariance.reshape(2, 4, 4), covariance, rtol=1e-9, atol=1e-12)


def test_a_matrix_and_its_bias_as_one_block_are_the_whole_posterior_of_a_line() -> None:
    """Of an affine model the joint block is `[x, 1] [x, 1]ᵀ ⊗ I`, all there is."""
    line = lambda w, x: x @ w["a"] + w["b"]  # noqa: E731
    x = jnp.arange(8.0).reshape(4, 2) ** 2 / 9
    w = {"a": jnp.array([[1.0, 0.0, 2.0], [0.5, 1.0, -1.0]]), "b": jnp.array([0.1, 0.2, 0.3])}
    y = jax.vmap(line, (None, 0))(w, x) + 0.1
    joint = laplace(line, "gaussian", structure="kronecker", bias="joint")(w, x, y)
    whole = laplace(line, "gaussian", structure="full")(w, x, y)
    evidence = joint.log_marginal_likelihood(0.5, 0.7)
    np.testing.assert_allclose(evidence, whole.log_marginal_likelihood(0.5, 0.7), rtol=1e-12)
    expected = whole.predictive(x, 0.5, 0.7).covariance
    np.testing.assert_allclose(joint.predictive(x, 0.5, 0.7).covariance, expected, atol=1e-12)
    over = fp.curvature.over([(x[:3], y[:3]), (x[3:], y[3:])])
    of_data = over(laplace(line, "gaussian", structure="kronecker", bias="joint"))(w)
    np.testing.assert_allclose(of_data.log_marginal_likelihood(0.5, 0.7), evidence, rtol=1e-12)
    with pytest.raises(ValueError, match="bias='joint' with structure='full'; a block of a matrix and its"):
        laplace(line, "gaussian", structure="full", bias="joint")


# --- priors -----------------------------------------------------------------------------------


@pytest.mark.parametrize("structure", ["full", "diagonal"])
def test_the_posterior_of_some_data_is_the_prior_of_the_next(structure: str) -> None:
    x = jax.random.normal(jax.random.key(0), (6, 3))
    x = x if structure == "full" else jnp.linalg.qr(x)[0]
    y = jax.random.normal(jax.random.key(1), (6,))
    both = [(x, y)] if structure == "diagonal" else [(x[:2], y[:2]), (x[2:], y[2:])]
    fitted = laplace(linear, "gaussian", structure=structure)
    δ, σ = 0.7, 0.6

    def mean(x: Any, y: Any, precision: Any, at: Any) -> Any:
        return jnp.linalg.solve(x.T @ x / σ**2 + precision, x.T @ y / σ**2 + precision @ at)

    total, prior, P, μ = 0.0, δ, δ * jnp.eye(3), jnp.zeros(3)
    for part in both:
        w = mean(*part, P, μ)
        posterior = fitted(w, *part)
        total += posterior.log_marginal_likelihood(prior, σ, prior_mean=0.0)
        prior = posterior.as_prior(prior, σ)
        P, μ = part[0].T @ part[0] / σ**2 + P, w
        np.testing.assert_allclose(prior.negative_log(w + 1), jnp.ones(3) @ P @ jnp.ones(3) / 2, rtol=1e-9)
    whole = jax.scipy.stats.multivariate_normal.logpdf(y, jnp.zeros(6), σ**2 * jnp.eye(6) + x @ x.T / δ)
    np.testing.assert_allclose(total, whole, rtol=1e-9)  # of the first, then of the second given the first
    new = jnp.eye(3)[:2]
    joint = posterior.predictive(new, prior if structure == "diagonal" else δ, σ, joint=True)
    assert joint.covariance.shape == (2, 1, 2, 1)
    assert joint.variance.shape == (2, 1)


def test_joint_predictive_and_prior_mean() -> None:
    x, y = jax.random.normal(jax.random.key(0), (6, 3)), jax.random.normal(jax.random.key(1), (6,))
    w = jnp.array([0.3, -0.2, 0.5])
    H = x.T @ x / 0.25 + 2 * jnp.eye(3)
    new = jax.random.normal(jax.random.key(2), (4, 3))
    for structure, options in (("full", {}), ("low-rank", {"rank": 3}), ("kronecker", {})):
        found = laplace(linear, "gaussian", structure=structure, **options)(w, x, y)
        joint = found.predictive(new, 2.0, 0.5, joint=True)
        np.testing.assert_allclose(joint.covariance.reshape(4, 4), new @ jnp.linalg.inv(H) @ new.T, atol=1e-9)
        apart = found.predictive(new, 2.0, 0.5)
        np.testing.assert_allclose(joint.variance, apart.variance, rtol=1e-9)
        moved = found.log_marginal_likelihood(2.0, 0.5, prior_mean=jnp.array([1.0, 0, 0]))
        plain = found.log_marginal_likelihood(2.0, 0.5)
        np.testing.assert_allclose(
            moved - plain, jnp.sum(w**2) - jnp.sum((w - jnp.eye(3)[0]) ** 2), rtol=1e-9
        )
    with pytest.raises(ValueError, match="only a posterior with structure='full' or 'diagonal' is the prior"):
        found.as_prior()
    full = laplace(linear, "gaussian", structure="full")(w, x, y)
    with pytest.raises(ValueError, match="prior_precision is a matrix, which is for structure='full'"):
        found.log_marginal_likelihood(full.as_prior())


def test_print_says_what_it_is_of_and_what_is_known_of_the_evidence() -> None:
    weights, targets = jnp.ones((2, 3)), jnp.ones((2, 4, 3))
    posterior = laplace(linear, "gaussian", structure="low-rank", rank=2)(weights, TOKENS, targets)
    squares = float(jnp.sum((TOKENS @ weights - targets) ** 2)) / 2
    title = "Laplace posterior of 6 parameters: likelihood 'gaussian', structure 'low-rank'"
    table = "parameter  type\n---------  -------------\n(all)      float64[2, 3]"
    assert repr(posterior) == f"{title}, half the squared error {squares:.5g}\n{table}"
    inside: list[str] = []
    jax.jit(lambda p: (inside.append(repr(p)), p.misfit)[1])(posterior)
    assert inside == [f"{title}\n{table}"]  # Its values are not known there.


def test_of_many_parameters_the_first_are_listed() -> None:
    names = fp.curvature.identity({f"w{i:02d}": jnp.ones(2) for i in range(23)}).parameters
    assert names.listed().splitlines()[-2:] == ["w19        float64[2]", "… and 3 more"]
