"""Bytes that one device holds at the peak, by purpose: the memory estimate of its program."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from funcprop.memory.estimate import MemoryEstimate, estimate
from funcprop.memory.tiles import kept_bytes

PURPOSES = (
    "parameters",
    "optimizer state",
    "batch",
    "saved",
    "gathered",
    "collectives",
    "temporaries",
    "results",
)
_COLLECTIVE = frozenset({"all_reduce", "psum", "psum_invariant", "reduce_scatter"})


@dataclass(frozen=True)
class DeviceBytes:
    """Bytes of one device at the peak, by purpose.

    "saved" was made in the forward sweep and is still needed; "gathered" are parameters that are whole for a
    while; "collectives" are operands and results of reductions; "results" are new arrays that are handed
    back.
    """

    by_purpose: Mapping[str, int]

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self.by_purpose.values())


def peak_of(
    jaxpr: Any,
    purposes: Sequence[str],
    donated: Mapping[int, int] | None = None,
    value: int | None = None,
    barriers: bool = False,
    platform: str = "cpu",
) -> DeviceBytes:
    """Estimate the peak of a program of one device.

    Args:
        jaxpr: the program, with the sizes that arrays have on the device.
        purposes: of each argument, one of `PURPOSES`.
        donated: the results that are written over arguments.
        value: the result with which the forward sweep ends.
        barriers: whether what a checkpoint computes again is not shared.
        platform: of the device.
    """
    donated = donated or {}
    found = estimate(jaxpr, donated, barriers, platform)
    held = dict.fromkeys(PURPOSES, 0)
    for v, purpose in zip(found.arguments, purposes, strict=True):
        held[purpose] += kept_bytes(v.aval, platform)
    held["parameters"] += sum(v.nbytes for v in found.constants)
    forward = _made_for(found, value)
    for v in found.live:
        readers = {step.op for step in found.users.get(id(v), ())}
        op = None if v.step is None else v.step.op
        if op == "all_gather":
            held["gathered"] += v.nbytes
        elif op in _COLLECTIVE or readers & _COLLECTIVE:
            held["collectives"] += v.nbytes
        else:
            held["saved" if id(v) in forward else "temporaries"] += v.nbytes
    held["temporaries"] += found.temporary - sum(v.nbytes for v in found.live)
    over = set(donated.values())
    new = (v.aval for i, v in enumerate(found.results) if v is not None and i not in over)
    held["results"] += sum(kept_bytes(aval, platform) for aval in new)
    return DeviceBytes({name: n for name, n in held.items() if n})


def _made_for(found: MemoryEstimate, value: int | None) -> set[int]:
    """What a result is made of."""
    waiting = [] if value is None else [found.results[value]]
    seen: set[int] = set()
    while waiting:
        v = waiting.pop()
        if v is not None and id(v) not in seen:
            seen.add(id(v))
            waiting += [] if v.step is None else v.step.operands
    return seen


def peak_of_step(
    jaxpr: Any, arguments: Sequence[Any], barriers: bool = False, platform: str = "cpu"
) -> DeviceBytes:
    """Estimate the peak of a step, or of value and gradient, on one device.

    `arguments` are the trees that it reads: parameters, the optimizer's state if there is one, and the batch.
    Captured constants come before them; a step's first results are written over parameters and state.
    """
    names = ("parameters", "batch") if len(arguments) == 2 else ("parameters", "optimizer state", "batch")
    sizes = [len(jax.tree.leaves(tree)) for tree in arguments]
    start = len(jaxpr.invars) - sum(sizes)
    purposes = ["parameters"] * start
    for name, size in zip(names, sizes, strict=True):
        purposes += [name] * size
    kept = sum(sizes[:-1]) if len(sizes) == 3 else 0
    return peak_of(jaxpr, purposes, {start + i: i for i in range(kept)}, kept, barriers, platform)
