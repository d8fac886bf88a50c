"""Stochastic estimates: 95 % intervals cover as often as they say, and are as narrow as theory has them."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quadratic import SIZE, entries, operator, symmetric, with_eigenvalues
from scipy import stats

import funcprop as fp

SEEDS, SAMPLES = 1000, 60
POSITIVE = with_eigenvalues(np.geomspace(0.5, 20, SIZE))


def coverage(estimate, truth, seeds: int = SEEDS):
    """How often the interval covers, and its mean half-width."""

    def one(key):
        low, high = map(entries, estimate(key).interval())
        return (low <= truth) & (truth <= high), (high - low) / 2

    covered, widths = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(5), seeds))
    return float(covered.mean()), widths.mean(0)


def test_trace() -> None:
    matrix = symmetric(1)
    A = operator(matrix)
    share, width = coverage(lambda key: A.trace(samples=SAMPLES, key=key), np.trace(matrix))
    assert 0.93 < share < 0.97
    # The variance of vᵀ A v over random signs is twice the sum of the squared off-diagonal entries.
    deviation = np.sqrt(2 * np.sum((matrix - np.diag(np.diag(matrix))) ** 2) / SAMPLES)
    np.testing.assert_allclose(width, deviation * stats.t.ppf(0.975, SAMPLES - 1), rtol=0.02)


def test_diagonal() -> None:
    matrix = symmetric(2)
    A = operator(matrix)
    share, width = coverage(lambda key: A.diagonal(samples=SAMPLES, key=key), np.diag(matrix))
    assert 0.93 < share < 0.97
    deviation = np.sqrt((np.sum(matrix**2, 1) - np.diag(matrix) ** 2) / SAMPLES)
    np.testing.assert_allclose(width, deviation * stats.t.ppf(0.975, SAMPLES - 1), rtol=0.03)


def test_traces() -> None:
    matrix = symmetric(4)
    A = operator(matrix)
    blocks = [A.block(path) for path in A.parameters.paths]
    truth = np.array([np.trace(block) for block in blocks])
    share, width = coverage(lambda key: A.traces(samples=SAMPLES, key=key), truth)
    assert 0.93 < share < 0.97
    # Of vᵀ A v over the rows of a block: entries inside count twice, those beside it once.
    total = np.array([np.sum(matrix[at] ** 2) for at in A.parameters.slices])
    inside = np.array([np.sum(np.asarray(block) ** 2) for block in blocks])
    diagonal = np.array([np.sum(np.diag(block) ** 2) for block in blocks])
    deviation = np.sqrt((total + inside - 2 * diagonal) / SAMPLES)
    np.testing.assert_allclose(width, deviation * stats.t.ppf(0.975, SAMPLES - 1), rtol=0.03)


def test_frobenius_norm() -> None:
    matrix = symmetric(3)
    A = operator(matrix)
    share, width = coverage(lambda key: A.frobenius_norm(samples=SAMPLES, key=key), np.linalg.norm(matrix))
    assert 0.93 < share < 0.97
    squared = matrix @ matrix
    deviation = np.sqrt(2 * np.sum((squared - np.diag(np.diag(squared))) ** 2) / SAMPLES)
    expected = deviation * stats.t.ppf(0.975, SAMPLES - 1) / (2 * np.linalg.norm(matrix))
    np.testing.assert_allclose(width, expected, rtol=0.03)


@functools.cache
def quadratures() -> fp.curvature.Spectrum:
    """The spectra of all seeds, from one program: the rows of each are a group."""
    key = jax.random.key(7)
    return operator(POSITIVE).spectrum(samples=SEEDS * SAMPLES // 2, products=SIZE, key=key)


def of_groups(estimate, truth) -> tuple[float, np.ndarray]:
    """Coverage and mean half-width over the groups of rows of `quadratures`."""
    found = quadratures()

    def one(nodes, weights):
        low, high = estimate(fp.curvature.Spectrum(nodes, weights, SIZE)).interval()
        return (low <= truth) & (truth <= high), (high - low) / 2

    groups = [x.reshape(SEEDS, SAMPLES // 2, SIZE) for x in (found.nodes, found.weights)]
    covered, widths = jax.jit(jax.vmap(one))(*groups)
    return float(covered.mean()), widths.mean(0)


def test_spectrum() -> None:
    values = np.geomspace(0.5, 20, SIZE)
    share, width = of_groups(lambda s: s.mean(jnp.log), np.mean(np.log(values)))
    assert 0.93 < share < 0.97
    of_matrix = np.linalg.eigh(POSITIVE)[1]
    logarithm = (of_matrix * np.log(values)) @ of_matrix.T
    deviation = np.sqrt(2 * np.sum((logarithm - np.diag(np.diag(logarithm))) ** 2)) / SIZE
    factor = stats.t.ppf(0.975, SAMPLES // 2 - 1) / np.sqrt(SAMPLES // 2)
    np.testing.assert_allclose(width, deviation * factor, rtol=0.03)
    assert 0.93 < of_groups(lambda s: s.count(1.0, 8.0), np.sum((values > 1) & (values < 8)))[0] < 0.97
    at = jnp.array([2.0, 10.0])
    truth = stats.norm.pdf(at, values[:, None], 1.5).mean(0)
    share, width = of_groups(lambda s: s.density(at, 1.5), truth)
    assert 0.93 < share < 0.97
    assert (width < truth).all()


def test_logdet_is_the_spectrums() -> None:
    A, key = operator(POSITIVE), jax.random.key(3)
    found = A.logdet(0.3, samples=20, products=SIZE, key=key)
    mean = A.spectrum(samples=20, products=SIZE, key=key).mean(lambda value: jnp.log(value + 0.3))
    np.testing.assert_allclose(found.value, SIZE * mean.value, rtol=1e-12)
    np.testing.assert_allclose(found.error, SIZE * mean.error, rtol=1e-12)
    exact = np.linalg.slogdet(POSITIVE + 0.3 * np.eye(SIZE))[1]
    assert abs(found.value - exact) < 4 * found.error


def test_a_density_integrates_to_one_and_has_the_eigenvalues_weights() -> None:
    """With P products the nodes are the eigenvalues; of a low rank too, where the Krylov space ends early."""
    values = np.array([0, 0, 0, 0, 0, 0, 0, 1.0, 2.0, 5.0])
    found = operator(with_eigenvalues(values)).spectrum(samples=200, products=SIZE)
    np.testing.assert_allclose(found.weights.sum(1), 1, rtol=1e-12)
    zeros, two = found.count(-1e-9, 1e-9), found.count(1.9, 2.1)
    assert abs(zeros.value - 7) < 4 * zeros.error < 2
    assert abs(two.value - 1) < 4 * two.error < 2
    grid = jnp.linspace(-3, 8, 400)
    np.testing.assert_allclose(jnp.trapezoid(found.density(grid).value, grid), 1, rtol=1e-3)


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda A: A.trace(samples=1, key=jax.random.key(0)), "samples=1 has no error bar; take 2 or more"),
        (lambda A: A.diagonal(samples=8), r"key=None: a stochastic estimate needs key=jax\.random\.key"),
        (lambda A: A.spectrum(samples=1), "samples=1 has no error bar"),
        (
            lambda A: A.spectrum(products=11),
            "products=11, but the operator has 10 rows; take 1 ≤",
        ),
        (
            lambda A: A.spectrum(products=4).mean(jnp.log).interval(1.5),
            "confidence=1.5 is not between 0 and 1",
        ),
        (
            lambda A: A.logdet(samples=8, key=jax.random.key(0)),
            "logdet: the operator is not positive definite",
        ),
    ],
)
def test_bad_input(ask, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ask(operator(symmetric(1)))
