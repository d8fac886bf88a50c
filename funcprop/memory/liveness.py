"""How many bytes of a program's values are live at a time, and which.

A value that a kernel (`fusion.py`) writes to memory lives from there to the last kernel that reads it.
Kernels run in the order in which what they read becomes ready.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from funcprop.memory.fusion import Fusion, Kernel, Step, Value

BARRIER = "optimization_barrier"


@dataclass(frozen=True, eq=False)
class Peak:
    """The bytes that are live at most, the values then, and the operator that runs."""

    nbytes: int
    live: tuple[Value, ...]
    op: str


class Liveness:
    """The kernels of a program of `steps` whose results are `results`, in the order in which they run."""

    def __init__(
        self, steps: Sequence[Step], results: Iterable[Value | None], library: bool = True, chip: int = 0
    ) -> None:
        self.chip = chip
        fusion = Fusion(steps, results, library)
        self.results, self.users = fusion.results, fusion.users
        self.hides = any(kernel.hides for kernel in fusion.kernels)
        # A barrier moves nothing, but what is behind it waits for all that it reads.
        self.kernels = self._without(_barrier, _in_order(self._without(_view, fusion.kernels)))

    def _without(self, views: Callable[[Kernel], Sequence[Value]], found: Sequence[Kernel]) -> list[Kernel]:
        """The kernels that compute something; what others make is the memory that they read."""
        same: dict[int, Value] = {}
        kept = []
        for kernel in found:
            kernel.reads = {id(v): v for v in (same.get(k, v) for k, v in kernel.reads.items())}
            kernel.operands = [same.get(id(v), v) for v in kernel.operands]
            sources = views(kernel)
            same.update((id(v), u) for u, v in zip(sources, kernel.step.results, strict=False))
            if not sources:
                kept.append(kernel)
        self.results = {id(same[key]) if key in same else key for key in self.results}
        return kept

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
        made = [(t, v) for t, kernel in enumerate(self.kernels) for v in kernel.step.results if v.size > 1]
        made.sort(key=lambda pair: -pair[1].nbytes)
        found: set[int] = set()
        for written, result in made:
            if id(result) not in self.results:
                continue
            # What is written over an argument is free once that was read.
            first = last.get(id(donated[id(result)]), -1) if id(result) in donated else -1
            # From when to when the memory is free, and what is written there then.
            free = [(first, written, result)]
            for start, v in made:
                if id(v) in self.results or id(v) in found or v.nbytes > result.nbytes:
                    continue
                end = last.get(id(v), start)
                for gap in free:
                    begin, t, after = gap
                    if begin < start and (end < t or (end == t and self._is_over(t, v, after))):
                        free.remove(gap)
                        free += [(begin, start, v), (end, t, after)]
                        found.add(id(v))
                        break
        return found

    def _on_chip(self, last: Mapping[int, int], elsewhere: Collection[int]) -> set[int]:
        """Find the values that stay in the memory on the chip: what is needed for a short time first."""
        if not self.chip:
            return set()
        free = np.full(len(self.kernels), self.chip)
        made = [(t, v) for t, kernel in enumerate(self.kernels) for v in kernel.step.results]
        spans = [(t, last.get(id(v), t) + 1, v) for t, v in made if id(v) not in elsewhere]
        found: set[int] = set()
        for start, end, v in sorted(spans, key=lambda span: span[1] - span[0]):
            if free[start:end].min() >= v.nbytes:
                free[start:end] -= v.nbytes
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
        uncounted |= self._on_chip(last, uncounted)
        live: dict[int, Value] = {}
        size, best = 0, Peak(0, (), "")
        for t, kernel in enumerate(self.kernels):
            step = kernel.step
            ending = [v for key, v in kernel.reads.items() if key in live and last[key] == t]
            for v in step.results:
                over = donated.get(id(v))
                is_over = over is not None and last.get(id(over), t) <= t and _is_written(step, over)
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


def _is_written(step: Step, argument: Value) -> bool:
    """Whether a step can write its result where an argument lies that it may overwrite."""
    return step.entrywise or any(step.operands[k] is argument for k in step.in_place)


def _view(kernel: Kernel) -> list[Value]:
    """What is read by a kernel that only reads it in another shape, in the place of its result."""
    same = len(kernel.reads) == 1 and all(step.op == "reshape" for step in kernel.members.values())
    return list(kernel.reads.values()) if same else []


def _barrier(kernel: Kernel) -> list[Value]:
    """What is behind a barrier, in the places of its results."""
    return kernel.operands if kernel.step.op == BARRIER else []


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
