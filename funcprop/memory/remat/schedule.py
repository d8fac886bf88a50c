"""The cheapest way through a chain of cut points under a budget: dynamic programming on plain numbers.

A program is a chain of steps; between two cut points its steps are either *kept* (what their derivatives read
is held until the backward sweep) or *recomputed* (only what the steps read from outside is held, and they are
run again when the backward sweep arrives). A schedule is a path of such segments. It is judged by three
numbers: the bytes it holds between the sweeps, the FLOPs it runs again, and its peak, the largest sum of what
is held so far and what one recomputed segment needs while it is differentiated.

A value that several segments hold is held once. A label of the dynamic program therefore carries, beside
bytes and FLOPs, which of the values that are live at its cut point are already held; with that the accounting
is exact, and a label is dropped only if another one at the same cut point holds the same live values with
no more bytes and no more FLOPs.

Chains of equal steps are the problem of Griewank & Walther (*revolve*, 2000) and Chen et al. ("Training deep
nets with sublinear memory cost", 2016); unequal ones that of Beaumont et al. ("Optimal checkpointing for
heterogeneous chains", 2019), whose segments are recomputed in pieces; here a segment is recomputed once.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

# Labels of all segments together, about; more at a cut point are thinned to one for each interval of bytes.
MOST_LABELS = 300_000


@dataclass(frozen=True)
class Segment:
    """The steps between two cut points and what is done with them.

    `held` are the values, bit by bit, that the segment reads in the backward sweep and that have a name
    outside of it; `extra` the bytes that it holds besides; `transient` the bytes that exist while it
    is recomputed and differentiated. `variant` is the form in which its loop runs, if it is one.
    """

    start: int
    stop: int
    recomputed: bool
    held: int
    extra: int
    flops: int
    transient: int
    variant: int = 0


class Schedule(NamedTuple):
    """A path through the chain, with its three numbers."""

    segments: tuple[Segment, ...]
    nbytes: int
    flops: int
    peak: int


# A cut point, and the live values that are held there.
State = tuple[int, int]


class ScheduledSegment(NamedTuple):
    """A segment from a state, and the bytes that it adds to what is held there."""

    before: State
    segment: Segment
    nbytes: int


@dataclass(frozen=True)
class CutChain:
    """Cut points `0 … len(live) − 1`, the values live at each, the size of every value, and the segments."""

    live: tuple[int, ...]
    sizes: tuple[int, ...]
    segments: tuple[Segment, ...]

    def size(self, mask: int) -> int:
        """Bytes of a set of values."""
        total = 0
        while mask:
            low = mask & -mask
            total += self.sizes[low.bit_length() - 1]
            mask ^= low
        return total

    @property
    def end(self) -> State:
        """The state at which every path ends."""
        return len(self.live) - 1, 0

    @functools.cached_property
    def steps(self) -> dict[State, list[ScheduledSegment]]:
        """The segments as steps between states, by the state to which they lead, in order of cut points."""
        into: list[list[Segment]] = [[] for _ in self.live]
        for s in self.segments:
            into[s.stop].append(s)
        masks: list[list[int]] = [[0], *([] for _ in self.live[1:])]
        found: dict[State, list[ScheduledSegment]] = {}
        for stop in range(1, len(self.live)):
            for s in into[stop]:
                for mask in masks[s.start]:
                    nbytes = self.size(s.held & ~mask) + s.extra
                    state = stop, (mask | s.held) & self.live[stop]
                    if state not in found:
                        found[state] = []
                        masks[stop].append(state[1])
                    found[state].append(ScheduledSegment((s.start, mask), s, nbytes))
        return found

    def schedule(self, segments: Sequence[Segment]) -> Schedule:
        """The numbers of a path."""
        held, nbytes, flops, peak = 0, 0, 0, 0
        for s in segments:
            nbytes += self.size(s.held & ~held) + s.extra
            held, flops, peak = held | s.held, flops + s.flops, max(peak, nbytes + s.transient)
        return Schedule(tuple(segments), nbytes, flops, peak)


class _Labels(NamedTuple):
    """Ways to a cut point that hold the same live values, by increasing bytes and decreasing FLOPs."""

    nbytes: np.ndarray
    flops: np.ndarray
    step: np.ndarray
    previous: np.ndarray


def frontier(chain: CutChain, budget: float = np.inf, peak: float = np.inf) -> list[Schedule]:
    """All schedules within the budget and the peak that no other one beats in bytes and FLOPs."""
    labels = _labels(chain, budget, peak)
    return [_path(chain, labels, i) for i in range(_count(chain, labels))]


def _quickest(chain: CutChain, budget: float, peak: float) -> Schedule | None:
    """The last of the frontier."""
    labels = _labels(chain, budget, peak)
    count = _count(chain, labels)
    return _path(chain, labels, count - 1) if count else None


def _count(chain: CutChain, labels: Mapping[State, _Labels]) -> int:
    return labels[chain.end].nbytes.size if chain.end in labels else 0


def _labels(chain: CutChain, budget: float, peak: float) -> dict[State, _Labels]:
    most = max(100, MOST_LABELS // max(len(chain.segments), 1))
    zero = np.zeros(1, np.int64)
    labels: dict[State, _Labels] = {(0, 0): _Labels(zero, zero, zero, zero)}
    for state, into in chain.steps.items():
        found = []
        for number, step in enumerate(into):
            if (before := labels.get(step.before)) is None:
                continue
            room = min(budget, peak - step.segment.transient) - step.nbytes
            fits = int(before.nbytes.searchsorted(room, side="right"))
            if fits:
                flops = before.flops[:fits] + step.segment.flops
                found.append((before.nbytes[:fits] + step.nbytes, flops, number))
        if found:
            labels[state] = _undominated(found, most)
    return labels


def _undominated(found: Sequence[tuple[np.ndarray, np.ndarray, int]], most: int) -> _Labels:
    nbytes, flops = (np.concatenate([entry[i] for entry in found]) for i in (0, 1))
    counts = [entry[0].size for entry in found]
    by = np.lexsort((flops, nbytes))
    least = np.minimum.accumulate(flops[by])
    chosen = by[np.concatenate([[True], least[1:] < least[:-1]])]
    if chosen.size > most:
        sizes = nbytes[chosen]
        buckets = (sizes - sizes[0]) * most // (sizes[-1] - sizes[0] + 1)
        # Of each bucket the last has the fewest FLOPs; the smallest of all stays.
        last = np.append(buckets[1:] != buckets[:-1], True)
        last[0] = True
        chosen = chosen[last]
    entry = np.repeat(np.arange(len(found)), counts)[chosen]
    start = np.cumsum([0, *counts[:-1]])
    steps = np.array([number for *_, number in found])
    return _Labels(nbytes[chosen], flops[chosen], steps[entry], chosen - start[entry])


def _path(chain: CutChain, labels: Mapping[State, _Labels], label: int) -> Schedule:
    segments: list[Segment] = []
    state = chain.end
    while state != (0, 0):
        at = labels[state]
        step = chain.steps[state][at.step[label]]
        segments.append(step.segment)
        state, label = step.before, at.previous[label]
    return chain.schedule(segments[::-1])


def cheapest(chain: CutChain, budget: float, peak: float = np.inf) -> Schedule | None:
    """The schedule of the fewest FLOPs within the budget and the peak; among those, one of a low peak."""
    best = _quickest(chain, budget, peak)
    if best is None:
        return None
    low, high = max(best.nbytes, 0), best.peak
    for _ in range(4):
        # The peak of any schedule is at least what some schedule of these FLOPs holds.
        middle = (low + high) // 2
        if middle >= high:
            break
        narrower = _quickest(chain, budget, middle)
        if narrower is not None and narrower.flops <= best.flops:
            best = narrower
            high = best.peak
        else:
            low = middle + 1
    return best


def kept(chain: CutChain) -> Schedule:
    """The schedule that recomputes nothing."""
    whole = {s.start: s for s in chain.segments if not s.recomputed and s.variant == 0}
    segments, at = [], 0
    while at < len(chain.live) - 1:
        segments.append(whole[at])
        at = whole[at].stop
    return chain.schedule(segments)


def in_chunks(chain: CutChain, count: int) -> Schedule | None:
    """`count` recomputed segments, the largest as small as possible (Chen et al. 2016); None if impossible.

    Steps that cannot be recomputed are kept.
    """
    usable = [s for s in chain.segments if s.variant == 0]
    movable = {(s.start, s.stop) for s in usable if s.recomputed}
    # The state is a cut point and the chunks before it; its value the largest transient, then the bytes cut.
    best: dict[tuple[int, int], tuple[tuple[int, int], tuple[Segment, ...]]] = {(0, 0): ((0, 0), ())}
    into: list[list[Segment]] = [[] for _ in chain.live]
    for s in usable:
        if s.recomputed or (s.start, s.stop) not in movable:
            into[s.stop].append(s)
    for stop in range(1, len(chain.live)):
        for s, used in itertools.product(into[stop], range(count + 1)):
            if (before := best.get((s.start, used))) is None:
                continue
            (largest, cut), path = before
            value = max(largest, s.transient), cut + chain.size(chain.live[stop])
            key = stop, used + s.recomputed
            if key[1] <= count and (key not in best or value < best[key][0]):
                best[key] = value, (*path, s)
    found = best.get((len(chain.live) - 1, count))
    return None if found is None else chain.schedule(found[1])
