"""A symmetric linear map on the parameters, by its products: all that Krylov methods ask for."""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from funcprop.operators.parameters import Parameters


class SymmetricMap(abc.ABC):
    """`v ↦ A v` for a symmetric matrix of P × P entries, P the number of parameters.

    Attributes:
        parameters: shapes, dtypes and paths of the P parameters.
    """

    parameters: Parameters

    @property
    def on_host(self) -> bool:
        """Whether python makes its products, as passes over a data loader, and none are inside of `jit`."""
        return False

    def columns(self, matrix: Float[Array, "P m"]) -> Float[Array, "P m"]:
        """`A V` for flat columns, by python, if the map is `on_host`."""
        raise NotImplementedError(f"{type(self).__name__} has products of its own.")

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

    @abc.abstractmethod
    def linearize(self) -> SymmetricMap:
        """The same map with the forward pass done: products cost only what depends on the vector."""

    @property
    def shape(self) -> tuple[int, int]:
        """`(P, P)`."""
        return self.parameters.size, self.parameters.size

    @property
    def dtype(self) -> Any:
        """The dtype of the flat vectors."""
        return self.parameters.dtype
