"""What the function costs, operator by operator."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from funcprop.drawing.symbols import symbol
from funcprop.graph.graph import Graph


@dataclass(frozen=True)
class Kind:
    """All operators of one kind in the function."""

    op: str
    symbol: str
    count: int
    flops: int
    nbytes: int


def kinds(graph: Graph) -> tuple[Kind, ...]:
    """The operators by kind, the one with the most operations first."""
    count, flops, nbytes = Counter[str](), Counter[str](), Counter[str]()
    symbols: dict[str, str] = {}
    for op in graph.operators:
        count[op.op] += 1
        flops[op.op] += op.flops
        nbytes[op.op] += op.nbytes
        symbols.setdefault(op.op, symbol(op))
    found = [Kind(op, symbols[op], n, flops[op], nbytes[op]) for op, n in count.items()]
    return tuple(sorted(found, key=lambda kind: (-kind.flops, -kind.nbytes)))
