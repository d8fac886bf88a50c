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

import itertools
from collections.abc import Sequence
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


@dataclass(frozen=True)
class Chain:
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

    def schedule(self, segments: Sequence[Segment]) -> Schedule:
        """The numbers of a path."""
        held, extra, flops, peak = 0, 0, 0, 0
        for s in segments:
            held, extra, flops = held | s.held, extra + s.extra, flops + s.flops
            peak = max(peak, self.size(held) + extra + s.transient)
        return Schedule(tuple(segments), self.size(held) + extra, flops, peak)


class _Labels(NamedTuple):
    """Ways to a cut point that hold the same live values, by increasing bytes and decreasing FLOPs."""

    nbytes: np.ndarray
    flops: np.ndarray
    segment: np.ndarray
    previous: np.ndarray
    parent: np.ndarray


def frontier(chain: Chain, budget: float = np.inf, peak: float = np.inf) -> list[Schedule]:
    """All schedules within the budget and the peak that no other one beats in bytes and FLOPs."""
    into: list[list[int]] = [[] for _ in chain.live]
    for number, s in enumerate(chain.segments):
        into[s.stop].append(number)
    most = max(100, MOST_LABELS // max(len(chain.segments), 1))
    zero, none = np.zeros(1, np.int64), np.full(1, -1)
    groups: list[dict[int, _Labels]] = [{0: _Labels(zero, zero, none, none, none)}]
    order: list[list[int]] = [[0]]
    for stop in range(1, len(chain.live)):
        pending: dict[int, list[_Labels]] = {}
        for number in into[stop]:
            s = chain.segments[number]
            for parent, mask in enumerate(order[s.start]):
                labels = groups[s.start][mask]
                nbytes = labels.nbytes + (chain.size(s.held & ~mask) + s.extra)
                fits = np.flatnonzero((nbytes <= budget) & (nbytes + s.transient <= peak))
                if fits.size:
                    same = np.full(fits.size, number), np.full(fits.size, parent)
                    new = _Labels(nbytes[fits], labels.flops[fits] + s.flops, same[0], fits, same[1])
                    pending.setdefault((mask | s.held) & chain.live[stop], []).append(new)
        groups.append({mask: _undominated(found, most) for mask, found in pending.items()})
        order.append(list(groups[-1]))
    last = groups[-1].get(0)
    if last is None:
        return []
    return [_path(chain, groups, order, i) for i in range(last.nbytes.size)]


def _undominated(found: Sequence[_Labels], most: int) -> _Labels:
    labels = _Labels(*(np.concatenate(column) for column in zip(*found, strict=True)))
    by = np.lexsort((labels.flops, labels.nbytes))
    least = np.minimum.accumulate(labels.flops[by])
    better = np.concatenate([[True], least[1:] < least[:-1]])
    chosen = by[better]
    if chosen.size > most:
        sizes = labels.nbytes[chosen]
        buckets = (sizes - sizes[0]) * most // (sizes[-1] - sizes[0] + 1)
        # Of each bucket the last has the fewest FLOPs; the smallest of all stays.
        last = np.append(buckets[1:] != buckets[:-1], True)
        last[0] = True
        chosen = chosen[last]
    return _Labels(*(column[chosen] for column in labels))


def _path(
    chain: Chain, groups: Sequence[dict[int, _Labels]], order: Sequence[Sequence[int]], label: int
) -> Schedule:
    segments: list[Segment] = []
    node, mask = len(groups) - 1, 0
    while node > 0:
        labels = groups[node][mask]
        s = chain.segments[labels.segment[label]]
        segments.append(s)
        node, mask, label = s.start, order[s.start][labels.parent[label]], labels.previous[label]
    return chain.schedule(segments[::-1])


def cheapest(chain: Chain, budget: float, peak: float = np.inf) -> Schedule | None:
    """The schedule of the fewest FLOPs within the budget and the peak; among those, one of a low peak."""
    found = frontier(chain, budget, peak)
    if not found:
        return None
    best = found[-1]
    low, high = max(best.nbytes, 0), best.peak
    for _ in range(4):
        # The peak of any schedule is at least what some schedule of these FLOPs holds.
        middle = (low + high) // 2
        if middle >= high:
            break
        narrower = frontier(chain, budget, middle)
        if narrower and narrower[-1].flops <= best.flops:
            best = narrower[-1]
            high = best.peak
        else:
            low = middle + 1
    return best


def in_chunks(chain: Chain, count: int) -> Schedule | None:
    """`count` recomputed segments, the largest as small as possible (Chen et al. 2016); None if impossible.

    Steps that cannot be recomputed are kept.
    """
    movable = {(s.start, s.stop): s for s in chain.segments if s.recomputed and s.variant == 0}
    # The state is a cut point and the chunks before it; its value the largest transient, then the bytes cut.
    best: dict[tuple[int, int], tuple[tuple[int, int], tuple[Segment, ...]]] = {(0, 0): ((0, 0), ())}
    into: list[list[Segment]] = [[] for _ in chain.live]
    for s in movable.values():
        into[s.stop].append(s)
    for s in chain.segments:
        if not s.recomputed and s.variant == 0 and (s.start, s.stop) not in movable:
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
