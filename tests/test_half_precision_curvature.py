"""Operators, norms and posteriors of parameters in half precision."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from curvature_models import linear, squared

import funcprop as fp
from funcprop.curvature import laplace

HALF = [jnp.bfloat16, jnp.float16]


@pytest.mark.sampled(1)
@pytest.mark.parametrize("dtype", HALF)
def test_operators_of_half_precision(dtype: Any) -> None:
    loss = lambda w: jnp.sum(jnp.tanh(w["a"]) ** 2) + w["a"][0] * w["b"]  # noqa: E731
    w = {"a": jnp.array([0.1, 0.2, 0.3], dtype), "b": jnp.array(1.0, dtype)}
    H = fp.hessian(loss)(w)
    exact = fp.hessian(loss)(jax.tree.map(lambda x: x.astype(jnp.float32), w)).dense()
    values = jnp.linalg.eigvalsh(exact)
    near = {"rtol": 0.02, "atol": 0.02}
    assert H.dense().dtype == H.diagonal()["a"].dtype == jnp.float32
    np.testing.assert_allclose(H.dense(), exact, **near)
    for solver in (fp.curvature.Lanczos(), fp.curvature.DenseSolver()):
        np.testing.assert_allclose(H.eigsh(2, solver=solver)[0], values[-2:], **near)
    of_spectrum = lambda A: A.spectrum(samples=2).mean(lambda v: v**2).value  # noqa: E731
    single = fp.hessian(loss)(jax.tree.map(lambda x: x.astype(jnp.float32), w))
    np.testing.assert_allclose(of_spectrum(H), of_spectrum(single), **near)
    np.testing.assert_allclose(H.logdet(4.0), jnp.log(values + 4).sum(), **near)
    np.testing.assert_allclose(
        H.solve(jnp.ones(4), 4.0), jnp.linalg.solve(exact + 4 * jnp.eye(4), jnp.ones(4)), **near
    )
    np.testing.assert_allclose(H.trace(), values.sum(), **near)
    positive = H + 4 * fp.curvature.identity(H)
    np.testing.assert_allclose(positive.sqrt(products=4) @ jnp.ones(4), positive.sqrt() @ jnp.ones(4), **near)
    assert H.solve(jax.tree.map(jnp.ones_like, w), 4.0)["a"].dtype == dtype


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("a", [16.0, 0.01])
def test_norms_that_half_precision_cannot_square(dtype: Any, a: float) -> None:
    names = {"norm", "gradients", "second_moment", "variance", "diag_ggn", "trace_ggn", "gram"}

    def found(dtype: Any) -> Any:
        arrays = jnp.zeros((2, 1), dtype), jnp.full((1, 2), a, dtype), jnp.full((1, 1), a, dtype)
        return fp.per_example(linear, squared)(*arrays, names)

    half, single = found(dtype), found(jnp.float32)
    for name in names:
        assert half[name].dtype == jnp.float32
        np.testing.assert_allclose(half[name], single[name], rtol=0.02)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("structure", ["full", "low-rank", "diagonal", "kronecker"])
def test_laplace_of_half_precision(dtype: Any, structure: str) -> None:
    x = jax.random.normal(jax.random.key(0), (6, 2))
    y, w = jax.random.normal(jax.random.key(1), (6, 3)), jax.random.normal(jax.random.key(2), (2, 3))
    options = {"rank": 6} if structure == "low-rank" else {}
    fitted = laplace(linear, "gaussian", structure=structure, **options)
    half = fitted(*(a.astype(dtype) for a in (w, x, y)))
    single = fitted(*(a.astype(dtype).astype(jnp.float32) for a in (w, x, y)))
    evidence = half.log_marginal_likelihood(0.5, 0.7)
    np.testing.assert_allclose(evidence, single.log_marginal_likelihood(0.5, 0.7), rtol=0.02)
    ours, expected = half.predictive(x.astype(dtype), 0.5), single.predictive(x.astype(jnp.float32), 0.5)
    assert ours.covariance.dtype == jnp.float32
    np.testing.assert_allclose(ours.covariance, expected.covariance, rtol=0.05, atol=0.02)
    assert half.sample(jax.random.key(0)).dtype == dtype


@pytest.mark.sampled(2)
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("mixed", [0.0, 0.1])
def test_a_loss_of_half_precision_is_as_convex_as_it_is(dtype: Any, mixed: float) -> None:
    """Rounding of the outputs' own Hessian would make a cross-entropy indefinite: its kinds of roots."""
    model = lambda w, x: jnp.tanh(x @ w["a"]) @ w["b"]  # noqa: E731

    def loss(o: Any, y: Any) -> Any:
        own = optax.softmax_cross_entropy_with_integer_labels(o, y)
        return own + mixed * jnp.sum(o**2) if mixed else own

    normal = lambda i, *shape: jax.random.normal(jax.random.key(i), shape, jnp.float32).astype(dtype)  # noqa: E731
    w, x, y = {"a": normal(0, 3, 4), "b": normal(1, 4, 3)}, normal(2, 6, 3), jnp.arange(6) % 3
    found, exact = [], []
    for params, inputs, to in (
        (w, x, found),
        (*jax.tree.map(lambda a: a.astype(float), (w, x)), exact),
    ):
        G = fp.ggn(model, loss)(params, inputs, y)
        to += [G.sqrt().dense(), fp.kfac(model, loss, kind="exact")(params, inputs, y).dense()]
        to.append(fp.per_example(model, loss)(params, inputs, y, {"diag_ggn"})["diag_ggn"]["b"])
        assert fp.curvature.summary(G, k=1).signs != "indefinite"
    for ours, reference in zip(found, exact, strict=True):
        assert jnp.linalg.norm(ours - reference) <= 0.05 * jnp.linalg.norm(reference)


def test_half_precision_under_strict_promotion() -> None:
    """What is promoted is promoted explicitly; targets are as wide as outputs."""
    x, y = (f(jnp.arange(12.0)).reshape(6, 2).astype(jnp.bfloat16) for f in (jnp.sin, jnp.cos))
    w = jnp.ones((2, 2), jnp.bfloat16)

    def quantities() -> list[Any]:
        return [
            fp.ggn(linear, squared)(w, x, y).trace(),
            fp.kfac(linear, squared, kind="exact")(w, x, y).trace(),
            fp.per_example(linear, squared)(w, x, y, {"diag_ggn"})["diag_ggn"],
        ]

    expected = quantities()
    with jax.numpy_dtype_promotion("strict"):
        for found, reference in zip(quantities(), expected, strict=True):
            np.testing.assert_array_equal(found, reference)
