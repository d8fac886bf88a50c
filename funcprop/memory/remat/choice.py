"""Which of several schedules lowers the peak of the compiled program, and what stands in its way.

What is held between the sweeps is not what a program holds at its peak: there are the cotangents, what a
derivative makes while it runs, and a segment that is recomputed. So schedules are made under lower limits on
their own peak as well, ranked by the estimate of their gradient's memory, and the best few are compiled.
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np

from funcprop import _jax
from funcprop._jax import xla_options
from funcprop._jax.buffers import NoBuffersError, buffers
from funcprop.memory.estimate import estimate
from funcprop.memory.remat.chain import StepChain
from funcprop.memory.remat.saving import vjp_of_some
from funcprop.memory.remat.schedule import CutChain, Schedule, cheapest, in_chunks
from funcprop.rules.machine import Machine

# Limits on a schedule's peak that are tried, as shares of the cheapest one's; numbers of equal chunks; how
# many of all these are compiled: of the fewest bytes, and the cheapest.
_PEAKS = (1.0, 0.8, 0.6, 0.45, 0.33, 0.25)
_CHUNKS = (2, 3, 4, 6, 8)
_COMPILED = 3
_CHEAP = 2
# How much of the budget is tried where nothing within it reaches the same share of the compiled bytes.
_BEYOND = 2
# A program that holds less is not compiled: of its memory, alignment is too large a part.
SMALLEST = 1 << 16


class CompiledGradient(NamedTuple):
    """Bytes and FLOPs of a compiled program: a value and its gradients.

    The FLOPs are XLA's own count, in which the body of a loop counts once. `largest` are the temporary bytes
    at the peak by operator, the most first.
    """

    temp: int
    argument: int
    output: int
    alias: int
    flops: float
    largest: tuple[tuple[str, int], ...] = ()

    @property
    def total(self) -> int:
        """All buffers of the program."""
        return self.argument + self.output + self.temp - self.alias

    @classmethod
    def of(cls, compiled: Any) -> CompiledGradient:
        """Read bytes and operations of a compiled program from XLA."""
        m = _jax.memory_fields(compiled)
        flops = _jax.counted_flops(compiled)
        try:
            largest = Counter[str]()
            for buffer in buffers(compiled).buffers:
                if buffer.kind == "temporary" and buffer.op_name:
                    largest[buffer.op_name.split("/")[-1]] += buffer.nbytes
        except NoBuffersError:  # Its totals are known, and its buffers are not.
            largest = Counter()
        sizes = m["temporary"], m["argument"], m["output"], m["alias"]
        return cls(*sizes, float("nan") if flops is None else flops, tuple(largest.most_common(3)))


class Placement(NamedTuple):
    """What a program is compiled for: a platform, and the sharding of each argument, None if it has none."""

    platform: str
    shardings: tuple[Any, ...]

    @classmethod
    def of(cls, values: Sequence[Any], target: Any) -> Placement:
        """That of a target as in `rematerialize`, or of arguments' own devices, or of JAX's default."""
        if target is None:
            own = (None if isinstance(v, jax.core.Tracer) else _jax.sharding_of(v) for v in values)
            return cls(_jax.platform_of(values) or _jax.default_platform(), tuple(own))
        device = next(iter(getattr(target, "devices", ())), target)
        sharding = jax.sharding.SingleDeviceSharding(device) if hasattr(device, "device_kind") else None
        return cls(Machine.of(target).platform, (sharding,) * len(values))

    @property
    def has_compiler(self) -> bool:
        """Whether there is a device, perhaps only described, to compile for."""
        return self.platform == _jax.default_platform() or any(s is not None for s in self.shardings)


@dataclass(frozen=True, eq=False)
class GradientProgram:
    """The gradient of a program in some of its arguments, by a schedule or as it stands."""

    program: StepChain
    chosen: tuple[int, ...]
    placement: Placement

    def sweeps(self, schedule: Schedule | None) -> tuple[Callable[..., Any], list[Any]]:
        """A function of arguments and seeds that runs both sweeps, and their types."""
        jaxpr = _jax.open_jaxpr(self.program.closed)
        consts = _jax.array_constants(self.program.closed)
        results = [v.aval for v in jaxpr.outvars]

        def evaluate(*every: Any) -> list[Any]:
            if schedule is None:
                return _jax.evaluate(jaxpr, consts, every)
            return self.program.run(schedule, every)

        def both_sweeps(values: Sequence[Any], seeds: Sequence[Any]) -> tuple[Any, Any]:
            found, pullback = vjp_of_some(evaluate, values, self.chosen)
            return found, pullback(_jax.with_zero_tangents(seeds, results))

        types = [
            jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype, sharding=sharding)
            for v, sharding in zip(jaxpr.invars, self.placement.shardings, strict=True)
        ]
        seeds = [jax.ShapeDtypeStruct(t.shape, t.dtype) for t in results if _jax.is_differentiable(t)]
        return both_sweeps, [types, seeds]

    def options(self, schedule: Schedule) -> dict[str, str]:
        """The compiler options that a schedule needs on this platform."""
        if not any(s.recomputed for s in schedule.segments):
            return {}
        return dict(xla_options.barrier_options(self.placement.platform) or {})

    def compiled(self, schedule: Schedule | None, options: dict[str, str] | None = None) -> CompiledGradient:
        """Compile it, with the options that its schedule needs if none are given."""
        if options is None:
            options = {} if schedule is None else self.options(schedule)
        known: dict[str, Any] = {**xla_options.for_buffers(self.placement.platform), **options}
        return CompiledGradient.of(self._traced(schedule).lower().compile(known or None))

    def estimated(self, schedule: Schedule | None) -> int:
        """Estimate its temporary bytes."""
        jaxpr = self._traced(schedule).jaxpr
        return estimate(jaxpr, barriers=True, platform=self.placement.platform).temporary

    def _traced(self, schedule: Schedule | None) -> Any:
        """Both sweeps, traced once."""
        key = None if schedule is None else schedule.segments
        if key not in self._known:
            fun, types = self.sweeps(schedule)
            self._known[key] = jax.jit(fun).trace(*types)
        return self._known[key]

    @functools.cached_property
    def _known(self) -> dict[Any, Any]:
        return {}


@dataclass(frozen=True)
class Choice:
    """A schedule, None if every one tried holds as much as none, and both programs' compiled memory."""

    schedule: Schedule | None
    plain: CompiledGradient
    chosen: CompiledGradient


