"""Which operators of two graphs are the same.

In this order: operators that compute the same from the same; operators from which the rest is computed in the
same way; operators of the same kind with a neighbour in common; and what is left, by its order.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from difflib import SequenceMatcher
from typing import Any

from funcprop.graph.graph import Graph, Operator, Variable


def kind(op: Operator) -> Hashable:
    """The kind of an operator: primitive or layer, parameters, literal operands, result types, bodies."""
    static = tuple(sorted((name, _text(value)) for name, value in op.static.items()))
    bodies = tuple((name, _body(body)) for name, body in sorted(op.bodies.items()))
    literals = tuple((i, v.name) for i, v in enumerate(op.inputs) if v.kind == "literal")
    return op.op, static, bodies, literals, tuple(v.type for v in op.outputs)


def _text(value: Any) -> str:
    """A parameter as text; functions and bodies have addresses in theirs, and are compared elsewhere."""
    if callable(value) or hasattr(value, "eqns") or hasattr(value, "jaxpr"):
        return type(value).__name__
    if isinstance(value, tuple | list):
        return "(" + ",".join(map(_text, value)) + ")"
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def _body(graph: Graph) -> Hashable:
    position: dict[str, int] = {v.name: i for i, v in enumerate(graph.variables)}

    def wired(variables: Iterable[Variable]) -> Hashable:
        return tuple(position.get(v.name, v.name) for v in variables)

    return tuple((kind(op), wired(op.inputs)) for op in graph.operators), wired(graph.outputs)


class _Side:
    """One of the graphs, indexed."""

    def __init__(self, graph: Graph, role: Callable[[Operator], Hashable]) -> None:
        self.graph = graph
        self.kinds: dict[str, Hashable] = {op.name: (kind(op), role(op)) for op in graph}
        self.operators = {op.name: op for op in graph}
        self.producer = {v.name: (op.name, i) for op in graph for i, v in enumerate(op.outputs)}
        self.readers: dict[str, list[tuple[Operator, int]]] = defaultdict(list)
        for op in graph:
            for i, v in enumerate(op.inputs):
                if v.kind != "literal":
                    self.readers[v.name].append((op, i))


class Matching:
    """Pairs of operators and of variables of two graphs, by their names.

    `role_a` and `role_b` say of an operator what it must have in common with one that it is paired with. An
    operator may read what is computed after it: a value that is carried through a loop.
    """

    def __init__(
        self,
        a: Graph,
        b: Graph,
        role_a: Callable[[Operator], Hashable],
        role_b: Callable[[Operator], Hashable],
    ) -> None:
        self.a, self.b = _Side(a, role_a), _Side(b, role_b)
        self.operators: dict[str, str] = {}
        self.inputs = dict(_same_inputs(a, b))
        numbers: dict[Hashable, int] = {}
        partner = dict(self.inputs)
        computed_a = _computed(
            self.a, {v.name: partner.get(v.name, ("a", v.name)) for v in a.inputs}, numbers
        )
        computed_b = _computed(self.b, {v.name: v.name for v in b.inputs}, numbers)
        self._pair(computed_a, computed_b, where=lambda n, m: n == m)
        # Of several that compute the same, the one that is read by the same.
        self._pair_neighbours(computed_a, computed_b)
        self._pair(computed_a, computed_b)
        back = {name: name for name in self.operators.values()}
        self._pair(_read(self.a, self.operators, numbers), _read(self.b, back, numbers))
        self._pair_neighbours(self.a.kinds, self.b.kinds)
        self._pair_in_order()
        self._pair_neighbours(self.a.kinds, self.b.kinds)
        self.variables = dict(self._variable_pairs())

    def unmatched(self) -> tuple[list[Operator], list[Operator]]:
        """The operators of either graph without a partner."""
        taken = set(self.operators.values())
        return (
            [op for op in self.a.graph if op.name not in self.operators],
            [op for op in self.b.graph if op.name not in taken],
        )

    def _pair(
        self,
        a: Mapping[str, Hashable],
        b: Mapping[str, Hashable],
        where: Callable[[int, int], bool] = lambda n, m: True,
    ) -> None:
        """Pair operators of equal keys in their order, if the numbers of such operators are as required."""
        groups: dict[Hashable, tuple[list[str], list[str]]] = defaultdict(lambda: ([], []))
        for i, (ops, keys) in enumerate(zip(self.unmatched(), (a, b), strict=True)):
            for op in ops:
                groups[keys[op.name]][i].append(op.name)
        for first, second in groups.values():
            if where(len(first), len(second)):
                self.operators.update(zip(first, second, strict=False))

    def _pair_neighbours(self, a: Mapping[str, Hashable], b: Mapping[str, Hashable]) -> None:
        """Pair operators of equal keys that share an operand or a reader, those that share the most first."""
        while True:
            open_a, open_b = self.unmatched()
            waiting: dict[Hashable, list[Operator]] = defaultdict(list)
            for op in open_a:
                waiting[a[op.name]].append(op)
            scored = [
                (score, op.name, other.name)
                for other in open_b
                for op in waiting[b[other.name]]
                if (score := self._shared(op, other))
            ]
            if not scored:
                return
            best = max(score for score, _, _ in scored)
            taken: set[str] = set()
            # The best alone: what they pair changes the scores of the others.
            for score, first, second in scored:
                if score == best and first not in self.operators and second not in taken:
                    self.operators[first] = second
                    taken.add(second)

    def _shared(self, a: Operator, b: Operator) -> int:
        """How many operands, readers and names two operators have in common."""
        shared = sum(self._same(v, w) for v, w in zip(a.inputs, b.inputs, strict=False))
        for v, w in zip(a.outputs, b.outputs, strict=True):
            readers = {(r.name, i) for r, i in self.b.readers[w.name]}
            shared += sum((self.operators.get(r.name), i) in readers for r, i in self.a.readers[v.name])
            shared += v.named and w.named and v.name == w.name
        return shared

    def _same(self, v: Variable, w: Variable) -> bool:
        if v.kind == "literal" or w.kind == "literal":
            return False
        made, other = self.a.producer.get(v.name), self.b.producer.get(w.name)
        if made is None or other is None:
            return made is other and self.inputs.get(v.name) == w.name
        return self.operators.get(made[0]) == other[0] and made[1] == other[1]

    def _pair_in_order(self) -> None:
        """Pair the remaining operators as a comparison of two texts does."""
        a, b = self.unmatched()
        keys_a, keys_b = [self.a.kinds[op.name] for op in a], [self.b.kinds[op.name] for op in b]
        for i, j, n in SequenceMatcher(None, keys_a, keys_b, autojunk=False).get_matching_blocks():
            self.operators.update((a[i + k].name, b[j + k].name) for k in range(n))

    def _variable_pairs(self) -> Iterator[tuple[str, str]]:
        """The same inputs, the same names given by the user, and the results of the same operators."""
        yield from self.inputs.items()
        named = {v.name for v in self.b.graph.variables if v.named and v.kind == "intermediate"}
        shared = {v.name for v in self.a.graph.variables if v.named and v.kind == "intermediate"} & named
        yield from ((name, name) for name in shared)
        for first, second in self.operators.items():
            outputs = self.a.operators[first].outputs, self.b.operators[second].outputs
            for v, w in zip(*outputs, strict=True):
                if v.name not in shared and w.name not in shared:
                    yield v.name, w.name


def _computed(
    side: _Side, inputs: Mapping[str, Hashable], numbers: dict[Hashable, int]
) -> dict[str, Hashable]:
    """Equal numbers for operators that compute the same from the same inputs."""
    of: dict[str, Hashable] = {name: ("input", same) for name, same in inputs.items()}
    of |= {v.name: ("constant", i, v.type) for i, v in enumerate(side.graph.constants)}
    found: dict[str, Hashable] = {}
    for op in side.graph:
        operands = tuple(
            ("literal", v.name, v.type) if v.kind == "literal" else of.get(v.name, "next") for v in op.inputs
        )
        number = numbers.setdefault(("computed", side.kinds[op.name], operands), len(numbers))
        found[op.name] = number
        of.update((v.name, (number, i)) for i, v in enumerate(op.outputs))
    return found


def _read(side: _Side, partner: Mapping[str, str], numbers: dict[Hashable, int]) -> dict[str, Hashable]:
    """Equal numbers for operators from which the results are computed in the same way."""
    results: dict[str, list[int]] = defaultdict(list)
    for i, v in enumerate(side.graph.outputs):
        results[v.name].append(i)
    found: dict[str, Hashable] = {}
    for op in reversed(side.graph.operators):
        readers = tuple(
            (
                tuple(results[v.name]),
                tuple(
                    sorted(
                        (str(partner.get(r.name, found.get(r.name, "next"))), i)
                        for r, i in side.readers[v.name]
                    )
                ),
            )
            for v in op.outputs
        )
        key = ("read", side.kinds[op.name], readers)
        found[op.name] = numbers.setdefault(key, len(numbers))
    return found


def _same_inputs(a: Graph, b: Graph) -> Iterator[tuple[str, str]]:
    """Inputs of the same name, then those of which one name ends with the other (`primals/W1`, `W1`)."""
    free_a: list[Variable] = [v for v in a.inputs if v.name not in {w.name for w in b.inputs}]
    free_b: list[Variable] = [w for w in b.inputs if w.name not in {v.name for v in a.inputs}]
    yield from ((v.name, v.name) for v in a.inputs if v not in free_a)
    for v in free_a:
        for w in free_b:
            if v.type == w.type and (w.name.endswith("/" + v.name) or v.name.endswith("/" + w.name)):
                yield v.name, w.name
                free_b.remove(w)
                break
    constants = zip(a.constants, b.constants, strict=False)
    yield from ((v.name, w.name) for v, w in constants if v.type == w.type)
