"""Curvature of single precision where JAX promotes nothing: strict dtypes and ranks, with 64 bits enabled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import funcprop as fp
from funcprop.curvature import accumulate, clipped_sum, influence, laplace, over, summary

KEY = jax.random.key(0)


class Data:
    """A small classifier and its data, in one precision."""

    def __init__(self, dtype: str, weighted: bool) -> None:
        cast = lambda a: jnp.asarray(a, dtype)  # noqa: E731
        self.w = {"a": cast(np.cos(np.arange(6)).reshape(3, 2)), "b": cast(np.ones(2))}
        self.x, self.labels = cast(np.sin(np.arange(12)).reshape(4, 3)), jnp.arange(4) % 2
        self.y = cast(np.cos(np.arange(8)).reshape(4, 2))
        self.options = {"weights": jnp.array([1.0, 0.0, 2.0, 1.0], "float32")} if weighted else {}
        rows = (self.x, self.labels, *self.options.values())
        self.over = over([tuple(a[at] for a in rows) for at in (slice(3), slice(3, 4))], weighted=weighted)

    def posterior(self, structure: str, likelihood: str = "gaussian") -> Any:
        y = self.y if likelihood == "gaussian" else self.labels
        return laplace(net, likelihood, structure=structure)(self.w, self.x, y, **self.options)

    def ggn(self) -> Any:
        return fp.ggn(net, cross_entropy)(self.w, self.x, self.labels)

    def influence(self) -> Any:
        return influence(of_one, damping=5.0)(self.w, self.x, self.labels, **self.options)


def net(w: Any, x: Any) -> Any:
    return jnp.tanh(x @ w["a"]) * w["b"]


def of_one(w: Any, x: Any, y: Any) -> Any:
    return cross_entropy(net(w, x), y)


cross_entropy = optax.softmax_cross_entropy_with_integer_labels
QUANTITIES: dict[str, Callable[[Data], Any]] = {
    "evidence, full": lambda d: d.posterior("full").log_marginal_likelihood(0.5, 0.7),
    "evidence, by its own prior": lambda d: d.posterior("full").log_marginal_likelihood(
        d.posterior("full").as_prior(0.5)
    ),
    "evidence, low rank": lambda d: d.posterior("low-rank").log_marginal_likelihood(0.5),
    "evidence, categorical": lambda d: d.posterior("diagonal", "categorical").log_marginal_likelihood(0.5),
    "evidence of both": lambda d: (
        d.posterior("kronecker").merged(d.posterior("kronecker")).log_marginal_likelihood(0.5)
    ),
    "probabilities": lambda d: d.posterior("full", "categorical").probabilities(d.x),
    "evidence of minibatches": lambda d: d.over(laplace(net, "categorical"))(d.w).log_marginal_likelihood(),
    "influence on losses": lambda d: d.influence().on_losses(d.x, d.labels, samples=3, key=KEY).value,
    "influence on itself": lambda d: d.influence().on_itself(),
    "influence of minibatches": lambda d: d.over(influence(of_one, damping=5.0))(d.w).on_itself(),
    "clipped sum": lambda d: clipped_sum(net, cross_entropy, norm=0.1)(d.w, d.x, d.labels, **d.options),
    "Kronecker factors of minibatches": lambda d: (
        d.over(fp.kfac(net, cross_entropy, kind="exact"))(d.w).inverse(0.1) @ d.w
    ),
    "trace, estimated": lambda d: d.ggn().trace(samples=3, key=KEY).error,
    "diagonal": lambda d: fp.per_example(net, cross_entropy)(d.w, d.x, d.labels, {"diag_ggn"}, **d.options),
    "summary": lambda d: summary(d.ggn()).spectrum.nodes,
    "its density": lambda d: summary(d.ggn()).spectrum.density(d.y[0]),
    "mean": lambda d: accumulate(jnp.mean, [(d.x[:3],), (d.x[3:],)]).mean,
}


@pytest.mark.sampled(4)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", QUANTITIES)
def test_single_precision_stays_and_is_right(name: str, weighted: bool) -> None:
    of = QUANTITIES[name]
    exact = of(Data("float64", weighted))
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        found = of(Data("float32", weighted))
    for f, e in zip(jax.tree.leaves(found), jax.tree.leaves(exact), strict=True):
        assert np.asarray(f).dtype == np.float32
        np.testing.assert_allclose(f, e, rtol=2e-3, atol=2e-4)