def can_compile(closed: Any) -> bool:
    """Whether a program means the same by itself: without references and outer axis names."""
    avals = [v.aval for v in _jax.open_jaxpr(closed).invars]
    if any(_jax.is_reference(a) or _jax.varying_axes(a) or _jax.explicitly_sharded(a) for a in avals):
        return False
    outside = _jax.equations(closed, lambda eqn: eqn.primitive.name != "shard_map")
    named = ("axes", "axis_name", "axis_index_groups")
    return not any(_has_name(eqn.params.get(key)) for eqn in outside for key in named)


def _has_name(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, tuple | list) and any(map(_has_name, value)))


def best(
    gradient: GradientProgram,
    base: Schedule,
    fits: Callable[[Schedule], bool],
    budget: float,
    peak: float,
    target: float,
) -> Choice:
    """Choose by the compiled program: the fewest FLOPs that reach a share `target` of the plain one's bytes.

    If none does, the one of the fewest bytes, also among those that hold more between the sweeps than the
    budget. `base` is the cheapest schedule by what is held; `fits` says whether a schedule is within it.
    """
    by_flops = operator.attrgetter("flops")
    plain, chain = gradient.compiled(None), gradient.program.chain
    room = budget if np.isfinite(budget) else base.nbytes
    different = {s.segments: s for s in _tried(chain, base, (room, room / 2), peak)}
    within = {key: s for key, s in different.items() if fits(s)}
    sizes = {key: gradient.estimated(s) for key, s in within.items()}
    least = sorted(within.values(), key=lambda s: sizes[s.segments])[:_COMPILED]
    enough = target * gradient.estimated(None)
    cheap = sorted((s for key, s in within.items() if sizes[key] <= enough), key=by_flops)[:_CHEAP]
    chosen = {s.segments: s for s in (base, *cheap, *least)}.values()
    compiled: list[tuple[Schedule, CompiledGradient]] = []
    for _, equal in itertools.groupby(sorted(chosen, key=by_flops), key=by_flops):
        compiled += (new := [(s, gradient.compiled(s)) for s in equal])
        schedule, program = min(new, key=lambda pair: pair[1].temp)
        if program.temp <= target * plain.temp:
            return Choice(schedule, plain, program)
    known = {base.segments, *within}
    beyond = [s for s in _tried(chain, base, (_BEYOND * room,), peak) if s.segments not in known]
    compiled += [(s, gradient.compiled(s)) for s in sorted(beyond, key=gradient.estimated)[:_CHEAP]]
    schedule, program = min(compiled, key=lambda pair: (pair[1].temp, pair[0].flops))
    if program.temp >= plain.temp:
        return Choice(None, plain, plain)
    return Choice(schedule, plain, program)


def _tried(chain: CutChain, base: Schedule, rooms: Sequence[float], peak: float) -> Iterator[Schedule]:
    """Schedules of these bytes held under lower limits on the peak, and in equal chunks."""
    limits = (min(peak, share * base.peak) for share in _PEAKS)
    found = [cheapest(chain, room, limit) for limit in limits for room in rooms]
    found += [in_chunks(chain, count) for count in _CHUNKS]
    yield from (s for s in found if s is not None and s.peak <= peak and s.segments != base.segments)
