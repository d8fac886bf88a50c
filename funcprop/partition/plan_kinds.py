"""The kinds of plans: layouts, accumulation, minibatches, rematerialisation, ZeRO-3, pipelines."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

from funcprop.memory.remat.limits import RematLimits
from funcprop.memory.remat.rematerialize import Rematerializer
from funcprop.partition.layout import DATA, MODEL, STAGE
from funcprop.partition.partition_plan import PartitionPlan, PlanProgram
from funcprop.partition.pipeline import PipelinedProgram
from funcprop.partition.problem import TrainingProblem, require_mean
from funcprop.partition.programs import SteppedProgram
from funcprop.partition.sharded import ShardedProgram
from funcprop.partition.task_order import Order
from funcprop.partition.topology import DeviceTarget
from funcprop.rules.primitives import convolution, pooling
from funcprop.rules.rule import Rule
from funcprop.rules.rule_set import OperatorKey

# Segments of ZeRO-3: more of them gather less at a time.
_SEGMENTS = 12
_CONVOLUTION = "conv_general_dilated"


class PlanKinds:
    """The plans of one problem on some devices, one of each kind at a time."""

    def __init__(
        self,
        problem: TrainingProblem,
        target: DeviceTarget,
        budget: int | None,
        microbatches: int | None,
        schedule: Order,
    ) -> None:
        self.problem, self.target, self.budget = problem, target, budget
        self.microbatches, self.schedule = microbatches, schedule

    def _plan(self, name: str, mesh: Mapping[str, int], program: PlanProgram, **more: Any) -> PartitionPlan:
        notes: tuple[str, ...] = ()
        if not self.problem.has_values and not (isinstance(program, SteppedProgram) and program.is_plain):
            notes = ("not checked: whether the loss is a mean over examples needs values, not shapes",)
        return PartitionPlan(
            name, dict(mesh), program.problem, program, self.target, self.budget, notes=notes, **more
        )

    def _split(self, devices: int) -> TrainingProblem:
        """The problem where examples are on several devices: rules go by the sizes of one.

        A convolution takes its batch in chunks, of which each device has a part. For autodiff's derivative of
        a max-pool XLA gathers the examples, so there the rule is used at all sizes.
        """
        problem, rules = self.problem, self.problem.rules
        if devices == 1 or rules is None or problem.platform == "tpu":
            return problem
        made = {eqn.primitive.name for eqn, _ in problem.axes.program.equations}
        changes: dict[OperatorKey, Rule | None] = {}
        if "select_and_scatter_add" in made:
            pools = ("reduce_window_max", False), ("reduce_window_min", True)
            changes |= {name: pooling.rule(minimum=least, everywhere=True) for name, least in pools}
        if _CONVOLUTION in made:
            changes[_CONVOLUTION] = convolution.rule(devices=devices)
        changes = {name: r for name, r in changes.items() if name in rules and not rules.is_replaced(name)}
        return replace(problem, rules=rules.replace(changes)) if changes else problem

    @cached_property
    def _mean(self) -> None:
        require_mean(self.problem)

    def on_mesh(self, mesh: Mapping[str, int], shard_parameters: bool) -> PartitionPlan:
        """The plan of a mesh.

        Raises:
            ValueError: an axis is not known, or there are not so many devices.
        """
        if unknown := set(mesh) - {DATA, MODEL, STAGE}:
            raise ValueError(
                f"mesh={dict(mesh)!r}: the model has no axis "
                f"{', '.join(sorted(map(repr, unknown)))}; use data "
                "(examples), model (parameters) and stage (a pipeline)."
            )
        count = math.prod(mesh.values())
        if count > self.target.count:
            raise ValueError(
                f"mesh={dict(mesh)!r} needs {count} devices, and there are {self.target.count}; "
                f"use fewer, or "
                "on='v5e:4x4' for devices that are not there."
            )
        if mesh.get(STAGE, 1) > 1:
            if mesh.get(MODEL, 1) > 1:
                raise ValueError(
                    f"mesh={dict(mesh)!r}: a pipeline is combined with data, not with model; drop one."
                )
            return self.pipeline(mesh[STAGE], mesh.get(DATA, 1))
        if shard_parameters:
            if mesh.get(MODEL, 1) > 1:
                raise ValueError(f"mesh={dict(mesh)!r}: shard_parameters=True is for data alone; drop model.")
            return self.zero(mesh.get(DATA, 1))
        parts = self.microbatches or 1
        return self.layout(mesh.get(DATA, 1), mesh.get(MODEL, 1), parts)

    def layout(self, data: int, model: int, parts: int = 1) -> PartitionPlan:
        """Data and tensor parallelism, with accumulation over `parts` microbatches."""
        names = ([f"data {data}"] if data > 1 else []) + ([f"tensor {model}"] if model > 1 else [])
        if parts > 1:
            self.problem.require_parts(parts, "microbatches")
            self.problem.require_parts(parts * data, "microbatches × data")
            self._mean  # noqa: B018
            names.append(f"accumulation {parts}")
        sizes = {DATA: data, MODEL: model} if model > 1 else {DATA: data}
        program = SteppedProgram(self._split(data), sizes, parts)
        program.whole_batch  # noqa: B018 (an axis that cannot be split is an error here)
        return self._plan(" × ".join(names) or "one device", sizes, program)

    def minibatch(self, parts: int) -> PartitionPlan:
        """A smaller minibatch on one device: so many updates with a part of the batch each."""
        self.problem.require_parts(parts, "minibatches")
        program = SteppedProgram(self.problem, {DATA: 1}, minibatches=parts)
        size = self.problem.examples // parts
        return self._plan(f"minibatch of {size}", {DATA: 1}, program, updates=parts)

    def remat(self, share: float) -> PartitionPlan:
        """Rematerialisation on one device, within a share of what is held between the sweeps."""
        # Schedules are compared by what they compile to only where that is what will run.
        lean = Rematerializer(RematLimits(share, measure=False))
        found = lean.plan_of(self.problem.loss)(*self.problem.shapes)
        options = found.compiler_options if self.target.is_present else {}
        program = SteppedProgram(self.problem, {DATA: 1}, lean=lean.applied, compiler_options=options or {})
        return self._plan(f"rematerialisation {share:.0%}", {DATA: 1}, program)

    def zero(self, parts: int) -> PartitionPlan:
        """ZeRO-3 over so many devices."""
        self.problem.require_parts(parts, "data")
        self._mean  # noqa: B018
        most = len(self.problem.cuttable(parts).positions()) - 1
        program = ShardedProgram(self.problem, parts, min(most, _SEGMENTS))
        return self._plan(f"zero {parts}", {DATA: parts}, program)

    def pipeline(self, stages: int, replicas: int) -> PartitionPlan:
        """A pipeline, each stage on `replicas` devices."""
        parts = self.microbatches or self._microbatches(stages, replicas)
        self.problem.require_parts(parts, "microbatches")
        self.problem.require_parts(parts * replicas, "microbatches × data")
        self._mean  # noqa: B018
        count = stages * 2 if self.schedule == "interleaved" else stages
        program = PipelinedProgram(self._split(replicas), count, parts, self.schedule, stages, replicas)
        program.timeline  # noqa: B018
        program.segments  # noqa: B018 (a loss that cannot be cut is an error here)
        name = f"pipeline {stages} ({self.schedule})" + (f" × data {replicas}" if replicas > 1 else "")
        mesh = {STAGE: stages, DATA: replicas} if replicas > 1 else {STAGE: stages}
        return self._plan(name, mesh, program)

    def _microbatches(self, stages: int, replicas: int) -> int:
        """The largest number up to four for each stage into which the batch can be cut."""
        each = self.problem.examples // replicas
        fit = [
            m
            for m in range(1, 4 * stages + 1)
            if each % m == 0 and self.problem.examples % (m * replicas) == 0
        ]
        if self.schedule == "interleaved":
            fit = [m for m in fit if m % stages == 0] or fit
        return max(fit, default=1)
