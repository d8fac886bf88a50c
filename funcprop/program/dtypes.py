"""Promotion of dtypes and ranks, done explicitly: the same whatever JAX is configured to do by itself.

`jax_numpy_dtype_promotion="strict"` and `jax_numpy_rank_promotion="raise"` find mistakes in users' code;
layers and rules say what they mean.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def common_dtype(*arrays: Any) -> Any:
    """Promote the dtypes of arrays (or types) as JAX does; floats of 8 bits count as bfloat16 beside others.

    Arguments that are None do not count.
    """
    present = [x for x in arrays if x is not None]
    strong = {x.dtype for x in present if not is_weak(x)}
    if len(strong) == 1 and jnp.issubdtype(dtype := next(iter(strong)), jnp.inexact):
        return dtype
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(*(jax.ShapeDtypeStruct((), _known(x), weak_type=is_weak(x)) for x in present))


def single_at_least(*arrays: Any) -> Any:
    """The common dtype of arrays and float32: the precision in which sums are formed."""
    with jax.numpy_dtype_promotion("standard"):
        # Of the dtype that weakly typed arrays have: they give way to other arrays, not to float32.
        return jnp.promote_types(common_dtype(*arrays), jnp.float32)


def product_dtype(*arrays: Any) -> Any:
    """The common dtype of arrays that are multiplied: operands of 16 bits stay so, for matrix units."""
    dtype = common_dtype(*arrays)
    return dtype if jnp.issubdtype(dtype, jnp.inexact) and dtype.itemsize > 1 else single_at_least(*arrays)


def together(*arrays: Any) -> list[Any]:
    """The arrays with their common dtype and the rank of the largest, of which new axes lead."""
    dtype, rank = common_dtype(*arrays), max(x.ndim for x in arrays)
    return [lax.expand_dims(x if x.dtype == dtype else x.astype(dtype), range(rank - x.ndim)) for x in arrays]


@contextlib.contextmanager
def promoting() -> Iterator[None]:
    """Where JAX promotes by itself: around equations, which are written as on paper."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def plus(a: Any, b: Any) -> Any:
    """`a + b`."""
    a, b = together(a, b)
    return a + b


def times(a: Any, b: Any) -> Any:
    """`a ⊙ b`."""
    a, b = together(a, b)
    return a * b


def is_weak(x: Any) -> bool:
    """Whether an array, or its type, takes the dtype of what it meets."""
    return bool(getattr(x, "weak_type", False))


def _known(x: Any) -> Any:
    """A dtype that JAX promotes: bfloat16 holds all floats of 8 bits."""
    return jnp.bfloat16 if jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize < 2 else x.dtype
