"""Lanczos' tridiagonalisation of a symmetric operator, with full reorthogonalisation and restarts.

`A ≈ Qᵀ T Q` on the space of `v, A v, A² v, …`, the rows of `Q` orthonormal, `T` tridiagonal. That space may
be smaller than asked for: a Gauss-Newton matrix of few examples has a low rank, and the Hessian of a
piecewise linear loss is zero. `matfree.decomp.tridiag_sym` divides by the length of what is left, which is
NaN where that is exactly nothing; here the iteration goes on from a new random vector, orthogonal to all
before, so that `T` falls into blocks. The first block is that of `v`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


class Tridiagonal(NamedTuple):
    """Orthonormal rows, and the matrix's diagonal and off-diagonal."""

    basis: Float[Array, "m P"]
    diagonal: Float[Array, " m"]
    off_diagonal: Float[Array, " l"]

    def without_last(self) -> Tridiagonal:
        """Drop the last step."""
        return Tridiagonal(self.basis[:-1], self.diagonal[:-1], self.off_diagonal[:-1])

    def eigh(self) -> tuple[Float[Array, " m"], Float[Array, "m m"]]:
        """Eigenvalues of the small matrix, ascending, and its eigenvectors as columns."""
        matrix = jnp.diag(self.diagonal) + jnp.diag(self.off_diagonal, 1) + jnp.diag(self.off_diagonal, -1)
        return jnp.linalg.eigh(matrix)


class LanczosState(NamedTuple):
    """The iteration before a step: what has been found, and the next vector that is multiplied."""

    basis: Array
    diagonal: Array
    off_diagonal: Array
    vector: Array
    largest: Array

    @classmethod
    def at(cls, start: Array, dimension: int) -> LanczosState:
        """Before the first step, with room for so many; starts may be stacked."""
        *stack, size = start.shape
        basis = jnp.zeros((*stack, dimension, size), start.dtype)
        zeros, largest = jnp.zeros((*stack, dimension), start.dtype), jnp.zeros(stack, start.dtype)
        return cls(basis, zeros, zeros, start / jnp.linalg.norm(start, axis=-1, keepdims=True), largest)

    @property
    def found(self) -> Tridiagonal:
        """The matrix, or matrices."""
        return Tridiagonal(self.basis, self.diagonal, self.off_diagonal[..., :-1])


def tridiagonal(
    apply: Callable[[Array], Array], start: Float[Array, " P"], dimension: int, key: Array
) -> Tridiagonal:
    """`dimension` products with `apply`, from `start`; `key` is for the vectors of restarts.

    Reference: Lanczos, "An iteration method for the solution of the eigenvalue problem of linear differential
    and integral operators", Journal of Research of the National Bureau of Standards 1950.
    """

    def step(i: Any, state: LanczosState) -> LanczosState:
        return advance(i, state, apply(state.vector), key)

    return jax.lax.fori_loop(0, dimension, step, LanczosState.at(start, dimension)).found


def continued(
    columns: Callable[[Array], Array], states: LanczosState, dimension: int, key: Array
) -> LanczosState:
    """Go on with n iterations, stacked, to so many dimensions; python makes the products of all at once."""
    done = states.diagonal.shape[1]
    basis, diagonal, off_diagonal = (
        jnp.pad(a, [(0, 0), (0, dimension - done)] + [(0, 0)] * (a.ndim - 2))
        for a in (states.basis, states.diagonal, states.off_diagonal)
    )
    states = states._replace(basis=basis, diagonal=diagonal, off_diagonal=off_diagonal)
    for i in range(done, dimension):
        states = _advance_all(i, states, columns(states.vector.T).T, key)
    return states


def advance(i: Any, state: LanczosState, product: Array, key: Array) -> LanczosState:
    """One step, from the product with the state's vector."""
    basis, diagonal, off_diagonal, v, largest = state
    tiny = jnp.finfo(v.dtype).eps * jnp.sqrt(len(v))

    def orthogonal(v: Array, basis: Array) -> Array:
        for _ in range(2):  # Once leaves rounding errors of the size of what it removed.
            v = v - basis.T @ (basis @ v)
        return v

    basis = basis.at[i].set(v)
    rest = orthogonal(product, basis)
    length = jnp.linalg.norm(rest)
    largest = jnp.maximum(largest, jnp.linalg.norm(product))
    exhausted = length <= tiny * largest
    # Under NaN nothing compares as true, and NaN is what comes out.
    fresh = jax.random.normal(jax.random.fold_in(key, i), v.shape, v.dtype)
    following = jax.lax.cond(exhausted, lambda: orthogonal(fresh, basis), lambda: rest)
    following = following / jnp.maximum(jnp.linalg.norm(following), jnp.finfo(v.dtype).tiny)
    diagonal = diagonal.at[i].set(v @ product)
    off_diagonal = off_diagonal.at[i].set(jnp.where(exhausted, 0, length))
    return LanczosState(basis, diagonal, off_diagonal, following, largest)


# What is known is large, and is written in its place.
_advance_all = jax.jit(jax.vmap(advance, (None, 0, 0, None)), donate_argnums=1)
