"""What is computed with an operator's products alone: columns, blocks, the diagonal. All compiled."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from funcprop import _jax
from funcprop.operators.symmetric_map import SymmetricMap
from funcprop.program.sizes import nbytes

COLUMN_BYTES = 2**28  # what the intermediate values of columns computed at once may take together
MOST_COLUMNS = 32  # more gain nothing on a CPU


@jax.jit
def product(operator: SymmetricMap, v: PyTree) -> PyTree:
    """`A v` for one pytree."""
    return operator.product(v)


@jax.jit
def flat_product(operator: SymmetricMap, v: Float[Array, " P"]) -> Float[Array, " P"]:
    """`A v` for one flat vector."""
    names = operator.parameters
    return names.ravel(operator.product(names.unravel(v)))


@functools.partial(jax.jit, static_argnames="at_once")
def products(operator: SymmetricMap, matrix: Float[Array, "P m"], at_once: int | None) -> Array:
    """`A V` for flat columns."""
    return mapped(flat_map(operator), matrix.T, at_once).T


@functools.partial(jax.jit, static_argnames=("rows", "columns", "at_once"))
def block(
    operator: SymmetricMap, rows: tuple[int, ...], columns: tuple[int, ...], at_once: int | None
) -> Float[Array, "R C"]:
    """The rows of some leaves and the columns of others."""
    names = operator.parameters
    ends = np.cumsum([0, *(names.sizes[i] for i in columns)])
    apply = operator.block_map(rows, columns)

    def column(index: Array) -> Array:
        unit = jnp.zeros(ends[-1], names.dtype).at[index].set(1)
        parts = [
            unit[a:b].reshape(names.shapes[i]).astype(names.dtypes[i])
            for i, a, b in zip(columns, ends, ends[1:], strict=False)
        ]
        return jnp.concatenate([jnp.ravel(part).astype(names.dtype) for part in apply(parts)])

    return mapped(column, jnp.arange(ends[-1]), at_once).T


@functools.partial(jax.jit, static_argnames="at_once")
def diagonal(operator: SymmetricMap, at_once: int | None) -> PyTree:
    """The diagonal, of one product per entry."""
    names = operator.parameters
    apply = flat_map(operator)

    def entry(index: Array) -> Array:
        return apply(jnp.zeros(names.size, names.dtype).at[index].set(1))[index]

    return names.unravel_results(mapped(entry, jnp.arange(names.size), at_once))


@functools.partial(jax.jit, static_argnames="at_once")
def squared_norm(operator: SymmetricMap, at_once: int | None) -> Array:
    """The sum of all squared entries, of one product per column."""
    names = operator.parameters
    apply = flat_map(operator)

    def column(index: Array) -> Array:
        return jnp.sum(apply(jnp.zeros(names.size, names.dtype).at[index].set(1)) ** 2)

    return jnp.sum(mapped(column, jnp.arange(names.size), at_once))


def flat_map(operator: SymmetricMap) -> Callable[[Array], Array]:
    """The operator's linear map on flat vectors."""
    names, apply = operator.parameters, operator.linear_map()
    return lambda flat: names.ravel(apply(names.unravel(flat)))


def mapped(column: Callable[[Array], Array], inputs: Array, at_once: int | None) -> Array:
    """`column` of each of the inputs, vmapped over as many at once as their intermediate values allow."""
    if len(inputs) == 0:
        return jax.vmap(column)(inputs)
    closed = jax.make_jaxpr(column)(jax.ShapeDtypeStruct(inputs.shape[1:], inputs.dtype))
    if at_once is None:
        at_once = max(1, min(MOST_COLUMNS, COLUMN_BYTES // max(1, _bytes(closed))))

    def evaluated(x: Array) -> Array:
        return _jax.evaluate(_jax.open_jaxpr(closed), _jax.array_constants(closed), [x])[0]

    return jax.lax.map(evaluated, inputs, batch_size=min(at_once, len(inputs)))


def _bytes(closed: Any) -> int:
    """Bytes of all values that a jaxpr computes."""
    return sum(nbytes(v) for eqn in _jax.open_jaxpr(closed).eqns for v in eqn.outvars)
