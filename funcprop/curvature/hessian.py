"""The Hessian of a loss."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from funcprop.curvature.binding import Bound
from funcprop.curvature.diagonal import hessian_diagonal
from funcprop.curvature.operator import LinearOperator
from funcprop.curvature.parameters import Parameters, Where
from funcprop.curvature.subset import Point
from funcprop.registry import RuleSet
from funcprop.rules import autodiff


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False, repr=False)
class Hessian(LinearOperator):
    """`∇² loss` at a point, forward over reverse."""

    loss: Bound
    point: Point
    parameters: Parameters = field(metadata={"static": True})

    def _gradient(self, chosen: PyTree) -> PyTree:
        return jax.grad(lambda p: self.loss(self.point.whole(p)))(chosen)

    def linear_map(self) -> Callable[[PyTree], PyTree]:
        """The gradient's derivative, linearised."""
        return jax.linearize(self._gradient, self.point.chosen)[1]

    def product(self, v: PyTree) -> PyTree:
        """The gradient's derivative along `v`."""
        return jax.jvp(self._gradient, (self.point.chosen,), (v,))[1]

    def block_map(self, rows: Sequence[int], columns: Sequence[int]) -> Callable[[Sequence[Any]], list[Any]]:
        """The derivative along some leaves of the gradient by others."""
        leaves = jax.tree.leaves(self.point.chosen)

        def value(by_row: Sequence[Any], by_column: Sequence[Any]) -> Any:
            # Where a leaf is in both, the second derivative is that of the sum of its two variables.
            moved = list(leaves)
            for i, part in zip(rows, by_row, strict=True):
                moved[i] = moved[i] + part
            for i, part in zip(columns, by_column, strict=True):
                moved[i] = moved[i] + part
            return self.loss(self.point.whole(self.parameters.unflatten(moved)))

        at_rows, at_columns = ([jnp.zeros_like(leaves[i]) for i in which] for which in (rows, columns))
        return jax.linearize(lambda c: jax.grad(value)(at_rows, c), at_columns)[1]

    def exact_diagonal(self, columns: int | None) -> PyTree:
        """By `fp.curvature.hessian_diagonal`: fewer than P products."""
        return _diagonal(self, columns)


def hessian(
    loss: Callable[..., Any], *, where: Where | None = None, rules: RuleSet | None = None
) -> Callable[..., Hessian]:
    """The Hessian `H = ∇²_p loss(p, …)` as a linear operator; `hessian(loss)(params, *args, **kwargs)`.

    `H @ v` is a Hessian-vector product, forward over reverse; the P × P matrix is formed only by
    `H.dense()`. The scale is the loss's own: a mean over examples has the mean of their Hessians.

    Args:
        loss: a function of a parameter pytree and whatever else; returns one real scalar. Arrays among its
            arguments are traced, all else stays concrete.
        where: a subset of the parameters; the others are constants. A path as `"params/Dense_1"` (a leaf, or
            all below it), several paths, a predicate of path and leaf, or a pytree of bools.
        rules: a rule set; `fp.rules.default` if None.

    Raises:
        TypeError: the loss is not one real scalar, or a parameter is not a real floating-point array.
        ValueError: `where` chooses nothing.

    Reference: Pearlmutter, "Fast exact multiplication by the Hessian", Neural Computation 1994.

    Example:
        >>> import jax.numpy as jnp, funcprop as fp
        >>> H = fp.hessian(lambda p: jnp.sum(p["a"] ** 2) + p["a"][0] * p["b"])(
        ...     {"a": jnp.ones(2), "b": jnp.array(3.0)})
        >>> print(H @ jnp.array([1.0, 0.0, 2.0]))
        [4. 0. 1.]
        >>> print(H.dense())
        [[2. 0. 1.]
         [0. 2. 0.]
         [1. 0. 0.]]
    """

    def at(params: PyTree, *args: Any, **kwargs: Any) -> Hessian:
        point, bound = Point.of(params, where), Bound.of(loss, rules, args, kwargs)
        require_scalar(jax.eval_shape(lambda p: bound(point.whole(p)), point.chosen), f"loss {bound.name}")
        return Hessian(bound, point, point.parameters)

    return at


@functools.partial(jax.jit, static_argnames="columns")
def _diagonal(operator: Hessian, columns: int | None) -> PyTree:
    # The function is taken apart as it was written; what is left of it carries the rules.
    written = replace(operator.loss, rules=autodiff)
    exact = hessian_diagonal(
        lambda p: written(operator.point.whole(p)), rules=operator.loss.rules, block_size=columns
    )
    return exact(operator.point.chosen)


def require_scalar(result: Any, what: str) -> None:
    """Raise a TypeError if the shapes of a result are not those of one real scalar."""
    leaves = jax.tree.leaves(result)
    if len(leaves) != 1 or leaves[0].shape != () or not jnp.issubdtype(leaves[0].dtype, jnp.floating):
        raise TypeError(
            f"{what} returns {result}, but curvature is of one real scalar; return a mean or a sum, alone."
        )
