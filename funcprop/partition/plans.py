"""Plans: ways to train with a loss on several devices, what each needs, and the function that does it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from funcprop import _jax
from funcprop.graph.graph import aligned
from funcprop.partition.device_bytes import DeviceBytes
from funcprop.partition.layout import DATA, mesh_of
from funcprop.partition.pipeline import PipelinedProgram
from funcprop.partition.problem import TrainingProblem, Weight
from funcprop.partition.programs import SteppedProgram
from funcprop.partition.proof import PartitionProof, deviation
from funcprop.partition.running_pipeline import RunningPipeline
from funcprop.partition.sharded import ShardedProgram
from funcprop.partition.task_order import PipelineTimeline
from funcprop.partition.topology import DeviceTarget
from funcprop.partition.traffic import compiled_collectives, unpredicted, volume
from funcprop.program.trained import Trained
from funcprop.rules.rule_set import RuleSet

PlanProgram = SteppedProgram | ShardedProgram | PipelinedProgram


@dataclass(frozen=True, eq=False)
class PartitionPlan:
    """One way to do a train step on several devices. `print(plan)` says what it needs.

    Attributes:
        name: its kinds, as "data 4 × tensor 2", "zero 8", "pipeline 4 (1f1b)", "accumulation 8".
        mesh: the devices, by the sizes of the axes `data`, `model` and `stage`.
        budget: bytes that a device has; None if nobody said.
        updates: how many updates a step makes; more than 1 for smaller minibatches.
    """

    name: str
    mesh: Mapping[str, int]
    problem: TrainingProblem
    program: PlanProgram
    target: DeviceTarget
    budget: int | None
    updates: int = 1
    extra_flops: int = 0
    notes: tuple[str, ...] = field(default=())

    @property
    def predicted(self) -> DeviceBytes:
        """Bytes of the device that holds most, at the peak, by purpose."""
        return self.program.predicted_bytes

    @property
    def fits(self) -> bool | None:
        """Whether it fits into the budget; None if there is none."""
        return None if self.budget is None else self.predicted.total <= self.budget

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

    # --- doing it -----------------------------------------------------------------------------

    @property
    def _count(self) -> int:
        return math.prod(self.mesh.values())

    def _devices(self) -> list[Any]:
        if not self.target.is_present:
            raise ValueError(
                f"plan {self.name!r} is for {self.target.on}, which is not there; it can be compiled only."
            )
        return self.target.devices(self._count)

    def _running(self, program: PipelinedProgram) -> RunningPipeline:
        """A pipeline on the devices.

        Raises:
            ValueError: one of them belongs to another process.
        """
        devices = self._devices()
        if any(d.process_index != jax.process_index() for d in devices):
            raise ValueError(
                "a pipeline over devices of several processes is not supported; use the devices "
                "of one process "
                "(jax.local_devices()), or a plan of data or tensor parallelism over all."
            )
        return RunningPipeline(program, devices)

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
            return self._running(self.program).place(params, state, optimizer)
        ins = self.program.jitted(self._devices(), None if state is None else optimizer)[1]
        placed = jax.tree.map(_placed, params, ins[0])
        return placed, None if state is None else jax.tree.map(_placed, state, ins[1])

    def step(self, optimizer: Any) -> Callable[..., Any]:
        """A train step, `step(params, state, batch) -> params, state, loss`; it overwrites the first two."""
        if isinstance(self.program, PipelinedProgram):
            run = self._running(self.program).step(optimizer)
        else:
            run = self.program.jitted(self._devices(), optimizer)[0]
        return lambda params, state, batch: run(params, state, self.put(batch))

    def gradient(self, params: Any, batch: Any) -> tuple[Any, Any]:
        """The loss and its gradient by the plan, at parameters wherever they are."""
        params = Trained.stateless(params).arrays
        tree = jax.tree.structure(params)
        if isinstance(self.program, PipelinedProgram):
            running = self._running(self.program)
            value, leaves = running.gradient(running.place(params)[0], batch)
            return value, jax.tree.unflatten(tree, leaves)
        fun, ins = self.program.jitted(self._devices(), None, gradient_only=True)
        return fun(*jax.tree.map(_put, (params, batch), ins))

    # --- what `fp.training.fit` asks for ------------------------------------------------------

    @property
    def is_of_parts(self) -> bool:
        """Whether each device computes the loss of its own examples, and not a part of the whole loss."""
        return not isinstance(self.program, SteppedProgram)

    def fitted(self, loss: Callable[..., Any]) -> tuple[Callable[..., Any], int]:
        """What is differentiated for a loss, and in how many parts a batch is taken.

        Raises:
            ValueError: the plan makes several updates of a batch, which is for who makes the batches.
        """
        if not isinstance(self.program, SteppedProgram):
            return loss, 1
        if self.updates > 1:
            raise ValueError(
                f"plan {self.name!r} makes {self.updates} updates of each batch; pass smaller batches, and "
                "the plan 'one device' or none."
            )
        lean = self.program.lean
        return loss if lean is None else lean(loss), self.program.parts

    def put(self, batch: Any) -> Any:
        """A batch where the plan's step reads it.

        Raises:
            ValueError: it is another tree, or an array of it cannot be divided as the plan says.
        """
        tree: Any = jax.tree.structure(batch)
        if tree != (planned := jax.tree.structure(self.problem.batch)):
            raise ValueError(f"plan {self.name!r} is for batches {planned}, and this one is {tree}.")
        parts = self.mesh.get(DATA, 1) * self._cuts
        for (path, x), d in zip(jax.tree.leaves_with_path(batch), self.problem.batch_axes, strict=True):
            if d is not None and any(n % parts for n in np.shape(x)[d : d + 1]):
                raise ValueError(
                    f"plan {self.name!r}: the batch's array {jax.tree_util.keystr(path)} of shape "
                    f"{np.shape(x)} cannot be divided among the devices of {dict(self.mesh)}; use batches of "
                    "equal sizes that they divide, and leave out a ragged last one."
                )
        if isinstance(self.program, PipelinedProgram):
            return batch
        return jax.tree.map(_put, batch, self._batch_layout)

    @property
    def _cuts(self) -> int:
        """Into how many parts each device's examples are cut."""
        program = self.program
        if isinstance(program, SteppedProgram):
            return program.parts * program.minibatches
        return program.microbatches if isinstance(program, PipelinedProgram) else 1

    @cached_property
    def _batch_layout(self) -> Any:
        assert not isinstance(self.program, PipelinedProgram)
        return self.program.jitted(self._devices(), self.problem.optimizer)[1][-1]

    @property
    def compiler_options(self) -> Mapping[str, Any] | None:
        """What the jit of a step needs."""
        return None if isinstance(self.program, PipelinedProgram) else self.program.compiler_options or None

    def gradient_of(self, loss: Callable[..., Any], rules: RuleSet | None) -> Callable[..., Any]:
        """`gradient(params, batch, factor) -> factor · (value, gradient)` of another loss by ZeRO-3."""
        assert isinstance(self.program, ShardedProgram)
        program, mesh = self.program, mesh_of(self._devices(), self.mesh)
        weigh = self.problem.weight and (lambda given: self.problem.weight(given[0]))  # type: ignore[misc]

        def scaled(params: Any, given: Any) -> Any:
            value = loss(params, given[0])
            return value if len(given) == 1 else value * given[1].astype(value.dtype)

        def gradient(params: Any, batch: Any, factor: Any = None) -> Any:
            given = (batch,) if factor is None else (batch, factor)
            problem = self._problem_of(scaled, rules, params=params, batch=given, weight=weigh)
            return replace(program, problem=problem).gradient(mesh)(params, given)

        return gradient

    def step_of(
        self,
        loss: Callable[..., Any],
        optimizer: Any,
        parts: int,
        weight: Weight | None,
        rules: RuleSet | None,
    ) -> Callable[..., Any]:
        """A step of a pipeline with another loss, which takes a batch in so many times more parts."""
        assert isinstance(self.program, PipelinedProgram)
        problem = self._problem_of(loss, rules, weight=weight or self.problem.weight)
        count = self.program.microbatches * parts
        problem.require_parts(count, "microbatches × accumulate")
        problem.require_parts(count * self.program.replicas, "microbatches × accumulate × data")
        return self._running(replace(self.program, problem=problem, microbatches=count)).step(optimizer)

    def _problem_of(self, loss: Callable[..., Any], rules: RuleSet | None, **more: Any) -> TrainingProblem:
        chosen = self.problem.rules if rules is None else rules
        return replace(self.problem, loss=loss, rules=chosen, optimizer=None, **more)

    def compile(self) -> PartitionProof:
        """Compile the plan, and compare it with what was predicted; with values, run its gradient as well."""
        expected = self.program.predicted_traffic
        if isinstance(self.program, PipelinedProgram):
            held, found = RunningPipeline(self.program, self.target.devices(self._count)).compiled()
            total = max(place.total for place in held)
        else:
            compiled = self.program.compiled(self.target.devices(self._count))
            total = _jax.held_bytes(_jax.memory_fields(compiled))
            found = compiled_collectives(_jax.program_text(compiled))
        errors: tuple[float | None, float | None] = None, None
        if self.problem.has_values and self.target.is_present:
            value, grads = self.gradient(self.problem.params, self.problem.batch)
            true, reference = jax.jit(jax.value_and_grad(self.problem.loss))(
                self.problem.params, self.problem.batch
            )
            errors = (
                deviation(jax.tree.leaves(grads), jax.tree.leaves(reference)),
                abs(float(value) - float(true)),
            )
        return PartitionProof(
            self.name, self.predicted, total, found, expected, unpredicted(expected, found), *errors
        )

    # --- saying it ----------------------------------------------------------------------------

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "name": self.name,
            "mesh": dict(self.mesh),
            "fits": self.fits,
            "bytes_per_device": self.predicted.total,
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
        held = ", ".join(f"{name} {n:,}" for name, n in self.predicted.by_purpose.items())
        lines = [
            f"{self.name} on {mesh}",
            f"  bytes per device: {self.predicted.total:,}{budget} ({held})",
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


@dataclass(frozen=True)
class RejectedPlan:
    """A kind of plan that cannot be made, and why."""

    name: str
    why: str


@dataclass(frozen=True, eq=False)
class Plans(Sequence[PartitionPlan]):
    """Plans, best first: what fits, by its rough time; then what does not. `print(plans)` is a table."""

    plans: tuple[PartitionPlan, ...]
    rejected: tuple[RejectedPlan, ...]
    examples: int

    def __getitem__(self, i: Any) -> Any:
        return self.plans[i]

    def __len__(self) -> int:
        return len(self.plans)

    def __iter__(self) -> Iterator[PartitionPlan]:
        return iter(self.plans)

    def named(self, name: str) -> PartitionPlan:
        """The first plan whose name begins so.

        Raises:
            KeyError: there is none.
        """
        for plan in self.plans:
            if plan.name.startswith(name):
                return plan
        raise KeyError(
            f"no plan is called {name!r}; there are {', '.join(plan.name for plan in self.plans)}."
        )

    def json(self) -> str:
        """The table as JSON."""
        return json.dumps(self.as_dict())

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "examples": self.examples,
            "plans": [plan.as_dict() for plan in self.plans],
            "rejected": [vars(r) for r in self.rejected],
        }

    def __str__(self) -> str:
        rows = [
            ("plan", "devices", "bytes/device", "fits", "FLOPs/device", "communicated", "bubble", "updates")
        ]
        for plan in self.plans:
            fits = {
                None: "",
                True: "yes",
                False: f"{plan.predicted.total / (plan.budget or 1):.1f} × too large",
            }
            rows.append(
                (
                    plan.name,
                    f"{math.prod(plan.mesh.values())}",
                    f"{plan.predicted.total:,}",
                    fits[plan.fits],
                    f"{plan.flops:,}",
                    f"{plan.communicated:,}",
                    f"{plan.bubble:.0%}",
                    f"{plan.updates}",
                )
            )
        text = aligned(rows, right={1, 2, 4, 5, 6, 7}, widest=60)
        return "\n".join([text, *(f"{r.name}: {r.why}" for r in self.rejected)])
