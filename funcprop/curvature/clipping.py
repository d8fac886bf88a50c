"""Sums of clipped gradients of single examples, for differential privacy and robust training."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree
from wadler_lindig import pformat

from funcprop.curvature.data_set import DataSet
from funcprop.curvature.example_gradients.per_example import LIMIT, PerExample, per_example
from funcprop.curvature.examples import batch_size, total_of, weights_of
from funcprop.operators.parameters import Where, times
from funcprop.operators.subset import restricted
from funcprop.program.program import Program
from funcprop.rules.rule_set import RuleSet
from funcprop.rules.running import with_rules


class ClippedSum(NamedTuple):
    """`Σ_n min(1, C / ‖g_n‖) g_n`, and the norm of each example's gradient over all parameters."""

    gradient: PyTree
    norms: Float[Array, " N"]

    def merged(self, other: ClippedSum, _: Any = None) -> ClippedSum:
        """That of the examples of both."""
        total = jax.tree.map(jnp.add, self.gradient, other.gradient)
        return ClippedSum(total, jnp.concatenate([self.norms, other.norms]))


@dataclass(frozen=True, eq=False)
class ClippedSumOf:
    """What `fp.curvature.clipped_sum` returns: `(params, x, y, weights=None) -> ClippedSum`."""

    __repr__ = pformat  # shapes instead of entries

    model: Callable[..., Any]
    loss: Callable[..., Any]
    norm: float
    microbatch: int | None
    where: Where | None
    rules: RuleSet | None
    quantities: PerExample

    def __call__(self, params: PyTree, x: Any, y: Any, *, weights: Any = None) -> ClippedSum:
        """The sum over one batch."""
        size = batch_size(x, y, "clipped_sum")
        weights = weights_of(weights, size, "clipped_sum")
        weights = jnp.ones(size) if weights is None else weights
        most = size if self.microbatch is None else min(self.microbatch, size)
        parts = []
        for start in range(0, size, most):
            here = jax.tree.map(lambda a, i=start: jnp.asarray(a[i : i + most]), (x, y, weights))
            part = functools.partial(self._part, params)
            parts.append(Program.of(part, *here, called=self.model).compiled(*here))
        return functools.reduce(ClippedSum.merged, parts)

    def over_data(self, data: DataSet, params: PyTree) -> ClippedSum:
        """The sum over all data, by one pass for the gradient and one for the norms."""

        def mean(x: Any, y: Any, weights: Any = None) -> PyTree:
            found = self(params, x, y, weights=weights)
            total = total_of(weights, len(found.norms))
            return jax.tree.map(functools.partial(times, 1 / total), found.gradient)

        def norms(x: Any, y: Any, weights: Any = None) -> Array:
            return self(params, x, y, weights=weights).norms

        found = data.mean(mean)
        gradient = jax.tree.map(functools.partial(times, found.weight), found.mean)
        return ClippedSum(gradient, data.rows(norms))

    def _part(self, params: PyTree, x: Any, y: Any, weights: Array) -> ClippedSum:
        of_chosen, chosen = restricted(self.model, params, self.where)
        of_one = with_rules(lambda p, x, y: self.loss(of_chosen(p, x), y), self.rules)
        found = self.quantities(params, x, y, {"norm"})["norm"]
        squares = [leaf**2 for leaf in jax.tree.leaves(found)]
        norms = jnp.sqrt(functools.reduce(jnp.add, squares))
        scale = times(weights, jnp.minimum(1, self.norm / jnp.where(norms > 0, norms, 1)))

        def scaled(p: PyTree) -> Array:
            return jnp.sum(times(scale, jax.vmap(of_one, (None, 0, 0))(p, x, y)))

        return ClippedSum(jax.grad(scaled)(chosen), norms)


def clipped_sum(
    model: Callable[..., Any],
    loss: Callable[..., Any],
    *,
    norm: float,
    microbatch: int | None = None,
    where: Where | None = None,
    rules: RuleSet | None = None,
    budget: int | str = LIMIT,
) -> ClippedSumOf:
    """The sum of the examples' gradients, each clipped to a norm: `clipped_sum(model, loss, norm=C)(params,
    x, y)`.

    Two sweeps, in neither of which a gradient of one example is made: the norms, as by `fp.per_example`, and
    the gradient of the losses times `min(1, C / ‖g_n‖)`. For DP-SGD noise is added to the sum. With
    `weights`, numbers ≥ 0 (0 for padding), each clipped gradient counts as that many. Of a data set in
    minibatches it is `fp.curvature.over(batches)(fp.curvature.clipped_sum(…))(params)`.

    Args:
        model, loss: of ONE example, as in `fp.per_example`.
        norm: C, a positive number.
        microbatch: how many examples are swept at once; all, if None. The sum does not depend on it.
        where, rules, budget: as in `fp.per_example`.

    Raises:
        ValueError: `norm` or `microbatch` is not positive; also as `fp.per_example`.

    References: Abadi et al., "Deep learning with differential privacy", CCS 2016; Goodfellow, "Efficient
    per-example gradient computations", 2015; Li et al., "Large language models can be strong differentially
    private learners", ICLR 2022 (the second sweep).

    Example:
        >>> import jax.numpy as jnp, funcprop as fp
        >>> model, loss = lambda w, x: jnp.vdot(w, x), lambda output, y: output - y
        >>> x = jnp.array([[3.0, 4.0], [0.0, 0.5]])  # these are the gradients
        >>> found = fp.curvature.clipped_sum(model, loss, norm=1.0)(jnp.zeros(2), x, jnp.zeros(2))
        >>> print(found.gradient, found.norms)
        [0.6 1.3] [5.  0.5]
    """
    if not norm > 0:
        raise ValueError(f"clipped_sum: norm={norm}; pass the largest norm of a gradient, a positive number.")
    if microbatch is not None and microbatch < 1:
        raise ValueError(f"clipped_sum: microbatch={microbatch}; pass a number of examples, 1 or more.")
    one = per_example(model, loss, where=where, rules=rules, budget=budget)
    return ClippedSumOf(model, loss, norm, microbatch, where, rules, one)
