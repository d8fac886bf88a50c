"""A symmetric linear operator on the parameters that is applied, never stored.

`A @ v` costs a few gradients; the P × P matrix exists only in `A.dense()`. An operator is a pytree, so it is
an argument or a result of jitted functions like any other. `A.linear_map()` does what has to be done once
(the forward pass and what it keeps) and returns a function that is linear in its argument: whatever applies
the operator repeatedly, in a loop or to many columns, applies that one.
"""

from __future__ import annotations

import abc
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree, Scalar

from funcprop import _compat
from funcprop.curvature import products
from funcprop.curvature.binding import Same
from funcprop.curvature.finite import require_finite
from funcprop.curvature.linearization import split
from funcprop.curvature.parameters import Parameters

DENSE_BYTES = 2**32  # a larger matrix is made only when asked for


class LinearOperator(abc.ABC):
    """A symmetric matrix of P × P entries, P the number of parameters, by its products.

    Attributes:
        parameters: shapes, dtypes and paths of the P parameters.
    """

    parameters: Parameters
    __array_ufunc__ = None  # NumPy leaves `2.0 * A` to us

    @abc.abstractmethod
    def linear_map(self) -> Callable[[PyTree], PyTree]:
        """`v ↦ A v` on pytrees, with all that does not depend on `v` computed here and now."""

    def product(self, v: PyTree) -> PyTree:
        """`A v` for one pytree, traceable; by another way than `linear_map` where one product is cheaper."""
        return self.linear_map()(v)

    def block_map(self, rows: Sequence[int], columns: Sequence[int]) -> Callable[[Sequence[Any]], list[Any]]:
        """The linear map from the leaves at the positions `columns` to those at `rows`."""
        apply, names = self.linear_map(), self.parameters

        def block(parts: Sequence[Any]) -> list[Any]:
            leaves = [jnp.zeros(s, d) for s, d in zip(names.shapes, names.dtypes, strict=True)]
            for position, part in zip(columns, parts, strict=True):
                leaves[position] = part
            results = jax.tree.leaves(apply(names.unflatten(leaves)))
            return [results[i] for i in rows]

        return block

    def restrict(self, tree: PyTree) -> PyTree:
        """The leaves of `tree` that the operator acts on; all, unless `where=` left some out."""
        return self.parameters.restrict(tree)

    # --- products -----------------------------------------------------------------------------

    @property
    def shape(self) -> tuple[int, int]:
        """`(P, P)`."""
        return self.parameters.size, self.parameters.size

    @property
    def dtype(self) -> Any:
        """That of the flat vectors."""
        return self.parameters.dtype

    def __matmul__(self, v: Any) -> Any:
        """`A @ v` for a pytree or a flat vector; for several as columns, a flat matrix or a last axis."""
        names = self.parameters
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
        if v.ndim == 2:
            return products.products(self, v.astype(self.dtype), None)
        return names.ravel(products.product(self, names.unravel(v)))

    def linearize(self) -> LinearOperator:
        """The same operator with the forward pass done: products cost only what depends on the vector."""
        return _linearized(self)

    # --- algebra ------------------------------------------------------------------------------

    def __add__(self, other: Any) -> LinearOperator:
        return Sum.of([self, other]) if isinstance(other, LinearOperator) else NotImplemented

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

    # --- the matrix and what is exact of it ---------------------------------------------------

    def dense(self, *, columns: int | None = None, limit: int = DENSE_BYTES) -> Float[Array, "P P"]:
        """The matrix, in `ravel_pytree` order.

        Args:
            columns: how many columns are computed at once; chosen for their bytes if None.
            limit: the most bytes that the matrix may have.

        Raises:
            ValueError: the matrix is larger than `limit`.
            FloatingPointError: it is not finite; the message has the parameter's path.
        """
        self._require_room(self.shape, limit, "the matrix")
        every = tuple(range(len(self.parameters.paths)))
        return require_finite(self, products.block(self, every, every, columns), "dense()")

    def block(
        self, rows: Any, columns: Any = None, *, at_once: int | None = None, limit: int = DENSE_BYTES
    ) -> Float[Array, "R C"]:
        """The rows of one parameter and the columns of another (the same if None), as a matrix.

        A parameter is given by its path, as `"params/Dense_0/kernel"` or a sequence of keys; a path with
        several parameters below it means all of them. Only these columns are computed.

        Raises:
            ValueError: there is no such parameter, or the block has more than `limit` bytes.
        """
        names = self.parameters
        r = names.select(rows)
        c = r if columns is None else names.select(columns)
        size = tuple(sum(names.sizes[i] for i in positions) for positions in (r, c))
        self._require_room(size, limit, "the block")
        return require_finite(self, products.block(self, r, c, at_once), "block()")

    def diagonal(self, *, columns: int | None = None) -> PyTree:
        """The diagonal as a pytree, exactly, from P products; only `columns` of them exist at a time."""
        return require_finite(self, products.diagonal(self, columns), "diagonal()")

    def _require_room(self, shape: tuple[int, ...], limit: int, what: str) -> None:
        needed = math.prod(shape) * self.dtype.itemsize
        if needed > limit:
            raise ValueError(
                f"{what} has {shape[0]} × {shape[1]} entries, {needed:.3g} bytes, and limit={limit}; use "
                "products, block(), diagonal() or where=, or raise limit=."
            )


