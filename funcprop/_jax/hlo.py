"""Compiled programs as XLA writes them, read instruction by instruction."""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Instruction:
    """One instruction of a compiled program; `type`, operand types and `attributes` as XLA writes them.

    `calls` are the computations that it runs; `trips` says how often a loop runs its body, None for another
    instruction or where XLA does not know it.
    """

    opcode: str
    type: str
    operands: tuple[str, ...]
    attributes: str
    calls: tuple[str, ...]
    trips: int | None


_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
_CALLED = re.compile(
    r"\b(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)"
    r"|branch_computations=\{([^}]*)\}"
)


_ARRAY = re.compile(r"^([a-z]+)(\d*)\w*\[([\d,]+)\]")


def constant_bytes(text: str) -> int:
    """Bytes of the arrays that are written in a compiled program; single numbers are not counted."""
    total = 0
    for instruction in itertools.chain.from_iterable(instructions(text)[0].values()):
        if instruction.opcode == "constant" and (found := _ARRAY.match(instruction.type)):
            bits = int(found[2] or 8)
            total += math.prod(map(int, found[3].split(","))) * bits // 8
    return total


def instructions(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """The computations of a compiled program by name, and the name of the one that is run."""
    computations: dict[str, list[Instruction]] = {}
    types: dict[str, str] = {}
    entry = current = ""
    for line in text.splitlines():
        if header := _COMPUTATION.match(line):
            current = header[2]
            computations[current], types = [], {}
            entry = current if header[1] else entry
        elif found := _INSTRUCTION.match(line):
            name, type_, opcode, rest = found.groups()
            types[name] = type_
            operands, _, attributes = rest.partition(")")
            called = [re.findall(r"[\w.\-]+", one or several) for one, several in _CALLED.findall(attributes)]
            trips = re.search(r'"known_trip_count":\{"n":"(\d+)"', attributes)
            computations[current].append(
                Instruction(
                    opcode,
                    type_,
                    tuple(types.get(o, "") for o in re.findall(r"%([\w.\-]+)", operands)),
                    attributes,
                    tuple(name for names in called for name in names),
                    int(trips[1]) if trips else None,
                )
            )
    return computations, entry
