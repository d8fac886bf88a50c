"""Sums of clipped gradients of single examples, for differential privacy and robust training."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from funcprop.curvature.example_gradients.per_example import LIMIT, per_example
from funcprop.curvature.examples import batch_size, weights_of
from funcprop.operators.parameters import Where, times
from funcprop.operators.subset import restricted
from funcprop.program.program import Program
from funcprop.rules.rule_set import RuleSet
from funcprop.rules.running import with_rules


class ClippedSum(NamedTuple):
    """`Σ_n min(1, C / ‖g_n‖) g_n`, and the norm of each example's gradient over all parameters."""

    gradient: PyTree
    norms: Float[Array, " N"]


def clipped_sum(
    model: Callable[..., Any],
    loss: Callable[..., Any],
    *,
    norm: float,
    microbatch: int | None = None,
    where: Where | None = None,
    rules: RuleSet | None = None,
    budget: int | str = LIMIT,
) -> Callable[..., ClippedSum]:
    """The sum of the examples' gradients, each clipped to a norm: `clipped_sum(model, loss, norm=C)(params,
    x, y)`.

    Two sweeps, in neither of which a gradient of one example is made: the norms, as by `fp.per_example`, and
    the gradient of the losses times `min(1, C / ‖g_n‖)`. For DP-SGD noise is added to the sum. With
    `weights`, numbers ≥ 0 (0 for padding), each clipped gradient counts as that many.

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
    quantities = per_example(model, loss, where=where, rules=rules, budget=budget)

    def at(params: PyTree, x: Any, y: Any, *, weights: Any = None) -> ClippedSum:
        size = batch_size(x, y, "clipped_sum")
        weights = weights_of(weights, size, "clipped_sum")
        weights = jnp.ones(size) if weights is None else weights
        of_chosen, chosen = restricted(model, params, where)
        of_one = with_rules(lambda p, x, y: loss(of_chosen(p, x), y), rules)

        def part(x: Any, y: Any, weights: Array) -> ClippedSum:
            found = quantities(params, x, y, {"norm"})["norm"]
            squares = [leaf**2 for leaf in jax.tree.leaves(found)]
            norms = jnp.sqrt(functools.reduce(jnp.add, squares))
            scale = times(weights, jnp.minimum(1, norm / jnp.where(norms > 0, norms, 1)))

            def scaled(p: PyTree) -> Array:
                losses = jax.vmap(of_one, (None, 0, 0))(p, x, y)
                return jnp.sum(times(scale, losses))

            return ClippedSum(jax.grad(scaled)(chosen), norms)

        most = size if microbatch is None else min(microbatch, size)
        parts = []
        for start in range(0, size, most):
            here = jax.tree.map(lambda a, i=start: jnp.asarray(a[i : i + most]), (x, y, weights))
            parts.append(Program.of(part, *here, called=model).compiled(*here))
        total = functools.reduce(functools.partial(jax.tree.map, jnp.add), [p.gradient for p in parts])
        return ClippedSum(total, jnp.concatenate([p.norms for p in parts]))

    return at
