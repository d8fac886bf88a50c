"""The layers of a network without modules or paths: operators by the matrices that they read.

What reads a matrix of a flat dictionary, and what follows before the next one, is a layer.
"""

from __future__ import annotations

from collections import Counter, defaultdict

from funcprop.graph.graph import Graph, Operator
from funcprop.program.facts import PRODUCTS

# What is before the first layer, and what follows the last one.
_FIRST, _LOSS = "inputs", "loss"


def layers_of(graph: Graph) -> list[str] | None:
    """The layer of every operator, in the order of the operators; None if these are no layers."""
    leaves = _leaves(graph)
    groups = _groups(graph, leaves)
    if len(set(groups.values())) < 2:
        return None
    order = {v.name: i for i, v in enumerate(graph.inputs)}

    def read(op: Operator) -> str | None:
        found = [leaf for v in op.inputs if (leaf := leaves.get(v.name)) in groups]
        return groups[min(found, key=order.__getitem__)] if found else None

    # A cast or a transpose of one parameter is where that is read.
    is_own = {op.name: all(v.name in leaves for v in op.outputs) for op in graph.operators}
    reads = {op.name: None if is_own[op.name] else read(op) for op in graph.operators}
    last = max((i for i, op in enumerate(graph.operators) if reads[op.name] is not None), default=-1)
    seen = Counter[str]()
    layer, current = _FIRST, None
    found: dict[str, str] = {}
    for i, op in enumerate(graph.operators):
        group = reads[op.name]
        if group is not None and group != current:
            seen[group] += 1
            # The same parameters again, such as a table that is tied, are a layer of their own.
            layer, current = group if seen[group] == 1 else f"{group} ({seen[group]})", group
        elif i > last and not is_own[op.name]:
            layer = _LOSS
        found[op.name] = layer
    readers = defaultdict[str, list[Operator]](list)
    for op in graph.operators:
        for v in op.inputs:
            readers[v.name].append(op)
    for op in reversed(graph.operators):
        if is_own[op.name]:
            where = [found[r.name] for v in op.outputs for r in readers[v.name]]
            found[op.name] = next((name for name in where if name != _LOSS), _LOSS)
    return [found[op.name] for op in graph.operators] if len(set(found.values())) > 2 else None


def _leaves(graph: Graph) -> dict[str, str]:
    """The input of the graph that a value is computed of, where it is one alone."""
    leaves = {v.name: v.name for v in graph.inputs}
    for op in graph.operators:
        read = {v.name for v in op.inputs if v.kind != "literal"}
        of = {leaves.get(name) for name in read}
        if len(of) == 1 and (leaf := of.pop()) is not None:
            leaves.update((v.name, leaf) for v in op.outputs)
    return leaves


def _groups(graph: Graph, leaves: dict[str, str]) -> dict[str, str]:
    """The layer of each parameter: the name of the matrix."""
    factors = [v.name for op in graph.operators if op.op in (*PRODUCTS, "gather") for v in op.inputs]
    matrices = [leaf for name in factors if (leaf := leaves.get(name)) is not None]
    return {leaf: leaf.rpartition("/")[2] for leaf in dict.fromkeys(matrices)}
