"""Which regions of a graph are functions that have a name; the user's own are called `φ`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace

import jax.numpy as jnp

from funcprop.equations.composition import Composition, LinePart, type_of
from funcprop.equations.constants import draw, named_function, pattern
from funcprop.equations.elementwise import elementwise, is_elementwise
from funcprop.equations.flow import Flow, Region, is_key, is_trivial, may_be_inside
from funcprop.equations.known_functions import find
from funcprop.equations.line_parts import LineParts
from funcprop.equations.named_function import NamedFunction
from funcprop.graph.graph import Operator, Variable
from funcprop.program.facts import facts_of
from funcprop.rules.expressions import Expression, symbol

_SYMBOLS = ("φ", "ψ", "χ")


class Recognition:
    """Writes the known functions of a flow into its parts.

    `functions` are the user's own, by their symbol: the formula of each. `roles` are those of variables that
    a known function reads as its `scale` or `shift`, with the variable that it computes.
    """

    def __init__(self, flow: Flow, parts: LineParts) -> None:
        self.flow, self.parts = flow, parts
        self.functions: dict[str, Expression] = {}
        self.roles: dict[str, tuple[str, str]] = {}
        # Equal regions, such as the activations of equal layers, are compared once.
        self._found: dict[str, NamedFunction | None] = {}
        self._formulas: dict[str, Expression] = {}
        self._plain: dict[str, LinePart] = {}
        # What is read outside of the functions that it is in is in none of them.
        self._outside: set[str] = set()
        while not (outside := self._recognise_all()) <= self._outside:
            self._outside |= outside
            self.functions, self.roles = {}, {}
            for name, part in self._plain.items():
                parts[name] = part

    def _recognise_all(self) -> set[str]:
        """Recognise functions from the end on; gives the variables in them that are read outside too."""
        homes: dict[Operator, set[str]] = defaultdict(set)
        outside = set[str]()
        for op in reversed(self.flow.operators):
            (v, *others) = op.outputs or (None,)
            if v is None or others or is_trivial(op):
                continue
            readers = self.flow.readers[v.name]
            if homes[op] and all(homes[op] & homes[reader] for reader in readers):
                continue
            if homes[op] and v.name in self.flow.active and any(homes[op] & homes[r] for r in readers):
                outside.add(v.name)
            region = self._recognise(v)
            for inner in () if region is None else region.operators:
                homes[inner].add(v.name)
        return outside

    def _recognise(self, v: Variable) -> Region | None:
        """Find the largest region that ends at a variable and is a known function."""
        if v.name in self.flow.keys:
            return self._draw(v) if self.flow.keys[v.name] else self._constant(v)
        if not may_be_inside(self.flow.maker[v.name]):
            return None
        if (given := self.parts[v.name].region) is not None and not self._is_open(given):
            return given
        found = self._largest(v)
        if found is None:
            return None
        region, known = found
        if not known.name:
            known = self._with_symbol(region, known)
        self._put(v, LinePart(v, region.inputs, None, region, known.write, known.name, known.kind))
        for role, w in zip(known.roles, region.inputs[1:], strict=False):
            if role is not None:
                self.roles[self.flow.source(w).name] = role, v.name
        return region

    def _draw(self, v: Variable) -> Region | None:
        """A random draw from one key, the last one from which all of it is made."""
        if is_key(v) or not self.flow.keys[v.name]:
            return None
        between = self.flow.between
        keys = {w.name: w for op in between([v]) for w in (*op.inputs, *op.outputs) if is_key(w)}
        for key in reversed(keys.values()):
            region = Region(tuple(between([v], {key.name})), (key,), v)
            if not region.is_closed or (name := draw(region)) is None:
                continue
            self._put(v, LinePart(v, (key,), None, region, named_function(name), name, "draw"))
            return region
        return None

    def _constant(self, v: Variable) -> Region | None:
        """A constant matrix that has a name of its own: `0.1 I`, a causal mask."""
        if len(v.shape or ()) < 2 or not all(map(may_be_inside, operators := self.flow.between([v]))):
            return None
        region = Region(tuple(operators), (), v)
        if (name := pattern(region())) in ("constant", "mask", "positions"):
            return None
        self._put(v, LinePart(v, (), None, region, named_function(name), name, "constant"))
        return region

    def _put(self, v: Variable, part: LinePart) -> None:
        self._plain.setdefault(v.name, self.parts[v.name])
        self.parts[v.name] = part

    def _is_open(self, region: Region) -> bool:
        """Whether something that a region computes on the way is read outside."""
        inner = {v.name for op in region.operators for v in op.outputs} - {region.output.name}
        return not inner.isdisjoint(self._outside)

    def _largest(self, last: Variable) -> tuple[Region, NamedFunction] | None:
        first, best = self.flow.dominators.get(last.name), None
        while first is not None:
            region = self.flow.region(last, first, False)
            if region is not None and (len(region.operators) == 1 or self._is_start(first)):
                regions = self._regions(region, last, first)
                found = next(((r, k) for r in regions if (k := self._known(r))), None)
                if found is not None and not (best is not None and _drops_factor(*found, *best)):
                    best = found
            if region is None or first not in self.flow.maker or self._is_named(first):
                break
            first = self.flow.dominators.get(first)
        return best

    def _regions(self, region: Region, last: Variable, first: str) -> Iterator[Region]:
        """A region, the same with the constants in it, and those that read labels which are computed."""
        yield region
        whole = self.flow.region(last, first, True)
        if whole is None:
            return
        yield whole
        if {"exp", "log"} <= set(whole.primitives()):
            rows = (whole.inputs[0].shape or ())[:-1]
            made = (v for op in whole.operators for v in op.outputs if v.name not in self.flow.active)
            for label in made:
                if jnp.issubdtype(label.dtype, jnp.integer) and label.shape == rows:
                    found = self.flow.region(last, first, True, label.name)
                    if found is not None:
                        yield found

    def _is_start(self, name: str) -> bool:
        """Whether a function may begin at a variable: not in the middle of a chain of entrywise operators."""
        op = self.flow.maker.get(name)
        if op is None or op.equation is None or op.call is not None or not facts_of(op.equation).elementwise:
            return True
        # Such as the difference of a prediction and its label.
        joins = len(op.inputs) == 2 and not any(self.parts.number(v).kind == "literal" for v in op.inputs)
        return joins or len(self.flow.readers[name]) > 1 or self._is_named(name)

    def _is_named(self, name: str) -> bool:
        return any(v.named for v in self.flow.maker[name].outputs if v.name == name)

    def _known(self, region: Region) -> NamedFunction | None:
        if all(map(is_trivial, region.operators)):
            return None
        key = region.key
        if key not in self._found:
            known = find(region)
            if known is not None and self._is_hidden(region, known):
                known = None
            self._found[key] = known or self._own_function(region)
        known = self._found[key]
        if known is not None and not known.name and region.output.name not in self.flow.active:
            return None
        return None if known is not None and known.kind == "loss" and self._is_open(region) else known

    def _is_hidden(self, region: Region, known: NamedFunction) -> bool:
        """Whether a function has its name already before the last operator, such as `softmax(z) + 1e-8`."""
        last = next(op for op in reversed(region.operators) if not is_trivial(op))
        if last.op not in ("add", "sub", "mul", "div", "max", "min", "clamp"):
            return False
        inner = self._without(region, last)
        found = None if inner is None else find(inner)
        return found is not None and found.name == known.name

    def _without(self, region: Region, last: Operator) -> Region | None:
        """The region before its last operator, if that combines it with numbers alone."""
        made = {v.name for op in region.operators for v in op.outputs}
        operands = [v for v in last.inputs if v.kind != "literal"]
        active = [v for v in operands if v.name in self.flow.active]
        if len(active) != 1 or any(v.name not in made for v in operands):
            return None
        given = region.inputs
        operators = self.flow.between(active, {v.name for v in given})
        return Region(tuple(operators), tuple(given), active[0])

    def _own_function(self, region: Region) -> NamedFunction | None:
        """A function of each entry that has no name is `φ`, if it is more than a short formula."""
        plain = [op for op in region.operators if not is_trivial(op)]
        # The absolute value of an input is read in its place.
        read = plain[0].outputs[0] if plain and plain[0].op == "abs" else region.inputs[0]
        uses = sum(v.name == read.name for op in plain for v in op.inputs)
        if not is_elementwise(region) or len(plain) < 3 or uses < 2:
            return None
        inner = self._without(region, plain[-1])
        if inner is not None and len(inner.operators) > 1 and find(inner) is not None:
            # Such as `elu(z) / 0.7`, which says more.
            return None
        parts = [self.parts.of_operator(op, op.outputs[0]) for op in region.operators]
        z = symbol(region.inputs[0].name, "z", "z", type_of(region.inputs[0]))
        formula = Composition(parts, region.inputs[:1], ()).write([z], z, z).forward
        self._formulas[region.key] = formula
        return NamedFunction("", "activation", region, elementwise(""))

    def _with_symbol(self, region: Region, known: NamedFunction) -> NamedFunction:
        """A function of the user's own with its symbol: equal formulas have one."""
        formula = self._formulas[region.key]
        same = (name for name, given in self.functions.items() if given.text() == formula.text())
        if (name := next(same, None)) is None:
            count = len(self.functions)
            name = _SYMBOLS[count] if count < len(_SYMBOLS) else f"φ{count}"
            self.functions[name] = formula
        return replace(known, name=name, write=elementwise(name))


def _drops_factor(region: Region, known: NamedFunction, inner: Region, of_inner: NamedFunction) -> bool:
    """Whether the same normalisation begins later: it divides by `√(… + ε)`, so a factor is no part of it."""
    before = set(region.operators).difference(inner.operators)
    return known.kind == "norm" and known.name == of_inner.name and not all(map(is_trivial, before))
