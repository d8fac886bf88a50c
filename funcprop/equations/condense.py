"""From a graph of operators to a graph of lines: what a person would write down, and what is read on the way.

A line is written for what has a name, for results of products, of layers and of loops, for what a product
reads, and for what is read more than once. Everything else is written where it is read: casts and shapes not
at all, sums and activations as formulas. A line that would be long is cut at its longest part.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from funcprop import _jax
from funcprop.equations.composition import Composition, LinePart
from funcprop.equations.constants import draw, index_of, named_function, pattern
from funcprop.equations.flow import Flow, Region, is_trivial, may_be_inside, run
from funcprop.equations.known_functions import NamedFunction, elementwise, find, is_elementwise, mean
from funcprop.graph.graph import Graph, Operator, Variable
from funcprop.graph.references import has_references
from funcprop.program.facts import PRODUCTS, facts_of
from funcprop.rules.expressions import Equations, Expression, decimal, symbol

# A line with more symbols on its right-hand side is cut.
_LONGEST_LINE = 12
# A formula with fewer symbols is written again where it is read twice.
_SHORT = 3

_ARITHMETIC = frozenset({"add", "add_any", "sub", "mul", "div"})

WriteLine = Callable[[Sequence[Expression], Expression, Expression], Equations]


@dataclass(frozen=True, eq=False)
class Condensed:
    """A graph of lines: how each is written, of what kind it is, and the functions that were given a name.

    `kinds` are by the name of the line's variable: `product`, `activation`, `softmax`, `loss`, `norm`,
    `sum`, `value`. `roles` are those of inputs that are read as `weight`, `bias`, `scale` or `table`, with
    the line that reads them. `functions` are the user's own, by their symbol: the formula of each.
    """

    graph: Graph
    writers: Mapping[Operator, WriteLine]
    kinds: Mapping[str, str]
    roles: Mapping[str, tuple[str, str]]
    functions: Mapping[str, Expression]


def condense(graph: Graph, result: Variable, inputs: Collection[str]) -> Condensed:
    """Merge the operators of a graph into lines."""
    return _Condenser(Flow(graph, result, inputs)).condensed()


class _Condenser:
    """Decides which variables have a line, and merges what is between them."""

    def __init__(self, flow: Flow) -> None:
        self.flow = flow
        self.functions: dict[str, Expression] = {}
        self.known: dict[str, NamedFunction] = {}
        self.roles: dict[str, tuple[str | None, str]] = {}
        self.parts: dict[str, LinePart] = {}
        self.lines: set[str] = {flow.result.name}

    def condensed(self) -> Condensed:
        """Merge what has no line into its readers."""
        for op in self.flow.operators:
            for v in op.outputs:
                self.parts[v.name] = (
                    self._mean(op) or self._index(op) or LinePart(v, self._operands(op), operator=op)
                )
        self._recognise()
        self._choose()
        return self._merged()

    def _operands(self, op: Operator) -> tuple[Variable, ...]:
        """The operands; a number that was computed or spread over an array is read as the number."""
        is_arithmetic = op.op in _ARITHMETIC and op.call is None
        return tuple(self._number(v) if is_arithmetic else self._computed(v) for v in op.inputs)

    def _number(self, v: Variable) -> Variable:
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
        operators = tuple(self._between(op.outputs[0], {plain.name}))
        return LinePart(
            op.outputs[0], (plain,), region=Region(operators, (plain,), op.outputs[0]), write=index_of
        )

    def _mean(self, op: Operator) -> LinePart | None:
        """A sum that is divided by the number of its terms."""
        if op.op not in ("div", "mul") or op.call is not None or len(op.inputs) != 2:
            return None
        count = self._number(op.inputs[1])
        total = self.flow.source(op.inputs[0])
        of = self.flow.maker.get(total.name)
        if (
            of is None
            or of.op != "reduce_sum"
            or total.named
            or count.kind != "literal"
            or np.ndim(count.value) != 0
        ):
            return None
        (x,) = of.inputs
        axes = tuple(of.static["axes"])
        size = int(np.prod([(x.shape or ())[a] for a in axes]))
        number = float(count.value) if op.op == "div" else 1 / float(count.value) if count.value else 0.0
        if not size or abs(number / size - 1) > 1e-6:
            return None
        between = [o for o in (of, self.flow.maker.get(op.inputs[0].name)) if o is not None]
        region = Region((*dict.fromkeys(between), op), (x,), op.outputs[0])
        if any(o is not of and not is_trivial(o) for o in between):
            return None
        return LinePart(op.outputs[0], (x,), region=region, write=mean(axes, len(x.shape or ()), size))

    # --- functions that have a name -----------------------------------------------------------

    def _recognise(self) -> None:
        """Find regions that are known functions, the largest that end at each variable, from the end."""
        covered: set[str] = set()
        cache: dict[str, NamedFunction | None] = {}
        for op in reversed(self.flow.operators):
            (v, *others) = op.outputs or (None,)
            if v is None or others or v.name in covered or v.name not in self.flow.active:
                continue
            if is_trivial(op) or not may_be_inside(op):
                continue
            found = self._largest(v, cache)
            mean = self.parts[v.name].region
            if found is None and mean is not None:
                covered.update(w.name for inner in mean.operators for w in inner.outputs)
            if found is not None:
                region, known = found
                self.known[v.name] = known
                self.parts[v.name] = LinePart(v, region.inputs, region=region, write=known.write)
                for role, w in zip(known.roles, region.inputs[1:], strict=False):
                    self.roles[self.flow.source(w).name] = role, v.name
                covered.update(w.name for op in region.operators for w in op.outputs)

    def _largest(
        self, last: Variable, cache: dict[str, NamedFunction | None]
    ) -> tuple[Region, NamedFunction] | None:
        first, best = self.flow.dominators.get(last.name), None
        while first is not None:
            region = self.flow.region(last, first, False)
            if region is not None and (len(region.operators) == 1 or self._is_start(first)):
                regions = (region, self.flow.region(last, first, True))
                found = next(((r, k) for r in regions if r and (k := self._known(r, cache))), None)
                best = found or best
            maker = self.flow.maker.get(first)
            if region is None or maker is None or self._is_named(first):
                break
            first = self.flow.dominators.get(first)
        return best

    def _is_start(self, name: str) -> bool:
        """Whether a function may begin at a variable: not in the middle of a chain of entrywise operators."""
        op = self.flow.maker.get(name)
        if op is None or op.equation is None or op.call is not None or not facts_of(op.equation).elementwise:
            return True
        return len(self.flow.readers[name]) > 1 or self._is_named(name)

    def _is_named(self, name: str) -> bool:
        return any(v.named for v in self.flow.maker[name].outputs if v.name == name)

    def _known(self, region: Region, cache: dict[str, NamedFunction | None]) -> NamedFunction | None:
        if all(map(is_trivial, region.operators)):
            return None
        key = region.key
        if key not in cache:
            cache[key] = find(region) or self._own_function(region)
        return cache[key]

    def _own_function(self, region: Region) -> NamedFunction | None:
        """A function of each entry that has no name is `φ`, if it is more than a short formula."""
        plain = [op for op in region.operators if not is_trivial(op)]
        uses = sum(v.name == region.inputs[0].name for op in plain for v in op.inputs)
        if not is_elementwise(region) or len(plain) < 3 or uses < 2:
            return None
        parts = [LinePart(op.outputs[0], self._operands(op), operator=op) for op in region.operators]
        x = region.inputs[0]
        z = symbol(x.name, "z", "z", jax.ShapeDtypeStruct(x.shape, x.dtype))
        formula = Composition(parts, region.inputs[:1], ()).write([z], z, z).forward
        for name, known in self.functions.items():
            if known.text() == formula.text():
                return NamedFunction(name, "activation", region, elementwise(name))
        name = ("φ", "ψ", "χ")[len(self.functions)] if len(self.functions) < 3 else f"φ{len(self.functions)}"
        self.functions[name] = formula
        return NamedFunction(name, "activation", region, elementwise(name))

    # --- which variables have a line ----------------------------------------------------------

    def _choose(self) -> None:
        self._inner = self._read_inside()
        for op in self.flow.operators:
            for v in op.outputs:
                if v.named or len(op.outputs) > 1:
                    self.lines.add(v.name)
            if op.jaxpr.effects:
                # It is run as it stands: what it reads and what it computes have lines.
                self.lines.update(v.name for v in (*op.inputs, *op.outputs) if v.name in self.parts)
            if op.outputs and self._is_whole(op) and self._is_used(op.outputs[0]):
                self.lines.add(self._climb(op.outputs[0]))
        self.readers: dict[str, list[LinePart]] = {}
        for part in self._used():
            for name in dict.fromkeys(v.name for v in part.inputs if v.kind != "literal"):
                self.readers.setdefault(name, []).append(part)
        for part in self._used():
            v = part.output
            if v.name not in self.lines and not self._is_shape(part) and self._must_have_line(v):
                self.lines.add(v.name)
        self._cut()

    def _used(self) -> list[LinePart]:
        """The parts that the result is computed by, in order, without what is inside of known functions."""
        needed, found = {self.flow.result.name}, []
        for op in reversed(self.flow.operators):
            for v in op.outputs:
                if v.name in needed:
                    found.append(self.parts[v.name])
                    needed.update(w.name for w in self.parts[v.name].inputs if w.kind != "literal")
        return found[::-1]

    def _read_inside(self) -> set[str]:
        return {part.output.name for part in self._used()}

    def _is_used(self, v: Variable) -> bool:
        return v.name in self._inner

    def _is_shape(self, part: LinePart) -> bool:
        return part.operator is not None and is_trivial(part.operator)

    def _is_whole(self, op: Operator) -> bool:
        """Whether an operator is a line of its own: a product, a layer, a loop, what moves single entries."""
        if op.outputs[0].name in self.known or is_trivial(op):
            return False
        if op.equation is None or op.call is not None or op.bodies or has_references(op):
            return op.op not in ("custom_jvp_call",) or op.outputs[0].name in self.flow.active
        facts = facts_of(op.equation)
        if op.op in PRODUCTS:
            return True
        return op.outputs[0].name in self.flow.active and not (facts.elementwise or facts.reduces)

    def _climb(self, v: Variable) -> str:
        """The end of a product: the sum with its bias, and the product with a number."""
        while v.name not in self.lines:
            readers = [op for op in self.flow.readers[v.name] if self._is_used(op.outputs[0])]
            if len(readers) != 1 or len(readers[0].outputs) != 1 or readers[0].outputs[0].name in self.known:
                break
            (op,) = readers
            if is_trivial(op):
                if op.op == "broadcast_in_dim" or not self._leads_to_arithmetic(op.outputs[0]):
                    break
            elif op.op in ("add", "sub"):
                others = [w for w in op.inputs if w.name != v.name]
                if len(others) != 1 or not (self._is_parameter(others[0]) or self._is_product(others[0])):
                    break
            elif op.op in ("mul", "div"):
                others = [w for w in op.inputs if w.name != v.name]
                if len(others) != 1 or self._number(others[0]).kind != "literal":
                    break
            else:
                break
            v = op.outputs[0]
        return v.name

    def _leads_to_arithmetic(self, v: Variable) -> bool:
        """Whether the one reader of a value, in whatever shape, is a sum or a product with a number."""
        readers = self.flow.readers[v.name]
        if len(readers) != 1 or v.named:
            return False
        (op,) = readers
        return self._leads_to_arithmetic(op.outputs[0]) if is_trivial(op) else op.op in _ARITHMETIC

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

    def _must_have_line(self, v: Variable) -> bool:
        ends = self._ends(v)
        if v.name not in self.flow.active:
            of_active = any(part.output.name in self.flow.active for part in ends)
            return of_active and not _is_key(v) and (self._draws(v) or len(self._steps(v)) > _SHORT)
        if v.name in self.known and self.known[v.name].kind in ("norm", "softmax", "log_softmax"):
            return True
        if len({part.output.name for part in ends}) > 1:
            return True
        return any(part.operator is not None and self._is_whole(part.operator) for part in ends)

    def _draws(self, v: Variable) -> bool:
        """Whether a value is made from random numbers."""
        op = self.flow.maker.get(v.name)
        if op is None or v.name in self.flow.active:
            return False
        is_draw = op.equation is not None and facts_of(op.equation).random
        return is_draw or any(self._draws(w) for w in op.inputs if w.kind != "literal")

    def _steps(self, v: Variable) -> list[LinePart]:
        """What a value is computed by, but for changes of shape and type."""
        return [part for part in self._inside(v) if not self._is_shape(part)]

    def _ends(self, v: Variable) -> list[LinePart]:
        """What reads a variable, in whatever shape."""
        found = []
        for part in self.readers.get(v.name, ()):
            if self._is_shape(part) and part.output.name not in self.lines:
                found += self._ends(part.output)
            else:
                found.append(part)
        return found

    def _cut(self) -> None:
        """Give lines to the longest parts of what is too long."""
        self.size: dict[str, int] = {}

        def size(v: Variable) -> int:
            if v.kind == "literal" or v.name in self.lines:
                return 1
            return self.size.get(v.name, 1)

        for part in self._used():
            v = part.output
            if self._is_shape(part):
                self.size[v.name] = size(part.inputs[0])
                continue
            if v.name not in self.flow.active:
                continue
            while (long := self._too_long(part, size)) is not None:
                self.lines.add(self._cuttable(long).name)
            total = sum(size(w) for w in part.inputs)
            self.size[v.name] = 1 + total

    def _too_long(self, part: LinePart, size: Callable[[Variable], int]) -> Variable | None:
        """An operand that is better a line of its own."""
        kind = self.known[part.output.name].kind if part.output.name in self.known else None
        for w in part.inputs:
            if kind in ("norm", "softmax", "log_softmax") and size(w) > 1:
                return w
            is_repeated = len(self._ends(self._cuttable(w))) > 1
            if size(w) > _SHORT and (is_repeated or self._is_curved(part)):
                return w
        longest = max(part.inputs, key=size, default=None)
        total = sum(size(w) for w in part.inputs)
        return longest if longest is not None and total > _LONGEST_LINE and size(longest) > 1 else None

    def _is_curved(self, part: LinePart) -> bool:
        """Whether a part is a function whose derivative is written with its operand inside."""
        if part.region is not None:
            return part.output.name in self.known
        op = part.operator
        if op is None or op.equation is None or op.call is not None:
            return True
        facts = facts_of(op.equation)
        return facts.elementwise and not facts.linear_in

    def _cuttable(self, v: Variable) -> Variable:
        """The variable to give a line: not one that is only another shape."""
        while v.name in self.parts and self._is_shape(self.parts[v.name]) and v.name not in self.lines:
            v = self.parts[v.name].inputs[0]
        return v

    # --- merging ------------------------------------------------------------------------------

    def _merged(self) -> Condensed:
        operators: list[Operator] = []
        writers: dict[Operator, WriteLine] = {}
        kinds: dict[str, str] = {}
        done: set[Operator] = set()
        for op in self.flow.operators:
            if op in done or not any(v.name in self.lines and self._is_used(v) for v in op.outputs):
                continue
            done.add(op)
            parts = self._inside(op.outputs[0]) if len(op.outputs) == 1 else []
            if op.outputs[0].name not in self.flow.active and len(parts) > 1:
                merged, writer = self._line(op, parts, self._constant(op.outputs[0], parts))
                operators.append(merged)
                writers[merged] = writer
            elif len(op.outputs) > 1 and any(self._is_inside(v) for v in op.inputs):
                operators.append(self._with_operands(op))
            elif (
                len(parts) <= 1
                and not (parts and parts[0].region)
                and tuple(parts[0].inputs if parts else op.inputs) == op.inputs
            ):
                operators.append(op)
                merged = op
            else:
                merged, writer = self._line(op, parts)
                operators.append(merged)
                writers[merged] = writer
            for v in op.outputs:
                kinds[v.name] = self._kind(v, parts)
        graph = replace(self.flow.graph, operators=tuple(operators))
        return Condensed(graph, writers, kinds, self._roles(operators), self.functions)

    def _is_inside(self, v: Variable) -> bool:
        """Whether a value is computed, and has no line."""
        return v.name in self.parts and v.name not in self.lines

    def _with_operands(self, op: Operator) -> Operator:
        """An operator of several results together with what its operands are computed by."""
        needed, found = {v.name for v in op.inputs if self._is_inside(v)}, [op]
        for other in reversed(self.flow.operators):
            if any(v.name in needed for v in other.outputs):
                found.append(other)
                needed.update(v.name for v in other.inputs if v.kind != "literal" and self._is_inside(v))
        operators = found[::-1]
        made = {v.name for o in operators for v in o.outputs}
        read = {v.name: v for o in operators for v in o.inputs if v.kind != "literal" and v.name not in made}
        inputs = tuple(read.values())
        run_all = [run(operators, inputs, v) for v in op.outputs]
        types = [_jax.inner_type(v.aval) for v in inputs]
        jaxpr = jax.make_jaxpr(lambda *values: [f(*values) for f in run_all])(*types)
        return replace(op, inputs=inputs, bodies={}, call=None, jaxpr=_jax.open_jaxpr(jaxpr))

    def _inside(self, v: Variable) -> list[LinePart]:
        """The parts of a line, in order."""
        needed, found = {v.name}, {}
        for op in reversed(self.flow.operators):
            for w in op.outputs:
                if w.name in needed and (w.name == v.name or w.name not in self.lines):
                    found[w.name] = self.parts[w.name]
                    needed.update(i.name for i in self.parts[w.name].inputs if i.kind != "literal")
        return list(found.values())[::-1]

    def _constant(self, v: Variable, parts: Sequence[LinePart]) -> str | None:
        """The name of a value without a derivative that is no short formula: a draw, a mask, positions."""
        if any(self._draws(part.output) for part in parts):
            return self._draw(v)
        if len(self._steps(v)) <= _LONGEST_LINE // 2 and any(
            v.kind == "input" for p in parts for v in p.inputs
        ):
            return None
        operators = self._between(v, set())
        if any(w.kind in ("input", "constant") for o in operators for w in o.inputs):
            return "mask" if v.dtype == bool else "f"
        return pattern(run(operators, (), v)())

    def _line(
        self, op: Operator, parts: Sequence[LinePart], name: str | None = None
    ) -> tuple[Operator, WriteLine]:
        """The operators of a line as one, and how it is written."""
        inner = {part.output.name for part in parts}
        read = {
            v.name: v for part in parts for v in part.inputs if v.kind != "literal" and v.name not in inner
        }
        inputs = tuple(read.values())
        (output,) = op.outputs
        operators = self._between(output, set(read))
        function = run(operators, inputs, output)
        jaxpr = jax.make_jaxpr(lambda *values: [function(*values)])(
            *(_jax.inner_type(v.aval) for v in inputs)
        )
        merged = replace(
            op,
            op=self.known[output.name].name if output.name in self.known and len(parts) == 1 else op.op,
            inputs=inputs,
            flops=sum(o.flops for o in operators),
            bodies={},
            call=None,
            jaxpr=jaxpr,
        )
        if name is not None:
            return merged, partial(named_function(name), function)
        return merged, Composition(parts, inputs, self.flow.active).write

    def _between(self, output: Variable, given: set[str]) -> list[Operator]:
        """The operators that compute a variable from given ones."""
        needed, found = {output.name}, []
        for op in reversed(self.flow.operators):
            if any(v.name in needed and v.name not in given for v in op.outputs):
                found.append(op)
                needed.update(v.name for v in op.inputs if v.kind != "literal")
        return found[::-1]

    def _draw(self, v: Variable) -> str:
        """The name of a random draw from the last key on the way to it."""
        operators = self._between(v, set())
        keys = [w for o in operators for w in (*o.inputs, *o.outputs) if _is_key(w)]
        for key in reversed(list(dict.fromkeys(keys))):
            inner = self._between(v, {key.name})
            made = {w.name for o in inner for w in o.outputs}
            given = {w.name for o in inner for w in o.inputs if w.kind != "literal" and w.name not in made}
            if given == {key.name} and (name := draw(run(inner, (key,), v), key, v)) is not None:
                return name
        return "random"

    # --- kinds and roles ----------------------------------------------------------------------

    def _kind(self, v: Variable, parts: Sequence[LinePart]) -> str:
        if any(part.operator is not None and part.operator.op in PRODUCTS for part in parts):
            return "product"
        if parts and parts[-1].activation is not None:
            return "activation"
        if any(part.operator is not None and part.operator.call is not None for part in parts):
            return "product" if any(self._is_weight(w) for p in parts for w in p.inputs) else "value"
        if v.name in self.known:
            return self.known[v.name].kind
        if not parts or not all(map(self._is_entrywise, parts)):
            return "value"
        return "activation" if any(map(self._is_curved, parts)) else "sum"

    def _is_weight(self, v: Variable) -> bool:
        return self.flow.source(v).kind == "input" and len(v.shape or ()) > 1

    def _is_entrywise(self, part: LinePart) -> bool:
        if part.region is not None:
            return is_elementwise(part.region)
        op = part.operator
        return op is not None and op.equation is not None and facts_of(op.equation).elementwise

    def _roles(self, operators: Sequence[Operator]) -> dict[str, tuple[str, str]]:
        """The role of every parameter that is an operand of a product, is added, or is multiplied with."""
        roles: dict[str, tuple[str, str]] = {
            name: (role, line) for name, (role, line) in self.roles.items() if role is not None
        }
        for line in operators:
            for part in self._inside(line.outputs[0]) if len(line.outputs) == 1 else ():
                for i, v in enumerate(part.inputs):
                    source = self.flow.source(v)
                    if v.kind == "literal" or source.kind != "input" or source.name not in self.flow.active:
                        continue
                    role = _role(part, i, source)
                    if role is not None:
                        roles.setdefault(source.name, (role, line.outputs[0].name))
        return roles


def _role(part: LinePart, index: int, source: Variable) -> str | None:
    op = part.operator
    if op is None or is_trivial(op):
        return None
    if op.op == "gather":
        return "table"
    if op.op in ("add", "sub", "add_any"):
        return "bias"
    return "weight" if len(source.shape or ()) > 1 or op.op in PRODUCTS else "scale"


def _is_key(v: Variable) -> bool:
    return jnp.issubdtype(v.aval.dtype, jax.dtypes.prng_key)
