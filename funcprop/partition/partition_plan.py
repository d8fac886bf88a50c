"""A plan: one way to train with a loss on several devices, what it needs, and the functions that do it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from funcprop import _jax
from funcprop.partition.device_bytes import DeviceBytes
from funcprop.partition.edges import on_the_host, placed
from funcprop.partition.layout import DATA
from funcprop.partition.pipeline import PipelinedProgram
from funcprop.partition.problem import TrainingProblem
from funcprop.partition.programs import SteppedProgram
from funcprop.partition.proof import PartitionProof, deviation
from funcprop.partition.running_pipeline import RunningPipeline
from funcprop.partition.sharded import ShardedProgram
from funcprop.partition.task_order import PipelineTimeline
from funcprop.partition.topology import DeviceTarget
from funcprop.partition.traffic import Collective, compiled_collectives, unpredicted, volume
from funcprop.program.trained import Trained

PlanProgram = SteppedProgram | ShardedProgram | PipelinedProgram


@dataclass(frozen=True, eq=False)
class PartitionPlan:
    """One way to do a train step on several devices. `print(plan)` says what it needs.

    Attributes:
        name: its kinds, as "data 4 × tensor 2", "zero 8", "pipeline 4 (1f1b)", "accumulation 8".
        mesh: the devices, by the sizes of the axes `data`, `model` and `stage`.
        budget: bytes that a device has; None if nobody said.
        updates: how many updates a step makes; more than 1 for smaller minibatches.
        compiled_bytes: bytes of a device by the compiler, where the plan was checked; None where not.
    """

    name: str
    mesh: Mapping[str, int]
    problem: TrainingProblem
    program: PlanProgram
    target: DeviceTarget
    budget: int | None
    updates: int = 1
    extra_flops: int = 0
    notes: tuple[str, ...] = ()
    compiled_bytes: int | None = None

    @property
    def predicted(self) -> DeviceBytes:
        """Bytes of the device that holds most, at the peak, by purpose: an estimate."""
        return self.program.predicted_bytes

    @property
    def held(self) -> int:
        """Bytes of that device by the compiler, or by the estimate where the plan was not checked."""
        return self.predicted.total if self.compiled_bytes is None else self.compiled_bytes

    @property
    def fits(self) -> bool | None:
        """Whether it fits into the budget; None if there is none."""
        return None if self.budget is None else self.held <= self.budget

    @property
    def flops(self) -> int:
        """Operations of one device in a step."""
        return self.program.flops + self.extra_flops

    @property
    def communicated(self) -> int:
        """Bytes that a device takes part in sending in a step."""
        return volume(self.program.predicted_traffic)

    @property
    def bubble(self) -> float:
        """The share of time in which a device waits for others; 0 without a pipeline."""
        return self.program.bubble if isinstance(self.program, PipelinedProgram) else 0.0

    @property
    def seconds(self) -> float:
        """A rough time of a step, by the machine's figures; plans are ordered by it."""
        machine = self.target.machine
        return self.flops / machine.flops / (1 - self.bubble) + self.communicated / machine.link

    def timeline(self) -> PipelineTimeline:
        """The schedule of a pipeline.

        Raises:
            ValueError: the plan has none.
        """
        if not isinstance(self.program, PipelinedProgram):
            raise ValueError(f"plan {self.name!r} has no timeline; only pipelines have.")
        return self.program.timeline

    @property
    def _count(self) -> int:
        return math.prod(self.mesh.values())

    def devices(self) -> list[Any]:
        """The devices that it is for.

        Raises:
            ValueError: they are not there, or all of them are another process's.
        """
        if not self.target.is_present:
            raise ValueError(
                f"plan {self.name!r} is for {self.target.on}, which is not there; it can be compiled only."
            )
        devices = self.target.devices(self._count)
        there = {d.process_index for d in devices}
        if len(there) == 1 and there != {jax.process_index()}:
            raise ValueError(
                f"plan {self.name!r} is for {len(devices)} devices, all of process {there.pop()}, and this "
                f"is process {jax.process_index()}; plan for more devices, or run it in that process alone."
            )
        return devices

    def place(self, params: Any, state: Any = None, optimizer: Any = None) -> tuple[Any, Any]:
        """Put parameters, and the state of the optimizer, where the plan keeps them: `(params, state)`.

        `optimizer` is the one that the plan was made for if it is None.

        Raises:
            TypeError: there is a state, and no optimizer.
        """
        params = Trained.stateless(params).arrays
        optimizer = optimizer or self.problem.optimizer
        if state is not None and optimizer is None:
            raise TypeError(
                f"plan {self.name!r} was made without an optimizer; pass optimizer= with its state."
            )
        if isinstance(self.program, PipelinedProgram):
            return RunningPipeline(self.program, self.devices()).place(params, state, optimizer)
        ins = self.program.jitted(self.devices(), None if state is None else optimizer)[1]
        placed = jax.tree.map(_placed, params, ins[0])
        return placed, None if state is None else jax.tree.map(_placed, state, ins[1])

    def gather(self, tree: Any) -> Any:
        """Return the values of parameters, or of a state, as whole arrays on the host; with several processes
        all of them call this."""
        return jax.tree.map(on_the_host, tree)

    def step(self, optimizer: Any) -> Callable[..., Any]:
        """A train step, `step(params, state, batch) -> params, state, loss`; it overwrites the first two."""
        if isinstance(self.program, PipelinedProgram):
            run = RunningPipeline(self.program, self.devices()).step(optimizer)
        else:
            run = self.program.jitted(self.devices(), optimizer)[0]
        return lambda params, state, batch: run(params, state, self.put(batch))[:3]

    def gradient(self, params: Any, batch: Any) -> tuple[Any, Any]:
        """The loss and its gradient by the plan, at parameters wherever they are."""
        params = Trained.stateless(params).arrays
        tree = jax.tree.structure(params)
        if isinstance(self.program, PipelinedProgram):
            running = RunningPipeline(self.program, self.devices())
            value, leaves = running.gradient(running.place(params)[0], batch)
            return value, jax.tree.unflatten(tree, leaves)
        fun, ins = self.program.jitted(self.devices(), None, gradient_only=True)
        return fun(*jax.tree.map(_put, (params, batch), ins))

    def put(self, batch: Any, *, checked: bool = False) -> Any:
        """A batch where the plan's step reads it; `checked` if all processes are known to have the same.

        Raises:
            ValueError: it is another tree, or an array of it cannot be divided as the plan says.
        """
        if isinstance(self.program, PipelinedProgram):
            return batch  # Checked where it is cut.
        program = self.program
        cuts = program.parts * program.minibatches if isinstance(program, SteppedProgram) else 1
        self.problem.require_divisible(batch, self.mesh.get(DATA, 1) * cuts)
        return jax.tree.map(placed if checked else _put, batch, self._batch_layout)

    @cached_property
    def _batch_layout(self) -> Any:
        assert not isinstance(self.program, PipelinedProgram)
        return self.program.jitted(self.devices(), self.problem.optimizer)[1][-1]

    def compile(self) -> PartitionProof:
        """Compile the plan, and compare it with what was predicted; with values, run its gradient as well."""
        total, found = self._compiled()
        expected = self.program.predicted_traffic
        errors: tuple[float | None, float | None] = None, None
        if self.problem.has_values and self.target.is_present:
            value, grads = self.gradient(self.problem.params, self.problem.batch)
            true, reference = jax.jit(jax.value_and_grad(self.problem.loss))(
                self.problem.params, self.problem.batch
            )
            together = len({d.process_index for d in self.devices()}) > 1
            errors = (
                deviation(jax.tree.leaves(grads), jax.tree.leaves(reference), together),
                abs(float(value) - float(true)),
            )
        return PartitionProof(
            self.name, self.predicted, total, found, expected, unpredicted(expected, found), *errors
        )

    def checked(self) -> PartitionPlan:
        """The plan with the bytes that its compiled program holds."""
        return replace(self, compiled_bytes=self._compiled()[0])

    def _compiled(self) -> tuple[int, list[Collective]]:
        """Bytes of the device that holds most, and all collectives, by the compiler."""
        devices = self.target.devices(self._count)
        if isinstance(self.program, PipelinedProgram):
            held, found = RunningPipeline(self.program, devices).compiled()
            return max(place.total for place in held), found
        compiled = self.problem.compiled(*self.program.jitted(devices, self.problem.optimizer))
        found = compiled_collectives(_jax.program_text(compiled))
        return _jax.held_bytes(_jax.memory_fields(compiled)), found

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "name": self.name,
            "mesh": dict(self.mesh),
            "fits": self.fits,
            "bytes_per_device": self.held,
            "estimated_bytes": self.predicted.total,
            "checked": self.compiled_bytes is not None,
            "by_purpose": dict(self.predicted.by_purpose),
            "flops_per_device": self.flops,
            "communicated": self.communicated,
            "bubble": self.bubble,
            "updates": self.updates,
            "notes": list(self.notes),
        }

    def json(self) -> str:
        """The plan as JSON."""
        return json.dumps(self.as_dict())

    def __str__(self) -> str:
        mesh = " × ".join(f"{name} {size}" for name, size in self.mesh.items()) or "one device"
        budget = (
            "" if self.budget is None else f", of {self.budget:,}: {'fits' if self.fits else 'does not fit'}"
        )
        estimated = f"estimated {self.predicted.total:,}"
        known = estimated if self.compiled_bytes is None else f"compiled {self.held:,}{budget}; {estimated}"
        known += budget if self.compiled_bytes is None else ""
        held = ", ".join(f"{name} {n:,}" for name, n in self.predicted.by_purpose.items())
        lines = [
            f"{self.name} on {mesh}",
            f"  bytes per device: {known} ({held})",
            f"  FLOPs per device {self.flops:,}, bytes communicated {self.communicated:,}, "
            f"bubble {self.bubble:.0%}, "
            f"updates for each batch {self.updates}",
        ]
        if isinstance(self.program, SteppedProgram):
            lines += [f"  {path}: {spec}" for path, spec in self._split()]
        if isinstance(self.program, PipelinedProgram):
            lines += [
                f"  stage {s}: {segment.equations} operators, {len(segment.params)} parameters, "
                f"{segment.flops:,} FLOPs, sends {segment.sends:,} bytes"
                for s, segment in enumerate(self.program.segments)
            ]
        return "\n".join([*lines, *(f"  {note}" for note in self.notes)])

    def _split(self) -> list[tuple[str, str]]:
        """The parameters that are split, with their layout."""
        layout = self.program.layout  # type: ignore[union-attr]
        start = len(layout.program.consts)
        paths = jax.tree.leaves_with_path(self.problem.shapes[0])
        variables = layout.program.jaxpr.invars[start : start + len(paths)]
        return [
            (jax.tree_util.keystr(path, simple=True, separator="/"), str(tuple(layout.over(v))))
            for (path, _), v in zip(paths, variables, strict=True)
            if any(layout.over(v))
        ]


def _placed(x: Any, sharding: Any) -> Any:
    # A copy: steps overwrite what they are given, and `device_put` shares what is already in its place.
    return _put(jnp.array(x, copy=True), sharding)


def _put(x: Any, sharding: Any) -> Any:
    """A value that all processes have, laid out over the devices of all of them."""
    return jax.device_put(x if sharding.is_fully_addressable else np.asarray(x), sharding)
