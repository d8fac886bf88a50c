"""The same transformations of JAX and of this library, and when two results are the same."""

from __future__ import annotations

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np

import funcprop as fp

HANDWRITTEN = fp.rules.handwritten

# The same transformations, of JAX and of this library.
JAX = types.SimpleNamespace(
    grad=jax.grad, value_and_grad=jax.value_and_grad, vjp=jax.vjp, jacobian=jax.jacrev, with_rules=lambda f: f
)
OURS = types.SimpleNamespace(
    **{name: functools.partial(getattr(fp, name), rules=HANDWRITTEN) for name in vars(JAX)}
)


def assert_same(actual, expected, rtol=1e-12):
    """The same structure, types and values; what is no array is equal and of the same type."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert type(a) is type(e)
        if not hasattr(e, "dtype"):
            assert a == e
            continue
        assert (a.shape, a.dtype) == (e.shape, e.dtype)
        assert getattr(a, "weak_type", None) == getattr(e, "weak_type", None)
        if e.dtype != jax.dtypes.float0:
            np.testing.assert_allclose(np.asarray(a, complex), np.asarray(e, complex), rtol=rtol, atol=rtol)


X, Y, Z = jnp.array([0.1, 0.2, 0.3]), jnp.array([1.0, -1.0, 2.0]), jnp.array(0.5)
