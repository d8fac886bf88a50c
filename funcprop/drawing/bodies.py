"""How the bodies of an operator are wired to its operands and results, and what they are called."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from funcprop import _jax
from funcprop.graph.graph import Graph, Operator


class OpenedBody(NamedTuple):
    """A graph inside an operator.

    `operands[i]` is the operand that its input `i` has (at first, if it is carried), `results[j]` the result
    that its output `j` becomes, None for none. `carried` maps an output to the input that it is next, and
    `sliced` are the inputs that are one step of their operand. `name` is empty if there is one body.
    """

    name: str
    graph: Graph
    operands: tuple[int, ...]
    results: tuple[int | None, ...]
    carried: dict[int, int]
    sliced: range


def bodies(op: Operator) -> tuple[OpenedBody, ...]:
    """The bodies of an operator; none if it is not known how they are wired."""
    return tuple(_bodies(op))


def _bodies(op: Operator) -> Iterator[OpenedBody]:
    graphs, n = op.bodies, len(op.inputs)
    none = range(0)
    if op.op == "scan":
        (graph,) = graphs.values()
        consts, carries = _jax.scan_counts(op.static)
        carried = {j: consts + j for j in range(carries)}
        results = tuple(range(len(op.outputs)))
        yield OpenedBody("", graph, tuple(range(n)), results, carried, range(consts + carries, n))
    elif op.op == "while":
        skipped, consts = op.static["cond_nconsts"], op.static["body_nconsts"]
        first = skipped + consts
        state = tuple(range(first, n))
        carried = {j: consts + j for j in range(len(state))}
        yield OpenedBody("condition", graphs["cond_jaxpr"], (*range(skipped), *state), (None,), {}, none)
        inputs = (*range(skipped, first), *state)
        yield OpenedBody("body", graphs["body_jaxpr"], inputs, tuple(range(len(state))), carried, none)
    elif op.op == "cond":
        results = tuple(range(len(op.outputs)))
        for i, graph in enumerate(graphs.values()):
            yield OpenedBody(f"branch {i}", graph, tuple(range(1, n)), results, {}, none)
    elif len(graphs) == 1:
        (graph,) = graphs.values()
        if (len(graph.inputs), len(graph.outputs)) == (n, len(op.outputs)):
            yield OpenedBody("", graph, tuple(range(n)), tuple(range(len(op.outputs))), {}, none)


def inner_prefix(op: str, body: str) -> str:
    """The scope of a body's operators: `scan[body]`, `cond[branch 1]`; no scope of a user is called that."""
    return f"{op}[{body or 'body'}]"


def inner_name(op: str, body: str, inner: str) -> str:
    """The name of an operator inside of another, in the graph around: `scan[body]/mul`."""
    return f"{inner_prefix(op, body)}/{inner}"
