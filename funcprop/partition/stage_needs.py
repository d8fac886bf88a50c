"""What the stages of a pipeline need: bytes and collectives of their sweeps, before they are compiled.

The examples of a microbatch are split over the devices of a stage. Each sweep is laid out like that, as the
stage before hands its results over, and read as the program of one of these devices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from funcprop import _jax
from funcprop.memory.estimate import estimate
from funcprop.memory.tiles import kept_bytes
from funcprop.partition.axis_program import flat_program
from funcprop.partition.layout import DATA, MeshLayout
from funcprop.partition.local import local_program
from funcprop.partition.stages import StageSweeps
from funcprop.partition.traffic import Collective, predicted_collectives
from funcprop.program.sizes import nbytes

# Along which of its axes an array holds the examples; None for one that each device has whole.
ExampleAxis = int | None


@dataclass(frozen=True)
class StageNeeds:
    """What one of the devices of a stage needs for a microbatch.

    Attributes:
        saved: bytes between the two sweeps: what the stage read, and what it made for later.
        extra: bytes that a sweep needs besides, at most, without the sum of gradients.
        sent: bytes of each array that it hands to the next stage.
        collectives: what the devices of the stage reduce in both sweeps.
        outputs: where what it hands over holds the examples.
    """

    saved: int
    extra: int
    sent: tuple[int, ...]
    collectives: tuple[Collective, ...]
    outputs: tuple[ExampleAxis, ...]


def needs_of(
    stage: StageSweeps,
    params: Sequence[Any],
    examples: Sequence[tuple[Any, ExampleAxis]],
    inputs: Sequence[tuple[Any, ExampleAxis]],
    replicas: int,
    platform: str,
) -> StageNeeds:
    """The needs of a stage that reads some parameters, arrays of the batch, and what the one before made."""
    whole: list[ExampleAxis] = [None] * len(params)
    given = [[x for x, _ in examples], [x for x, _ in inputs]]
    places = [[d for _, d in examples], [d for _, d in inputs]]
    outputs, saved = jax.eval_shape(stage.forward, params, *given)
    forward = _SplitSweep(
        stage.forward, (params, *given), [*whole, *places[0], *places[1]], replicas, platform
    )
    made, kept = forward.places[: len(outputs)], forward.places[len(outputs) :]
    backward = _SplitSweep(
        stage.backward,
        (params, saved, cotangents(outputs), params, *given),
        [*whole, *kept, *made, *whole, *places[0], *places[1]],
        replicas,
        platform,
        donated=len(params),
    )
    handed, held = sum(forward.sizes[: len(outputs)]), sum(forward.sizes[len(outputs) :])
    received = sum(kept_bytes(_part(x, d, replicas), platform) for x, d in [*examples, *inputs])
    extra = max(forward.temporary + handed, backward.temporary + sum(backward.sizes[len(params) :]))
    sent = tuple(nbytes(_part(x, d, replicas)) for x, d in zip(outputs, made, strict=True))
    collectives = *forward.collectives, *backward.collectives
    return StageNeeds(held + received, extra, sent, collectives, tuple(made))


def cotangents(outputs: Any) -> Any:
    """What the backward sweep is given for what a stage hands over: zeros for what has no derivative."""
    return [x if jnp.issubdtype(x.dtype, jnp.inexact) else _jax.zero_tangent(x) for x in outputs]


class _SplitSweep:
    """One sweep of a stage on one of its devices, from where its arguments hold the examples."""

    def __init__(
        self,
        fun: Any,
        arguments: tuple[Any, ...],
        places: Sequence[ExampleAxis],
        replicas: int,
        platform: str,
        donated: int = 0,
    ) -> None:
        program = flat_program(fun, *arguments)
        start = len(program.consts)
        pairs = zip(program.jaxpr.invars[start:], places, strict=True)
        split = {program.find((v, d)): DATA for v, d in pairs if d is not None and replicas > 1}
        layout = MeshLayout(program, {DATA: replicas}, split)
        over = {start + i: i for i in range(donated)}
        found = estimate(local_program(layout, platform), over, platform=platform)
        results = program.jaxpr.outvars
        self.temporary = found.temporary
        self.sizes = [kept_bytes(layout.type_of(v), platform) for v in results]
        self.places = [None if isinstance(v, _jax.Literal) else _examples(layout, v) for v in results]
        self.collectives = predicted_collectives(layout, platform)


def _examples(layout: MeshLayout, v: Any) -> ExampleAxis:
    over = layout.over(v)
    return over.index(DATA) if DATA in over else None


def _part(x: Any, place: ExampleAxis, replicas: int) -> Any:
    """The type of one device's part of an array."""
    sizes = [n // replicas if d == place else n for d, n in enumerate(x.shape)]
    return jax.ShapeDtypeStruct(sizes, x.dtype)
