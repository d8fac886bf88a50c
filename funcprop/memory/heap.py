"""Where buffers are placed: the largest first, each into the smallest gap that is free for its lifetime."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(eq=False)
class Buffer:
    """Memory for one value, or for several that are written over each other, from `start` to `end`."""

    nbytes: int
    start: int
    end: int
    values: list[object] = field(default_factory=list)

    def meets(self, other: Buffer) -> bool:
        """Whether both are needed at one time."""
        return self.start <= other.end and other.start <= self.end


def heap_size(buffers: Sequence[Buffer], alignment: int = 64) -> int:
    """The bytes of an arena for all buffers, as XLA lays it out: the better of two orders of placement.

    Reference: `GlobalDecreasingSizeBestFitHeap` of XLA's heap simulator.
    """
    rounded = {id(b): -(-b.nbytes // alignment) * alignment for b in buffers}
    by_size = _placed(sorted(buffers, key=lambda b: (-b.nbytes, b.start)), rounded)
    by_time = _placed(sorted(buffers, key=lambda b: (b.start - b.end, -b.nbytes)), rounded)
    return min(by_size, by_time)


def _placed(order: Sequence[Buffer], rounded: dict[int, int]) -> int:
    placed: list[tuple[int, int, Buffer]] = []
    top = 0
    for buffer in order:
        size, gap, best, offset = rounded[id(buffer)], 0, None, None
        for low, high, _ in sorted((p for p in placed if p[2].meets(buffer)), key=lambda p: p[:2]):
            room = low - gap
            if room >= size and (best is None or room < best):
                best, offset = room, gap
            gap = max(gap, high)
        offset = gap if offset is None else offset
        placed.append((offset, offset + size, buffer))
        top = max(top, offset + size)
    return top


def peak_time(buffers: Sequence[Buffer]) -> int:
    """When most bytes are needed."""
    changes: dict[int, int] = {}
    for buffer in buffers:
        changes[buffer.start] = changes.get(buffer.start, 0) + buffer.nbytes
        changes[buffer.end + 1] = changes.get(buffer.end + 1, 0) - buffer.nbytes
    most, at, held = 0, 0, 0
    for time in sorted(changes):
        held += changes[time]
        if held > most:
            most, at = held, time
    return at
