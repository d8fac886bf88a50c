"""The mean of an operator over a data set, every product of which is one pass over the data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from funcprop.curvature.data_set import DataSet
from funcprop.curvature.minibatches import applied
from funcprop.operators import products
from funcprop.operators.linear_operator import LinearOperator
from funcprop.operators.parameters import Parameters


def mean_operator(data: DataSet, factory: Callable[..., LinearOperator], *, key: Any = None) -> DataOperator:
    """The mean of the operators `factory(*batch, weights=…, key=…)`.

    Raises:
        ValueError: a mean over the data is to be continued, which this is not.
    """
    if data.state is not None:
        raise ValueError(
            "over: state= continues a mean over the data, but every product of an operator is a pass of "
            "its own; leave it out, and give solve() the last solution as start=."
        )
    return DataOperator(OperatorOfMinibatch(data, factory, key), data.types(factory, key).parameters)


@dataclass(eq=False)
class OperatorOfMinibatch:
    """How the operator of a minibatch is made, and what visits the data."""

    data: DataSet
    factory: Callable[..., LinearOperator]
    key: Any
    compiled: dict[Any, Any] = field(default_factory=dict)

    def mean(self, quantity: Callable[..., PyTree], *more: Any, shown: str) -> PyTree:
        """The mean of `quantity(operator, *more)`, whose numbers may be infinite or NaN."""

        def of_minibatch(data: Any, options: Any, *more: Any) -> PyTree:
            return quantity(applied(self.factory, data, **options), *more)

        if quantity not in self.compiled:
            self.compiled[quantity] = self.data.evaluated(of_minibatch, self.key)
        total, count = None, 0.0
        for batch in self.data.loader.visit(shown):
            found, weight = self.compiled[quantity](batch, *more), float(batch.total)
            weighted = jax.tree.map(lambda x, w=weight: w * x if w > 0 else jnp.zeros_like(x), found)
            total = weighted if total is None else jax.tree.map(jnp.add, total, weighted)
            count += weight
        return jax.tree.map(lambda x: x / (count or 1.0), total)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False, repr=False)
class DataOperator(LinearOperator):
    """The mean of an operator over a data set, weighted by the examples: every product is one pass over it.

    All queries of `LinearOperator` work; python makes their products, so none can be inside of `jit`. Columns
    go through the data together: the matrix, a trace, or ten random vectors are one pass.
    """

    source: OperatorOfMinibatch = field(metadata={"static": True})
    parameters: Parameters = field(metadata={"static": True})

    @property
    def on_host(self) -> bool:
        """Always."""
        return True

    def columns(self, matrix: Float[Array, "P m"]) -> Float[Array, "P m"]:
        """`A V`, by one pass over the data."""
        if isinstance(matrix, jax.core.Tracer):
            raise TypeError(
                "an operator over a data set cannot be used inside of jit, grad or vmap: its products are "
                "passes over the minibatches; call its methods outside, or use that of one batch inside."
            )
        return self.source.mean(_columns, matrix, shown="a product over minibatches")

    def linear_map(self) -> Callable[[PyTree], PyTree]:
        """The product, by a pass over the data."""
        names = self.parameters
        return lambda v: names.unravel(self.columns(names.ravel(v)[:, None])[:, 0])

    def exact_diagonal(self, at_once: int | None) -> PyTree:
        """The mean of the minibatches' diagonals, by one pass."""
        del at_once  # Of a minibatch, columns are chosen for their bytes.
        return self.source.mean(_diagonal, shown="a diagonal over minibatches")


def _columns(operator: LinearOperator, matrix: Array) -> Array:
    if matrix.shape[1] == 1:
        return products.flat_product(operator, matrix[:, 0])[:, None]
    return products.products(operator, matrix, None)


def _diagonal(operator: LinearOperator) -> PyTree:
    return operator.exact_diagonal(None)
