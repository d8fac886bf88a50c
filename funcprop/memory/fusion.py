"""Which steps of a program a compiler computes together: the kernels of XLA on a CPU.

Sums of many entries are computed by a library, with what only they read and what alone reads them. Then every
other step joins all kernels that read it, if it and they are computed entry by entry and it is cheap, or read
by one of them only. What no kernel takes in, and what a product or a loop reads or makes, is in memory.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from funcprop.program.facts import PRODUCTS
from funcprop.program.sizes import nbytes

# The library takes steps that read or make so many entries.
_LIBRARY_ENTRIES = 4096
_LIBRARY = frozenset(
    {"abs", "add", "add_any", "ceil", "convert_element_type", "div", "erf", "exp", "expm1", "floor", "square"}
    | {"integer_pow", "log", "log1p", "logistic", "max", "min", "mul", "neg", "pow", "round", "rsqrt", "sign"}
    | {"sqrt", "sub", "tanh"}
)
# These it takes of any size; transposes are copies by then, and what is padded is in memory.
_MOVED_IN_LIBRARY = frozenset({"broadcast_in_dim", "iota", "reshape"})
_LIBRARY_TYPES = frozenset({"float64", "float32", "bfloat16", "int8", "uint8"})
_LIBRARY_SUMS = frozenset({"reduce_sum", "reduce_max", "reduce_min"})
WINDOWS = frozenset({"reduce_window_sum", "reduce_window_max", "reduce_window_min"})
# Another sum along an axis of more entries is computed in several steps, and reads from memory.
_LONGEST_AXIS = 32
# They may read an entry several times: what is expensive is not computed in their place.
_REPEATS = frozenset({"broadcast_in_dim", "slice", "dynamic_slice", "gather"})
# An entry is computed at no more than so many indices inside of one kernel.
_DUPLICATES = 15


@dataclass(eq=False)
class Value:
    """An array of the program, and the step that makes it, None for an argument."""

    aval: Any
    step: Step | None = None

    @property
    def nbytes(self) -> int:
        """Its bytes."""
        return nbytes(self.aval)

    @property
    def size(self) -> int:
        """The number of entries."""
        return math.prod(getattr(self.aval, "shape", ()))

    @property
    def is_number(self) -> bool:
        """Whether it is one number, or made of single numbers."""
        if self.step is None:
            return self.size <= 1
        return self.is_spread and all(v.is_number for v in self.step.operands)

    @property
    def is_spread(self) -> bool:
        """Whether it is made of fewer entries, or of none."""
        return self.step is not None and self.step.op in ("broadcast_in_dim", "iota")

    @property
    def rank(self) -> int:
        """The number of axes along which there are several entries."""
        return sum(n > 1 for n in getattr(self.aval, "shape", ()))


@dataclass(eq=False)
class Step:
    """An equation, or a part of one.

    `fuses` says that it may be computed where its result is read, `reduces` how long the longest axis is that
    it adds up, `expensive` that it is not computed twice, `entrywise` that its result may be written over an
    operand of the same size, `in_place` over which operand each result is, and `library` that a product or a
    window is one that the library knows. `inside` are the bytes that it needs while it runs.
    """

    op: str
    scope: str
    operands: list[Value]
    results: list[Value] = field(default_factory=list)
    fuses: bool = False
    reduces: int = 0
    entrywise: bool = False
    expensive: bool = False
    library: bool = False
    effects: bool = False
    in_place: dict[int, int] = field(default_factory=dict)
    inside: int = 0

    @property
    def joins_several(self) -> bool:
        """Whether it reads more than it writes, in several arrays that are not spread out."""
        result = self.results[0]
        full = [v for v in self.operands if not v.is_spread and v.rank >= result.rank]
        return len(full) > 1 and sum(v.size for v in _different(self.operands)) > result.size

    @property
    def starts_library(self) -> bool:
        """Whether the library is called for it, and what is beside it."""
        return (self.op in _LIBRARY_SUMS or (self.op in WINDOWS and self.library)) and self._is_long_enough

    @property
    def is_in_library(self) -> bool:
        """Whether the library computes it beside a sum."""
        if self.op in _MOVED_IN_LIBRARY:
            return self._has_library_types
        return self.starts_library or self.library or (self.op in _LIBRARY and self._is_long_enough)

    @property
    def _is_long_enough(self) -> bool:
        values = [*self.operands, *self.results]
        return self._has_library_types and max(v.size for v in values) >= _LIBRARY_ENTRIES

    @property
    def _has_library_types(self) -> bool:
        return all(str(v.aval.dtype) in _LIBRARY_TYPES for v in (*self.operands, *self.results))


@dataclass(eq=False)
class Kernel:
    """A step whose results are in memory, the steps that are computed inside, and what they read from there.

    `indices` are for each member those at which its entries are computed, one for each way to the root.
    """

    step: Step
    members: dict[int, Step]
    indices: dict[int, frozenset[Any]] = field(default_factory=dict)
    repeated: set[int] = field(default_factory=set)
    reads: dict[int, Value] = field(default_factory=dict)
    operands: list[Value] = field(default_factory=list)
    is_library: bool = False

    def writes_over(self, operand: Value, result: Value, users: Iterable[Step]) -> bool:
        """Whether a result may lie where an operand lies that is not read again."""
        if self.step.in_place:
            k = next((k for k, v in enumerate(self.operands) if v is operand), -1)
            return k in self.step.in_place and self.step.results[self.step.in_place[k]] is result
        if self.is_library:
            return False
        return self.indices_of(u for u in users if id(u) in self.members) == self.indices[id(self.step)]

    def indices_of(self, users: Iterable[Step]) -> frozenset[Any]:
        """The indices at which members read the entries of an operand."""
        return frozenset(i if u.entrywise else (id(u), i) for u in users for i in self.indices[id(u)])

    @property
    def hides(self) -> bool:
        """Whether the library computes several layers, whose memory no compiler tells."""
        return sum(s.op in PRODUCTS or s.op in WINDOWS for s in self.members.values()) > 1


class Fusion:
    """The kernels of a program of steps; `library` says whether a library computes long sums."""

    def __init__(self, steps: Sequence[Step], results: Iterable[Value | None], library: bool = True) -> None:
        self.results = {id(v) for v in results if v is not None}
        self.steps = _needed(steps, self.results)
        self.users: dict[int, list[Step]] = defaultdict(list)
        for step in self.steps:
            for v in _different(step.operands):
                self.users[id(v)].append(step)
        self.kernels = self._kernels(self._in_library() if library else {})

    def _users_of(self, step: Step) -> list[Step]:
        return [u for v in step.results for u in self.users[id(v)]]

    def _is_returned(self, step: Step) -> bool:
        return any(id(v) in self.results for v in step.results)

    def _in_library(self) -> dict[int, Kernel]:
        """For each step that the library computes, its kernel."""
        found: dict[int, Kernel] = {}
        for start in reversed(self.steps):
            if id(start) in found or not start.starts_library:
                continue
            kernel = Kernel(start, {id(start): start}, is_library=True)
            while more := [s for s in self._beside(kernel) if s.is_in_library]:
                for step in more:
                    # A sum behind it has a kernel already, which is joined.
                    joined = found.get(id(step), Kernel(step, {id(step): step}))
                    if any(step is u for u in self._users_of(kernel.step)):
                        kernel.step = joined.step
                    kernel.members.update(joined.members)
            found.update(dict.fromkeys(kernel.members, kernel))
        return found

    def _beside(self, kernel: Kernel) -> list[Step]:
        """The steps that are read by a kernel alone, and the one that alone reads it."""
        inside = kernel.members
        before = {id(v.step): v.step for s in inside.values() for v in s.operands if v.step is not None}
        found = [
            s
            for key, s in before.items()
            if key not in inside
            and not self._is_returned(s)
            and all(id(u) in inside for u in self._users_of(s))
        ]
        after = self._users_of(kernel.step)
        return found + after if len(after) == 1 and not self._is_returned(kernel.step) else found

    def _kernels(self, library: dict[int, Kernel]) -> list[Kernel]:
        """Put every step inside of the kernels that read it, or make it one."""
        unshared = self._unshared(library)
        within: dict[int, list[Kernel]] = {}
        found = []
        for step in reversed(self.steps):
            if (kernel := library.get(id(step))) is not None:
                within[id(step)] = [kernel]
                found += [kernel] if kernel.step is step else []
                continue
            users, returned = self._users_of(step), self._is_returned(step)
            readers = list({id(k): k for u in users for k in within[id(u)]}.values())
            alone = len(readers) == 1 and not returned
            joined = []
            if (alone or not step.expensive) and id(step) not in unshared:
                for kernel in readers:
                    if kernel.is_library:
                        continue
                    inside = [u for u in users if id(u) in kernel.members]
                    indices = kernel.indices_of(inside)
                    repeated = any(id(u) in kernel.repeated or u.op in _REPEATS for u in inside)
                    if repeated and step.expensive and kernel.step.fuses:
                        continue
                    if _takes_in(kernel.step, step) and len(indices) <= _DUPLICATES:
                        kernel.members[id(step)], kernel.indices[id(step)] = step, indices
                        kernel.repeated.update([id(step)] * repeated)
                        joined.append(kernel)
            within[id(step)] = list(joined)
            if not step.fuses or returned or len(joined) < len(readers):
                kernel = Kernel(step, {id(step): step}, {id(step): frozenset([0])})
                within[id(step)].append(kernel)
                found.append(kernel)
        for kernel in found:
            operands = (v for step in kernel.members.values() for v in step.operands)
            kernel.reads = {id(v): v for v in operands if v.step is None or id(v.step) not in kernel.members}
            kernel.operands = list(kernel.step.operands)
        return found[::-1]

    def _unshared(self, library: dict[int, Kernel]) -> set[int]:
        """Find the steps that read more than they write, and of which a path leaves a kernel.

        They are not computed twice. A path from such a step to one of its readers leaves the reader's kernel
        if a step on it does not join the next.
        """
        behind: dict[int, int] = {}  # of a step: a bit for each that it depends on, and its own
        for i, step in enumerate(self.steps):
            behind[id(step)] = 1 << i
            for v in step.operands:
                behind[id(step)] |= behind.get(id(v.step), 0)
        found: set[int] = set()
        for i in range(len(self.steps) - 1, -1, -1):
            step = self.steps[i]
            if step.fuses and step.joins_several:
                waiting = self._users_of(step)
                seen, leaves = set(map(id, waiting)), self._is_returned(step)
                while waiting and not leaves:
                    reader = waiting.pop()
                    before = [v.step for v in reader.operands if v.step is not None]
                    before = [s for s in before if behind[id(s)] >> i & 1]
                    leaves = id(reader) in library or any(
                        id(s) in found or not self._joins(s, reader) for s in before
                    )
                    new = {id(s): s for s in before if s is not step and id(s) not in seen}
                    seen.update(new)
                    waiting += new.values()
                if leaves:
                    found.add(id(step))
        return found

    def _joins(self, step: Step, reader: Step) -> bool:
        alone = len(self._users_of(step)) == 1 and not self._is_returned(step)
        return _takes_in(reader, step) and (alone or not step.expensive)


def with_copies(
    steps: Sequence[Step], results: Iterable[Value | None], donated: Mapping[int, Value] | None = None
) -> list[Step]:
    """The steps, with copies of what is written over though others read it, too, as soon as it is there.

    `donated` says over which argument a result may be written.
    """
    returned = {id(v) for v in results if v is not None}
    steps, readers, found = _needed(steps, returned), defaultdict(set), []
    for step in steps:
        for v in step.operands:
            readers[id(v)].add(id(step))
    for step in steps:
        for k, place in step.in_place.items():
            v, over = step.operands[k], (donated or {}).get(id(step.results[place]))
            is_kept = (v.step is None and over is not v) or len(readers[id(v)]) > 1 or id(v) in returned
            if v.size > 1 and is_kept:
                copy = Step("copy", step.scope, [v])
                copy.results = [Value(v.aval, copy)]
                step.operands[k] = copy.results[0]
                found.append(copy)
        found.append(step)
    return found


def _needed(steps: Sequence[Step], results: Collection[int]) -> list[Step]:
    """The steps that results depend on."""
    needed, found = set(results), []
    for step in reversed(steps):
        if step.effects or any(id(v) in needed for v in step.results):
            found.append(step)
            needed.update(id(v) for v in step.operands)
    return found[::-1]


def _different(values: Iterable[Value]) -> list[Value]:
    return list({id(v): v for v in values}.values())


def _takes_in(root: Step, step: Step) -> bool:
    """Whether the kernel of a root computes a step that it reads."""
    return step.fuses and (root.fuses or 0 < root.reduces <= _LONGEST_AXIS)
