"""From a graph of operators to a graph of lines: what is between two lines is one operator."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from funcprop import _jax
from funcprop.equations.composition import Composition, LinePart, literal, type_of
from funcprop.equations.constants import named_function, pattern
from funcprop.equations.elementwise import is_elementwise
from funcprop.equations.flow import Flow, Region, is_key, is_trivial, run
from funcprop.equations.line_choice import chosen_lines
from funcprop.equations.line_parts import LineParts, is_curved
from funcprop.equations.recognition import Recognition
from funcprop.graph.graph import Graph, Operator, Variable
from funcprop.program.facts import PRODUCTS, facts_of
from funcprop.rules.equations import Equations, opaque
from funcprop.rules.expressions import Expression
from funcprop.sweeps.evaluation import evaluated

WriteLine = Callable[[Sequence[Expression], Expression, Expression], Equations]


@dataclass(frozen=True, eq=False)
class Condensed:
    """A graph of lines: how each is written, of what kind it is, and the functions that were given a name.

    `kinds` are by the name of the line's variable: `product`, `activation`, `softmax`, `loss`, `norm`,
    `sum`, `value`. `roles` are those of inputs that are read as `weight`, `bias`, `scale` or `table`, with
    the line that reads them. `functions` are the user's own, by their symbol: the formula of each. `operand`
    writes a variable of the graph before in the symbols of the lines. `smooth` are those with a gradient.
    """

    graph: Graph
    writers: Mapping[Operator, WriteLine]
    kinds: Mapping[str, str]
    roles: Mapping[str, tuple[str, str]]
    functions: Mapping[str, Expression]
    operand: Callable[[Variable, Mapping[str, Expression]], Expression]
    smooth: Collection[str]


def condense(graph: Graph, result: Variable, inputs: Collection[str]) -> Condensed:
    """Merge the operators of a `plain` graph into lines."""
    flow = Flow(graph, result, inputs)
    parts = LineParts(flow)
    recognition = Recognition(flow, parts)
    return _Condensing(flow, parts, chosen_lines(flow, parts)).condensed(recognition)


class _Condensing:
    """Merges what is between the variables that have `lines`."""

    def __init__(self, flow: Flow, parts: LineParts, lines: Collection[str]) -> None:
        self.flow, self.parts, self.lines = flow, parts, lines

    def condensed(self, recognition: Recognition) -> Condensed:
        """The graph of the lines that the result is computed by."""
        used = {part.output.name for part in self.parts.within(self.flow.result)}
        operators: list[Operator] = []
        writers: dict[Operator, WriteLine] = {}
        kinds: dict[str, str] = {}
        roles = dict(recognition.roles)
        for op in self.flow.operators:
            if not any(v.name in self.lines and v.name in used for v in op.outputs):
                continue
            parts = self.parts.within(op.outputs[0], self.lines) if len(op.outputs) == 1 else []
            merged, writer = self._line(op, parts)
            operators.append(merged)
            if writer is not None:
                writers[merged] = writer
            kinds |= {v.name: self._kind(v, parts) for v in op.outputs}
            for name, role in self._roles(parts):
                roles.setdefault(name, (role, op.outputs[0].name))
        graph = replace(self.flow.graph, operators=tuple(operators))
        named = {part.name for part in self.parts.within(self.flow.result)}
        functions = {name: form for name, form in recognition.functions.items() if name in named}
        return Condensed(graph, writers, kinds, roles, functions, self._operand, self.flow.active)

    def _operand(self, v: Variable, symbols: Mapping[str, Expression]) -> Expression:
        """A variable as it is written where it is read."""
        v = self.parts.number(v)
        if v.kind == "literal":
            return literal(v)
        if v.name in self.lines or v.name not in self.parts:
            return symbols[v.name]
        parts = self.parts.within(v, self.lines)
        inner = {part.output.name for part in parts}
        read = {w.name: w for part in parts for w in part.inputs if w.kind != "literal"}
        inputs = [w for w in read.values() if w.name not in inner]
        unknown = opaque(lambda: jnp.zeros(v.shape or (), v.dtype), (), "?", "?", type_of(v))
        return (
            Composition(parts, inputs, ()).write([symbols[w.name] for w in inputs], unknown, unknown).forward
        )

    def _line(self, op: Operator, parts: Sequence[LinePart]) -> tuple[Operator, WriteLine | None]:
        """The operators of a line as one, and how it is written if not as the operator itself."""
        if not parts:
            return self._with_operands(op), None
        v, last = op.outputs[0], parts[-1]
        if len(parts) == 1 and last.region is None and last.inputs == op.inputs:
            return op, None
        inner = {part.output.name for part in parts}
        read = {w.name: w for part in parts for w in part.inputs if w.kind != "literal"}
        inputs = tuple(w for w in read.values() if w.name not in inner)
        merged = self._merged(op, self.flow.between([v], {w.name for w in inputs}), inputs, parts)
        if v.name not in self.flow.active and len(parts) > 1:
            name = self._constant(v, parts)
            if name is not None:
                return merged, partial(named_function(name), Region((merged,), inputs, v))
        if len(parts) == 1 and last.name is not None:
            merged = replace(merged, op=last.name)
        return merged, Composition(parts, inputs, self.flow.active).write

    def _with_operands(self, op: Operator) -> Operator:
        """An operator of several results together with what its operands are computed by."""
        if not any(v.name in self.parts and v.name not in self.lines for v in op.inputs):
            return op
        operators = [*self.flow.between(op.inputs, self.lines), op]
        made = {v.name for o in operators for v in o.outputs}
        read = {v.name: v for o in operators for v in o.inputs if v.kind != "literal"}
        return self._merged(op, operators, tuple(v for v in read.values() if v.name not in made))

    def _merged(
        self,
        op: Operator,
        operators: Sequence[Operator],
        inputs: tuple[Variable, ...],
        parts: Sequence[LinePart] = (),
    ) -> Operator:
        """Some operators as one, which computes the results of the last of them, `op`, by the `parts`."""
        types = [_jax.inner_type(v.aval) for v in inputs]
        function = self._by_parts(parts, inputs) if parts else run(operators, inputs, op.outputs)
        flops = sum(o.flops for o in operators)
        jaxpr = _jax.open_jaxpr(jax.make_jaxpr(function)(*types))
        return replace(op, inputs=inputs, flops=flops, bodies={}, call=None, jaxpr=jaxpr)

    def _by_parts(self, parts: Sequence[LinePart], inputs: Sequence[Variable]) -> Callable[..., list[Any]]:
        """The function that parts are together: what one computes inside is not read by the others."""

        def function(*values: Any) -> list[Any]:
            known = {v.name: x for v, x in zip(inputs, values, strict=True)}

            def value(v: Variable) -> Any:
                if v.kind == "literal":
                    return v.value
                if v.name not in known:
                    # Such as a number in every entry of an array, which a part reads as the number.
                    known[v.name] = evaluated(self.flow.between([v], known), known)[v.name]
                return known[v.name]

            for part in parts:
                region = part.region
                if region is None:
                    assert part.operator is not None
                    region = Region((part.operator,), part.operator.inputs, part.output)
                known[part.output.name] = region(*map(value, region.inputs))
            return [known[parts[-1].output.name]]

        return function

    # --- what has no derivative ---------------------------------------------------------------

    def _constant(self, v: Variable, parts: Sequence[LinePart]) -> str | None:
        """The name of a value that is made from keys or from nothing, and is no draw: a mask, positions."""
        if v.name not in self.flow.keys:
            return None
        if self.flow.keys[v.name]:
            is_made = any(is_key(w) for part in parts for w in part.inputs)
            return parts[-1].name if parts[-1].kind == "draw" else "random" if is_made else None
        return pattern(run(self.flow.between([v]), (), [v])()[0])

    # --- kinds and roles ----------------------------------------------------------------------

    def _kind(self, v: Variable, parts: Sequence[LinePart]) -> str:
        operators = [part.operator for part in parts if part.operator is not None]
        if any(op.op in PRODUCTS for op in operators):
            return "product"
        if parts and parts[-1].activation is not None:
            return "activation"
        if any(op.call is not None for op in operators):
            return "product" if any(self._is_weight(w) for part in parts for w in part.inputs) else "value"
        if (kind := self.parts[v.name].kind) is not None:
            return kind if kind != "draw" else {"b": "mask", "i": "index"}.get(v.dtype.kind, kind)
        if not parts or not all(map(_is_entrywise, parts)):
            return "value"
        return "activation" if any(map(is_curved, parts)) else "sum"

    def _is_weight(self, v: Variable) -> bool:
        return self.flow.source(v).kind == "input" and len(v.shape or ()) > 1

    def _roles(self, parts: Sequence[LinePart]) -> Sequence[tuple[str, str]]:
        """The roles of the parameters that a line reads: an operand of a product, added, multiplied with."""
        found = []
        for part in parts:
            for v in part.inputs:
                source = self.flow.source(v)
                is_parameter = source.kind == "input" and source.name in self.flow.active
                if v.kind != "literal" and is_parameter and (role := _role(part, source)) is not None:
                    found.append((source.name, role))
        return found


def _is_entrywise(part: LinePart) -> bool:
    if part.region is not None:
        return is_elementwise(part.region)
    op = part.operator
    return op is not None and op.equation is not None and facts_of(op.equation).elementwise


def _role(part: LinePart, source: Variable) -> str | None:
    op = part.operator
    if op is None or is_trivial(op) or op.bodies:
        return None
    if op.op == "gather":
        return "table"
    if op.op in ("add", "sub", "add_any") or (op.op == "concatenate" and len(source.shape or ()) == 1):
        return "bias"
    return "weight" if len(source.shape or ()) > 1 or op.op in PRODUCTS else "scale"
