"""The examples that a model was trained with: one batch, or a data set in minibatches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from funcprop.curvature.data_set import DataSet
from funcprop.curvature.examples import total_of
from funcprop.program.program import Program


class Training(Protocol):
    """The training examples of a model: their shares of the mean loss, and their gradients."""

    def shares(self) -> Float[Array, " N"]:
        """What each example has of the mean: `1/N`, or its part of the weights."""

    def example(self, n: int) -> tuple[Any, ...]:
        """The arrays of example n."""

    def slopes(self, direction: PyTree) -> Float[Array, " N"]:
        """`∇loss_nᵀ s` for all n: one tangent, not N gradients."""

    def rows(self, quantity: Callable[..., Array]) -> Float[Array, " N"]:
        """What `quantity(*arrays)` has for each example, of all."""


@dataclass(frozen=True, eq=False)
class TrainingBatch:
    """Training examples that are one batch; `program` is `(params, data, s) ↦ ∇loss_nᵀ s`."""

    program: Program
    params: PyTree
    data: tuple[Any, ...]
    weights: Any

    def __repr__(self) -> str:
        return f"{self.size:,} training examples"

    @property
    def size(self) -> int:
        """How many there are."""
        return len(jax.tree.leaves(self.data)[0])

    def shares(self) -> Float[Array, " N"]:
        """Of a mean over the batch."""
        return (
            jnp.full(self.size, 1 / self.size)
            if self.weights is None
            else self.weights / total_of(self.weights, 0)
        )

    def example(self, n: int) -> tuple[Any, ...]:
        """Its row of every array."""
        row: tuple[Any, ...] = jax.tree.map(lambda leaf: leaf[n], self.data)
        return row

    def slopes(self, direction: PyTree) -> Float[Array, " N"]:
        """By one compiled sweep."""
        found: Array = self.program.compiled(self.params, self.data, direction)
        return found

    def rows(self, quantity: Callable[..., Array]) -> Float[Array, " N"]:
        """Of the batch."""
        return quantity(*self.data)


@dataclass(frozen=True, eq=False)
class TrainingMinibatches:
    """Training examples of a data set; every answer is a pass over it."""

    data: DataSet
    along: Callable[..., Any]

    def __repr__(self) -> str:
        return "the training examples of a data set"

    def shares(self) -> Float[Array, " N"]:
        """Of a mean over the data."""
        counts = [
            np.ones(batch.size) if batch.weights is None else batch.weights
            for batch in self.data.loader.visit("the examples' weights")
        ]
        weights = jnp.asarray(np.concatenate(counts))
        return weights / total_of(weights, 0)

    def example(self, n: int) -> tuple[Any, ...]:
        """Its row of the minibatch that it is in."""
        before = 0
        for batch in self.data.loader.visit("one example"):
            if n < before + batch.size:
                at = n - before
                row: tuple[Any, ...] = jax.tree.map(lambda a, at=at: jnp.asarray(a[at]), batch.arguments)
                return row
            before += batch.size
        raise IndexError(f"example={n}, but there are {before} training examples.")

    def slopes(self, direction: PyTree) -> Float[Array, " N"]:
        """By one pass."""
        found: Array = self.along(direction)
        return found

    def rows(self, quantity: Callable[..., Array]) -> Float[Array, " N"]:
        """By one pass."""
        found: Array = self.data.rows(lambda *arguments, weights=None: quantity(*arguments))
        return found
