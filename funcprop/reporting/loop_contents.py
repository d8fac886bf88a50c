"""What is inside of the loops that are drawn open, and under which name the sweeps keep it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from funcprop.drawing.bodies import inner_prefix
from funcprop.drawing.loops import open_loops
from funcprop.drawing.request import Shown
from funcprop.graph.graph import Graph, Operator, Variable
from funcprop.graph.naming import joined


@dataclass(frozen=True)
class Opened:
    """A graph with open loops.

    `operators` and `variables` are those inside of each loop, by its name, and those of the loops in it.
    `stored` says of a value computed in a `scan` what the sweeps call it, where it has a leading axis for the
    iterations; `slices` of one step of an array of which array.
    """

    shown: Shown
    operators: dict[str, tuple[Operator, ...]]
    variables: dict[str, tuple[Variable, ...]]
    stored: dict[str, str]
    slices: dict[str, str]

    def loop_of(self, name: str) -> str | None:
        """The loop in which something with this name is."""
        return next((loop for loop in self.operators if name.startswith(loop + "[")), None)


def opened(graph: Graph, levels: int) -> Opened:
    """The graph with its loops open to so many levels."""
    shown = open_loops(Shown(graph), levels)
    variables = {v.name: v for v in (*shown.graph.variables, *shown.places.values())}
    inside = {
        op.name: tuple(inner for inner in shown.graph if inner.name.startswith(op.name + "["))
        for op in graph
        if op.bodies
    }
    found = {loop: operators for loop, operators in inside.items() if operators}
    again = {link.target.name for link in shown.links if link.is_next}
    results = {v.name for v in graph.variables}
    slices = {
        link.target.name: link.source.name
        for link in shown.links
        if link.target.name not in again | results and link.source.kind != "literal"
    }
    return Opened(
        shown,
        found,
        {loop: tuple(v for name, v in variables.items() if name.startswith(loop + "[")) for loop in found},
        dict(_stored(graph, "", "")),
        slices,
    )


def _stored(graph: Graph, scope: str, stored: str) -> Iterator[tuple[str, str]]:
    """The names of values in the picture, and those under which the sweeps keep them."""
    for op in graph.operators:
        if op.op == "scan":
            whole = inner_prefix(joined(scope, op.name), "")
            (body,) = op.bodies.values()
            for inner in body:
                yield from ((joined(whole, v.name), f"{stored}{op.name}/{v.name}") for v in inner.outputs)
            yield from _stored(body, whole, f"{stored}{op.name}/")
