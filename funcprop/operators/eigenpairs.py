"""Eigenpairs at the ends of the spectrum: Lanczos, LOBPCG, or all of them.

Lanczos starts from one random vector and so finds one vector of an eigenvalue that occurs several times,
until its space is exhausted. LOBPCG iterates on a block and finds the copies too. Neither is silent about
what it did not find: the residual `‖A v − λ v‖` of every pair is computed.
"""

from __future__ import annotations

import abc
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.sparse.linalg import lobpcg_standard
from jaxtyping import Array, Float

from funcprop.operators.convergence import is_traced, tolerance_of, warn_unless
from funcprop.operators.finite import require_finite
from funcprop.operators.lanczos import LanczosState, Tridiagonal, continued, tridiagonal
from funcprop.operators.products import flat_map, flat_product, mapped, matrix_of
from funcprop.operators.solvers import DenseSolver
from funcprop.operators.symmetric_map import SymmetricMap

ENDS = {"LA": "largest", "SA": "smallest", "BE": "half of each end", "LM": "largest in magnitude"}
BASIS_BYTES = 2**32  # what the vectors of a Krylov space may take, unless their number is given


class Pairs(NamedTuple):
    """Eigenvalues, ascending, their vectors as columns, the largest `‖A v − λ v‖`, and the norm of A."""

    values: Float[Array, " k"]
    vectors: Float[Array, "P k"]
    residual: Array
    norm: Array


class EigenSolver(abc.ABC):
    """A way to some eigenpairs, for `LinearOperator.eigsh`."""

    @abc.abstractmethod
    def pairs(self, operator: SymmetricMap, k: int, which: str, key: Array) -> Pairs:
        """k pairs, on flat vectors."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Lanczos(EigenSolver):
    """With full reorthogonalisation, in spaces that double until all pairs have converged.

    It finds one vector of an eigenvalue that occurs several times, until its space is exhausted.

    Attributes:
        tolerance: on `‖A v − λ v‖ / ‖A‖`; `ε^(2/3)` of the parameters' dtype if None.
        products: at most so many; 320 or 10 k if None, or as many vectors as fit 4 GiB.

    Reference: Lanczos, Journal of Research of the National Bureau of Standards 1950.
    """

    tolerance: float | None = None
    products: int | None = None

    def pairs(self, operator: SymmetricMap, k: int, which: str, key: Array) -> Pairs:
        """In Krylov spaces that double until all pairs have converged, or have so many dimensions."""
        size, most = operator.parameters.size, self.products
        tolerance = tolerance_of(operator, self.tolerance)
        if most is None:
            room = BASIS_BYTES // (size * operator.dtype.itemsize)
            most = max(k, min(max(10 * k, 320), room))
        most = min(most, size)
        if most < k:
            raise ValueError(
                f"products={most} are fewer than k={k}; allow at least as many, better ten times."
            )
        operator = operator.linearize()
        dimension = most if is_traced((operator, key)) else min(most, max(2 * k + 2, 40))
        state = None
        while True:
            pairs, state = _lanczos(operator, k, which, dimension, key, state)
            # NaN compares as false, and then more products are of no use.
            if dimension == most or not bool(pairs.residual > tolerance * pairs.norm):
                break
            dimension = min(most, 2 * dimension)
        after = f"{dimension} products"
        return _checked(operator, pairs, k, which, tolerance, after, "products=, or Lobpcg()")


@dataclass(frozen=True, eq=False, kw_only=True)
class Lobpcg(EigenSolver):
    """On blocks of k vectors, which finds all vectors of an eigenvalue; takes 5 k < P.

    Attributes:
        tolerance: as of `Lanczos`.
        iterations: at most so many.

    Reference: Knyazev, "Toward the optimal preconditioned eigensolver", SIAM Journal on Scientific Computing
    2001.
    """

    tolerance: float | None = None
    iterations: int = 100

    def pairs(self, operator: SymmetricMap, k: int, which: str, key: Array) -> Pairs:
        """From the largest down, of the operator or of its negative."""
        size, tolerance = operator.parameters.size, tolerance_of(operator, self.tolerance)
        if operator.on_host:
            raise ValueError(
                "Lobpcg is not for an operator over a data set; use Lanczos(), or DenseSolver(), which is "
                "one pass over the data."
            )
        if 5 * k >= size:
            raise ValueError(
                f"k={k} is too many for Lobpcg on {size} parameters, which takes 5 k < P; use Lanczos() "
                "or DenseSolver()."
            )
        pairs = _lobpcg(operator, k, which, tolerance, self.iterations, key)
        after = f"{self.iterations} iterations"
        return _checked(operator, pairs, k, which, tolerance, after, "iterations=, or Lanczos()")


def eigenpairs(
    operator: SymmetricMap, k: int, which: str, solver: EigenSolver | DenseSolver | None, key: Array
) -> Pairs:
    """`LinearOperator.eigsh`, where the arguments are explained, on flat vectors."""
    size = operator.parameters.size
    if which not in ENDS:
        said = ", ".join(f"{name} ({meaning})" for name, meaning in ENDS.items())
        raise ValueError(f"which={which!r} is not known; choose one of {said}.")
    if not 0 < k <= size:
        raise ValueError(f"k={k}, but the operator has {size} eigenvalues; take 1 ≤ k ≤ {size}.")
    if isinstance(solver, DenseSolver):
        pairs = _of_matrix(matrix_of(operator, solver.budget), k, which)
        return require_finite(operator, pairs, "eigsh()")
    if solver is not None and not isinstance(solver, EigenSolver):
        raise TypeError(
            f"eigsh: solver={solver!r} is none; pass fp.curvature.Lanczos(), Lobpcg() or DenseSolver()."
        )
    return (solver or Lanczos()).pairs(operator, k, which, key)


def _checked(
    operator: SymmetricMap, pairs: Pairs, k: int, which: str, tolerance: float, after: str, instead: str
) -> Pairs:
    require_finite(operator, pairs, "eigsh()")
    warn_unless(
        pairs.residual <= tolerance * pairs.norm,
        f"eigsh: the largest residual ‖A v − λ v‖ of k={k} pairs ({which}) is {{}} after {after}, above "
        f"tolerance={tolerance:.1e} times ‖A‖={{}}; try more {instead}.",
        pairs.residual,
        pairs.norm,
    )
    return pairs


@functools.partial(jax.jit, static_argnames=("k", "which"))
def _of_matrix(matrix: Array, k: int, which: str) -> Pairs:
    values, vectors = jnp.linalg.eigh(matrix)
    at = chosen(values, k, which)
    return Pairs(values[at], vectors[:, at], jnp.zeros((), values.dtype), jnp.abs(values).max())


def _lanczos(
    operator: SymmetricMap, k: int, which: str, dimension: int, key: Array, state: LanczosState | None
) -> tuple[Pairs, LanczosState | None]:
    """The pairs in a space of so many dimensions, and the iteration; `state` is that of a smaller space."""
    if is_traced((operator, key)):
        return _compiled_lanczos(operator, k, which, dimension, key), None

    def columns(matrix: Array) -> Array:
        # One program for all products, of any number of vectors in a space of any dimension: most of the time
        # of a deep network is that of its compilation.
        if operator.on_host:
            return operator.columns(matrix)
        return jnp.stack([flat_product(operator, v) for v in matrix.T], 1)

    if state is None:
        names = operator.parameters
        state = LanczosState.at(jax.random.normal(key, (1, names.size), names.dtype), 0)
    state = continued(columns, state, dimension, key)
    values, vectors, norm = _ritz(jax.tree.map(lambda a: a[0], state.found), k, which)
    return _of_products(columns(vectors), values, vectors, norm), state


@functools.partial(jax.jit, static_argnames=("k", "which", "dimension"))
def _compiled_lanczos(operator: SymmetricMap, k: int, which: str, dimension: int, key: Array) -> Pairs:
    names, apply = operator.parameters, flat_map(operator)
    start = jax.random.normal(key, (names.size,), names.dtype)
    values, vectors, norm = _ritz(tridiagonal(apply, start, dimension, key), k, which)
    return _with_residuals(apply, values, vectors, norm)


@functools.partial(jax.jit, static_argnames=("k", "which"))
def _ritz(found: Tridiagonal, k: int, which: str) -> tuple[Array, Array, Array]:
    """The pairs of the small matrix, in the large space, and the matrix's norm."""
    values, small = found.eigh()
    at = chosen(values, k, which)
    return values[at], found.basis.T @ small[:, at], jnp.abs(values).max()


