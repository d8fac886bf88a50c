"""From which repetitions of a folded block an arrow comes, and to which it leads, in words."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple


class Crossing(NamedTuple):
    """The repetitions, by group from the outside, that a value comes from and goes to."""

    source: Mapping[int, int]
    target: Mapping[int, int]


def alike(crossings: Iterable[Crossing]) -> Iterator[list[Crossing]]:
    """Those that leave and enter the same groups: one arrow can stand for them."""
    found: dict[tuple[tuple[int, ...], tuple[int, ...]], list[Crossing]] = defaultdict(list)
    for crossing in crossings:
        left, entered = beyond_common(crossing)
        found[tuple(left), tuple(entered)].append(crossing)
    yield from found.values()


def words(crossings: Sequence[Crossing], counts: Sequence[int]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Choose `Edge.leaves` and `Edge.enters` of an arrow that is all of these; `counts` are of the groups."""
    ends = [beyond_common(crossing) for crossing in crossings]
    left, entered = [source for source, _ in ends], [target for _, target in ends]
    sources, targets = ends[0]
    leaves = [_word(g, left, counts, counts[g] - 1, "last") for g in sources]
    enters = [_word(g, entered, counts, 0, "first") for g in targets]
    for i, g in enumerate(sources):
        for j, h in enumerate(targets):
            pairs = {(a[g], b[h]) for a, b in ends if g in a and h in b}
            if leaves[i] == enters[j] == "every" and len(pairs) == counts[g] == counts[h]:
                reverse = all(b == counts[g] - 1 - a for a, b in pairs)
                if reverse or all(a == b for a, b in pairs):
                    leaves[i] = enters[j] = "each"
                    enters[j] += ", backwards" * reverse
    return tuple(leaves), tuple(enters)


def beyond_common(crossing: Crossing) -> tuple[dict[int, int], dict[int, int]]:
    """The groups that are left and those that are entered: not those in which the value stays, or goes on."""
    source, target = list(crossing.source.items()), list(crossing.target.items())
    shared = 0
    while shared < min(len(source), len(target)) and source[shared][0] == target[shared][0]:
        shared += 1
        if source[shared - 1] != target[shared - 1]:
            break
    return dict(source[shared:]), dict(target[shared:])


def _word(group: int, ends: Iterable[Mapping[int, int]], counts: Sequence[int], only: int, word: str) -> str:
    found: Collection[int] = {end[group] for end in ends if group in end}
    if found == {only}:
        return word
    return "every" if len(found) == counts[group] else "some"
