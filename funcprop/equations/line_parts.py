"""What each variable is computed by, as a person would read it: a part of a line.

A part is an operator, or a region that is written as one function. Numbers that were computed or spread over
an array are read as the number, indices that count from the end as the index, sums divided by the number of
their terms as a mean.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import replace

import jax.numpy as jnp
import numpy as np

from funcprop import _jax
from funcprop.equations.composition import LinePart
from funcprop.equations.constants import index_of
from funcprop.equations.flow import Flow, Region, is_trivial, may_be_inside
from funcprop.equations.norms import mean
from funcprop.graph.graph import Operator, Variable
from funcprop.program.facts import facts_of
from funcprop.rules.notation import decimal

ARITHMETIC = frozenset({"add", "add_any", "sub", "mul", "div"})


class LineParts:
    """The part that computes each variable, by the variable's name; `parts[name]` may be replaced."""

    def __init__(self, flow: Flow) -> None:
        self.flow = flow
        self._parts: dict[str, LinePart] = {}
        for op in flow.operators:
            for v in op.outputs:
                self._parts[v.name] = self._mean(op) or self._index(op) or self.of_operator(op, v)

    def __getitem__(self, name: str) -> LinePart:
        return self._parts[name]

    def __setitem__(self, name: str, part: LinePart) -> None:
        self._parts[name] = part

    def __contains__(self, name: str) -> bool:
        return name in self._parts

    def of_operator(self, op: Operator, output: Variable) -> LinePart:
        """An operator as a part; in arithmetic, a number that is spread over an array is the number."""
        is_arithmetic = op.op in ARITHMETIC and op.call is None
        inputs = tuple(self.number(v) if is_arithmetic else self._computed(v) for v in op.inputs)
        return LinePart(output, inputs, operator=op)

    def within(self, v: Variable, lines: Container[str] = ()) -> list[LinePart]:
        """The parts that a variable is computed by, in order, as far as variables that have lines."""
        found: dict[str, LinePart] = {}
        stack = [v]
        while stack:
            w = stack.pop()
            if w.name in self and w.name not in found and (w.name == v.name or w.name not in lines):
                found[w.name] = self[w.name]
                stack.extend(i for i in self[w.name].inputs if i.kind != "literal")
        return sorted(found.values(), key=lambda part: self.flow.rank[part.output.name])

    def number(self, v: Variable) -> Variable:
        """The number that is spread over an array, or the variable itself."""
        source = v
        while (op := self.flow.maker.get(source.name)) is not None and not source.named:
            if op.op not in ("broadcast_in_dim", "convert_element_type") or op.inputs[0].shape != ():
                break
            if op.op == "convert_element_type" and op.inputs[0].kind != "literal":
                break
            source = op.inputs[0]
        return self._computed(source)

    def _computed(self, v: Variable) -> Variable:
        """A number that is computed from numbers alone, as one."""
        op = self.flow.maker.get(v.name)
        if op is None or v.shape != () or v.named or not may_be_inside(op) or v.name in self.flow.active:
            return v
        operands = [self._computed(w) for w in op.inputs]
        if any(w.kind != "literal" for w in operands):
            return v
        (value,) = _jax.evaluate(op.jaxpr, (), [w.value for w in operands])
        value = np.asarray(value)
        if not jnp.issubdtype(value.dtype, jnp.number):
            return v
        text = decimal(float(value), value.dtype) if jnp.issubdtype(value.dtype, jnp.floating) else str(value)
        return replace(v, kind="literal", name=text, value=value[()])

    def _index(self, op: Operator) -> LinePart | None:
        """An index of which negative values count from the end, as the index."""
        if op.op != "select_n" or len(op.inputs) != 3 or op.call is not None:
            return None
        test, index, shifted = op.inputs
        below, moved = self.flow.maker.get(test.name), self.flow.maker.get(shifted.name)
        if below is None or moved is None or below.op != "lt" or moved.op != "add":
            return None
        plain = self.flow.source(index)
        if {self.flow.source(o.inputs[0]).name for o in (below, moved)} != {plain.name}:
            return None
        operators = tuple(self.flow.between(op.outputs, {plain.name}))
        return LinePart(
            op.outputs[0], (plain,), region=Region(operators, (plain,), op.outputs[0]), write=index_of
        )

    def _mean(self, op: Operator) -> LinePart | None:
        """A sum that is divided by the number of its terms."""
        if op.op not in ("div", "mul") or op.call is not None or len(op.inputs) != 2:
            return None
        count = self.number(op.inputs[1])
        total = self.flow.source(op.inputs[0])
        of = self.flow.maker.get(total.name)
        if of is None or of.op != "reduce_sum" or total.named:
            return None
        if count.kind != "literal" or np.ndim(count.value) != 0:
            return None
        (x,) = of.inputs
        axes = tuple(of.static["axes"])
        size = int(np.prod([(x.shape or ())[a] for a in axes]))
        number = float(count.value) if op.op == "div" else 1 / float(count.value) if count.value else 0.0
        if not size or abs(number / size - 1) > 1e-6:
            return None
        between = dict.fromkeys((of, self.flow.maker[op.inputs[0].name]))
        if any(o is not of and not is_trivial(o) for o in between):
            return None
        region = Region(tuple(self.flow.between(op.outputs, {x.name})), (x,), op.outputs[0])
        return LinePart(op.outputs[0], (x,), region=region, write=mean(axes, len(x.shape or ()), size))


def is_shape(part: LinePart) -> bool:
    """Whether a part changes shape and type alone."""
    return part.operator is not None and is_trivial(part.operator)


def is_curved(part: LinePart) -> bool:
    """Whether a part is a function whose derivative is written with its operand inside."""
    if part.region is not None:
        return part.name is not None
    op = part.operator
    if op is None or op.equation is None or op.call is not None:
        return True
    facts = facts_of(op.equation)
    return facts.elementwise and not facts.linear_in
