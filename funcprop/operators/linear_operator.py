"""A symmetric linear operator on the parameters that is applied, never stored.

`A @ v` costs a few gradients; the P × P matrix exists only in `A.dense()`. An operator is a pytree, so it is
an argument or a result of jitted functions like any other. `A.linear_map()` does what has to be done once
(the forward pass and what it keeps) and returns a function that is linear in its argument: whatever applies
the operator repeatedly, in a loop or to many columns, applies that one.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree, Scalar

from funcprop.operators import products
from funcprop.operators.convergence import is_traced, warn_unless
from funcprop.operators.lanczos import Tridiagonal, tridiagonal
from funcprop.operators.linearization import split
from funcprop.operators.parameters import Parameters
from funcprop.operators.products import DENSE_BYTES
from funcprop.operators.queries import Queries
from funcprop.program.program import Program


class LinearOperator(Queries):
    """A symmetric matrix of P × P entries, P the number of parameters, by its products.

    Attributes:
        parameters: shapes, dtypes and paths of the P parameters.
    """

    has_mean = False  # whether the mean of the leaves of several is the operator of all
    __array_ufunc__ = None  # NumPy leaves `2.0 * A` to us

    def restrict(self, tree: PyTree) -> PyTree:
        """The leaves of `tree` that the operator acts on; all, unless `where=` left some out."""
        return self.parameters.restrict(tree)

    def merged(self, other: Any, share: Any) -> LinearOperator:
        """The mean `(1 − share) A + share B` with another operator of the same kind.

        Raises:
            ValueError: it is no mean of what the operators are made of.
        """
        if not self.has_mean or self.parameters != other.parameters:
            raise ValueError(
                f"accumulate: a {type(self).__name__} of one minibatch has no mean with others; use "
                "fp.curvature.over(batches)(factory)(params), which is the operator of all data."
            )
        return jax.tree.map(lambda x, y: x + (y - x) * jnp.asarray(share, x.dtype), self, other)

    # --- products -----------------------------------------------------------------------------

    def __matmul__(self, v: Any) -> Any:
        """`A @ v` for a pytree or a flat vector; for several as columns, a flat matrix or a last axis."""
        names = self.parameters
        if isinstance(v, LinearOperator):
            raise TypeError(
                "operators have no product, which would not be symmetric; write A @ (B @ v), or A.dense() @ "
                "B.dense()."
            )
        if not names.is_flat(v):
            columns = names.columns(v)
            if columns is None:
                return products.product(self, names.vector(v))
            return names.unravel_columns(products.products(self, names.ravel_columns(columns), None))
        v = jnp.asarray(v)
        if v.ndim > 2 or v.shape[:1] != (names.size,):
            raise ValueError(
                f"v has shape {v.shape}, but the operator has shape {self.shape}; give a vector of shape "
                f"({names.size},), a matrix of shape ({names.size}, m), or a pytree like the parameters."
            )
        v = names.real(v, "v").astype(self.dtype)
        return products.flat_product(self, v) if v.ndim == 1 else products.products(self, v, None)

    def linearize(self) -> LinearOperator:
        """The same operator with the forward pass done: products cost only what depends on the vector."""
        return self if self.on_host else _linearized(self)

    def __repr__(self) -> str:
        names = self.parameters
        return f"{type(self).__name__}({names.size} × {names.size}, of {names})"

    # --- algebra ------------------------------------------------------------------------------

    def __add__(self, other: Any) -> LinearOperator:
        return Sum.of([self, other]) if isinstance(other, LinearOperator) else NotImplemented

    def __radd__(self, other: Any) -> LinearOperator:
        # `sum(operators)` begins with 0.
        return self if isinstance(other, int | float) and other == 0 else NotImplemented

    def __sub__(self, other: Any) -> LinearOperator:
        return self + (-other) if isinstance(other, LinearOperator) else NotImplemented

    def __mul__(self, scale: Any) -> LinearOperator:
        return NotImplemented if isinstance(scale, LinearOperator) else Scaled.of(scale, self)

    __rmul__ = __mul__

    def __truediv__(self, scale: Any) -> LinearOperator:
        return (
            NotImplemented if isinstance(scale, LinearOperator) else Scaled.of(1 / jnp.asarray(scale), self)
        )

    def __neg__(self) -> LinearOperator:
        return Scaled.of(-1.0, self)

    def sqrt(self, *, products: int | None = None, budget: int | str = DENSE_BYTES) -> LinearOperator:
        """The symmetric square root: `S @ (S @ v)` is `A @ v`.

        Args:
            products: if given, each `S @ v` is approximated by so many products with A, by Lanczos, and warns
                where the last one still changed the result. Otherwise the matrix is formed, once.
            budget: the most bytes that the matrix may have.

        Raises:
            ValueError: the operator has a negative eigenvalue. (Under `jit`, S is NaN.)

        Example:
            >>> import jax.numpy as jnp, funcprop as fp
            >>> H = fp.hessian(lambda w: 2 * jnp.sum(w**2))(jnp.ones(2))
            >>> print(H.sqrt() @ jnp.ones(2))
            [2. 2.]
        """
        if products is not None and self.on_host:
            raise ValueError(
                "sqrt: products= is not for an operator over a data set; leave it out, and the matrix is "
                "formed in one pass."
            )
        if products is not None:
            Root.require_positive(self.eigsh(2, which="BE")[0], self.parameters)
            return Root(self.linearize(), self.parameters, products)
        values, vectors = jnp.linalg.eigh(self.dense(budget=budget))
        Root.require_positive(values, self.parameters)
        return Dense(vectors * Root.of_values(values, self.parameters) @ vectors.T, self.parameters)


# --- operators made of operators ----------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False, repr=False)
class Linearized(LinearOperator):
    """An operator by its linear map, whose residuals are data."""

    multiply: Program
    parameters: Parameters = field(metadata={"static": True})

    def linear_map(self) -> Callable[[PyTree], PyTree]:
        """The linear map, on its residuals."""
        return self.multiply

    def linearize(self) -> LinearOperator:
        """Itself."""
        return self


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False, repr=False)
class Sum(LinearOperator):
    """`Σ_i A_i`, of operators on the same parameters."""

    terms: tuple[LinearOperator, ...]
    parameters: Parameters = field(metadata={"static": True})

    @classmethod
    def of(cls, terms: Sequence[LinearOperator]) -> Sum:
        """Add operators.

        Raises:
            ValueError: they act on different parameters.
        """
        names = terms[0].parameters
        for term in terms[1:]:
            if term.parameters != names:
                raise ValueError(
                    "operators of different parameters cannot be added: one acts on "
                    f"{names}, the other on {term.parameters}."
                )
        flat = [t for term in terms for t in (term.terms if isinstance(term, Sum) else (term,))]
        return cls(tuple(flat), names)

    @property
    def on_host(self) -> bool:
        """Whether any term is."""
        return any(term.on_host for term in self.terms)

    def columns(self, matrix: Float[Array, "P m"]) -> Float[Array, "P m"]:
        """The sum of the terms' products."""
        return _added([products.products(term, matrix, None) for term in self.terms])

    def linear_map(self) -> Callable[[PyTree], PyTree]:
        """The sum of the terms' linear maps."""
        maps = [term.linear_map() for term in self.terms]
        return lambda v: _added([apply(v) for apply in maps])

    def product(self, v: PyTree) -> PyTree:
        """The sum of the terms' products."""
        return _added([term.product(v) for term in self.terms])

    def exact_diagonal(self, at_once: int | None) -> PyTree:
        """The sum of the terms' diagonals."""
        return _added([term.exact_diagonal(at_once) for term in self.terms])

    def block_map(self, rows: Sequence[int], columns: Sequence[int]) -> Callable[[Sequence[Any]], list[Any]]:
        """The sum of the terms' blocks."""
        maps = [term.block_map(rows, columns) for term in self.terms]
        return lambda parts: _added([apply(parts) for apply in maps])


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False, repr=False)
class Scaled(LinearOperator):
    """`c A` for a number `c`."""

    scale: Scalar
    operator: LinearOperator
    parameters: Parameters = field(metadata={"static": True})

    @classmethod
    def of(cls, scale: Any, operator: LinearOperator) -> Scaled:
        """Multiply an operator by a real number.

        Raises:
            TypeError: it is not one real number.
        """
        number = jnp.asarray(scale)
        if number.ndim or jnp.issubdtype(number.dtype, jnp.complexfloating):
            raise TypeError(f"scale={scale!r} is not one real number; operators are scaled by numbers only.")
        if isinstance(operator, Scaled):
            return cls(number * operator.scale, operator.operator, operator.parameters)
        return cls(number, operator, operator.parameters)

    @property
    def on_host(self) -> bool:
        """Whether the operator is."""
        return self.operator.on_host

    def columns(self, matrix: Float[Array, "P m"]) -> Float[Array, "P m"]:
        """The operator's products, scaled."""
        return self._scaled(self.operator.columns(matrix))

    def _scaled(self, tree: PyTree) -> PyTree:
        return jax.tree.map(lambda leaf: self.scale.astype(leaf.dtype) * leaf, tree)

    def linear_map(self) -> Callable[[PyTree], PyTree]:
        """The operator's linear map, scaled."""
        apply = self.operator.linear_map()
        return lambda v: self._scaled(apply(v))

    def product(self, v: PyTree) -> PyTree:
        """The operator's product, scaled."""
        return self._scaled(self.operator.product(v))

    def exact_diagonal(self, at_once: int | None) -> PyTree:
        """The operator's diagonal, scaled."""
        return self._scaled(self.operator.exact_diagonal(at_once))

    def block_map(self, rows: Sequence[int], columns: Sequence[int]) -> Callable[[Sequence[Any]], list[Any]]:
        """The operator's block, scaled."""
        apply = self.operator.block_map(rows, columns)
        return lambda parts: self._scaled(apply(parts))


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False, repr=False)
class Identity(LinearOperator):
    """`v ↦ v`: damping is `A + damping * identity(A)`."""

    has_mean = True
    parameters: Parameters = field(metadata={"static": True})

    def linear_map(self) -> Callable[[PyTree], PyTree]:
        """The identity."""
        return lambda v: v


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False, repr=False)
class Dense(LinearOperator):
    """An operator by its symmetric matrix, in `ravel_pytree` order."""

    has_mean = True
    matrix: Float[Array, "P P"]
    parameters: Parameters = field(metadata={"static": True})

    def linear_map(self) -> Callable[[PyTree], PyTree]:
        """Multiply by the matrix."""
        return lambda v: self.parameters.unravel(self.matrix @ self.parameters.ravel(v))


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False, repr=False)
class Root(LinearOperator):
    """The square root of a positive semi-definite operator, for each vector in its Krylov space."""

    operator: LinearOperator
    parameters: Parameters = field(metadata={"static": True})
    products: int = field(metadata={"static": True})

    @staticmethod
    def of_values(values: Array, parameters: Parameters) -> Array:
        """The roots of eigenvalues; rounding makes zeros negative, and what is more negative becomes NaN."""
        roots = jnp.sqrt(jnp.maximum(values, 0))
        return jnp.where(values < -_rounding(values, parameters), jnp.nan, roots)

    @staticmethod
    def require_positive(values: Array, parameters: Parameters) -> None:
        """Raise a ValueError if an eigenvalue is negative beyond rounding."""
        if not is_traced(values) and bool(values.min() < -_rounding(values, parameters)):
            raise ValueError(
                f"sqrt: the operator is indefinite: an eigenvalue is {float(values.min()):.3e}; take a "
                "Gauss-Newton or Fisher matrix, or add damping * identity(A)."
            )

    def linear_map(self) -> Callable[[PyTree], PyTree]:
        """Linear up to the error of the approximation."""
        names, apply = self.parameters, products.flat_map(self.operator)
        tolerance = names.rounding**0.5

        def root(v: PyTree) -> PyTree:
            start = names.ravel(v)
            length = jnp.linalg.norm(start)
            unit = jnp.where(length > 0, start / length, 1 / math.sqrt(names.size))
            found = tridiagonal(apply, unit, min(self.products, names.size), jax.random.key(0))
            last, before = (_root_of_first(part, names) for part in (found, found.without_last()))
            change = jnp.linalg.norm(last.at[:-1].add(-before)) * length
            result = length * (found.basis.T @ last)
            warn_unless(
                (change <= tolerance * jnp.linalg.norm(result)) | (self.products >= names.size),
                f"sqrt: the last of {self.products} products still changed the result by {{}} of {{}}; raise "
                "products=.",
                change,
                jnp.linalg.norm(result),
            )
            return names.unravel(result)

        return root


