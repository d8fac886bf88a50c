"""A picture of any function at a size that can be read, and what had to be left out of it for that."""

from __future__ import annotations

import sys
from typing import NamedTuple

from funcprop.drawing.draw import Drawing, draw
from funcprop.drawing.levels import MOST_NODES as FEW_NODES
from funcprop.drawing.levels import in_runs
from funcprop.drawing.loops import has_loops
from funcprop.graph.graph import Graph
from funcprop.reporting.loop_contents import Opened, opened

# A picture with more nodes is drawn with loops closed, then with its innermost scopes collapsed.
MOST_NODES = 400
# What is still too large is drawn as so many runs of operators that follow each other.
RUNS = 150


class ScaledPicture(NamedTuple):
    """A drawing, the loops that are open in it, and in words what is collapsed."""

    drawing: Drawing
    opened: Opened
    notes: tuple[str, ...]


def picture_of(graph: Graph, depth: int | None, fold: bool) -> ScaledPicture:
    """The graph with as much of it open as fits into `MOST_NODES`; `depth` is the user's own choice."""
    closed = "Loops are drawn closed."
    for levels in (sys.maxsize, 1, 0):
        drawing = draw(graph, depth=99 if depth is None else depth, loops=levels, fold=fold)
        if len(drawing.picture.nodes) <= (FEW_NODES if fold and depth is None else MOST_NODES):
            has_closed = levels == 0 and has_loops(graph)
            return ScaledPicture(drawing, opened(graph, levels), (closed,) if has_closed else ())
    inside = opened(graph, 0)
    notes: tuple[str, ...] = (closed,) if has_loops(graph) else ()
    if fold and depth is None:
        drawing = draw(graph, loops=0)
        if any(node.inside for node in drawing.picture.nodes):
            notes += ("Grey boxes are modules, or operators together: choose one to see what is inside.",)
        return ScaledPicture(drawing, inside, notes)
    if depth is not None:
        return ScaledPicture(drawing, inside, notes)
    deepest = max(op.scope.count("/") for op in graph.operators)
    for level in range(deepest, -1, -1):
        drawing = draw(graph, depth=level, loops=0, fold=fold)
        if len(drawing.picture.nodes) <= MOST_NODES:
            which = "Scopes" if level == 0 else f"Scopes that are inside of {level} others"
            return ScaledPicture(drawing, inside, (*notes, f"{which} are drawn as one node each."))
    length = -(-len(graph) // RUNS)
    said = f"Of {len(graph):,} operators, every {length} that follow each other are drawn as one node."
    return ScaledPicture(draw(in_runs(graph, RUNS), depth=0, loops=0, fold=False), inside, (*notes, said))
