"""Which values of a program are written to memory, and how many bytes of them are live at a time.

A compiler writes to memory what products, long sums, loops and other steps that it does not fuse make or
read, what is expensive and read in several places, arguments and results. Everything else is computed inside
of the kernels that read it. A value lives from the kernel that makes it to the last that reads it; they run
in the order in which what they read becomes ready.
"""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from funcprop.program.sizes import nbytes

BARRIER = "optimization_barrier"
# Sums of so many entries are computed by a library, which reads from memory what others read, too; shorter
# ones compute what they read inside if they add up no more than so many for each result.
_LIBRARY_ENTRIES = 4096
_WINDOW = 32
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


@dataclass(eq=False)
class Step:
    """An equation, or a part of one.

    `fuses` says that it may be computed where its result is read, `expensive` that it is not computed twice,
    `entrywise` that its result may be written over an operand of the same size, and `in_place` over which
    operand each result is. `inside` are the bytes that it needs while it runs.
    """

    op: str
    scope: str
    operands: list[Value]
    results: list[Value] = field(default_factory=list)
    fuses: bool = False
    reduces: bool = False
    entrywise: bool = False
    expensive: bool = False
    in_library: bool = False
    effects: bool = False
    in_place: dict[int, int] = field(default_factory=dict)
    inside: int = 0

    @property
    def joins_several(self) -> bool:
        """Whether it reads more than it writes, in several arrays that are not spread out."""
        rank, result = _rank(self.results[0]), self.results[0].size
        read = {id(v): v for v in self.operands}.values()
        full = [v for v in read if not v.is_spread and _rank(v) >= rank]
        return len(full) > 1 and sum(v.size for v in read) > result


@dataclass(eq=False)
class Kernel:
    """A step whose results are in memory, the steps that are computed inside, and what they read from there.

    `indices` are for each member those at which its entries are computed, one for each way to the root.
    """

    step: Step
    members: dict[int, Step]
    indices: dict[int, frozenset[Any]]
    repeated: set[int] = field(default_factory=set)
    reads: dict[int, Value] = field(default_factory=dict)

    def writes_over(self, operand: Value, result: Value, users: Iterable[Step]) -> bool:
        """Whether a result may lie where an operand lies that is not read again."""
        if self.step.in_place:
            k = next((k for k, v in enumerate(self.step.operands) if v is operand), -1)
            return k in self.step.in_place and self.step.results[self.step.in_place[k]] is result
        return self.indices_of(u for u in users if id(u) in self.members) == self.indices[id(self.step)]

    def indices_of(self, users: Iterable[Step]) -> frozenset[Any]:
        """The indices at which members read the entries of an operand."""
        return frozenset(i if u.entrywise else (id(u), i) for u in users for i in self.indices[id(u)])


@dataclass(frozen=True, eq=False)
class Peak:
    """The bytes that are live at most, the values then, and the operator that runs."""

    nbytes: int
    live: tuple[Value, ...]
    op: str


