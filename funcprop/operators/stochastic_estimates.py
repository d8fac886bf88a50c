"""Traces, diagonals and norms from random vectors: a chosen number of products, and an error bar.

The samples and what is computed of each are matfree's; here are the operators and the error bars.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array
from matfree import stochtrace

from funcprop.operators.estimate import Estimate
from funcprop.operators.finite import require_finite
from funcprop.operators.products import flat_map, mapped, products
from funcprop.operators.symmetric_map import SymmetricMap

INTEGRANDS: dict[str, Callable[[], Any]] = {
    "trace": stochtrace.monte_carlo_trace,
    "diagonal": stochtrace.monte_carlo_diagonal,
    "traces": stochtrace.monte_carlo_diagonal,
    "squared norm": stochtrace.monte_carlo_frobeniusnorm_squared,
}


def estimate(operator: SymmetricMap, quantity: str, samples: int, key: Array | None) -> Estimate:
    """The quantity's estimate from `samples` vectors of random signs.

    Raises:
        ValueError: there is no key, or fewer than two samples, of which no error bar can be made.
    """
    key = require_samples(samples, key)
    found = Estimate.of(_samples(operator, quantity, samples, key))
    require_finite(operator, found.value, quantity)
    if quantity not in ("diagonal", "traces"):
        return found
    names = operator.parameters
    shaped = names.unravel_results if quantity == "diagonal" else names.unflatten
    return Estimate(shaped(found.value), shaped(found.error), samples)


def squared_to_norm(squared: Estimate) -> Estimate:
    """The norm, from an estimate of its square; `d√s = ds / 2√s` gives its error."""
    norm = jnp.sqrt(squared.value)
    return Estimate(norm, squared.error / (2 * norm), squared.samples)


def require_samples(samples: int, key: Array | None) -> Array:
    """The key; a ValueError if there is none, or there are too few samples for an error bar."""
    if key is None:
        raise ValueError("key=None: a stochastic estimate needs key=jax.random.key(…).")
    if samples < 2:
        raise ValueError(f"samples={samples} has no error bar; take 2 or more.")
    return key


def signs(operator: SymmetricMap, samples: int, key: Array) -> Array:
    """Flat vectors of independent random signs, `samples × P`."""
    like = jnp.zeros(operator.parameters.size, operator.dtype)
    return stochtrace.sampler_signs(like, num=samples)(key)


def _samples(operator: SymmetricMap, quantity: str, samples: int, key: Array) -> Array:
    if not operator.on_host:
        return _compiled_samples(operator, quantity, samples, key)
    v = signs(operator, samples, key)
    turned = products(operator, v.T, None).T
    if quantity == "squared norm":
        return jnp.sum(turned**2, 1)
    if quantity == "trace":
        return jnp.sum(v * turned, 1)
    if quantity == "traces":
        return jnp.stack([jnp.sum((v * turned)[:, part], 1) for part in operator.parameters.slices], 1)
    return v * turned


@functools.partial(jax.jit, static_argnames=("quantity", "samples"))
def _compiled_samples(operator: SymmetricMap, quantity: str, samples: int, key: Array) -> Array:
    apply, integrand = flat_map(operator), INTEGRANDS[quantity]()
    slices = operator.parameters.slices

    def sample(v: Array) -> Array:
        found = integrand(apply, v)
        if quantity == "traces":
            return jnp.stack([jnp.sum(found[part]) for part in slices])
        return found

    return mapped(sample, signs(operator, samples, key), None)
