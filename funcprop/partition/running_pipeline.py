"""A pipeline on its devices: its tasks are run in the order of the timeline."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from funcprop import _jax
from funcprop._jax.xla_options import for_buffers
from funcprop.memory.tiles import kept_bytes
from funcprop.partition.device_bytes import DeviceBytes
from funcprop.partition.edges import moved, opened, placed, told
from funcprop.partition.layout import along, placed_type
from funcprop.partition.pipeline import PipelinedProgram, sent
from funcprop.partition.stage_needs import cotangents
from funcprop.partition.stages import StageUpdates, replicated, stage_meshes
from funcprop.partition.task_order import PipelineTask
from funcprop.partition.traffic import Collective, compiled_collectives
from funcprop.program.sizes import nbytes

Watch = Callable[[PipelineTask], None]


class RunningPipeline:
    """A pipeline on its devices, which need not be there if it is only compiled."""

    def __init__(self, program: PipelinedProgram, devices: Sequence[Any]) -> None:
        self.program = program
        meshes = stage_meshes(devices, program.place_count, program.replicas)
        self._mesh = [meshes[place] for place in program.timeline.devices]
        self._is_spread = len({d.process_index for mesh in meshes for d in mesh.devices.flat}) > 1

    def place(self, params: Any, state: Any = None, optimizer: Any = None) -> tuple[Any, Any]:
        """Parameters, and the optimizer's state, each leaf on the devices of the stage that owns it."""
        leaves, tree = jax.tree.flatten(params)
        placed = [_copied(x, self._mesh[s]) for x, s in zip(leaves, self.program.owners, strict=True)]
        if state is None:
            return jax.tree.unflatten(tree, placed), None
        rest, state_tree = jax.tree.flatten(state)
        owners = self.program.updates(optimizer).state_owners
        held = [_copied(x, self._mesh[s or 0]) for x, s in zip(rest, owners, strict=True)]
        return jax.tree.unflatten(tree, placed), jax.tree.unflatten(state_tree, held)

    def _to(self, s: int, x: Any) -> Any:
        return moved(x, self._mesh[s])

    def _parts(self, batch: Any) -> tuple[list[list[Any]], list[Any]]:
        """The leaves of each microbatch, and its weight as a share of all."""
        problem, count = self.program.problem, self.program.microbatches
        problem.require_divisible(batch, count * self.program.replicas)
        stacked = jax.tree.leaves(problem.parts_of(batch, count, strided=False))
        parts = [[x[m] for x in stacked] for m in range(count)]
        if problem.weight is None:
            return parts, [1 / count] * count
        tree = jax.tree.structure(batch)
        weights = [problem.weight(jax.tree.unflatten(tree, part)) for part in parts]
        total = sum(weights)
        return parts, [w / total for w in weights]

    def _layout(self, s: int, d: int | None) -> NamedSharding:
        """That of an array on a stage whose examples are along an axis."""
        return NamedSharding(self._mesh[s], along(d))

    def gradient(self, params: Any, batch: Any, watch: Watch | None = None) -> tuple[Any, list[Any]]:
        """The loss, and the leaves of the gradient, each where the parameter is."""
        program, last = self.program, self.program.count - 1
        self._connected  # noqa: B018 (before the first task)
        leaves = jax.tree.leaves(params)
        held = [
            [self._to(s, leaves[i]) for i in segment.params] for s, segment in enumerate(program.segments)
        ]
        total = [
            [jnp.zeros(x.shape, x.dtype, device=replicated(self._mesh[s])) for x in own]
            for s, own in enumerate(held)
        ]
        parts, weights = self._parts(batch)
        places = program.problem.batch_axes
        handed: dict[tuple[str, int, int], Any] = {}
        saved: dict[tuple[int, int], Any] = {}
        losses: list[Any] = []
        for task in program.timeline.tasks:
            s, m = task.stage, task.microbatch
            stage, segment = program.stages[s], program.segments[s]
            if task.sweep == "F":
                examples = [placed(parts[m][i], self._layout(s, places[i])) for i in segment.batch]
                inputs = [self._to(s, x) for x in handed.pop(("F", s - 1, m), [])]
                outputs, kept = stage.forward(held[s], examples, inputs)
                saved[s, m] = kept, examples, inputs
                if s == last:
                    weight = placed(jnp.asarray(weights[m], outputs[0].dtype), replicated(self._mesh[s]))
                    losses.append(weight * outputs[0])
                    handed["B", s, m] = [weight]
                else:
                    handed["F", s, m] = outputs
                del inputs, outputs, examples, kept
            else:
                sent = handed.pop(("B", s, m))
                sent = sent if s == last else self._cotangents(s, sent)
                kept, examples, inputs = saved.pop((s, m))
                total[s], sent = stage.backward(total[s], kept, sent, held[s], examples, inputs)
                if s:
                    handed["B", s - 1, m] = sent
                del sent, kept, examples, inputs
            if watch is not None:
                watch(task)
        value = sum(losses[1:], losses[0])
        return told(value) if self._is_spread else value, self._added(leaves, total)

    @cached_property
    def _connected(self) -> None:
        """Compile the programs and connect the processes, if there are several."""
        if self._is_spread:
            for _ in self._compiled_stages(None):
                pass
            opened(self._edges())

    def _edges(self) -> list[tuple[Mesh, Mesh]]:
        """From which stages to which arrays go: along the cuts, and to and from the owners of parameters."""
        pairs = list(pairwise(range(self.program.count)))
        pairs += [(0, s) for s in range(1, self.program.count)]  # counts of the optimizer
        for s, segment in enumerate(self.program.segments):
            pairs += [(self.program.owners[i], s) for i in segment.params]
        return [(self._mesh[a], self._mesh[b]) for s, t in pairs for a, b in ((s, t), (t, s))]

    def _cotangents(self, s: int, sent: list[Any]) -> list[Any]:
        """What the next stage sent back, with zeros for what has no derivative."""
        given = iter(sent)
        found = []
        for v in self.program.segments[s].outputs:
            if jnp.issubdtype(v.dtype, jnp.inexact):
                found.append(self._to(s, next(given)))
            else:
                found.append(_jax.zero_tangent(v))
        return found

    def _added(self, leaves: Sequence[Any], total: Sequence[Sequence[Any]]) -> list[Any]:
        """The gradients on the owners of their parameters; those of other stages are added in their order."""
        grads: list[Any] = [None] * len(leaves)
        for s, segment in enumerate(self.program.segments):
            for i, x in zip(segment.params, total[s], strict=True):
                owner = self.program.owners[i]
                grads[i] = x if grads[i] is None else grads[i] + self._to(owner, x)
        return [
            jnp.zeros(x.shape, x.dtype, device=replicated(self._mesh[owner])) if g is None else g
            for g, x, owner in zip(grads, leaves, self.program.owners, strict=True)
        ]

    def step(self, optimizer: Any) -> Callable[..., Any]:
        """A train step: `step(params, state, batch, intact=None) -> params, state, loss, intact`.

        It overwrites the parameters: with what they are where the loss or the update of a stage is not finite
        or `intact` is false, if that is given.
        """
        updates = self.program.updates(optimizer)
        owners = updates.state_owners
        if self._is_spread:
            for lowered in self._lowered(updates):
                lowered.compile()

        def step(params: Any, state: Any, batch: Any, intact: Any = None) -> Any:
            value, grads = self.gradient(params, batch)
            leaves, tree = jax.tree.flatten(params)
            rest, state_tree = jax.tree.flatten(state)
            new, kept = list(leaves), list(rest)
            given = []
            for s in range(self.program.count):
                own, needed = updates.of(s)
                given.append(
                    (
                        [leaves[i] for i in own],
                        [self._to(s, rest[j]) for j in needed],
                        [grads[i] for i in own],
                    )
                )
            intact = jnp.bool_(True) if intact is None else self._intact(updates, given, intact, value)
            for s, update in enumerate(updates.programs):
                own, needed = updates.of(s)
                changes = placed(intact, replicated(self._mesh[s]))
                values, states = update(*given[s], changes)
                for i, x in zip(own, values, strict=True):
                    new[i] = x
                for j, x in zip(needed, states, strict=True):
                    if owners[j] == s or (owners[j] is None and s == 0):
                        kept[j] = x
            return jax.tree.unflatten(tree, new), jax.tree.unflatten(state_tree, kept), value, intact

        return step

    def text(self, optimizer: Any) -> str:
        """All programs and their order, equal in processes that run the same pipeline."""
        problem, count = self.program.problem, self.program.microbatches
        forward = jax.jit(problem.loss).lower(problem.shapes[0], problem.part_shapes(count))
        updates = self._lowered(self.program.updates(optimizer))
        return "\n".join([str(self.program.timeline.tasks), *(x.as_text() for x in (forward, *updates))])

    def _lowered(self, updates: StageUpdates) -> list[Any]:
        return updates.lowered([replicated(mesh) for mesh in self._mesh])

    def _intact(self, updates: StageUpdates, given: Any, before: Any, value: Any) -> Any:
        """Whether the loss and the updates of all stages are finite, and `before`."""
        sound = before & jnp.isfinite(value)
        sound = placed(sound, replicated(self._mesh[0]))
        for s, check in enumerate(updates.checks):
            sound = check(*given[s], self._to(s, sound))
        return told(sound) if self._is_spread else sound

    def compiled(self) -> tuple[list[DeviceBytes], list[Collective]]:
        """The peak of the devices of each place, and all collectives of a step, by the compiled programs."""
        program = self.program
        saved, extra = [], []
        found: list[Collective] = []
        stages = self._compiled_stages(for_buffers(program.problem.platform))
        for s, (given, outputs, *sweeps) in enumerate(stages):
            if s < program.count - 1:
                found += [sent(x, nbytes(_part(x)), s, program.microbatches) for x in outputs]
            for compiled in sweeps:
                inside = compiled_collectives(_jax.program_text(compiled))
                found += [replace(c, trips=c.trips * program.microbatches) for c in inside]
            forward, backward = map(_jax.memory_fields, sweeps)
            handed, read = sum(map(self._bytes, outputs)), sum(map(self._bytes, given))
            saved.append(forward["output"] - handed + read)
            new = backward["output"] - backward["alias"]
            extra.append(max(forward["temporary"] + handed, backward["temporary"] + new))
        return program.bytes_with(saved, extra), found

    def _bytes(self, x: Any) -> int:
        """Those of one device's part."""
        return kept_bytes(_part(x), self.program.problem.platform)

    def _compiled_stages(self, options: Any) -> Iterator[tuple[list[Any], list[Any], Any, Any]]:
        """For each stage the types of what it is given and hands on, and its compiled sweeps."""
        places = self.program.problem.batch_axes
        outputs: list[Any] = []
        for s, stage in enumerate(self.program.stages):
            params, examples, _ = stage.types(*self.program.leaves)
            params = [placed_type(x, replicated(self._mesh[s])) for x in params]
            split = zip(examples, self.program.segments[s].batch, strict=True)
            examples = [placed_type(x, self._layout(s, places[i])) for x, i in split]
            inputs = [placed_type(x, NamedSharding(self._mesh[s], x.sharding.spec)) for x in outputs]
            lowered = stage.forward.lower(params, examples, inputs)
            forward = lowered.compile(options)
            outputs, pull = jax.tree.map(placed_type, lowered.out_info, forward.output_shardings)
            backward = stage.backward.lower(params, pull, cotangents(outputs), params, examples, inputs)
            yield [*examples, *inputs], outputs, forward, backward.compile()


def _part(x: Any) -> jax.ShapeDtypeStruct:
    """The type of one device's part of an array that lies on several."""
    return jax.ShapeDtypeStruct(x.sharding.shard_shape(x.shape), x.dtype)


def _copied(x: Any, mesh: Mesh) -> Any:
    """A copy: steps overwrite what they are given, and `device_put` shares what is already in its place."""
    return placed(jnp.array(x, copy=True), replicated(mesh))
