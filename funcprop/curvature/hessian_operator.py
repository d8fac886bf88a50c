"""The Hessian of a loss."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from funcprop.curvature.binding import Bound, ruled
from funcprop.curvature.derived import Derived
from funcprop.curvature.diagonal.exact_diagonal import hessian_diagonal
from funcprop.operators.parameters import Where
from funcprop.operators.subset import Point
from funcprop.program.call import shown_types, without_aux
from funcprop.program.program import Program
from funcprop.rules.rule_set import RuleSet
from funcprop.rules.running import with_rules


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False, repr=False)
class Hessian(Derived):
    """`∇² loss` at a point, forward over reverse."""

    def derived(self, v: PyTree) -> PyTree:
        """The gradient's derivative along `v`."""
        return _product(ruled(self.written, self.rules), self.chosen, self.arrays, v)

    def exact_diagonal(self, at_once: int | None) -> PyTree:
        """By `fp.curvature.hessian_diagonal`: fewer than P products."""
        return _diagonal(self, at_once)


def hessian(
    loss: Callable[..., Any],
    *,
    where: Where | None = None,
    has_aux: bool = False,
    rules: RuleSet | None = None,
) -> Callable[..., Hessian]:
    """The Hessian `H = ∇²_p loss(p, …)` as a linear operator; `hessian(loss)(params, *args, **kwargs)`.

    `H @ v` is a Hessian-vector product, forward over reverse; the P × P matrix is formed only by
    `H.dense()`. The scale is the loss's own: a mean over examples has the mean of their Hessians.

    The loss is traced when the operator is made. What it reads besides its arguments it has since, in all
    queries; an operator made after a change sees it. What was compiled for an equal loss is found again.

    Args:
        loss: a function of a parameter pytree and whatever else; returns one real scalar. Arrays among its
            arguments are traced, all else stays concrete.
        where: a subset of the parameters; the others are constants. A path as `"params/Dense_1"` (a leaf, or
            all below it), several paths, a predicate of path and leaf, or a pytree of bools.
        has_aux: `loss` returns the scalar and auxiliary data, which are left out.
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
    loss = without_aux(loss) if has_aux else loss

    def at(params: PyTree, *args: Any, **kwargs: Any) -> Hessian:
        point = Point.of(params, where)
        bound = Bound.of(loss, args, kwargs, point)
        function = with_rules(bound, rules)
        written = Program.of(bound, point.chosen, bound.arrays, called=loss)
        require_scalar(written.results, f"loss {written.name}")
        whole = None
        if not written.structure.differentiable:
            product = functools.partial(_product, function)
            whole = Program.of(product, point.chosen, bound.arrays, point.chosen, called=loss)
        return Hessian(written, point.chosen, bound.arrays, whole, point.parameters, rules)

    return at


def _product(loss: Callable[..., Any], chosen: PyTree, arrays: Any, v: PyTree) -> PyTree:
    return jax.jvp(lambda p: jax.grad(loss)(p, arrays), (chosen,), (v,))[1]


@functools.partial(jax.jit, static_argnames="at_once")
def _diagonal(operator: Hessian, at_once: int | None) -> PyTree:
    # The function is taken apart as it was written; what is left of it carries the rules.
    exact = hessian_diagonal(
        lambda p: operator.written(p, operator.arrays), rules=operator.rules, at_once=at_once
    )
    return exact(operator.chosen)


def require_scalar(result: Any, what: str) -> None:
    """Raise a TypeError if the shapes of a result are not those of one real scalar."""
    leaves = jax.tree.leaves(result)
    if len(leaves) != 1 or leaves[0].shape != () or not jnp.issubdtype(leaves[0].dtype, jnp.floating):
        raise TypeError(
            f"{what} returns {shown_types(result)}, but curvature is of one real scalar; return a mean or a "
            "sum, alone."
        )
