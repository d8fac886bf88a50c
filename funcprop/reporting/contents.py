"""What the page's script knows, as plain data with indices for names.

A number is rounded to five digits, which is more than can be seen.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from funcprop.drawing.picture import Node
from funcprop.drawing.symbols import symbol
from funcprop.graph.graph import Operator
from funcprop.reporting.equations import TypesetEquations, by_variable
from funcprop.reporting.inspection import InspectedValue
from funcprop.reporting.report_data import ReportData
from funcprop.reporting.statistics import Statistics


@dataclass(frozen=True)
class Detail:
    """What the page has of values that nobody named, and how many lines of equations of each sweep.

    `said` is told on the page.
    """

    histograms: bool
    statistics: bool
    lines: int
    said: str = ""


_BOUND = "To stay below 2 MB, this page has"
# From everything to little; the page takes the first that it has room for.
DETAILS = (
    Detail(True, True, 400),
    Detail(False, True, 400, f"{_BOUND} no histograms of values that nobody named."),
    Detail(False, False, 400, f"{_BOUND} no statistics of values that nobody named."),
    Detail(False, False, 50, f"{_BOUND} no statistics of values that nobody named, and few equations."),
)


def contents(report: ReportData, equations: TypesetEquations, detail: Detail = DETAILS[0]) -> dict[str, Any]:
    """Nodes, operators and values with their numbers; the order of both sweeps."""
    graph, of = report.graph, _Numbers(report)
    lines = (
        dict(by_variable((*equations.forward, *equations.inside), "")),
        dict(by_variable(equations.backward, f"∂{graph.outputs[0].name}/∂")),
    )
    named = {v.name for v in graph.variables if v.named}
    return {
        "nodes": [of.node(node) for node in of.nodes],
        "pictures": of.pictures,
        "operators": [of.operator(op) for op in of.listed],
        "sources": list(of.sources),
        "forward": len(graph),
        "isRun": report.value is not None,
        "links": [
            [of.values[link.source.name], of.values[link.target.name], link.is_next]
            for link in report.opened.shown.links
            if link.source.kind != "literal"
        ],
        "variables": [
            {
                **_described(q, DETAILS[0] if name in named else detail),
                "node": of.squares.get(name, -1),
                **(of.loop_around(name) if q.kind == "inside" else {}),
                "equations": [found for each in lines if (found := each.get(name))],
            }
            for name, q in report.inspection.quantities.items()
        ],
        "result": of.values[graph.outputs[0].name],
        "backward": [
            [of.operators[s.operator], [of.values[n] for n in s.adds], [of.values[n] for n in s.completes]]
            for s in report.inspection.backward
        ],
    }


class _Numbers:
    """The numbers by which the page's data refer to values, operators, source lines and nodes.

    The node of a value is a square, that of an operator a circle.
    """

    def __init__(self, report: ReportData) -> None:
        self.opened, self.inside = report.opened, report.inspection.inside
        self.listed = [*report.graph.operators, *(op for ops in self.opened.operators.values() for op in ops)]
        self.values = {name: i for i, name in enumerate(report.inspection.quantities)}
        self.operators = {op.name: i for i, op in enumerate(self.listed)}
        self.sources = {source: i for i, source in enumerate(dict.fromkeys(op.source for op in self.listed))}
        self.nodes: list[Node] = []
        self.pictures: list[dict[str, Any]] = []
        # Of all pictures in which something is seen, the outermost that has a square or a circle for it.
        self.squares: dict[str, int] = {}
        self.circles: dict[str, int] = {}
        self.around: dict[str, list[int]] = defaultdict(list)
        for drawing, outer, key in report.pictures:
            nodes, first = drawing.picture.nodes, len(self.nodes)
            self.pictures.append(
                {
                    "title": drawing.picture.title,
                    "first": first,
                    "around": outer,
                    "key": key,
                }
            )
            self.nodes += nodes
            for i, node in enumerate(nodes, first):
                for name in node.members:
                    if node.kind == "variable":
                        self.squares.setdefault(name, i)
                    elif node.kind == "operator":
                        self.circles[name] = i
                    else:
                        self.around[name].append(i)

    def loop_around(self, name: str) -> dict[str, int]:
        """Make the entry `loop` of a value or operator inside of an open loop."""
        loop = self.opened.loop_of(name)
        return {} if loop is None else {"loop": self.operators[loop]}

    def node(self, node: Node) -> dict[str, Any]:
        """Describe a node."""
        of = self.values if node.kind == "variable" else self.operators
        members, saved = [of[m] for m in node.members], node.key.startswith("r:")
        return {"key": node.key, "kind": node.kind, "members": members, "saved": saved}

    def operator(self, op: Operator) -> dict[str, Any]:
        """Describe an operator; an open loop also has the nodes inside of it."""
        own = self.circles.get(op.name, self.around[op.name][0] if self.around[op.name] else -1)
        circles = [self.circles[o.name] for o in self.opened.operators.get(op.name, ())]
        squares = [self.squares.get(v.name, -1) for v in self.opened.variables.get(op.name, ())]
        nodes = list(dict.fromkeys(i for i in (own, *self.around[op.name], *circles, *squares) if i >= 0))
        return {
            "name": op.name,
            "op": op.op,
            "symbol": symbol(op),
            "scope": op.scope,
            "source": self.sources[op.source],
            "flops": op.flops,
            "in": [self.values[v.name] for v in op.inputs if v.kind != "literal"],
            "out": [self.values[v.name] for v in op.outputs],
            "inside": [self.values[name] for name in self.inside.get(op.name, ())],
            "node": own,
            **self.loop_around(op.name),
            **({} if nodes == [own] else {"nodes": nodes}),
        }


def _described(q: InspectedValue, detail: Detail) -> dict[str, Any]:
    shape = "" if q.shape is None else f"[{','.join(map(str, q.shape))}]"
    found: dict[str, Any] = {
        "name": q.name,
        "kind": "parameter" if q.is_parameter else q.kind,
        "scope": q.scope,
        "type": q.dtype + shape,
        "bytes": q.nbytes,
        "value": _numbers(q.value, detail),
        "gradient": _numbers(q.gradient, detail),
    }
    return found if q.entries is None else {**found, "entries": q.entries}


def _numbers(found: Statistics | None, detail: Detail) -> list[Any] | None:
    """Minimum, maximum, mean, deviation, norm, zeros, non-finite, size, and the histogram as a list."""
    if found is None or not detail.statistics:
        return None
    h = found.histogram if detail.histograms else None
    plain = (found.minimum, found.maximum, found.mean, found.std, found.norm, found.zeros)
    histogram = None if h is None else [_short(h.low), _short(h.high), list(h.counts)]
    return [*map(_short, plain), found.nonfinite, found.size, histogram]


def _short(number: float | None) -> float | None:
    if number is None:
        return None
    rounded = float(f"{number:.5g}")
    # The largest of all numbers, which masks are filled with, would be rounded to infinity.
    return rounded if math.isfinite(rounded) else number
