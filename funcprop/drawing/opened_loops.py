"""Two graphs made comparable: loops that differ are open, and what becomes something else is an operator.

Loops that are the same in both graphs stay operators. The others are opened where both graphs have one with
the same title (so many iterations, in this direction), and the loops in them likewise. What is in a loop is
only compared with what is in such a loop.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable, Collection, Hashable
from typing import NamedTuple

from funcprop.drawing.bodies import bodies
from funcprop.drawing.loops import OPENABLE, open_loops, title
from funcprop.drawing.matching import Matching
from funcprop.drawing.request import DrawnPlace, Link, Shown
from funcprop.drawing.scopes import scope_path, scopes_around
from funcprop.graph.graph import Graph, Operator, Variable


class Passage(Operator):
    """A step by which a value becomes another in an opened loop: carried, iterated, or the loop's result.

    It stands for the arrows (`Link`) that lead to a value, and is no operator of anybody's.
    """

    @property
    def static(self) -> dict[str, object]:
        """None: it has no equation."""
        return {}


class ComparedGraphs(NamedTuple):
    """Both graphs with the loops that differ open, and what is the same in them."""

    first: Shown
    second: Shown
    matching: Matching


def compared(a: Shown, b: Shown, role: Callable[[str], str]) -> ComparedGraphs:
    """Open what differs and match the rest; operators of different roles are not the same."""
    names: tuple[set[str], set[str]] = (set(), set())
    while True:
        first, second = (open_loops(s, sys.maxsize, n) for s, n in zip((a, b), names, strict=True))
        keys = [_keys(shown, role) for shown in (first, second)]
        matching = Matching(with_passages(first), with_passages(second), keys[0], keys[1])
        open_a, open_b = (_closed(ops, n) for ops, n in zip(matching.unmatched(), names, strict=True))
        titles = open_a.keys() & open_b.keys()
        if not titles:
            return ComparedGraphs(first, second, matching)
        for found, n in ((open_a, names[0]), (open_b, names[1])):
            n.update(name for key in titles for name in found[key])


def _closed(operators: Collection[Operator], opened: Collection[str]) -> dict[Hashable, list[str]]:
    """The loops that could still be opened, by their title and how they are run."""
    found: dict[Hashable, list[str]] = defaultdict(list)
    for op in operators:
        if op.op in OPENABLE and op.name not in opened and any(body.graph.operators for body in bodies(op)):
            found[title(op), op.static.get("unroll")].append(op.name)
    return found


def loops_around(scope: str, shown: Shown) -> list[tuple[str, ...]]:
    """The scopes of the opened loops around a scope, from the outside."""
    return [path for path in scopes_around(scope) if path in shown.titles]


def _keys(shown: Shown, role: Callable[[str], str]) -> Callable[[Operator], Hashable]:
    """Key operators by their role and the loops around them, which equal ones share."""

    def key(op: Operator) -> Hashable:
        path = scope_path(op.scope)
        loops = tuple(
            (shown.titles[loop], path[len(loop) :][:1] if loop[-1].endswith("[bodies]") else ())
            for loop in loops_around(op.scope, shown)
        )
        return role(shown.roles.get(op.name, "")), loops

    return key


def with_passages(shown: Shown) -> Graph:
    """The graph in which every value of an opened loop is what an operator computes."""
    sources: dict[str, list[Link]] = defaultdict(list)
    for link in shown.links:
        sources[link.target.name].append(link)
    scope_of = {op.name: op.scope for op in shown.graph}
    before: dict[str, list[tuple[int, Operator]]] = defaultdict(list)
    after: dict[tuple[str, ...], list[Operator]] = defaultdict(list)
    for place, v in shown.places.items():
        passage = _passage(v, sources[v.name], place)
        if place.outside:
            after[scope_path(scope_of[place.operator])[: place.depth]].append(passage)
        else:
            before[place.operator].append((place.depth, passage))
    last = {path: op.name for op in shown.graph for path in scopes_around(op.scope)}
    ends: dict[str, list[Operator]] = defaultdict(list)
    for path in sorted(after, key=len, reverse=True):
        ends[last[path]] += after[path]
    operators: list[Operator] = []
    for op in shown.graph:
        operators += [passage for _, passage in sorted(before[op.name], key=lambda entry: entry[0])]
        operators.append(op)
        operators += ends[op.name]
    graph = shown.graph
    return Graph(graph.name, graph.inputs, graph.constants, tuple(operators), graph.outputs)


def _passage(v: Variable, links: list[Link], place: DrawnPlace) -> Passage:
    kind = "result" if place.outside else "carried" if any(link.is_next for link in links) else "step"
    name = links[0].end if links else f"→ {v.name}"
    return Passage(name, kind, v.scope, tuple(link.source for link in links), (v,), 0, None, {}, None, None)
