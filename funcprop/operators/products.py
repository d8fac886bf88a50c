"""What is computed with an operator's products alone: columns, blocks, the diagonal.

All is compiled, but for an operator on a data loader, whose columns go through the data together.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from funcprop import _jax
from funcprop.operators.symmetric_map import SymmetricMap
from funcprop.program.sizes import budget_bytes, nbytes

COLUMN_BYTES = 2**28  # what the intermediate values of columns computed at once may take together
MOST_COLUMNS = 32  # more gain nothing on a CPU
DENSE_BYTES = 2**32  # a larger matrix is made only when asked for


def product(operator: SymmetricMap, v: PyTree) -> PyTree:
    """`A v` for one pytree."""
    names = operator.parameters
    return (
        names.unravel(flat_product(operator, names.ravel(v))) if operator.on_host else _product(operator, v)
    )


def flat_product(operator: SymmetricMap, v: Float[Array, " P"]) -> Float[Array, " P"]:
    """`A v` for one flat vector."""
    return operator.columns(v[:, None])[:, 0] if operator.on_host else _flat_product(operator, v)


def products(operator: SymmetricMap, matrix: Float[Array, "P m"], at_once: int | None) -> Array:
    """`A V` for flat columns."""
    if not operator.on_host:
        return _products(operator, matrix, at_once)
    return jnp.concatenate([operator.columns(part) for part in _in_passes(operator, matrix)], 1)


def block(
    operator: SymmetricMap, rows: tuple[int, ...], columns: tuple[int, ...], at_once: int | None
) -> Float[Array, "R C"]:
    """The rows of some leaves and the columns of others."""
    if not operator.on_host:
        return _block(operator, rows, columns, at_once)
    at, kept = (_entries(operator, positions) for positions in (columns, rows))
    most = _columns_of_pass(operator)
    parts = [at[i : i + most] for i in range(0, len(at), most)]
    return jnp.concatenate([operator.columns(_units(operator, part))[kept] for part in parts], 1)


def matrix_of(
    operator: SymmetricMap, budget: int | str = DENSE_BYTES, at_once: int | None = None
) -> Float[Array, "P P"]:
    """The matrix; a ValueError if it has more bytes than `budget`."""
    require_room(operator, operator.shape, budget, "the matrix")
    every = tuple(range(len(operator.parameters.paths)))
    return block(operator, every, every, at_once)


def require_room(operator: SymmetricMap, shape: tuple[int, ...], budget: int | str, what: str) -> None:
    """Raise a ValueError if a matrix of this shape has more bytes than `budget`."""
    needed = math.prod(shape) * operator.dtype.itemsize
    if needed > budget_bytes(budget, "budget"):
        raise ValueError(
            f"{what} has {shape[0]} × {shape[1]} entries, {needed:.3g} bytes, and budget={budget}; use "
            "products, block(), diagonal() or where=, or raise budget=."
        )


def diagonal(operator: SymmetricMap, at_once: int | None) -> PyTree:
    """The diagonal, of one product per entry."""
    names = operator.parameters
    if not operator.on_host:
        return _diagonal(operator, at_once)
    found = [
        operator.columns(_units(operator, part))[part, np.arange(len(part))] for part in _passes(operator)
    ]
    return names.unravel_results(jnp.concatenate(found))


def squared_norm(operator: SymmetricMap, at_once: int | None) -> Array:
    """The sum of all squared entries, of one product per column."""
    if not operator.on_host:
        return _squared_norm(operator, at_once)
    found = [jnp.sum(operator.columns(_units(operator, part)) ** 2) for part in _passes(operator)]
    return jnp.sum(jnp.stack(found))


def _entries(operator: SymmetricMap, positions: tuple[int, ...]) -> np.ndarray:
    """The numbers of the entries of some leaves."""
    every = np.arange(operator.parameters.size)
    return np.concatenate([every[operator.parameters.slices[i]] for i in positions])


def _columns_of_pass(operator: SymmetricMap) -> int:
    """How many columns go through the data at once."""
    return max(1, COLUMN_BYTES // (operator.parameters.size * operator.dtype.itemsize))


def _passes(operator: SymmetricMap) -> list[np.ndarray]:
    """The numbers of all columns, in parts that go through the data at once."""
    every, most = np.arange(operator.parameters.size), _columns_of_pass(operator)
    return [every[i : i + most] for i in range(0, len(every), most)]


def _in_passes(operator: SymmetricMap, matrix: Array) -> list[Array]:
    most = _columns_of_pass(operator)
    return [matrix[:, i : i + most] for i in range(0, matrix.shape[1], most)] or [matrix]


def _units(operator: SymmetricMap, at: np.ndarray) -> Array:
    """Unit vectors as columns."""
    zeros = jnp.zeros((operator.parameters.size, len(at)), operator.dtype)
    return zeros.at[at, np.arange(len(at))].set(1)


@jax.jit
def _product(operator: SymmetricMap, v: PyTree) -> PyTree:
    return operator.product(v)


@jax.jit
def _flat_product(operator: SymmetricMap, v: Float[Array, " P"]) -> Float[Array, " P"]:
    names = operator.parameters
    return names.ravel(operator.product(names.unravel(v)))


@functools.partial(jax.jit, static_argnames="at_once")
def _products(operator: SymmetricMap, matrix: Float[Array, "P m"], at_once: int | None) -> Array:
    return mapped(flat_map(operator), matrix.T, at_once).T


@functools.partial(jax.jit, static_argnames=("rows", "columns", "at_once"))
def _block(
    operator: SymmetricMap, rows: tuple[int, ...], columns: tuple[int, ...], at_once: int | None
) -> Float[Array, "R C"]:
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
def _diagonal(operator: SymmetricMap, at_once: int | None) -> PyTree:
    names = operator.parameters
    apply = flat_map(operator)

    def entry(index: Array) -> Array:
        return apply(jnp.zeros(names.size, names.dtype).at[index].set(1))[index]

    return names.unravel_results(mapped(entry, jnp.arange(names.size), at_once))


@functools.partial(jax.jit, static_argnames="at_once")
def _squared_norm(operator: SymmetricMap, at_once: int | None) -> Array:
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
