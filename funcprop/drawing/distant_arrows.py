"""Arrows between places far apart, in pictures of many nodes.

A layout engine gives an arrow one bend for every column that it crosses. The residuals of a deep network
cross all of both sweeps: of 3,000 operators they made a million bends, which took Graphviz 2.43 over 10 s, or
overflowed its stack. So the engine is not told of them, and they are drawn from end to end as one curve.
"""

from __future__ import annotations

from collections import defaultdict

from funcprop.drawing.picture import Picture

# Columns that an arrow may cross.
_NEAR = 4


def far_edges(picture: Picture) -> frozenset[int]:
    """The arrows, by their number, that cross more columns than an engine should have to bend them over."""
    column = columns(picture)
    return frozenset(
        i
        for i, edge in enumerate(picture.edges)
        if abs(column[edge.target] - column[edge.source]) > _NEAR or edge.kind == "repeat"
    )


def columns(picture: Picture) -> dict[str, int]:
    """The column of every node: one more than that of what flows into it.

    An input, and a value that is saved, stand beside what reads them.
    """
    readers: dict[str, list[str]] = defaultdict(list)
    waiting = dict.fromkeys((node.key for node in picture.nodes), 0)
    for edge in picture.edges:
        if edge.kind != "repeat":
            readers[edge.source].append(edge.target)
            waiting[edge.target] += 1
    ready = [key for key, count in waiting.items() if not count]
    made = {edge.target for edge in picture.edges if edge.kind == "flow"}
    column = dict.fromkeys(waiting, 0)
    while ready:
        key = ready.pop()
        for target in readers[key]:
            column[target] = max(column[target], column[key] + 1)
            waiting[target] -= 1
            if not waiting[target]:
                ready.append(target)
    for key in waiting.keys() - made:
        if readers[key]:
            column[key] = min(column[target] for target in readers[key]) - 1
    return column
