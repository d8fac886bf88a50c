"""An estimate of a program's memory before it is compiled: a liveness analysis of its jaxpr.

estimate = arguments + constants + results + max over t of the bytes of the other values live at t
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from funcprop import _jax
from funcprop.memory.fusion import Step, Value
from funcprop.memory.steps_of import StepsOf
from funcprop.program.sizes import nbytes


@dataclass(frozen=True, eq=False)
class MemoryEstimate:
    """The bytes of temporary values at their peak, these values, and the operator that runs then.

    What an operator holds inside of itself is part of `temporary` and not among the values.
    """

    temporary: int
    live: tuple[Value, ...]
    operator: str
    arguments: tuple[Value, ...]
    constants: tuple[Value, ...]
    users: Mapping[int, Sequence[Step]] = field(repr=False)
    results: tuple[Value | None, ...] = ()

    def readers(self, value: Value) -> list[str]:
        """The names of the steps that read a value, each behind its scope."""
        return [f"{step.scope}/{step.op}" for step in self.users.get(id(value), ())]


def estimate(
    closed: Any, donated: Mapping[int, int] | None = None, barriers: bool = False, platform: str = "cpu"
) -> MemoryEstimate:
    """Estimate the memory of a jaxpr; `donated` says over which argument a result is written.

    With `barriers`, what `jax.checkpoint` computes again is not shared with what was computed before.
    """
    program = StepsOf(barriers, platform)
    jaxpr, consts = _jax.with_constants_as_inputs(closed)
    jaxpr, _ = _jax.without_unread_inputs(jaxpr, [True] * len(jaxpr.invars))
    values = [Value(v.aval) for v in jaxpr.invars]
    program.constants += values[: len(consts)]
    arguments, results = values[len(consts) :], program.walk(jaxpr, values, "")
    pairs = {id(results[j]): arguments[i] for i, j in (donated or {}).items() if results[j] is not None}
    live = program.liveness(results, pairs)
    peak = live.peak(pairs)
    if live.hides:
        plain = program.liveness(results, pairs, library=False)
        peak = max(peak, plain.peak(pairs), key=lambda found: found.nbytes)
    read = (v for v in program.constants if live.users[id(v)] and v.size > 1)
    return MemoryEstimate(
        peak.nbytes, peak.live, peak.op, tuple(arguments), tuple(read), live.users, tuple(results)
    )


def peak_bytes(closed: Any) -> int:
    """Estimate the peak bytes of a jaxpr as a program of its own, without captured constants."""
    found, jaxpr = estimate(closed), _jax.open_jaxpr(closed)
    given = (v for v in found.arguments if v.step is None and found.users.get(id(v)))
    return found.temporary + sum(v.nbytes for v in given) + sum(map(nbytes, jaxpr.outvars))
