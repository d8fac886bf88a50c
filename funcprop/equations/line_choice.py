"""Which variables have a line: what has a name, results of products, layers and loops, what is read again.

Everything else is written where it is read: casts and shapes not at all, sums and activations as formulas.
A line that would be long is cut at its longest part.
"""

from __future__ import annotations

from collections import defaultdict

from funcprop import _jax
from funcprop.equations.flow import Flow, is_key, is_trivial
from funcprop.equations.line_parts import ARITHMETIC, LinePart, LineParts, is_curved, is_shape
from funcprop.graph.graph import Operator, Variable
from funcprop.graph.references import has_references
from funcprop.program.facts import PRODUCTS, facts_of

# A line with more symbols on its right-hand side is cut.
LONGEST_LINE = 12
# A formula with fewer symbols is written again where it is read twice.
_SHORT = 3
# The derivative of these repeats the result and the operand: both have lines.
_PICKS = ("gather", "scatter", "scatter-add")
_REPEATED = ("norm", "softmax", "log_softmax")


def chosen_lines(flow: Flow, parts: LineParts) -> set[str]:
    """The names of the variables that have a line."""
    return _LineChoice(flow, parts).lines


class _LineChoice:
    """Variables get lines one after another; `lines` are those that have one so far."""

    def __init__(self, flow: Flow, parts: LineParts) -> None:
        self.flow, self.parts = flow, parts
        self.lines = {flow.result.name}
        # What the result is computed by, without what is inside of known functions.
        self.used = parts.within(flow.result)
        self.used_names = {part.output.name for part in self.used}
        self.readers: dict[str, list[LinePart]] = defaultdict(list)
        for part in self.used:
            for name in dict.fromkeys(v.name for v in part.inputs if v.kind != "literal"):
                self.readers[name].append(part)
        for op in flow.operators:
            self._give_lines_to(op)
        for part in self.used:
            v = part.output
            if v.name not in self.lines and not is_shape(part) and self._must_have_line(part):
                self.lines.add(v.name)
        self._cut()

    def _give_lines_to(self, op: Operator) -> None:
        """Give lines to what has a name, to operators that are run as they stand, and to whole ones."""
        self.lines.update(v.name for v in op.outputs if v.named or len(op.outputs) > 1)
        if op.jaxpr.effects:
            self.lines.update(v.name for v in (*op.inputs, *op.outputs) if v.name in self.parts)
        is_used = bool(op.outputs) and op.outputs[0].name in self.used_names
        if is_used and self._is_whole(op) and not self._is_operand(op):
            self.lines.add(self._climb(op.outputs[0]))

    def _is_whole(self, op: Operator) -> bool:
        """Whether an operator is a line of its own: a product, a layer, a loop, what moves single entries."""
        name = op.outputs[0].name
        if self.parts[name].name is not None or is_trivial(op):
            return False
        if op.equation is None or op.call is not None or op.bodies or has_references(op):
            return op.op != "custom_jvp_call" or name in self.flow.active
        facts = facts_of(op.equation)
        return op.op in PRODUCTS or (name in self.flow.active and not (facts.elementwise or facts.reduces))

    def _is_operand(self, op: Operator) -> bool:
        """Whether an operator takes entries or puts them in, and one sum or product reads what it gives."""
        if op.op not in ("slice", "pad") or op.call is not None or op.outputs[0].named:
            return False
        readers = [end.operator.op for end in self._ends(op.outputs[0]) if end.operator is not None]
        return readers in (["add"], ["sub"], ["mul"])

    # --- the end of a product -----------------------------------------------------------------

    def _climb(self, v: Variable) -> str:
        """The end of a product: the sum with its bias, and the product with a number."""
        while v.name not in self.lines:
            readers = [op for op in self.flow.readers[v.name] if op.outputs[0].name in self.used_names]
            if len(readers) != 1 or len(readers[0].outputs) != 1:
                break
            (op,) = readers
            if self.parts[op.outputs[0].name].name is not None or not self._belongs_to_product(op, v):
                break
            (v,) = op.outputs
        return v.name

    def _belongs_to_product(self, op: Operator, v: Variable) -> bool:
        """Whether the operator that reads a product is written on its line."""
        if is_trivial(op):
            shaped = op.outputs[0]
            if op.op == "squeeze" or self._is_taken_apart(shaped):
                return True
            return op.op != "broadcast_in_dim" and self._leads_to_arithmetic(shaped)
        others = [w for w in op.inputs if w.name != v.name]
        if len(others) != 1:
            return False
        if op.op in ("add", "sub"):
            return self._is_parameter(others[0]) or self._is_product(others[0])
        return op.op in ("mul", "div") and self.parts.number(others[0]).kind == "literal"

    def _leads_to_arithmetic(self, v: Variable) -> bool:
        """Whether the one reader of a value, in whatever shape, is a sum or a product with a number."""
        readers = self.flow.readers[v.name]
        if len(readers) != 1 or v.named:
            return False
        (op,) = readers
        return self._leads_to_arithmetic(op.outputs[0]) if is_trivial(op) else op.op in ARITHMETIC

    def _is_taken_apart(self, v: Variable) -> bool:
        """Whether entries are read out of a value: their indices are those of its own shape."""
        return any(op.op in ("slice", "dynamic_slice", "gather") for op in self.flow.readers[v.name])

    def _is_parameter(self, v: Variable) -> bool:
        """Whether a value is a parameter, or an array that is closed over."""
        return v.name in self.flow.parameters or self.flow.source(v).kind == "constant"

    def _is_product(self, v: Variable) -> bool:
        """Whether a value is the product of data and a weight, with its bias, and is read once."""
        while v.kind != "literal" and v.name not in self.lines and len(self.flow.readers[v.name]) == 1:
            op = self.flow.maker.get(v.name)
            if op is None:
                return False
            if op.op in PRODUCTS:
                return any(w.name in self.flow.parameters for w in op.inputs)
            data = [w for w in op.inputs if not self._is_parameter(w)]
            if not (is_trivial(op) or op.op == "add") or len(data) != 1:
                return False
            (v,) = data
        return False

    # --- what is read more than once ----------------------------------------------------------

    def _must_have_line(self, part: LinePart) -> bool:
        v, ends = part.output, self._ends(part.output)
        if v.name not in self.flow.active:
            of_active = any(end.output.name in self.flow.active for end in ends)
            picks = [end.operator is not None and end.operator.op in _PICKS for end in ends]
            if all(picks) and part.operator is not None and part.operator.op == "concatenate":
                # The places of single entries: `x[i, j]`.
                return False
            if is_key(v) or part.kind in ("draw", "norm"):
                return not is_key(v)
            keys = self.flow.keys.get(v.name)
            is_read = any(self.flow.keys.get(end.output.name) != keys for end in ends)
            return (of_active or is_read) and (bool(keys) or self._is_long(v))
        if part.kind in _REPEATED or len({end.output.name for end in ends}) > 1:
            return True
        wholes = [end.operator for end in ends if end.operator is not None and self._is_whole(end.operator)]
        return bool(wholes) and not (self._is_scaled(part) and all(o.op == "dot_general" for o in wholes))

    def _is_scaled(self, part: LinePart) -> bool:
        """Whether a part is a line times a number, which stands before a product."""
        if part.operator is None or part.operator.op not in ("mul", "div", "neg"):
            return False
        others = [v for v in part.inputs if v.kind != "literal"]
        return len(others) == 1 and (others[0].name in self.lines or others[0].name not in self.parts)

    def _is_long(self, v: Variable) -> bool:
        return sum(not is_shape(part) for part in self.parts.within(v, self.lines)) > _SHORT

    def _ends(self, v: Variable) -> list[LinePart]:
        """What reads a variable, in whatever shape."""
        found = []
        for part in self.readers[v.name]:
            if is_shape(part) and part.output.name not in self.lines:
                found += self._ends(part.output)
            else:
                found.append(part)
        return found

    # --- what is too long ---------------------------------------------------------------------

    def _cut(self) -> None:
        """Give lines to the longest parts of what is too long."""
        self.size: dict[str, int] = {}
        for part in self.used:
            if not is_shape(part) and part.output.name not in self.flow.keys:
                while (long := self._too_long(part)) is not None:
                    self.lines.add(self._cuttable(long).name)
                self.size[part.output.name] = 1 + sum(map(self._symbols, part.inputs))

    def _symbols(self, v: Variable) -> int:
        """The number of symbols that a variable is written by where it is read."""
        v = self._cuttable(v)
        return 1 if v.kind == "literal" or v.name in self.lines else self.size.get(v.name, 1)

    def _too_long(self, part: LinePart) -> Variable | None:
        """An operand that is better a line of its own."""
        for w in part.inputs:
            size = self._symbols(w) if _jax.is_differentiable(w.aval) else 1
            if part.kind in _REPEATED and size > 1:
                return w
            if size > _SHORT and (is_curved(part) or len(self._ends(self._cuttable(w))) > 1):
                return w
        longest = max(part.inputs, key=self._symbols, default=None)
        if longest is None or self._symbols(longest) == 1:
            return None
        return longest if sum(map(self._symbols, part.inputs)) > LONGEST_LINE else None

    def _cuttable(self, v: Variable) -> Variable:
        """The variable to give a line: not one that is only another shape."""
        while v.name in self.parts and is_shape(self.parts[v.name]) and v.name not in self.lines:
            v = self.parts[v.name].inputs[0]
        return v
