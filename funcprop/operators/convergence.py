"""What has not converged says so."""

from __future__ import annotations

import warnings
from typing import Any

import jax

from funcprop.operators.symmetric_map import SymmetricMap


class ConvergenceWarning(UserWarning):
    """An iteration ended before it reached its tolerance; the message has the residual."""


def warn_unless(converged: Any, message: str, *numbers: Any) -> None:
    """Warn with the numbers filled into the message's `{}`; under `jit`, when the program runs."""

    def warn(converged: Any, *numbers: Any) -> None:
        # A residual that is NaN has not converged either, and compares as False.
        if not converged:
            shown = [f"{float(number):.2e}" for number in numbers]
            warnings.warn(message.format(*shown), ConvergenceWarning, stacklevel=4)

    if is_traced((converged, numbers)):
        jax.debug.callback(warn, converged, *numbers)
    else:
        warn(bool(converged), *numbers)


def tolerance_of(operator: SymmetricMap, given: float | None = None) -> float:
    """The tolerance that is given, by default `ε^(2/3)` of the parameters' dtype."""
    return operator.parameters.rounding ** (2 / 3) if given is None else given


def is_traced(tree: Any) -> bool:
    """Whether any leaf has no value yet."""
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree))
