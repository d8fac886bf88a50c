"""The end of a run in which something is not finite: which operator was the first, found by a replay."""

from __future__ import annotations

from typing import Any

import jax

from funcprop.partition.edges import on_the_host
from funcprop.program.batch_arguments import arguments
from funcprop.rules.rule_set import RuleSet
from funcprop.sweeps.backprop import propagation_of
from funcprop.training.position import Position, step_key
from funcprop.training.training_loss import TrainingLoss
from funcprop.training.training_state import TrainingState


class NonFiniteStepError(FloatingPointError):
    """A step whose loss or update is not finite.

    `params` and `state` are those before that step, `batch` is its minibatch, and `first` says what was the
    first that is not finite (`fp.backprop(…).first_nonfinite()`), or why that is not known.
    """

    def __init__(self, message: str, params: Any, state: TrainingState, batch: Any, first: Any) -> None:
        super().__init__(message)
        self.params, self.state, self.batch, self.first = params, state, batch, first


def nonfinite_step(
    objective: TrainingLoss,
    rules: RuleSet | None,
    params: Any,
    state: TrainingState,
    batch: Any,
    key: Any,
    value: float,
    kept: str,
) -> NonFiniteStepError:
    """Make the error: run the step again in the open, with the parameters before it.

    `state.position` is that before the step, and `kept` says where the parameters are.
    """
    at: Position = state.position
    what = "update" if jax.numpy.isfinite(value) else f"loss ({value})"
    try:
        first: Any = _first(objective, rules, params, state, batch, key)
    except Exception as error:  # Whatever a replay runs into, the step's own failure is to be told.
        first = f"not known, for a replay failed: {type(error).__name__}: {str(error).splitlines()[0]}"
    optimizer = "not in the loss: both sweeps of a replay are finite, so it is in the optimizer"
    found = optimizer if first is None else first
    message = (
        f"fit: the {what} of step {at.step + 1} (epoch {at.epoch + 1}, batch {at.batch + 1}) is not finite; "
        f"{kept}. The first is: {found}; lower the learning rate, clip gradients, or mend it."
    )
    return NonFiniteStepError(message, params, state, batch, first)


def _first(
    objective: TrainingLoss, rules: RuleSet | None, params: Any, state: TrainingState, batch: Any, key: Any
) -> Any:
    own = step_key(key, state.position.step)
    params, model, batch = jax.tree.map(_here, (params, state.model, batch))
    if objective == TrainingLoss(objective.loss):
        # Names are those of the loss's own arguments.
        parts = arguments(batch, objective.loss, params)
        return propagation_of(objective.loss, rules=rules)(params, *parts).first_nonfinite()

    def replayed(params: Any, model_state: Any, batch: Any, key: Any) -> Any:
        return objective.value(params, model_state, batch, key)

    return propagation_of(replayed, rules=rules)(params, model, batch, own).first_nonfinite()


def _here(x: Any) -> Any:
    """An array that is spread over processes as a whole one of this process, for operators one by one."""
    return x if getattr(x, "is_fully_addressable", True) else on_the_host(x)
