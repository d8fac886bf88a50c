"""A loss that is not convex in the model's outputs has no Gauss-Newton matrix with a root: it is named."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from funcprop.operators.convergence import is_traced

REMEDY = (
    "use kind='empirical', or pass a likelihood (an fp.curvature.Likelihood) in place of the loss: its "
    "Fisher matrix is never indefinite"
)
_SHOWN = 5  # examples that a message lists


def require_convex(what: str, rootless: Any, remedy: str) -> None:
    """Raise if the loss of some examples is not convex in the outputs; under `jit`, when the program runs.

    Args:
        what: the function that is asked for a curvature.
        rootless: of each example, whether its loss has no root; None if every such loss has one.
        remedy: what to do instead.

    Raises:
        ValueError: it names the examples. What `jit` has compiled raises an error of the runtime with this
            message, before any of its results can be read.
    """

    def require(rootless: Any) -> None:
        broken = np.flatnonzero(rootless)
        if broken.size:
            listed = ", ".join(map(str, broken[:_SHOWN])) + (", …" if broken.size > _SHOWN else "")
            raise ValueError(
                f"{what}: the loss is not convex in the model's output at {broken.size} of "
                f"{np.size(rootless)} examples ({listed}), so its Gauss-Newton matrix is indefinite and has "
                f"no root; {remedy}."
            )

    if rootless is None:
        return
    if is_traced(rootless):
        jax.lax.cond(rootless.any(), lambda: jax.debug.callback(require, rootless), lambda: None)
    else:
        require(np.asarray(rootless))
