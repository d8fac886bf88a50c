"""Diagonals taken from dense Hessians, which know no forms, and functions with derivatives of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from compiling import compiled
from jax.flatten_util import ravel_pytree

import funcprop as fp

KEY = jax.random.key(0)
N = 4
Y = jnp.arange(N) % 3


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jax.random.normal(jax.random.fold_in(KEY, seed), shape)


def cross_entropy(logits: Any, labels: Any) -> Any:
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def of_dense_matrix(loss: Callable[..., Any], params: Any, *args: Any) -> jax.Array:
    flat, unravel = ravel_pytree(params)
    return compiled(lambda p, *a: jnp.diag(jax.hessian(lambda p: loss(unravel(p), *a))(p)))(flat, *args)


def assert_exact(loss: Callable[..., Any], params: Any, *args: Any, **options: Any) -> fp.curvature.Plan:
    diagonal = fp.curvature.hessian_diagonal(loss, **options)
    found, expected = diagonal(params, *args), of_dense_matrix(loss, params, *args)
    assert jax.tree.map(jnp.shape, found) == jax.tree.map(jnp.shape, params)
    np.testing.assert_allclose(ravel_pytree(found)[0], expected, rtol=1e-10, atol=1e-14)
    return diagonal.plan(params, *args)


@jax.custom_jvp
def straight_through(x: Any) -> Any:
    return jnp.round(x)


@straight_through.defjvp
def _(primals: Any, tangents: Any) -> Any:
    return straight_through(*primals), tangents[0] * jnp.cos(primals[0])


@jax.custom_vjp
def mixing_backwards(x: Any) -> Any:
    return x * 2


mixing_backwards.defvjp(lambda x: (x * 2, x), lambda x, g: (g * jnp.sum(x),))
