"""A step of `fit` under a plan: where its arrays lie, and how its gradient is computed.

Under data and tensor parallelism it is the ordinary step, whose loss is that of the whole batch. Under ZeRO-3
each device computes the loss of its own examples, and in a pipeline each stage is a program of its own: there
a loss is what it is only as a mean over examples.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from funcprop.partition.fitted_plan import FittedPlan
from funcprop.partition.partition_plan import PartitionPlan
from funcprop.program.batch_arguments import arguments
from funcprop.rules.rule_set import RuleSet
from funcprop.training.compiled_step import CompiledStep, PlannedStep
from funcprop.training.training_loss import TrainingLoss
from funcprop.training.update_step import update_step


@dataclass(frozen=True)
class PartedLoss(TrainingLoss):
    """A loss whose gradient a plan computes, each device from its own examples."""

    plan: FittedPlan | None = None

    def _derivative(self, rules: RuleSet | None, factor: Any) -> Callable[..., Any]:
        def loss(params: Any, batch: Any) -> Any:
            return self.whole(params, None, batch, None)[0]

        def derivative(params: Any, model: Any, batch: Any, key: Any) -> Any:
            assert self.plan is not None
            value, gradient = self.plan.gradient_of(loss, rules)(params, batch, factor)
            return (value, (value if factor is None else value / factor, (model, {}))), gradient

        return derivative


def step_under(
    plan: Any,
    objective: TrainingLoss,
    optimizer: optax.GradientTransformation,
    rules: RuleSet | None,
    params: Any,
) -> tuple[TrainingLoss, CompiledStep | PlannedStep, Callable[..., Any]]:
    """What is trained under a plan, its step, and `place(params, state)`; `params` are shapes.

    Raises:
        TypeError: the plan does not do what the loss needs.
    """
    if not isinstance(plan, PartitionPlan):
        _refuse(objective, fields(objective), "a plan of one's own has a step of its own", "leave them out")
        own = plan.step(optimizer)

        def step(params: Any, state: Any, batch: Any, intact: Any) -> Any:
            params, state, value = own(params, state, batch)
            return params, state, value, intact & jnp.isfinite(value)

        def text(batch: Any) -> str:
            return str(
                jax.jit(objective.loss).lower(params, *arguments(batch, objective.loss, params)).as_text()
            )

        return objective, PlannedStep(step, text), plan.place
    place, fitted = partial(plan.place, optimizer=optimizer), FittedPlan(plan)
    if fitted.is_of_parts:
        why = f"the plan {plan.name!r} computes losses of parts of a batch, on different devices"
        _refuse(objective, [f for f in fields(objective) if f.name in _OF_THE_WHOLE], why, _WHOLE)
    if fitted.is_pipelined:
        return objective, _pipelined(fitted, objective, optimizer, rules), place
    loss, parts = fitted.differentiated(objective.loss)
    objective = replace(objective, loss=loss, accumulate=objective.accumulate * parts)
    if fitted.is_of_parts:
        given = {f.name: getattr(objective, f.name) for f in fields(TrainingLoss)}
        objective = PartedLoss(**given, plan=fitted)
    step = update_step(objective, optimizer, plan.problem.rules if rules is None else rules)
    return objective, CompiledStep(step, partial(plan.put, checked=True), fitted.compiler_options), place


_OF_THE_WHOLE = ("has_aux", "stateful", "keyed")
_CALLED = {"stateful": "model_state"}
_WHOLE = "use a plan of data or tensor parallelism, whose loss is that of the whole batch"


def _refuse(objective: TrainingLoss, which: Any, why: str, remedy: str) -> None:
    plain = TrainingLoss(objective.loss)
    asked = [
        _CALLED.get(f.name, f.name) for f in which if getattr(objective, f.name) != getattr(plain, f.name)
    ]
    if asked:
        raise TypeError(f"fit: {', '.join(asked)}: {why}; {remedy}.")


def _pipelined(fitted: FittedPlan, objective: TrainingLoss, optimizer: Any, rules: Any) -> PlannedStep:
    """A pipeline's step of the loss in its precision."""
    if objective.precision is not None and objective.precision.scale is not None:
        raise TypeError(
            f"fit: precision={objective.precision.compute!r}: the plan {fitted.plan.name!r} updates each "
            "stage by itself, so that an overflow on one cannot leave out the update of all; use 'bfloat16', "
            "or a plan of data or tensor parallelism."
        )
    counted = objective.weight
    weight = counted and (lambda batch: counted(*arguments(batch, counted)))

    def loss(params: Any, batch: Any) -> Any:
        return objective.whole(params, None, batch, None)[0]

    pipeline = fitted.pipeline_of(loss, objective.accumulate, weight, rules)
    text = lambda _: pipeline.text(optimizer)  # noqa: E731
    return PlannedStep(pipeline.step(optimizer), text, fitted.plan.gather)