class Liveness:
    """The kernels of a program of `steps` whose results are `results`, in the order in which they run."""

    def __init__(self, steps: Sequence[Step], results: Iterable[Value | None]) -> None:
        self.results = {id(v) for v in results if v is not None}
        needed = set(self.results)
        self.steps: list[Step] = []
        for step in reversed(steps):
            if step.effects or any(id(v) in needed for v in step.results):
                self.steps.append(step)
                needed.update(id(v) for v in step.operands)
        self.steps.reverse()
        self.users: dict[int, list[Step]] = defaultdict(list)
        for step in self.steps:
            for v in {id(v): v for v in step.operands}.values():
                self.users[id(v)].append(step)
        self._copy_shared()
        # A barrier moves nothing, but what is behind it waits for all that it reads.
        self.kernels = self._without(_barrier, _in_order(self._without(_view, self._kernels())))

    def _copy_shared(self) -> None:
        """Copy what is written over though others read it, too, as soon as it is there."""
        for step in list(self.steps):
            for k in step.in_place:
                v = step.operands[k]
                if v.size > 1 and (v.step is None or len(self.users[id(v)]) > 1 or id(v) in self.results):
                    copy = Step("copy", step.scope, [v])
                    copy.results = [Value(v.aval, copy)]
                    step.operands[k] = copy.results[0]
                    self.users[id(copy.results[0])] = [step]
                    self.users[id(v)].append(copy)
                    if not any(u is v for u in step.operands):
                        self.users[id(v)] = [u for u in self.users[id(v)] if u is not step]
                    self.steps.insert(self.steps.index(step), copy)

    def _without(self, views: Callable[[Kernel], Sequence[Value]], found: Sequence[Kernel]) -> list[Kernel]:
        """The kernels that compute something; what others make is the memory that they read."""
        same: dict[int, Value] = {}
        kept = []
        for kernel in found:
            kernel.reads = {id(v): v for v in (same.get(k, v) for k, v in kernel.reads.items())}
            kernel.step.operands = [same.get(id(v), v) for v in kernel.step.operands]
            sources = views(kernel)
            same.update((id(v), u) for u, v in zip(sources, kernel.step.results, strict=False))
            if not sources:
                kept.append(kernel)
        self.results = {id(same[key]) if key in same else key for key in self.results}
        return kept

    def _users_of(self, step: Step) -> list[Step]:
        return [u for v in step.results for u in self.users[id(v)]]

    def _is_returned(self, step: Step) -> bool:
        return any(id(v) in self.results for v in step.results)

    def _kernels(self) -> list[Kernel]:
        """Put every step inside of the kernels that read it, or make it one."""
        unshared = self._unshared()
        within: dict[int, list[Kernel]] = {}
        found = []
        for step in reversed(self.steps):
            users, returned = self._users_of(step), self._is_returned(step)
            readers = list({id(k): k for u in users for k in within[id(u)]}.values())
            alone = len(readers) == 1 and not returned
            joined = []
            if alone or not (step.expensive or id(step) in unshared):
                for kernel in readers:
                    inside = [u for u in users if id(u) in kernel.members]
                    indices = kernel.indices_of(inside)
                    repeated = any(id(u) in kernel.repeated or u.op in _REPEATS for u in inside)
                    if repeated and step.expensive and kernel.step.fuses:
                        continue
                    if _takes_in(kernel.step, step, alone) and len(indices) <= _DUPLICATES:
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
        return found[::-1]

    def _unshared(self) -> set[int]:
        """Find the steps that read more than they write, and of which a path leaves a kernel.

        They are not computed twice. A path from such a step to one of its readers leaves the reader's kernel
        if a step on it does not
        join the next.
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
                    leaves = any(id(s) in found or not self._joins(s, reader) for s in before)
                    new = {id(s): s for s in before if s is not step and id(s) not in seen}
                    seen.update(new)
                    waiting += new.values()
                if leaves:
                    found.add(id(step))
        return found

    def _joins(self, step: Step, reader: Step) -> bool:
        alone = len(self._users_of(step)) == 1 and not self._is_returned(step)
        return _takes_in(reader, step, alone) and (alone or not step.expensive)

    def invariant(self, constants: Iterable[Value]) -> list[Value]:
        """Find what a loop's body computes from its constants alone: it is computed once, before the loop."""
        known = {id(v) for v in constants}
        found = []
        for kernel in self.kernels:
            made = kernel.step.results
            shrinks = sum(v.nbytes for v in made) <= sum(v.nbytes for v in kernel.reads.values())
            if kernel.reads and shrinks and known.issuperset(kernel.reads):
                known.update(map(id, made))
                found += [v for v in made if id(v) not in self.results]
        return found

    def _in_results(self, donated: dict[int, Value], last: dict[int, int]) -> set[int]:
        """Find the values that lie in the memory of a result before it is written: the largest first."""
        made = {id(v): (t, v) for t, kernel in enumerate(self.kernels) for v in kernel.step.results}
        slots = [made[key] for key in self.results - donated.keys() if key in made]
        values = [(t, v) for key, (t, v) in made.items() if key not in self.results and v.size > 1]
        values.sort(key=lambda pair: -pair[1].nbytes)
        found: set[int] = set()
        slots.sort(key=lambda pair: -pair[1].nbytes)
        gaps = [[(-1, written)] for written, _ in slots]
        # First what a result is written over, then what else is there before it.
        for is_over in (True, False):
            for (written, result), free in zip(slots, gaps, strict=True):
                for start, v in values:
                    end = last.get(id(v), start)
                    if id(v) in found or v.nbytes > result.nbytes:
                        continue
                    if is_over and not (end == written and self._is_over(written, v, result)):
                        continue
                    gap = next((g for g in free if g[0] < start and (is_over or end < g[1])), None)
                    if gap is not None:
                        free.remove(gap)
                        free += [(gap[0], start), (end, gap[1])]
                        found.add(id(v))
        return found

    def _is_over(self, t: int, operand: Value, result: Value) -> bool:
        """Whether a kernel writes a result where an operand lies that is not read again."""
        same = operand.nbytes == result.nbytes
        return same and self.kernels[t].writes_over(operand, result, self.users[id(operand)])

    def peak(self, donated: dict[int, Value], outside: Collection[Value] = (), in_loop: bool = False) -> Peak:
        """Find when most bytes are live, of what is neither argument nor result.

        `donated` says over which argument a result is written; `outside` is not counted. In a loop, results
        are counted.
        """
        last = {key: t for t, kernel in enumerate(self.kernels) for key in kernel.reads}
        uncounted = {id(v) for v in outside}
        if not in_loop:
            uncounted |= self.results | self._in_results(donated, last)
        live: dict[int, Value] = {}
        size, best = 0, Peak(0, (), "")
        for t, kernel in enumerate(self.kernels):
            step = kernel.step
            ending = [v for key, v in kernel.reads.items() if key in live and last[key] == t]
            for v in step.results:
                over = donated.get(id(v))
                is_over = over is not None and step.entrywise and last.get(id(over), t) <= t
                if id(v) in uncounted or is_over:
                    continue
                for u in ending:
                    if id(u) in live and self._is_over(t, u, v):
                        size -= live.pop(id(u)).nbytes
                        break
                live[id(v)] = v
                size += v.nbytes
            if size + step.inside > best.nbytes:
                best = Peak(size + step.inside, tuple(live.values()), step.op)
            for v in [*ending, *step.results]:
                if id(v) in live and last.get(id(v), t) <= t and not (in_loop and id(v) in self.results):
                    size -= live.pop(id(v)).nbytes
        return best


