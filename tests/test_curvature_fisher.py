"""Fisher matrices against their definition, and the scaling conventions against closed forms."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import funcprop as fp

N, INPUTS, OUTPUTS = 4, 2, 3
X = jnp.asarray(np.random.default_rng(0).standard_normal((N, INPUTS)))
PARAMS = {
    "w": jnp.asarray(np.random.default_rng(1).standard_normal((INPUTS, OUTPUTS))),
    "b": jnp.ones(OUTPUTS),
}
LABELS = {
    "categorical": jnp.array([0, 2, 1, 1]),
    "gaussian": jnp.asarray(np.random.default_rng(2).standard_normal((N, OUTPUTS))),
    "bernoulli": jnp.asarray(np.random.default_rng(3).integers(0, 2, (N, OUTPUTS)) * 1.0),
}
LOSSES = {
    "categorical": lambda o, y: optax.softmax_cross_entropy_with_integer_labels(o, y).mean(),
    "gaussian": lambda o, y: 0.5 * jnp.sum((o - y) ** 2) / N,
    "bernoulli": lambda o, y: optax.sigmoid_binary_cross_entropy(o, y).sum(-1).mean(),
}


def model(params, x):
    return jnp.tanh(x @ params["w"] + params["b"])


def jacobians() -> jax.Array:
    """N × outputs × P."""
    flat, unravel = ravel_pytree(PARAMS)
    return jax.jacrev(lambda flat: model(unravel(flat), X))(flat)


def outer_gradients(loss_of_one, labels) -> np.ndarray:
    """The mean over examples and over all given targets of g gᵀ."""
    flat, unravel = ravel_pytree(PARAMS)
    gradient = jax.grad(lambda flat, x, y: loss_of_one(model(unravel(flat), x), y))
    g = jax.vmap(jax.vmap(gradient, (None, 0, 0)), (None, None, 0))(flat, X, labels)
    return np.einsum("sni,snj->ij", g, g) / g.shape[0] / N


@pytest.mark.parametrize("likelihood", LABELS)
def test_exact_is_the_ggn_of_its_loss(likelihood: str) -> None:
    F = fp.fisher(model, likelihood, batched=True)(PARAMS, X)
    G = fp.ggn(model, LOSSES[likelihood], batched=True)(PARAMS, X, LABELS[likelihood])
    np.testing.assert_allclose(F.dense(), G.dense(), rtol=1e-12, atol=1e-14)


def test_exact_is_the_expectation_over_targets() -> None:
    """Of all classes, weighted by their probabilities."""
    p, J = jax.nn.softmax(model(PARAMS, X)), jacobians()
    expected = 0
    for label in range(OUTPUTS):
        g = jnp.einsum("no,nop->np", p - jax.nn.one_hot(label, OUTPUTS), J)
        expected += jnp.einsum("n,ni,nj->ij", p[:, label], g, g) / N
    F = fp.fisher(model, "categorical", batched=True)(PARAMS, X)
    np.testing.assert_allclose(F.dense(), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("likelihood", LABELS)
def test_empirical_is_the_second_moment_of_gradients(likelihood: str) -> None:
    of_one = fp.curvature.likelihood.LIKELIHOODS[likelihood].negative_log
    F = fp.fisher(model, likelihood, kind="empirical", batched=True)(PARAMS, X, LABELS[likelihood])
    expected = outer_gradients(of_one, LABELS[likelihood][None])
    np.testing.assert_allclose(F.dense(), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("likelihood", LABELS)
def test_mc_is_unbiased(likelihood: str) -> None:
    """The mean over many draws is the exact matrix within its own standard error, and draws differ."""
    exact = fp.fisher(model, likelihood, batched=True)(PARAMS, X).dense()
    F = fp.fisher(model, likelihood, kind="mc", samples=5, batched=True)

    draws = jax.jit(jax.vmap(lambda key: F(PARAMS, X, key=key).dense()))(
        jax.random.split(jax.random.key(1), 400)
    )
    error = draws.std(0) / np.sqrt(len(draws))
    assert (np.abs(draws.mean(0) - exact) < 4.5 * error + 1e-12).all()
    assert error.max() < 0.1 * np.abs(exact).max()
    assert not np.allclose(draws[0], draws[1])


def test_a_key_draws_the_same_targets_every_time() -> None:
    F = fp.fisher(model, "categorical", kind="mc", batched=True)(PARAMS, X, key=jax.random.key(3))
    v = jnp.arange(F.shape[0], dtype=float)
    np.testing.assert_allclose(F @ v, F.dense() @ v, rtol=1e-12)
    np.testing.assert_allclose(F.linearize() @ v, F @ v, rtol=1e-12)
    assert np.linalg.matrix_rank(F.dense()) <= N


def test_positions_of_an_example_add_up() -> None:
    """With a time axis, the logarithms of an example's positions are summed, and examples averaged."""
    x = jnp.stack([X, 2 * X], 1)  # examples, positions, inputs
    both = fp.fisher(model, "categorical", batched=True)(PARAMS, x).dense()
    each = [fp.fisher(model, "categorical", batched=True)(PARAMS, x[:, t]).dense() for t in range(2)]
    np.testing.assert_allclose(both, each[0] + each[1], rtol=1e-12)
    y = jnp.stack([LABELS["categorical"]] * 2, 1)
    empirical = fp.fisher(model, "categorical", kind="empirical", batched=True)(PARAMS, x, y).dense()

    def loss_of_one(w, x, y):
        return optax.softmax_cross_entropy_with_integer_labels(model(w, x), y).sum()

    g = jax.vmap(lambda x, y: ravel_pytree(jax.grad(loss_of_one)(PARAMS, x, y))[0])(x, y)
    np.testing.assert_allclose(empirical, g.T @ g / N, rtol=1e-12)


