"""A loss whose Hessian is a given matrix, so that a test has every answer in closed form."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

import funcprop as fp

PARAMS = {"a": {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}, "c": jnp.array(1.0)}
SIZE = 10


def loss(params, matrix):
    """`½ wᵀ M w`."""
    w = ravel_pytree(params)[0]
    return 0.5 * w @ matrix @ w


def operator(matrix, **options):
    """The Hessian of `loss`: the matrix as an operator on `PARAMS`, or on a vector if it has another size."""
    params = PARAMS if len(matrix) == SIZE else jnp.ones(len(matrix))
    return fp.hessian(loss, **options)(params, jnp.asarray(matrix))


def symmetric(seed: int, size: int = SIZE) -> np.ndarray:
    """Indefinite, with distinct eigenvalues."""
    m = np.random.default_rng(seed).standard_normal((size, size))
    return (m + m.T) / 2


def with_eigenvalues(values, seed: int = 0) -> np.ndarray:
    """A symmetric matrix with these eigenvalues."""
    size = len(values)
    q, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((size, size)))
    return (q * np.asarray(values)) @ q.T


def entries(tree) -> jax.Array:
    """A pytree as a flat vector."""
    return ravel_pytree(tree)[0]
