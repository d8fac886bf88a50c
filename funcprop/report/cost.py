"""What each program costs: operators, matrix products, operations, bytes; and which operators cost most."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from funcprop.drawing import backward_graph, second_order_graph
from funcprop.drawing.symbols import symbol
from funcprop.graph import Graph, Operator

_PRODUCTS = frozenset({"dot_general", "conv_general_dilated"})


@dataclass(frozen=True)
class Program:
    """A program by its graph; `nbytes` are those of all results, `products` counts loops by iterations."""

    name: str
    operators: int
    products: int
    flops: int
    nbytes: int


@dataclass(frozen=True)
class Kind:
    """All operators of one kind in the function."""

    op: str
    symbol: str
    count: int
    flops: int
    nbytes: int


@dataclass(frozen=True)
class Cost:
    """Programs from the forward sweep to second derivatives, and the forward sweep by kinds of operators."""

    programs: tuple[Program, ...]
    kinds: tuple[Kind, ...]


def cost(
    graph: Graph, fun: Callable[..., Any], argnums: int | Sequence[int], args: Sequence[Any], kwargs: Any
) -> Cost:
    """The cost of a function whose graph is known, of its gradient and its Hessian-vector product."""
    both = backward_graph(fun, argnums)(*args, **kwargs)
    forward = {name for name, sweep in both.sweeps.items() if sweep == "forward"}
    product: Any = second_order_graph(fun, argnums)
    programs = (
        _program("forward sweep, as the gradient runs it", both, forward),
        _program("gradient: both sweeps", both),
        _program("Hessian-vector product", product(*args, **kwargs)),
    )
    return Cost(programs, tuple(_kinds(graph)))


def _program(name: str, graph: Graph, only: Collection[str] | None = None) -> Program:
    ops = [op for op in graph.operators if only is None or op.name in only]
    flops, nbytes = sum(op.flops for op in ops), sum(op.nbytes for op in ops)
    return Program(name, len(ops), _products(ops), flops, nbytes)


def _products(ops: Iterable[Operator]) -> int:
    found = 0
    for op in ops:
        times = op.static["length"] if op.op == "scan" else 1
        found += (op.op in _PRODUCTS) + times * sum(_products(body.operators) for body in op.bodies.values())
    return found


def _kinds(graph: Graph) -> list[Kind]:
    count, flops, nbytes = Counter[str](), Counter[str](), Counter[str]()
    symbols: dict[str, str] = {}
    for op in graph.operators:
        count[op.op] += 1
        flops[op.op] += op.flops
        nbytes[op.op] += op.nbytes
        symbols.setdefault(op.op, symbol(op))
    kinds = [Kind(op, symbols[op], n, flops[op], nbytes[op]) for op, n in count.items()]
    return sorted(kinds, key=lambda kind: (-kind.flops, -kind.nbytes))
