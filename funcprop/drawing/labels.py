"""Where a picture begins, and what its nodes and arrows say."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import replace

from funcprop.drawing.picture import Edge, Node, value_text
from funcprop.drawing.request import Shown
from funcprop.graph.graph import Operator, bytes_text


def origin(shown: Shown, candidates: Collection[str]) -> str | None:
    """The input that is farthest from the result, and of those the one that is used the least."""
    onward = defaultdict(list)
    for link in shown.links:
        if not link.is_next:
            onward[link.source.name].append(link.target.name)
    distance: dict[str, int] = {}

    def of(name: str) -> int:
        beyond = [distance.get(target, 0) + 1 for target in onward[name]]
        return max([distance.get(name, 0), *beyond])

    uses: Counter[str] = Counter()
    for op in reversed(shown.graph.operators):
        beyond = max((of(v.name) for v in op.outputs), default=0)
        for v in op.inputs:
            distance[v.name] = max(distance.get(v.name, 0), beyond + 1)
            uses[v.name] += 1
    found = [v.name for v in shown.graph.inputs if v.name in candidates]
    return min(found, key=lambda name: (-of(name), uses[name] + len(onward[name])), default=None)


def merged(groups: Iterable[list[Edge]], nodes: Mapping[str, Node], few: bool) -> Iterator[Edge]:
    """One arrow for all values between the same nodes; in a picture of few operators, with what flows."""
    for edges in groups:
        edge = edges[0]
        ends = {nodes[edge.source].kind, nodes[edge.target].kind}
        if len(edges) > 1:
            total = sum(e.nbytes or 0 for e in edges)
            names = ", ".join(e.variable for e in edges)
            edge = replace(edge, variable=names, shape=None, dtype=None, nbytes=total)
            text = f"{len(edges)} values, {bytes_text(total)}"
        else:
            text = value_text(edge.shape, edge.dtype, edge.nbytes)
        if edge.kind == "residual":
            yield replace(edge, label=bytes_text(edge.nbytes or 0))
        elif few and ends == {"operator"}:
            yield replace(edge, label=text)
        else:
            yield edge


def operator_tooltip(op: Operator) -> str:
    """The full story of an operator."""
    results = ", ".join(f"{v.name}: {value_text(v.shape, str(v.dtype), v.nbytes)}" for v in op.outputs)
    lines = [f"{op.op}({', '.join(v.name for v in op.inputs)})", results, f"{op.flops:,} flops"]
    lines += [f"in {op.scope}"] if op.scope else []
    lines += [op.source] if op.source else []
    lines += [f"{key}: {len(body)} operators" for key, body in op.bodies.items()]
    return "\n".join(lines)