def _root_of_first(found: Tridiagonal, parameters: Parameters) -> Array:
    """The first column of the square root of the small matrix."""
    values, vectors = found.eigh()
    return vectors @ (Root.of_values(values, parameters) * vectors[0])


def _rounding(values: Array, parameters: Parameters) -> Array:
    """How far from zero rounding may put an eigenvalue."""
    return parameters.eigenvalue_rounding * jnp.abs(values).max()


def identity(like: LinearOperator | PyTree) -> Identity:
    """The identity on the parameters of an operator, or on a pytree of parameters.

    Example:
        >>> import jax.numpy as jnp, funcprop as fp
        >>> damping = 0.1 * fp.curvature.identity({"w": jnp.ones(2)})
        >>> print(damping @ jnp.ones(2))
        [0.1 0.1]
    """
    return Identity(like.parameters if isinstance(like, LinearOperator) else Parameters.of(like))


@jax.jit
def _linearized(operator: LinearOperator) -> Linearized:
    names = operator.parameters
    leaves, tree = jax.tree.flatten(operator)

    def product(leaves: Sequence[Any], v: Sequence[Any]) -> list[Any]:
        return jax.tree.leaves(jax.tree.unflatten(tree, leaves).linear_map()(names.unflatten(v)))

    residuals, jaxpr = split(product, leaves, jax.tree.leaves(names.structs))
    inputs = jax.tree.structure((names.structs,))
    return Linearized(Program.of_jaxpr(jaxpr, residuals, inputs, names.tree, "linear_map"), names)


def _added(trees: Sequence[PyTree]) -> PyTree:
    return functools.reduce(functools.partial(jax.tree.map, jnp.add), trees)
