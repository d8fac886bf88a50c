"""Bytes that devices send each other: predicted from a layout, and read from the compiled program."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from funcprop import _jax
from funcprop._jax import hlo
from funcprop.partition.layout import MeshLayout

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


@dataclass(frozen=True)
class Collective:
    """One array that several devices make or move together.

    Attributes:
        kind: as XLA names it, `"all-reduce"` for instance.
        nbytes: of the array on one device: what is reduced, what was gathered, what is left of a scatter.
        operator: the operator that needs it, with its scope.
        trips: how often it happens in a step.
    """

    kind: str
    nbytes: int
    operator: str
    trips: int = 1


# Whose compilers reduce once, behind the loop, the sums that its steps add to a carry.
REDUCES_BEHIND_LOOPS = frozenset({"tpu"})


def predicted_collectives(layout: MeshLayout, platform: str) -> list[Collective]:
    """The all-reduces of a layout: one for each operator that sums over a split axis, at each trip."""
    reduced, found = layout.reduced_on(platform), []
    joined = {total.eqn.outvars[0] for total in layout.program.totals if total.joins}
    for eqn, trips in layout.program.equations:
        for v in reduced.keys() & set(eqn.outvars):
            behind = v in joined and platform in REDUCES_BEHIND_LOOPS
            name = "/".join(part for part in (_jax.scope(eqn), eqn.primitive.name) if part)
            found.append(Collective("all-reduce", layout.bytes_of(v), name, 1 if behind else trips))
    return found


def compiled_collectives(text: str) -> list[Collective]:
    """The collectives of a compiled program, each array by itself though XLA joins them."""
    computations, entry = hlo.instructions(text)
    found: list[Collective] = []

    def visit(name: str, trips: int) -> None:
        for instruction in computations.get(name, ()):
            kind = instruction.opcode.removesuffix("-start")
            if kind in KINDS:
                named = re.search(r'op_name="([^"]*)"', instruction.attributes)
                operator = named[1] if named else "an operator without a name"
                types = instruction.type if kind != "all-reduce" else " ".join(instruction.operands)
                found.extend(Collective(kind, n, operator, trips) for n in array_bytes(types))
            elif instruction.opcode not in ("all-reduce-done", "reduce"):
                for called in instruction.calls:
                    visit(called, trips * (instruction.trips or 1))

    visit(entry, 1)
    return found


_ARRAY = re.compile(r"\b([a-z]+)(\d*)(?:e\dm\d\w*)?\[([\d,]*)\]")


def array_bytes(types: str) -> list[int]:
    """The bytes of each array in a type as XLA writes it."""
    return [
        math.prod(int(size) for size in sizes.split(",") if size) * max(1, int(bits or 8) // 8)
        for _, bits, sizes in _ARRAY.findall(types)
    ]


def volume(collectives: Iterable[Collective]) -> int:
    """Bytes of all collectives of a step."""
    return sum(c.nbytes * c.trips for c in collectives)


def unpredicted(predicted: Sequence[Collective], compiled: Sequence[Collective]) -> list[Collective]:
    """The compiled collectives that were not predicted, by kind and bytes of each array."""
    expected = Counter((c.kind, c.nbytes) for c in predicted for _ in range(c.trips))
    found = []
    for c in compiled:
        left = min(c.trips, expected[c.kind, c.nbytes])
        expected[c.kind, c.nbytes] -= left
        if left < c.trips:
            found.append(Collective(c.kind, c.nbytes, c.operator, c.trips - left))
    return found