@functools.partial(jax.jit, static_argnames=("k", "which", "iterations"))
def _lobpcg(
    operator: SymmetricMap, k: int, which: str, tolerance: float, iterations: int, key: Array
) -> Pairs:
    names, apply = operator.parameters, flat_map(operator)
    bounds, start = jax.random.split(key)
    few = tridiagonal(apply, jax.random.normal(bounds, (names.size,), names.dtype), min(12, names.size), key)
    shift = 1.1 * jnp.abs(few.eigh()[0]).max()

    def end(sign: int, count: int) -> tuple[Array, Array]:
        # LOBPCG finds the largest, and tests convergence relative to them: all are made positive.
        def block(columns: Array) -> Array:
            return shift * columns + sign * jax.vmap(apply, 1, 1)(columns)

        vectors = jax.random.normal(start, (names.size, count), names.dtype)
        values, vectors, _ = lobpcg_standard(block, vectors, iterations, tolerance / (40 * names.size))
        return sign * (values - shift), vectors

    counts = {"LA": (0, k), "SA": (k, 0), "BE": (k // 2, k - k // 2), "LM": (k, k)}[which]
    ends = [end(sign, count) for sign, count in zip((-1, 1), counts, strict=True) if count]
    values, vectors = (jnp.concatenate(parts, -1) for parts in zip(*ends, strict=True))
    order = jnp.argsort(values)
    at = order[chosen(values[order], k, which)]
    return _with_residuals(apply, values[at], vectors[:, at], shift / 1.1)


def chosen(values: Array, k: int, which: str) -> Array:
    """Choose k of the ascending values: their positions, ascending."""
    m = len(values)
    if which == "LM":
        return jnp.sort(jnp.argsort(jnp.abs(values))[m - k :])
    low = {"LA": 0, "SA": k, "BE": k // 2}[which]
    return jnp.concatenate([jnp.arange(low), jnp.arange(m - k + low, m)])


def _with_residuals(apply: Callable[[Array], Array], values: Array, vectors: Array, norm: Array) -> Pairs:
    """The pairs with their residuals, by one product each."""
    return _of_products(mapped(apply, vectors.T, None).T, values, vectors, norm)


@jax.jit
def _of_products(products: Array, values: Array, vectors: Array, norm: Array) -> Pairs:
    residual = jnp.linalg.norm(products - vectors * values[None], axis=0).max()
    return Pairs(values, vectors, residual, norm)
