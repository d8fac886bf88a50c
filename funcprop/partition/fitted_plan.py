"""A plan as `fp.training.fit` uses it, with a loss and an optimizer of the run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from funcprop.partition.layout import mesh_of
from funcprop.partition.partition_plan import PartitionPlan, PlanProgram
from funcprop.partition.pipeline import PipelinedProgram
from funcprop.partition.problem import TrainingProblem, Weight
from funcprop.partition.programs import SteppedProgram
from funcprop.partition.running_pipeline import RunningPipeline
from funcprop.partition.sharded import ShardedProgram
from funcprop.rules.rule_set import RuleSet


@dataclass(frozen=True)
class FittedPlan:
    """How a plan computes losses and gradients that it was not made for."""

    plan: PartitionPlan

    @property
    def _program(self) -> PlanProgram:
        return self.plan.program

    @property
    def is_pipelined(self) -> bool:
        """Whether stages have programs and parameters of their own."""
        return isinstance(self._program, PipelinedProgram)

    @property
    def is_of_parts(self) -> bool:
        """Whether each device computes the loss of its own examples, and not a part of the whole loss."""
        return not isinstance(self._program, SteppedProgram)

    def differentiated(self, loss: Callable[..., Any]) -> tuple[Callable[..., Any], int]:
        """What is differentiated for a loss, and in how many parts a batch is taken.

        Raises:
            ValueError: the plan makes several updates of a batch, which is for who makes the batches.
        """
        if not isinstance(self._program, SteppedProgram):
            return loss, 1
        if self.plan.updates > 1:
            raise ValueError(
                f"plan {self.plan.name!r} makes {self.plan.updates} updates of each batch; pass smaller "
                "batches, and the plan 'one device' or none."
            )
        lean = self._program.lean
        return loss if lean is None else lean(loss), self._program.parts

    @property
    def compiler_options(self) -> Mapping[str, Any] | None:
        """What the jit of a step needs."""
        program = self._program
        return None if isinstance(program, PipelinedProgram) else program.compiler_options or None

    def gradient_of(self, loss: Callable[..., Any], rules: RuleSet | None) -> Callable[..., Any]:
        """`gradient(params, batch, factor) -> factor · (value, gradient)` of another loss by ZeRO-3."""
        program, mesh = self._program, mesh_of(self.plan.devices(), self.plan.mesh)
        assert isinstance(program, ShardedProgram)
        weigh = self.plan.problem.weight and (lambda given: self.plan.problem.weight(given[0]))  # type: ignore[misc]

        def scaled(params: Any, given: Any) -> Any:
            value = loss(params, given[0])
            return value if len(given) == 1 else value * given[1].astype(value.dtype)

        def gradient(params: Any, batch: Any, factor: Any = None) -> Any:
            given = (batch,) if factor is None else (batch, factor)
            problem = self._problem_of(scaled, rules, params=params, batch=given, weight=weigh)
            return replace(program, problem=problem).gradient(mesh)(params, given)

        return gradient

    def pipeline_of(
        self, loss: Callable[..., Any], parts: int, weight: Weight | None, rules: RuleSet | None
    ) -> RunningPipeline:
        """The pipeline of another loss, in so many times more parts."""
        program = self._program
        assert isinstance(program, PipelinedProgram)
        problem = self._problem_of(loss, rules, weight=weight or self.plan.problem.weight)
        count = program.microbatches * parts
        problem.require_parts(count, "microbatches × accumulate")
        problem.require_parts(count * program.replicas, "microbatches × accumulate × data")
        planned = replace(program, problem=problem, microbatches=count)
        return RunningPipeline(planned, self.plan.devices())

    def _problem_of(self, loss: Callable[..., Any], rules: RuleSet | None, **more: Any) -> TrainingProblem:
        chosen = self.plan.problem.rules if rules is None else rules
        return replace(self.plan.problem, loss=loss, rules=chosen, optimizer=None, **more)
