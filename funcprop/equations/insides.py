"""What is inside of the loops and branches of a graph, as lines of their own, and what is inside of these."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax.numpy as jnp

from funcprop.equations.bodies import Around, BodyWriter, InsideLines
from funcprop.equations.cases import Case, conditions
from funcprop.equations.condense import Condensed
from funcprop.equations.flow import Flow, is_key, run
from funcprop.equations.line_writer import LineWriter
from funcprop.equations.loops import Scan, While
from funcprop.graph.graph import Graph, Operator, Variable
from funcprop.graph.references import has_references


class Insides:
    """The loops and branches that the result of a graph is computed by, each condensed.

    `inputs` are those that the result is differentiated by; `depth` is the number of loops around the graph.
    """

    def __init__(self, graph: Graph, result: Variable, inputs: Sequence[str], depth: int = 0) -> None:
        self.flow, self.depth = Flow(graph, result, inputs), depth
        users = {v.name for op in self.flow.operators for v in op.inputs} | {result.name}
        self.results = {
            op: {i: v.name for i, v in enumerate(op.outputs) if v.name in users} for op in self.flow.operators
        }
        self.parts = {op: parts for op in self.flow.operators if (parts := self._parts(op))}
        self.inner = {
            part: Insides(part.body.graph, part.body.result, part.body.active, depth + (op.op != "cond"))
            for op, parts in self.parts.items()
            for part in parts
        }

    def _parts(self, op: Operator) -> Sequence[Scan | While | Case]:
        if op.op not in ("scan", "while", "cond") or op.call is not None or op.jaxpr.effects:
            return ()
        if has_references(op) or not all(_is_plain(v) for v in (*op.inputs, *op.outputs)):
            return ()
        active = [v.name in self.flow.active for v in op.inputs]
        read = list(self.results[op])
        if op.op == "cond":
            assert op.equation is not None
            count = len(op.equation.params["branches"])
            return [Case(op, i, active, read) for i in (range(count) if count != 2 else (1, 0))]
        if op.op == "while":
            return [While(op, read)]
        return [Scan(op, active, read)] if op.static["length"] else ()

    def add_roles(self, condensed: Condensed) -> Condensed:
        """The roles of parameters that are read in bodies alone, beside those of others."""
        roles, functions = dict(condensed.roles), dict(condensed.functions)
        for op, parts in self.parts.items():
            for part in parts:
                inside = self.inner[part].add_roles(part.body.condensed)
                functions |= inside.functions
                given = op.inputs[len(op.inputs) - len(part.body.inputs) :]
                for v, inner in zip(given, part.body.inputs, strict=True):
                    role = inside.roles.get(inner.name)
                    if role is not None and v.kind != "literal":
                        roles.setdefault(self.flow.source(v).name, (role[0], op.outputs[0].name))
        return replace(condensed, roles=roles, functions=functions)

    def written(
        self, writer: LineWriter, condensed: Condensed, taken: frozenset[str] = frozenset()
    ) -> tuple[InsideLines, ...]:
        """All of them, in the symbols of the lines around them."""
        return tuple(self._written(writer, condensed, taken | {s.text() for s in writer.symbols.values()}))

    def _written(
        self, writer: LineWriter, condensed: Condensed, taken: frozenset[str]
    ) -> Iterator[InsideLines]:
        given = [*self.flow.graph.inputs, *self.flow.graph.constants]
        lines = {v.name for op in condensed.graph.operators for v in op.outputs}
        for op, parts in self.parts.items():
            if not lines.issuperset(self.results[op].values()):
                # It is a part of a line that has a name, such as a mask.
                continue
            operands = [condensed.operand(v, writer.symbols) for v in op.inputs]
            read = self.results[op]
            results = [writer.symbols[v.name].text() if i in read else None for i, v in enumerate(op.outputs)]
            ends = [i for i, name in read.items() if name == self.flow.result.name]
            collected = writer.collected if isinstance(writer, BodyWriter) else ()
            around = Around(taken, self._shared(op, collected), self.depth, ends[0] if ends else None)
            compute = run(self.flow.between(op.inputs), given, op.inputs)
            titles: Sequence[str] = ("", "")
            if op.op == "cond":
                titles = conditions(op, self.flow, lambda v: condensed.operand(v, writer.symbols))
            for part in parts:
                if isinstance(part, Case):
                    part.condition = titles[part.number]
                title, back, inside = part.lines(operands, results, around)
                inner = self.inner[part].written(inside, part.body.condensed, taken)
                leaves = _leaves(part, compute, [v.name for v in given])
                is_case = isinstance(part, Case)
                yield InsideLines(
                    title,
                    back,
                    *inside.lines(),
                    part.body.traced,
                    leaves,
                    inner,
                    is_optional=is_case,
                    is_result=is_case and bool(ends),
                )

    def _shared(self, op: Operator, collected: Collection[str]) -> frozenset[int]:
        """The operands that other operators or steps read too, or that stand at several places."""
        names = [v.name for v in op.inputs]

        def is_shared(v: Variable) -> bool:
            is_read_again = len(self.flow.readers[v.name]) > 1 or names.count(v.name) > 1
            return is_read_again or self.flow.source(v).name in collected

        return frozenset(i for i, v in enumerate(op.inputs) if v.kind != "literal" and is_shared(v))


def _leaves(
    part: Scan | While | Case, compute: Callable[..., Any], names: Sequence[str]
) -> Callable[[Mapping[str, Any]], Sequence[Any]]:
    return lambda values: part.leaves(compute(*(values[name] for name in names)))


def _is_plain(v: Variable) -> bool:
    """Whether a variable is an array of real numbers, or a key that is passed on."""
    return (
        jnp.issubdtype(v.dtype, jnp.bool)
        or is_key(v)
        or (jnp.issubdtype(v.dtype, jnp.number) and not jnp.issubdtype(v.dtype, jnp.complexfloating))
    )
