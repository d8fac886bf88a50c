"""What the page's script knows, as plain data with indices for names.

A number is rounded to five digits, which is more than can be seen.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

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
    graph, inspection, opened = report.graph, report.inspection, report.opened
    nodes = report.drawing.picture.nodes
    quantities = {name: i for i, name in enumerate(inspection.quantities)}
    listed = [*graph.operators, *(op for inner in opened.operators.values() for op in inner)]
    operators = {op.name: i for i, op in enumerate(listed)}
    node_of_variable = {name: i for i, n in enumerate(nodes) if n.kind == "variable" for name in n.members}
    node_of_operator = {name: i for i, n in enumerate(nodes) if n.kind != "variable" for name in n.members}
    value_lines = dict(by_variable((*equations.forward, *equations.inside), ""))
    gradient_lines = dict(by_variable(equations.backward, f"∂{graph.outputs[0].name}/∂"))

    named = {v.name for v in report.graph.variables if v.named}
    sources = {source: i for i, source in enumerate(dict.fromkeys(op.source for op in listed))}

    def nodes_of(op: Operator) -> list[int]:
        """Its own node; if it is an open loop, those of what is inside."""
        own = [node_of_operator[op.name]] if op.name in node_of_operator else []
        inner = [node_of_operator[o.name] for o in opened.operators.get(op.name, ())]
        squares = [node_of_variable.get(v.name) for v in opened.variables.get(op.name, ())]
        return list(dict.fromkeys([*own, *inner, *(n for n in squares if n is not None)]))

    def operator(op: Operator) -> dict[str, Any]:
        loop = opened.loop_of(op.name)
        found = {
            "name": op.name,
            "op": op.op,
            "symbol": symbol(op),
            "scope": op.scope,
            "source": sources[op.source],
            "flops": op.flops,
            "in": [quantities[v.name] for v in op.inputs if v.kind != "literal"],
            "out": [quantities[v.name] for v in op.outputs],
            "inside": [quantities[name] for name in inspection.inside.get(op.name, ())],
            "node": node_of_operator.get(op.name, -1),
        }
        if loop is not None:
            found["loop"] = operators[loop]
        if nodes_of(op) != [found["node"]]:
            found["nodes"] = nodes_of(op)
        return found

    def variable(name: str, q: InspectedValue) -> dict[str, Any]:
        found = _described(q, DETAILS[0] if name in named else detail)
        loop = opened.loop_of(name) if q.kind == "inside" else None
        found["node"] = node_of_variable.get(name, -1)
        if loop is not None:
            found["loop"] = operators[loop]
        found["equations"] = [x for lines in (value_lines, gradient_lines) if (x := lines.get(name))]
        return found

    return {
        "nodes": [
            {
                "key": node.key,
                "kind": node.kind,
                "members": [(quantities if node.kind == "variable" else operators)[m] for m in node.members],
                "saved": node.key.startswith("r:"),
            }
            for node in nodes
        ],
        "origin": next((i for i, n in enumerate(nodes) if n.key == report.drawing.picture.origin), 0),
        "operators": [operator(op) for op in listed],
        "sources": list(sources),
        "forward": len(graph),
        "isRun": report.value is not None,
        "links": [
            [quantities[link.source.name], quantities[link.target.name], link.is_next]
            for link in opened.shown.links
            if link.source.kind != "literal"
        ],
        "variables": [variable(name, q) for name, q in inspection.quantities.items()],
        "result": quantities[graph.outputs[0].name],
        "backward": [
            [operators[s.operator], [quantities[n] for n in s.adds], [quantities[n] for n in s.completes]]
            for s in inspection.backward
        ],
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
