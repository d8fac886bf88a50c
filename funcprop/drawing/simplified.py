"""A graph as it is drawn: without changes of shape and type, numbers, guards and checkpoints."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from funcprop.graph.graph import Graph, Operator, Variable, needed
from funcprop.graph.naming import joined
from funcprop.program.facts import CHECKPOINTS, LOOPS, facts_of

# What gives a value another type, or axes of length 1.
_SAME = frozenset({"broadcast_in_dim", "convert_element_type", "copy", "expand_dims", "squeeze"})
# What is seen of a number's type.
_TYPES = frozenset({"shape", "dtype", "new_dtype", "sharding", "weak_type"})
# With these numbers, an operator is its other operand.
_NEUTRAL = {"max": -math.inf, "min": math.inf, "mul": 1.0, "add": 0.0}


def simplified(graph: Graph) -> Graph:
    """The graph in which operators read through what is no mathematics.

    Gone are changes of type, axes of length 1, values that are computed from numbers alone, indices that
    would count from the end if they were negative, the guards of a log-sum-exp, and `max(x, −∞)`. A sum that
    is divided by the number of its terms is a `mean`; what is recomputed stands in place of its checkpoint.
    What has a name, and a result, stays.
    """
    operators = needed(_Simplifying(graph).operators, graph.outputs)
    return replace(graph, operators=tuple(operators))


def live(graph: Graph) -> Graph:
    """The graph without what no result depends on, and without what nobody reads."""
    operators = needed(graph.operators, graph.outputs)
    read = {id(v) for op in operators for v in op.inputs} | set(map(id, graph.outputs))
    inputs, constants = (tuple(v for v in vs if id(v) in read) for vs in (graph.inputs, graph.constants))
    return replace(graph, inputs=inputs, constants=constants, operators=tuple(operators))


def data_of(graph: Graph) -> frozenset[str]:
    """The inputs that are a part of another argument than the first, as `batch/0`."""
    first = graph.inputs[0].name.partition("/")[0] if graph.inputs else ""
    parts = [(v.name, *v.name.partition("/")) for v in graph.inputs]
    return frozenset(name for name, top, _, inner in parts if inner.isdigit() and top != first)


class _Simplifying:
    """Follows the operators of a graph: `of` has what is read in place of a variable."""

    def __init__(self, graph: Graph) -> None:
        self.of: dict[str, Variable] = {}
        self.maker: dict[str, Operator] = {}
        self.readers: dict[str, list[Operator]] = defaultdict(list)
        self.kept = {v.name for v in graph.outputs}
        self.operators: list[Operator] = []
        self._add(graph.operators)

    def _read(self, v: Variable) -> Variable:
        return v if v.kind == "literal" else self.of.get(v.name, v)

    def _add(self, operators: Sequence[Operator]) -> None:
        for op in operators:
            for v in op.inputs:
                self.readers[v.name].append(op)
        for op in operators:
            op = replace(op, inputs=tuple(map(self._read, op.inputs)))
            if op.op in CHECKPOINTS and _computes_all(op):
                self._add_inside(op)
                continue
            if len(op.outputs) == 1 and op.call is None:
                (v,) = op.outputs
                same = None if v.named or v.name in self.kept else self._same(op, v)
                if same is not None:
                    self.of[v.name] = same
                    continue
                op = self._mean(op) or op
            if op.op in LOOPS:
                op = replace(op, scope=joined(op.scope, _scope_inside(op)))
            self.operators.append(op)
            self.maker |= {v.name: op for v in op.outputs}

    def _add_inside(self, op: Operator) -> None:
        """The operators of a checkpoint, in the scope around."""
        (body,) = op.bodies.values()
        inside: dict[int, Variable] = {id(v): w for v, w in zip(body.inputs, op.inputs, strict=True)}
        for v in (*body.constants, *(v for o in body.operators for v in o.outputs)):
            name = joined(op.name, v.name)
            inside[id(v)] = replace(v, name=name, scope=joined(op.scope, v.scope))
        results = zip(body.outputs, op.outputs, strict=True)
        inside |= {id(v): w for v, w in results if v.kind == "intermediate"}

        def moved(variables: Sequence[Variable]) -> tuple[Variable, ...]:
            return tuple(inside.get(id(v), v) for v in variables)

        self._add([
            replace(
                o,
                name=joined(op.name, o.name),
                scope=joined(op.scope, o.scope),
                inputs=moved(o.inputs),
                outputs=moved(o.outputs),
            )
            for o in body.operators
        ])  # fmt: skip

    def _same(self, op: Operator, v: Variable) -> Variable | None:
        """What is read in place of a result; None for the result itself."""
        if all(w.kind == "literal" for w in op.inputs) and not op.bodies and isinstance(v.dtype, np.dtype):
            value = op.inputs[0].value if op.op in _SAME and op.inputs else None
            # Equal names are equal numbers to whoever looks for equal blocks.
            chosen = {k: x for k, x in op.static.items() if k not in _TYPES and x not in (None, ())}
            given = [*(w.name for w in op.inputs), *(f"{k}={x}" for k, x in chosen.items())]
            return replace(v, kind="literal", name=f"{op.op}({', '.join(given)})", value=value)
        if op.op == "broadcast_in_dim" and math.prod(v.shape or ()) > math.prod(op.inputs[0].shape or ()):
            # To who takes it entry by entry it is the same.
            return op.inputs[0] if all(map(_is_entrywise, self.readers[v.name])) else None
        if op.op in _SAME or (op.op == "reshape" and _lengths(op.inputs[0]) == _lengths(v)):
            return op.inputs[0]
        if op.op in _NEUTRAL and len(op.inputs) == 2:
            others = [w for w in op.inputs if not _is_number(w, _NEUTRAL[op.op])]
            return others[0] if len(others) == 1 and others[0].shape == v.shape else None
        return self._chosen(op) if op.op == "select_n" and len(op.inputs) == 3 else None

    def _chosen(self, op: Operator) -> Variable | None:
        """The one of two values that is meant: an index as it is, a maximum where it is finite."""
        test, no, yes = op.inputs
        if test.kind == "literal" and test.shape == () and _is_number(no, np.nan):
            # A variance, of which the number of entries is known.
            return yes
        made = self.maker.get(test.name)
        if made is None:
            return None
        if made.op == "is_finite" and made.inputs[0] is yes and no.kind == "literal":
            return yes
        shifted = self.maker.get(yes.name)
        if made.op != "lt" or shifted is None or shifted.op != "add":
            return None
        return no if made.inputs[0] is no is shifted.inputs[0] else None

    def _mean(self, op: Operator) -> Operator | None:
        """A sum that is divided by the number of its terms."""
        total = self.maker.get(op.inputs[0].name) if op.op == "div" else None
        if total is None or total.op != "reduce_sum" or total.outputs[0].named:
            return None
        (x,) = total.inputs
        count = math.prod((x.shape or ())[axis] for axis in total.static["axes"])
        return replace(op, op="mean", inputs=(x,)) if _is_number(op.inputs[1], count) else None


def _computes_all(op: Operator) -> bool:
    """Whether every result of a checkpoint is a value of its own that is computed inside."""
    results = [v for body in op.bodies.values() for v in body.outputs]
    return all(v.kind == "intermediate" for v in results) and len(set(map(id, results))) == len(op.outputs)


def _is_entrywise(op: Operator) -> bool:
    return op.equation is not None and op.call is None and facts_of(op.equation).elementwise


def _scope_inside(op: Operator) -> str:
    """The scope that all of a loop is in, by the module whose steps it makes."""
    scopes = [o.scope.split("/") for body in op.bodies.values() for o in body.operators]
    shared = itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*scopes, strict=False))
    return "/".join(parts[0] for parts in shared)


def _lengths(v: Variable) -> list[int]:
    return [n for n in v.shape or () if n != 1]


def _is_number(v: Variable, number: Any) -> bool:
    """Whether a variable is this number, in every entry."""
    return (
        v.kind == "literal"
        and v.value is not None
        and bool(np.all(np.equal(v.value, number) | (v.value != v.value) & (number != number)))
    )
