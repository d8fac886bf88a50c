"""A pipeline of an unchanged loss: one program for each stage and sweep, run in the order of a timeline.

The programs are ordinary jitted functions (several programs, several data), so stages may be unequal, and a
parameter may be read by several of them: each has a copy, the gradients are added on the first, which owns
it, and the copies are made anew from what the owner's optimizer has updated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp

from funcprop.memory.tiles import kept_bytes
from funcprop.partition.device_bytes import DeviceBytes
from funcprop.partition.problem import TrainingProblem
from funcprop.partition.segments import LossSegment
from funcprop.partition.stage_needs import StageNeeds, needs_of
from funcprop.partition.stages import StageSweeps, StageUpdates
from funcprop.partition.task_order import Order, PipelineTimeline, timeline
from funcprop.partition.traffic import Collective
from funcprop.program.structural_key import StructuralKey


@dataclass(frozen=True, eq=False)
class PipelinedProgram:
    """A step as a pipeline.

    Attributes:
        count: how many stages.
        places: on how many places, each of `replicas` devices, they are; fewer than stages if interleaved.
        microbatches: into how many parts the batch is cut.
    """

    problem: TrainingProblem
    count: int
    microbatches: int
    order: Order = "1f1b"
    places: int = 0
    replicas: int = 1
    recompute: bool = False

    @property
    def place_count(self) -> int:
        """How many places there are."""
        return self.places or self.count

    @cached_property
    def timeline(self) -> PipelineTimeline:
        """Who does what when."""
        return timeline(self.order, self.count, self.microbatches, self.place_count)

    @cached_property
    def segments(self) -> list[LossSegment]:
        """The loss of a microbatch, cut."""
        return self.problem.cuttable(self.microbatches).segments(self.count)

    @cached_property
    def stages(self) -> list[StageSweeps]:
        """The programs; stages that compute the same have the same."""
        found: dict[StructuralKey, StageSweeps] = {}
        for segment in self.segments:
            if segment.key not in found:
                found[segment.key] = StageSweeps(segment, self.problem.rules, self.recompute)
        return [found[segment.key] for segment in self.segments]

    @cached_property
    def owners(self) -> tuple[int, ...]:
        """The first stage that reads each parameter; the first of all for one that none reads."""
        count = len(jax.tree.leaves(self.problem.params))
        return tuple(
            next((s for s, segment in enumerate(self.segments) if i in segment.params), 0)
            for i in range(count)
        )

    @cached_property
    def leaves(self) -> tuple[list[Any], list[Any]]:
        """The shapes of the parameters, and of a microbatch."""
        parts = self.problem.part_shapes(self.microbatches)
        return jax.tree.leaves(self.problem.shapes[0]), jax.tree.leaves(parts)

    @cached_property
    def needs(self) -> list[StageNeeds]:
        """What one device of each stage needs for a microbatch."""
        (params, batch), places = self.leaves, self.problem.batch_axes
        known: dict[Any, StageNeeds] = {}
        found: list[StageNeeds] = []
        for stage, segment in zip(self.stages, self.segments, strict=True):
            examples = [(batch[i], places[i]) for i in segment.batch]
            inputs = list(zip(segment.inputs, found[-1].outputs if found else (), strict=True))
            key = stage, tuple(d for _, d in [*examples, *inputs])
            if key not in known:
                own = [params[i] for i in segment.params]
                known[key] = needs_of(stage, own, examples, inputs, self.replicas, self.problem.platform)
            found.append(known[key])
        return found

    @cached_property
    def stage_bytes(self) -> list[DeviceBytes]:
        """The peak of the devices of each place."""
        return self.bytes_with([n.saved for n in self.needs], [n.extra for n in self.needs])

    def bytes_with(self, saved: Sequence[int], extra: Sequence[int]) -> list[DeviceBytes]:
        """The peak of the devices of each place, where microbatches and sweeps need so many bytes."""
        weigh = [kept_bytes(x, self.problem.platform) for x in self.leaves[0]]
        found = []
        for place in range(self.place_count):
            own = range(place, self.count, self.place_count)
            weights = sum(weigh[i] for s in own for i in self.segments[s].params)
            held = sum(saved[s] * self.timeline.in_flight[s] for s in own)
            purposes = {"parameters": weights, "optimizer state": self._state_bytes(own), "saved": held}
            purposes |= {"results": weights, "temporaries": max(extra[s] for s in own)}
            found.append(DeviceBytes({name: n for name, n in purposes.items() if n}))
        return found

    def _state_bytes(self, own: Sequence[int]) -> int:
        if self.problem.optimizer is None:
            return 0
        leaves = jax.tree.leaves(self.problem.state_shapes(self.problem.optimizer))
        owners = self._planned_updates.state_owners
        mine = (x for x, s in zip(leaves, owners, strict=True) if s is None or s in own)
        return sum(kept_bytes(x, self.problem.platform) for x in mine)

    def updates(self, optimizer: Any) -> StageUpdates:
        """The optimizer's update, for each stage."""
        return StageUpdates(optimizer, self.problem.shapes[0], self.owners, self.count)

    @cached_property
    def _planned_updates(self) -> StageUpdates:
        return self.updates(self.problem.optimizer)

    @cached_property
    def predicted_bytes(self) -> DeviceBytes:
        """The peak of the device that holds most."""
        return max(self.stage_bytes, key=lambda held: held.total)

    @cached_property
    def predicted_traffic(self) -> list[Collective]:
        """What stages hand each other in a step, both ways, and what is reduced over replicas."""
        found = []
        for s, (segment, needs) in enumerate(zip(self.segments, self.needs, strict=True)):
            if s < self.count - 1:
                pairs = zip(segment.outputs, needs.sent, strict=True)
                found += [sent(v, n, s, self.microbatches) for v, n in pairs]
            found += [replace(c, trips=c.trips * self.microbatches) for c in needs.collectives]
        return found

    @cached_property
    def flops(self) -> int:
        """Operations of the busiest device in one step: its segments forward, twice as much backward."""
        work = [
            sum(self.segments[s].flops for s in range(place, self.count, self.place_count))
            for place in range(self.place_count)
        ]
        return max(work) * (4 if self.recompute else 3) * self.microbatches // self.replicas

    @property
    def bubble(self) -> float:
        """The share of time in which a device waits."""
        return self.timeline.bubble


def sent(x: Any, size: int, stage: int, microbatches: int) -> Collective:
    """What a stage hands to the next for each microbatch, and gets the cotangent of, if it has one."""
    trips = microbatches * (2 if jnp.issubdtype(x.dtype, jnp.inexact) else 1)
    return Collective("send", size, f"stage {stage} to {stage + 1}", trips)
