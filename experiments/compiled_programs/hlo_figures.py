"""What the text of a compiled program says about its cost, with loops counted as often as they run.

XLA's own `cost_analysis` counts the body of a loop once. A TPU's text has an estimate of cycles for every
fusion; a GPU's has none, but every top-level instruction is a kernel, whose operands and results are its
traffic.
"""

from __future__ import annotations

import functools
import math
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, NamedTuple

_ITEMSIZE = {"pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2,
             "f32": 4, "s32": 4, "u32": 4, "f64": 8, "s64": 8, "u64": 8, "c64": 8}  # fmt: skip
_COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
# They name values and move none.
_FREE = frozenset(
    [
        "parameter",
        "constant",
        "tuple",
        "get-tuple-element",
        "bitcast",
        "after-all",
        "copy-done",
        "partition-id",
        "replica-id",
        "iota",
    ]
)
_ON_CHIP = re.compile(r"\w+\[[\d,]*\]\{[^}]*S\(1\)[^}]*\}")


class Instruction(NamedTuple):
    """One line of a computation."""

    name: str
    type: str
    operator: str
    rest: str

    @property
    def operands(self) -> list[str]:
        """The names of its operands."""
        end = self.rest.find("), ")
        return re.findall(r"%([\w.\-]+)", self.rest if end < 0 else self.rest[:end])

    def called(self, key: str) -> str:
        """The computation that it calls as `key`."""
        found = re.search(rf"{key}=%?([\w.\-]+)", self.rest)
        return found[1] if found else ""


@dataclass
class Figures:
    """Estimated cycles, bytes that kernels read and write (and those of them not on the chip), kernels,
    collectives by kind; loops whose length the text does not tell count once."""

    cycles: float = 0
    traffic: float = 0
    memory_traffic: float = 0
    kernels: float = 0
    collectives: Counter[str] = field(default_factory=Counter)
    unknown_loops: int = 0

    def add(self, other: Figures, times: float = 1) -> None:
        """Add the figures of something that runs so many times."""
        self.cycles += times * other.cycles
        self.traffic += times * other.traffic
        self.memory_traffic += times * other.memory_traffic
        self.kernels += times * other.kernels
        self.unknown_loops += other.unknown_loops
        for kind, count in other.collectives.items():
            self.collectives[kind] += int(times * count)


def figures(text: str) -> Figures:
    """The figures of an optimised program (`Compiled.as_text()`)."""
    return _Program(text).of_entry()


def _bytes(type_text: str) -> float:
    shapes = re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", type_text)
    return sum(_ITEMSIZE.get(d, 0) * math.prod(int(n) for n in s.split(",") if n) for d, s in shapes)


