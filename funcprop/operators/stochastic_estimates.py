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
from funcprop.operators.products import flat_map, mapped
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
    require_samples(samples, key)
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


def require_samples(samples: int, key: Array | None) -> None:
    """Raise a ValueError if there is no key, or there are too few samples for an error bar."""
    if key is None:
        raise ValueError("key=None: a stochastic estimate needs key=jax.random.key(…).")
    if samples < 2:
        raise ValueError(f"samples={samples} has no error bar; take 2 or more.")


def signs(operator: SymmetricMap, samples: int, key: Array) -> Array:
    """Flat vectors of independent random signs, `samples × P`."""
    like = jnp.zeros(operator.parameters.size, operator.dtype)
    return stochtrace.sampler_signs(like, num=samples)(key)


@functools.partial(jax.jit, static_argnames=("quantity", "samples"))
def _samples(operator: SymmetricMap, quantity: str, samples: int, key: Array) -> Array:
    apply, integrand = flat_map(operator), INTEGRANDS[quantity]()
    slices = operator.parameters.slices

    def sample(v: Array) -> Array:
        found = integrand(apply, v)
        if quantity == "traces":
            return jnp.stack([jnp.sum(found[part]) for part in slices])
        return found

    return mapped(sample, signs(operator, samples, key), None)
