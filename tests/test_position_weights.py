"""Weights of the positions of an example, against written-out means over positions and against padding."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import funcprop as fp

KEYS = jax.random.split(jax.random.key(0), 8)
P = {"in": jax.random.normal(KEYS[0], (2, 3)), "bias": jnp.array([0.1, 0.2, 0.3])}
P |= {"q": jax.random.normal(KEYS[1], (3, 3)) / 3, "out": jax.random.normal(KEYS[2], (3, 4))}
N, LENGTHS = 3, jnp.array([1, 3, 2])
TOKENS = jax.random.normal(KEYS[3], (N, 3, 2))
LABELS = jax.random.randint(KEYS[4], (N, 3), 0, 4)
WEIGHTS = jnp.array([[2.0, 0, 0], [0.5, 1.5, 1.0], [3.0, 0.25, 0]])


def attention(p: Any, x: Any) -> Any:
    """Four logits for each token; padding has no part in what others attend to."""
    tokens, mask = x
    h = tokens @ p["in"] + p["bias"]
    scores = jnp.where(mask > 0, (h @ p["q"]) @ h.T, -1e30)
    return jnp.tanh(jax.nn.softmax(scores) @ h) @ p["out"]


def cross_entropy(logits: Any, y: Any) -> Any:
    return optax.softmax_cross_entropy_with_integer_labels(logits, y)


def data(length: int, weights: Any = WEIGHTS) -> tuple[Any, Any, Any]:
    """Inputs, labels and weights, padded to a length with what must not matter."""
    more = length - 3
    mask = (jnp.arange(length) < LENGTHS[:, None]).astype(float)
    tokens = jnp.pad(TOKENS, ((0, 0), (0, more), (0, 0)), constant_values=7.0)
    tokens = jnp.where(mask[..., None] > 0, tokens, 5.0)
    labels = jnp.pad(LABELS, ((0, 0), (0, more)), constant_values=3)
    return (tokens, mask), labels, jnp.pad(weights, ((0, 0), (0, more)))


def mean_loss(flat: Any, unravel: Any, x: Any, y: Any, w: Any) -> Any:
    """`Σ w ℓ / Σ w` over all positions."""
    logits = jax.vmap(attention, (None, 0))(unravel(flat), x)
    return jnp.sum(w * cross_entropy(logits, y)) / jnp.sum(w)


@jax.jit
def dense_gauss_newton(x: Any, y: Any, w: Any) -> Any:
    """`Σ w Jᵀ (diag p − p pᵀ) J / Σ w`, by the Jacobian of all logits."""
    flat, unravel = ravel_pytree(P)
    logits = lambda f: jax.vmap(attention, (None, 0))(unravel(f), x)  # noqa: E731
    J, p = jax.jacobian(logits)(flat), jax.nn.softmax(logits(flat))
    root = jax.vmap(jax.vmap(jnp.diag))(p) - p[..., :, None] * p[..., None, :]
    return jnp.einsum("ntap,nt,ntab,ntbq->pq", J, w / w.sum(), root, J)


def test_gauss_newton_and_fisher() -> None:
    x, y, w = data(3)
    expected = dense_gauss_newton(x, y, w)
    np.testing.assert_allclose(
        fp.ggn(attention, cross_entropy)(P, x, y, weights=w).dense(), expected, atol=1e-12
    )
    F = fp.fisher(attention, "categorical")(P, x, weights=w)
    np.testing.assert_allclose(F.dense(), expected, atol=1e-12)
    drawn = fp.fisher(attention, "categorical", kind="mc", samples=4000)(P, x, key=KEYS[5], weights=w).dense()
    np.testing.assert_allclose(drawn, expected, atol=0.1 * float(jnp.abs(expected).max()))
    empirical = fp.fisher(attention, "categorical", kind="empirical")(P, x, y, weights=w).dense()
    flat, unravel = ravel_pytree(P)
    losses = lambda f: cross_entropy(jax.vmap(attention, (None, 0))(unravel(f), x), y)  # noqa: E731
    g = jax.jit(jax.jacobian(losses))(flat)
    np.testing.assert_allclose(empirical, jnp.einsum("ntp,nt,ntq->pq", g, w / w.sum(), g), atol=1e-12)


def test_quantities_of_examples() -> None:
    x, y, w = data(3)
    flat, unravel = ravel_pytree(P)
    key = jax.random.key(0)
    names = ("value", "gradient", "second_moment", "diag_ggn", "diag_ggn_mc")
    for loss in (cross_entropy, "categorical"):
        found = fp.per_example(attention, loss, samples=2000)(P, x, y, names, key, weights=w)
        value, gradient = jax.jit(jax.value_and_grad(mean_loss), static_argnums=1)(flat, unravel, x, y, w)
        np.testing.assert_allclose(found["value"], value, rtol=1e-12)
        np.testing.assert_allclose(ravel_pytree(found["gradient"])[0], gradient, atol=1e-12)
        diagonal = jnp.diagonal(dense_gauss_newton(x, y, w))
        np.testing.assert_allclose(ravel_pytree(found["diag_ggn"])[0], diagonal, atol=1e-12)
        estimate = ravel_pytree(found["diag_ggn_mc"])[0]
        np.testing.assert_allclose(estimate, diagonal, atol=0.1 * float(diagonal.max()))
    # An example counts as the sum of its weights, and its gradient is of their weighted mean.
    one = lambda f, x, y, w: jnp.sum(w * cross_entropy(attention(unravel(f), x), y)) / w.sum()  # noqa: E731
    each = jax.jit(jax.vmap(jax.grad(one), (None, 0, 0, 0)))(flat, x, y, w)
    second = (w.sum(1)[:, None] * each**2).sum(0) / w.sum()
    np.testing.assert_allclose(ravel_pytree(found["second_moment"])[0], second, atol=1e-12)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("bias", ["separate", "joint"])
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("of", [fp.kfac, fp.ekfac])
def test_kronecker_factors_do_not_depend_on_the_padding(of: Any, sharing: str, bias: str) -> None:
    dense = []
    for length in (3, 4, 7):
        x, y, w = data(length)
        made = of(attention, cross_entropy, kind="exact", sharing=sharing, bias=bias)
        dense.append(made(P, x, y, weights=w).dense())
    for other in dense[1:]:
        np.testing.assert_allclose(other, dense[0], rtol=1e-12, atol=1e-12)


def test_kronecker_factors_of_a_mask_are_exact_for_a_linear_model() -> None:
    """Every position that counts is one datum: the factors are means over all of them."""
    w, x = jax.random.normal(KEYS[5], (2, 3)), TOKENS
    mask = (jnp.arange(3) < LENGTHS[:, None]).astype(float)
    squared = lambda o, y: jnp.sum((o - y) ** 2, -1) / 2  # noqa: E731
    K = fp.kfac(lambda w, x: x @ w, squared, kind="exact")(w, x, jnp.zeros((N, 3, 3)), weights=mask)
    rows = x[mask > 0]
    np.testing.assert_allclose(K.dense(), jnp.kron(rows.T @ rows / len(rows), jnp.eye(3)), atol=1e-12)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("structure", ["full", "diagonal", "kronecker", "low-rank"])
@pytest.mark.parametrize("likelihood", ["categorical", "gaussian", "gaussian with noise"])
def test_laplace(structure: str, likelihood: str) -> None:
    noise = jnp.array([0.5, 1.0, 2.0, 1.5]) if likelihood.endswith("noise") else None
    name = likelihood.split()[0]
    fitted = fp.curvature.laplace(attention, name, structure=structure, noise=noise)
    found = []
    for length in (3, 5):
        x, y, w = data(length)
        y = y if name == "categorical" else jnp.sin(jnp.arange(4.0) + y[..., None])
        posterior = fitted(P, x, y, weights=w)
        found.append(posterior.log_marginal_likelihood(0.7))
    np.testing.assert_allclose(found[1], found[0], rtol=1e-12)
    if structure == "full":
        x, y, w = data(3)
        logits = jax.vmap(attention, (None, 0))(P, x)
        if name == "categorical":
            H, fit = w.sum() * dense_gauss_newton(x, y, w), -jnp.sum(w * cross_entropy(logits, y))
        else:
            s = jnp.ones(4) if noise is None else noise
            y = jnp.sin(jnp.arange(4.0) + y[..., None])
            flat, unravel = ravel_pytree(P)
            J = jax.jit(jax.jacobian(lambda f: jax.vmap(attention, (None, 0))(unravel(f), x)))(flat)
            H = jnp.einsum("ntap,nt,a,ntaq->pq", J, w, 1 / s**2, J)
            logs = -(((logits - y) / s) ** 2) / 2 - jnp.log(2 * jnp.pi * s**2) / 2
            fit = jnp.sum(w * logs.sum(-1))
        flat = ravel_pytree(P)[0]
        size = len(flat)
        half = jnp.linalg.slogdet(H + 0.7 * jnp.eye(size))[1] - size * jnp.log(0.7) + 0.7 * flat @ flat
        np.testing.assert_allclose(found[0], fit - half / 2, rtol=1e-10)


@pytest.mark.nightly
def test_of_a_data_set() -> None:
    x, y, w = data(3)
    whole = [((x[0], x[1]), y, w)]
    parts = [jax.tree.map(lambda a, i=i: a[i], whole[0]) for i in (slice(0, 1), slice(1, 3))]
    over = fp.curvature.over(parts, weighted=True)
    G = over(fp.ggn(attention, cross_entropy))(P)
    np.testing.assert_allclose(G.dense(), dense_gauss_newton(x, y, w), atol=1e-12)
    for factory in (
        fp.kfac(attention, cross_entropy, kind="exact"),
        fp.curvature.laplace(attention, "categorical"),
    ):
        ours, expected = over(factory)(P), factory(P, x, y, weights=w)
        for a, b in zip(*map(jax.tree.leaves, (ours, expected)), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-12)
    found = over(fp.per_example(attention, cross_entropy))(P, {"variance"})["variance"]
    expected = fp.per_example(attention, cross_entropy)(P, x, y, {"variance"}, weights=w)["variance"]
    np.testing.assert_allclose(ravel_pytree(found)[0], ravel_pytree(expected)[0], atol=1e-12)


def test_errors() -> None:
    x, y, w = data(3)
    scalar = lambda o, y: cross_entropy(o, y).mean()  # noqa: E731
    for ask in (
        lambda loss: fp.ggn(attention, loss)(P, x, y, weights=w),
        lambda loss: fp.kfac(attention, loss, kind="exact")(P, x, y, weights=w),
        lambda loss: fp.per_example(attention, loss)(P, x, y, {"gradient"}, weights=w),
    ):
        with pytest.raises(ValueError, match=r"shape \(3,\), one for each position, .* one of shape \(\)"):
            ask(scalar)
    with pytest.raises(ValueError, match="kfac: weights of positions are for a loss, or for a likelihood by"):
        fp.kfac(attention, fp.curvature.gaussian(1.0), kind="exact")(P, x, y, weights=w)
    with pytest.raises(ValueError, match=r"influence: weights have shape \(3, 3\), but there are 3 examples"):
        fp.curvature.influence(lambda p, x, y: scalar(attention(p, x), y))(P, x, y, weights=w)
    with pytest.raises(ValueError, match="a weight is -"):
        fp.ggn(attention, cross_entropy)(P, x, y, weights=-w)
