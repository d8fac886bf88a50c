"""What an operator of a second derivative computes: primal, tangent, cotangent, tangent of cotangent.

It is decided by what the operator depends on, and followed through the bodies of loops: what is carried from
one iteration to the next depends on all that it is computed from in any of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, get_args

from funcprop.drawing.bodies import OpenedBody, bodies, inner_name
from funcprop.graph.graph import Graph, Operator

Class = Literal["primal", "tangent", "cotangent", "tangent of cotangent"]

# By mark. Bit 0: depends on the direction; bit 1: depends on the seed.
CLASSES: tuple[Class, ...] = get_args(Class)


def classify(
    operators: Sequence[Operator], names: Sequence[str], marks: Mapping[int, int]
) -> dict[str, Class]:
    """The class of every operator, in bodies too, by its name; `marks` are those of inputs, by identity."""
    marking = _Marking(marks)
    marking.run(operators, names)
    return {name: CLASSES[mark] for name, mark in marking.found.items()}


class _Marking:
    """Marks of values by their identity, and of operators by their name."""

    def __init__(self, marks: Mapping[int, int]) -> None:
        self.of = dict(marks)
        self.found: dict[str, int] = {}

    def run(self, operators: Sequence[Operator], names: Sequence[str]) -> None:
        """Mark operators that follow each other, and their results."""
        depends: set[int] = set()
        constants: set[int] = set()
        for op, name in zip(operators, names, strict=True):
            inputs = [v for v in op.inputs if v.kind != "literal"]
            mark = 0
            for v in inputs:
                mark |= self.of.get(id(v), 0)
            self.found[name] = mark
            for v, result in zip(op.outputs, self.results(op, name, mark), strict=True):
                self.of[id(v)] = result
            if not mark and all(v.kind == "intermediate" and id(v) not in depends for v in inputs):
                constants.add(id(op))
            else:
                depends.update(map(id, op.outputs))
        # What depends on nothing belongs to its first reader.
        reader: dict[int, int] = {}
        for op, name in zip(reversed(operators), reversed(names), strict=True):
            if id(op) in constants:
                self.found[name] = next((reader[id(v)] for v in op.outputs if id(v) in reader), 0)
            reader.update((id(v), self.found[name]) for v in op.inputs)

    def results(self, op: Operator, name: str, mark: int) -> list[int]:
        """The marks of an operator's results, each by itself where its bodies tell."""
        wired = bodies(op)
        if not wired:
            for key, graph in op.bodies.items():
                self.alike(graph, name, key, mark)
            return [mark] * len(op.outputs)
        operands = [0 if v.kind == "literal" else self.of.get(id(v), 0) for v in op.inputs]
        # Which branch is taken decides all that a cond returns.
        results = [operands[0] if op.op == "cond" else 0] * len(op.outputs)
        changed = True
        while changed:
            changed = False
            for body in wired:
                for j, out in enumerate(self.body(body, name, operands)):
                    index = body.results[j]
                    if index is not None:
                        results[index] |= out
                    if j in body.carried:
                        operand = body.operands[body.carried[j]]
                        changed |= operands[operand] | out != operands[operand]
                        operands[operand] |= out
        return results

    def body(self, body: OpenedBody, name: str, operands: Sequence[int]) -> list[int]:
        """The marks of a body's outputs."""
        for v, operand in zip(body.graph.inputs, body.operands, strict=True):
            self.of[id(v)] = operands[operand]
        inner = body.graph.operators
        self.run(inner, [inner_name(name, body.name, op.name) for op in inner])
        return [0 if v.kind == "literal" else self.of.get(id(v), 0) for v in body.graph.outputs]

    def alike(self, graph: Graph, name: str, key: str, mark: int) -> None:
        """Mark everything inside of a body, of which it is not known how it is wired, as the operator is."""
        for op in graph.operators:
            own = inner_name(name, key, op.name)
            self.found[own] = mark
            for inner_key, inner in op.bodies.items():
                self.alike(inner, own, inner_key, mark)