class _Program:
    def __init__(self, text: str) -> None:
        self.computations: dict[str, list[Instruction]] = {}
        self.entry = ""
        current: list[Instruction] | None = None
        for line in text.splitlines():
            if head := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$", line):
                current = self.computations[head[2]] = []
                self.entry = head[2] if head[1] else self.entry
            elif line.startswith("}"):
                current = None
            elif current is not None and (found := re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*)$", line)):
                current.append(_instruction(found[1], found[2]))
        self.of_computation = functools.cache(self._of_computation)
        self.of_fusion = functools.cache(self._of_fusion)

    def of_entry(self) -> Figures:
        return self.of_computation(self.entry)

    def _of_computation(self, name: str) -> Figures:
        total = Figures()
        types = {i.name: i.type for i in self.computations.get(name, ())}
        for i in self.computations.get(name, ()):
            cycles = re.search(r'"estimated_cycles":"(\d+)"', i.rest)
            if cycles and int(cycles[1]) < 2**50:  # XLA's infinity for what it cannot estimate.
                total.cycles += int(cycles[1])
            if i.operator == "while":
                trips = self._trips(i)
                total.unknown_loops += trips is None
                total.add(self.of_computation(i.called("body")), trips or 1)
            elif i.operator == "call":
                total.add(self.of_computation(i.called("to_apply")))
            elif i.operator == "conditional":
                total.add(self._largest_branch(i))
            elif i.operator not in _FREE and not i.operator.endswith("-done"):
                total.add(self._kernel(i, types))
        return total

    def _trips(self, loop: Instruction) -> int | None:
        known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest)
        return int(known[1]) if known else self._bound(loop.called("condition"))

    def _bound(self, condition: str) -> int | None:
        instructions = self.computations.get(condition, [])
        constants = [
            int(n) for i in instructions if i.operator == "constant" and i.type.startswith("s32[]")
            for n in re.findall(r"constant\((\d+)\)", i.rest)
        ]  # fmt: skip
        inner = [self._bound(called) for i in instructions if (called := i.called("calls"))]
        return max([*constants, *(n for n in inner if n is not None)], default=None)

    def _largest_branch(self, i: Instruction) -> Figures:
        listed = re.search(r"branch_computations=\{([^}]*)\}", i.rest)
        names = re.findall(r"[\w.\-]+", listed[1]) if listed else []
        names += re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", i.rest)
        return max(map(self.of_computation, names), key=lambda f: (f.cycles, f.traffic), default=Figures())

    def _kernel(self, i: Instruction, types: dict[str, str]) -> Figures:
        kind = next((c for c in _COLLECTIVES if i.operator in (c, f"{c}-start")), None)
        parts: list[tuple[float, str]]
        operands = [types.get(name, "") for name in i.operands]
        if i.operator == "dynamic-slice":
            parts = [(2 * _bytes(i.type), i.type)]
        elif i.operator == "dynamic-update-slice":
            parts = [(2 * _bytes(operands[1]), i.type)]
        elif i.operator == "fusion":
            read, written = self.of_fusion(i.called("calls"))
            parts = [
                (_bytes(t) if (n := read.get(k)) is None else min(n, _bytes(t)), t)
                for k, t in enumerate(operands)
            ]
            parts.append((_bytes(i.type) if written is None else written, i.type))
        else:
            parts = [(_bytes(t), t) for t in (i.type, *operands)]
        off_chip = sum(n for n, t in parts if not _ON_CHIP.search(t) or t.startswith("("))
        return Figures(0, sum(n for n, _ in parts), off_chip, 1, Counter([kind] if kind else []))

    def _of_fusion(self, name: str) -> tuple[dict[int, float | None], float | None]:
        """Bytes read of every operand, None for all of it; and bytes written, None for all of the result."""
        instructions = self.computations.get(name, [])
        types = {i.name: i.type for i in instructions}
        place: dict[str, int] = {}
        read: dict[int, float | None] = {}
        written: float | None = None
        for i in instructions:
            if i.operator == "parameter":
                place[i.name] = int(re.findall(r"parameter\((\d+)\)", i.rest)[0])
                read[place[i.name]] = 0.0
                continue
            operands = i.operands
            if i.operator == "bitcast" and operands and operands[0] in place:
                place[i.name] = place[operands[0]]
                continue
            inner: Any = self.of_fusion(i.called("calls"))[0] if i.operator == "fusion" else {}
            for k, operand in enumerate(operands):
                if operand not in place:
                    continue
                at = place[operand]
                before = read[at]
                if i.operator == "dynamic-update-slice" and k == 0:
                    continue
                taken = _bytes(i.type) if i.operator == "dynamic-slice" and k == 0 else inner.get(k)
                read[at] = None if taken is None or before is None else before + taken
            if i.operator == "dynamic-update-slice" and len(operands) > 1:
                written = (written or 0) + _bytes(types.get(operands[1], ""))
        return read, written


def _instruction(name: str, text: str) -> Instruction:
    if text.startswith("("):
        depth = 0
        end = 0
        for end, letter in enumerate(text):  # noqa: B007
            depth += (letter == "(") - (letter == ")")
            if depth == 0:
                break
        type_text, rest = text[: end + 1], text[end + 1 :].strip()
    else:
        type_text, _, rest = text.partition(" ")
    operator = re.match(r"([\w\-]+)\(", rest)
    return Instruction(name, type_text, operator[1] if operator else "", rest)
