"""Steps divided by a diagonal curvature, as optax gradient transformations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, PyTree

from funcprop.operators.solvers import require_damping
from funcprop.training.extra import chosen_arguments, require_arguments


class DiagonalState(NamedTuple):
    """`updates` counts the updates, `average` is the moving average of the diagonals' magnitudes."""

    updates: Int[Array, ""]
    average: PyTree


def scale_by_diagonal(
    diagonal: Callable[..., PyTree],
    *,
    damping: float = 1e-3,
    decay: float = 0.95,
    every: int = 1,
) -> optax.GradientTransformationExtraArgs:
    """Divide the updates by a moving average of a diagonal curvature.

    `u ↦ u / (d̂ + damping)`, with `d̂` the average of `|diagonal|` over past updates, in which the one `k`
    times `every` updates ago has the weight `decay^k`, all weights divided by their sum. As for all
    `scale_by` transformations of optax, the sign stays: `optax.scale(-rate)` follows.

    Args:
        diagonal: `diagonal(params, **extra)`, a pytree like the parameters. Of the extra arguments of
            `update` it gets those that are its parameters, so `lambda params, batch: …` gets the minibatch
            that `fp.training.make_step` passes. Magnitudes are taken: a Hessian's diagonal has both signs.
        damping: a number > 0 or, if the diagonal is never zero, 0.
        decay: between 0 (the last diagonal alone) and 1 (the mean of all), exclusive of 1.
        every: after how many updates the diagonal is computed anew.

    Raises:
        ValueError: an argument is out of range, or `update` lacks `params`.

    Reference: Becker and Le Cun, "Improving the convergence of back-propagation learning with second order
    methods", 1988; Liu et al., "Sophia", ICLR 2024, for the moving average.

    Example:
        >>> import jax, jax.numpy as jnp, optax, funcprop as fp
        >>> f = lambda w: jnp.sum(jnp.array([1.0, 100.0]) * (w - 3) ** 2)
        >>> hessian = lambda params, value_fn: fp.curvature.hessian_diagonal(value_fn)(params)
        >>> newton = optax.chain(fp.training.scale_by_diagonal(hessian, damping=0.0), optax.scale(-1.0))
        >>> w = jnp.zeros(2)
        >>> step, _ = newton.update(jax.grad(f)(w), newton.init(w), w, value_fn=f)
        >>> print(jnp.round(optax.apply_updates(w, step), 4))
        [3. 3.]
    """
    require_damping(damping, "scale_by_diagonal")
    if not 0 <= decay < 1:
        raise ValueError(f"scale_by_diagonal: decay={decay}; pass a number from 0 up to, but not, 1.")
    if every < 1:
        raise ValueError(f"scale_by_diagonal: every={every}; pass a number of updates, 1 or more.")

    def init(params: PyTree) -> DiagonalState:
        return DiagonalState(jnp.zeros((), int), optax.tree.zeros_like(params))

    def update(
        updates: PyTree, state: DiagonalState, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, DiagonalState]:
        require_arguments("scale_by_diagonal", {"params": params, **extra})

        def renewed(average: PyTree) -> PyTree:
            found = diagonal(params, **chosen_arguments(diagonal, extra))
            # The state has the parameters' precision; what is added up has that of the diagonal.
            mean = lambda a, d: (decay * a + (1 - decay) * jnp.abs(d)).astype(a.dtype)  # noqa: E731
            return jax.tree.map(mean, average, found)

        average = jax.lax.cond(state.updates % every == 0, renewed, lambda average: average, state.average)
        times = state.updates // every + 1
        # The weights sum to 1 − decay^times.
        weight = 1 - jnp.asarray(decay, float) ** times
        scaled = jax.tree.map(lambda u, a: (u / (a / weight + damping)).astype(u.dtype), updates, average)
        return scaled, DiagonalState(state.updates + 1, average)

    return optax.GradientTransformationExtraArgs(init, update)