def _rank(value: Value) -> int:
    """The number of axes along which there are several entries."""
    return sum(n > 1 for n in getattr(value.aval, "shape", ()))


def _takes_in(root: Step, step: Step, alone: bool) -> bool:
    """Whether the kernel of a root computes a step that it reads; `alone`, if nothing else reads that."""
    if not step.fuses or not root.reduces:
        return step.fuses and root.fuses
    size = max(v.size for v in root.operands)
    if size >= _LIBRARY_ENTRIES:
        return alone and step.in_library
    return size <= _WINDOW * root.results[0].size


def _view(kernel: Kernel) -> list[Value]:
    """What is read by a kernel that only reads it in another shape, in the place of its result."""
    same = len(kernel.reads) == 1 and all(step.op == "reshape" for step in kernel.members.values())
    return list(kernel.reads.values()) if same else []


def _barrier(kernel: Kernel) -> list[Value]:
    """What is behind a barrier, in the places of its results."""
    return kernel.step.operands if kernel.step.op == BARRIER else []


def _in_order(found: Sequence[Kernel]) -> list[Kernel]:
    """The kernels in the order in which what they read becomes ready, breadth first."""
    source = {id(v): kernel for kernel in found for v in kernel.step.results}
    waiting: dict[int, int] = {}
    readers: dict[int, list[Kernel]] = defaultdict(list)
    for kernel in found:
        needs = {id(source[key]) if key in source else key for key in kernel.reads}
        waiting[id(kernel)] = len(needs)
        for key in needs:
            readers[key].append(kernel)
    ready = deque(dict.fromkeys(key for kernel in found for key in kernel.reads if key not in source))
    ready.extend(id(kernel) for kernel in found if not waiting[id(kernel)])
    by_id, order = {id(kernel): kernel for kernel in found}, []
    while ready:
        key = ready.popleft()
        if key in by_id:
            order.append(by_id[key])
        for kernel in readers[key]:
            waiting[id(kernel)] -= 1
            if not waiting[id(kernel)]:
                ready.append(id(kernel))
    return order