# --- scaling ----------------------------------------------------------------------------------


def test_scales_of_a_linear_model() -> None:
    """Of `o = x W` the matrices are Kronecker products that can be written down."""
    linear = lambda w, x: x @ w  # noqa: E731
    w, y = jnp.zeros((INPUTS, OUTPUTS)), jnp.ones((N, OUTPUTS))
    moment = np.kron(X.T @ X, np.eye(OUTPUTS))
    total = lambda o, y: jnp.sum((o - y) ** 2)  # noqa: E731
    mean = lambda o, y: jnp.mean((o - y) ** 2)  # noqa: E731

    def close(operator, expected):
        np.testing.assert_allclose(operator.dense(), expected, rtol=1e-12, atol=1e-14)

    # A sum of squares has second derivative 2; a mean divides by all N × outputs entries.
    close(fp.ggn(linear, total, batched=True)(w, X, y), 2 * moment)
    close(fp.ggn(linear, mean, batched=True)(w, X, y), 2 * moment / (N * OUTPUTS))
    close(fp.hessian(lambda w: total(X @ w, y))(w), 2 * moment)
    close(fp.hessian(lambda w: mean(X @ w, y))(w), 2 * moment / (N * OUTPUTS))
    # Fisher matrices are means over examples, whatever the loss is; the Gaussian's has no factor.
    close(fp.fisher(linear, "gaussian", batched=True)(w, X), moment / N)
    close(fp.fisher(linear, "bernoulli", batched=True)(w, X), moment / N / 4)
    softmax = np.eye(OUTPUTS) / OUTPUTS - 1 / OUTPUTS**2
    close(fp.fisher(linear, "categorical", batched=True)(w, X), np.kron(X.T @ X, softmax) / N)
    g = np.einsum("ni,no->nio", X, -y).reshape(N, -1)  # of ½ ‖x W − y‖² at W = 0
    close(fp.fisher(linear, "gaussian", kind="empirical", batched=True)(w, X, y), g.T @ g / N)
    # One example is a batch too.
    close(fp.fisher(linear, "gaussian", batched=True)(w, X[:1]), np.kron(X[:1].T @ X[:1], np.eye(OUTPUTS)))


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (
            lambda: fp.fisher(model, "poisson", batched=True),
            "likelihood='poisson' is not known; choose one of categorical",
        ),
        (
            lambda: fp.fisher(model, "gaussian", kind="sampled", batched=True),
            "kind='sampled' is not known; choose one of",
        ),
        (
            lambda: fp.fisher(model, "gaussian", kind="mc", samples=0, batched=True),
            "samples=0, but at least one target",
        ),
        (
            lambda: fp.fisher(model, "gaussian", kind="mc", batched=True)(PARAMS, X),
            "key=None: kind='mc' draws targets",
        ),
        (
            lambda: fp.fisher(model, "gaussian", kind="empirical", batched=True)(PARAMS, X),
            "y=None: kind='empirical'",
        ),
        (
            lambda: fp.fisher(model, "gaussian", kind="empirical", batched=True)(
                PARAMS, X, jnp.ones((3, OUTPUTS))
            ),
            r"y has the shapes \(3, 3\), but the outputs are of 4 examples",
        ),
        (  # Broadcast, it would be a target for every output.
            lambda: fp.fisher(model, "gaussian", kind="empirical", batched=True)(PARAMS, X, jnp.ones(N)),
            r"gaussian: the target of one example has shape \(\), .*give a target of shape \(3,\)",
        ),
        (
            lambda: fp.fisher(lambda w, x: w.sum(), "gaussian", batched=True)(jnp.ones(2), X),
            "leading axis has to be the examples",
        ),
    ],
)
def test_bad_input(ask, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ask()