# --- operators made of operators ----------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class Linearized(LinearOperator):
    """An operator by its linear map, whose residuals are data."""

    residuals: tuple[Any, ...]
    parameters: Parameters = field(metadata={"static": True})
    jaxpr: Same = field(metadata={"static": True})

    def linear_map(self) -> Callable[[PyTree], PyTree]:
        """The linear map, on its residuals."""

        def apply(v: PyTree) -> PyTree:
            results = _compat.evaluate(self.jaxpr.value, (), [*self.residuals, *jax.tree.leaves(v)])
            return self.parameters.unflatten(results)

        return apply

    def linearize(self) -> LinearOperator:
        """Itself."""
        return self


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
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

    def linear_map(self) -> Callable[[PyTree], PyTree]:
        """The sum of the terms' linear maps."""
        maps = [term.linear_map() for term in self.terms]
        return lambda v: _added([apply(v) for apply in maps])

    def product(self, v: PyTree) -> PyTree:
        """The sum of the terms' products."""
        return _added([term.product(v) for term in self.terms])

    def block_map(self, rows: Sequence[int], columns: Sequence[int]) -> Callable[[Sequence[Any]], list[Any]]:
        """The sum of the terms' blocks."""
        maps = [term.block_map(rows, columns) for term in self.terms]
        return lambda parts: _added([apply(parts) for apply in maps])


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
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

    def _scaled(self, tree: PyTree) -> PyTree:
        return jax.tree.map(lambda leaf: self.scale.astype(leaf.dtype) * leaf, tree)

    def linear_map(self) -> Callable[[PyTree], PyTree]:
        """The operator's linear map, scaled."""
        apply = self.operator.linear_map()
        return lambda v: self._scaled(apply(v))

    def product(self, v: PyTree) -> PyTree:
        """The operator's product, scaled."""
        return self._scaled(self.operator.product(v))

    def block_map(self, rows: Sequence[int], columns: Sequence[int]) -> Callable[[Sequence[Any]], list[Any]]:
        """The operator's block, scaled."""
        apply = self.operator.block_map(rows, columns)
        return lambda parts: self._scaled(apply(parts))


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class Identity(LinearOperator):
    """`v ↦ v`: damping is `A + damping * identity(A)`."""

    parameters: Parameters = field(metadata={"static": True})

    def linear_map(self) -> Callable[[PyTree], PyTree]:
        """The identity."""
        return lambda v: v


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
    return Linearized(tuple(residuals), names, Same(jaxpr))


def _added(trees: Sequence[PyTree]) -> PyTree:
    return functools.reduce(functools.partial(jax.tree.map, jnp.add), trees)
