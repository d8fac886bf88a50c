"""What the result of a graph is computed from: the operators it needs, who reads what, and what dominates.

A variable *dominates* another if every way from the differentiated inputs to the other one leads through it.
Parameters that enter on the way (weights, biases, scales) do not count as ways: they are read where they are.
So an activation is dominated by its pre-activation, a normalisation by what it normalises, a loss by the
outputs of the network. The operators between a variable and its dominator are a *region*: a function of the
dominator, of parameters, and of what has no derivative.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp

from funcprop import _jax
from funcprop.graph.graph import Graph, Operator, Variable, needed
from funcprop.graph.references import has_references
from funcprop.program.facts import facts_of, is_view
from funcprop.sweeps.activity import active_variables
from funcprop.sweeps.evaluation import evaluated


class Flow:
    """The operators that a result needs, and how its value flows through them."""

    def __init__(self, graph: Graph, result: Variable, inputs: Collection[str]) -> None:
        self.graph, self.result = graph, result
        self.operators = tuple(op for op in needed(graph.operators, [result]) if op.outputs)
        self.maker = {v.name: op for op in self.operators for v in op.outputs}
        active = active_variables(graph, inputs)
        # What is read behind a `stop_gradient` alone has no gradient.
        self.active = {result.name} & active
        for op in reversed(self.operators):
            if any(v.name in self.active for v in op.outputs):
                self.active.update(v.name for v in op.inputs if v.name in active)

    @cached_property
    def readers(self) -> dict[str, list[Operator]]:
        """The operators that read each variable, each once."""
        found: dict[str, list[Operator]] = defaultdict(list)
        for op in self.operators:
            for name in dict.fromkeys(v.name for v in op.inputs if v.kind != "literal"):
                found[name].append(op)
        return found

    @cached_property
    def parameters(self) -> set[str]:
        """Differentiated inputs, and these in another shape or type."""
        found = {v.name for v in self.graph.inputs if v.name in self.active}
        for op in self.operators:
            if is_trivial(op) and op.inputs[0].name in found:
                found.add(op.outputs[0].name)
        return found

    @cached_property
    def dominators(self) -> dict[str, str | None]:
        """The nearest dominator of every real variable; None where there is none.

        What has no derivative is on the way only to what depends on nothing else.
        """
        parent: dict[str, str | None] = {}
        depth: dict[str | None, int] = {None: 0}

        def common(a: str | None, b: str | None) -> str | None:
            while a != b:
                if a is not None and depth[a] >= depth[b]:
                    a = parent[a]
                elif b is not None:
                    b = parent[b]
            return a

        def ways(op: Operator) -> list[str]:
            found = [v.name for v in op.inputs if v.kind != "literal" and v.name in parent]
            of_active = [name for name in found if name in self.active]
            of_values = [name for name in of_active if name not in self.parameters]
            of_data = [name for name in found if name not in self.active]
            # A parameter from which a value beside it comes, as in `w − max(w)`.
            beside = [name for name in of_active if any(is_above(name, v) for v in of_values or of_data)]
            return [*(of_values or of_data), *beside] or of_active

        def is_above(first: str, name: str | None) -> bool:
            while name is not None and name != first:
                name = parent[name]
            return name is not None

        for v in (*self.graph.inputs, *self.graph.constants):
            if _jax.is_differentiable(v.aval):
                parent[v.name], depth[v.name] = None, 1
        for op in self.operators:
            if found := ways(op):
                nearest: str | None = found[0]
                for name in found[1:]:
                    nearest = common(nearest, name)
                for v in op.outputs:
                    if _jax.is_differentiable(v.aval):
                        parent[v.name], depth[v.name] = nearest, depth[nearest] + 1
        return parent

    @cached_property
    def keys(self) -> dict[str, frozenset[str]]:
        """The keys that what depends on nothing else is made from; none for a constant."""
        found = {
            v.name: frozenset({v.name}) for v in (*self.graph.inputs, *self.graph.constants) if is_key(v)
        }
        for op in self.operators:
            given = [v.name for v in op.inputs if v.kind != "literal"]
            if all(name in found for name in given):
                keys = frozenset().union(*(found[name] for name in given))
                found |= {v.name: frozenset({v.name}) if is_key(v) else keys for v in op.outputs}
        return found

    def source(self, variable: Variable) -> Variable:
        """What a variable is, but for its shape and type."""
        while (op := self.maker.get(variable.name)) is not None and is_trivial(op) and not variable.named:
            variable = op.inputs[0]
        return variable

    def region(
        self, last: Variable, first: str, into_constants: bool, stop: str | None = None
    ) -> Region | None:
        """The operators from `first` to `last`, or None where one of them is no part of a simple function.

        Where the region goes `into_constants`, what has no derivative is computed in it from inputs of the
        graph, from what has a name and from `stop`; otherwise it is read as it is.
        """
        inside: dict[Operator, None] = {}
        others: dict[str, Variable] = {}
        stack = [last]
        while stack:
            v = stack.pop()
            if v.kind == "literal" or v.name == first:
                continue
            op = self.maker.get(v.name)
            is_outer = op is None or (v.named and v is not last) or v.name == stop
            if v.name not in self.active and not is_outer and first in self.active:
                is_outer = not (into_constants or self._is_literal(v) or self._is_of(first, v))
            if op is None or is_outer:
                others[v.name] = v
            elif not may_be_inside(op) or len(inside) > _LARGEST_REGION:
                return None
            elif op not in inside:
                inside[op] = None
                stack.extend(op.inputs)
        ordered = tuple(sorted(inside, key=self._place.__getitem__))
        given = [v for op in ordered for v in op.inputs if v.name == first][:1]
        if not given or any(v.name in self.active and v.name not in self.parameters for v in others.values()):
            return None
        rest = sorted(others.values(), key=lambda v: self.rank[v.name])
        return Region(ordered, (given[0], *rest), last)

    def between(self, outputs: Iterable[Variable], given: Container[str] = ()) -> list[Operator]:
        """The operators that compute variables from `given` ones, in order."""
        found: dict[Operator, None] = {}
        stack = list(outputs)
        while stack:
            v = stack.pop()
            op = None if v.name in given else self.maker.get(v.name)
            if op is not None and op not in found:
                found[op] = None
                stack.extend(w for w in op.inputs if w.kind != "literal")
        return sorted(found, key=self._place.__getitem__)

    @cached_property
    def _place(self) -> dict[Operator, int]:
        return {op: i for i, op in enumerate(self.operators)}

    @cached_property
    def rank(self) -> dict[str, int]:
        """The place of every variable among those of the graph."""
        return {v.name: i for i, v in enumerate(self.graph.variables)}

    def _is_of(self, first: str, v: Variable) -> bool:
        """Whether a few operators compute a variable from another one, such as the largest entry of a row."""
        for _ in range(_FEW):
            op = self.maker.get(v.name)
            if v.name == first or op is None or v.named:
                break
            v = next((w for w in op.inputs if w.name == first or w.kind != "literal"), v)
        return v.name == first

    def _is_literal(self, variable: Variable) -> bool:
        """Whether a value is made of literals alone, such as a number in every entry of an array."""
        if variable.kind == "literal":
            return True
        op = self.maker.get(variable.name)
        return op is not None and may_be_inside(op) and all(map(self._is_literal, op.inputs))


# A region with more operators is no single function that has a name.
_LARGEST_REGION = 60

_FEW = 8

_OUTSIDE = frozenset(
    {"dot_general", "conv_general_dilated", "scan", "while", "cond", "custom_vjp_call", "solve", "tril"}
)


def may_be_inside(op: Operator) -> bool:
    """Whether an operator may be a part of a region: no product, loop, layer or effect."""
    if op.equation is None or op.call is not None or has_references(op) or len(op.outputs) != 1:
        return False
    return op.op not in _OUTSIDE and not op.jaxpr.effects and not facts_of(op.equation).random


def is_key(v: Variable) -> bool:
    """Whether a variable is a key of random numbers."""
    return jnp.issubdtype(v.aval.dtype, jax.dtypes.prng_key)


def is_trivial(op: Operator) -> bool:
    """Whether an operator gives one value another shape or type alone, or repeats it along new axes."""
    if op.equation is None or op.call is not None or len(op.inputs) != 1 or len(op.outputs) != 1:
        return False
    if _jax.is_differentiable(op.outputs[0].aval) != _jax.is_differentiable(op.inputs[0].aval):
        return False
    return op.op == "broadcast_in_dim" or (is_view(op.equation) and op.op != "rev")


@dataclass(frozen=True, eq=False)
class Region:
    """Operators that compute one variable from a few: a function of `inputs`, the dominator first."""

    operators: tuple[Operator, ...]
    inputs: tuple[Variable, ...]
    output: Variable

    def __call__(self, *values: Any) -> Any:
        """The value of the output, from those of the inputs."""
        return run(self.operators, self.inputs, [self.output])(*values)[0]

    @property
    def is_closed(self) -> bool:
        """Whether its inputs are all that it reads."""
        known = {v.name for op in self.operators for v in op.outputs}.union(v.name for v in self.inputs)
        return all(v.kind == "literal" or v.name in known for op in self.operators for v in op.inputs)

    def primitives(self) -> Iterator[str]:
        """The names of all primitives in it, those of bodies included."""
        for op in self.operators:
            for eqn in _jax.equations(op.jaxpr):
                yield eqn.primitive.name

    @cached_property
    def key(self) -> str:
        """The region as text; equal regions are the same function."""
        number = {v.name: f"x{i}" for i, v in enumerate(self.inputs)}
        rows = []
        for op in self.operators:
            given = [f"{v.value!r}" if v.kind == "literal" else number[v.name] for v in op.inputs]
            number |= {v.name: f"y{len(number)}" for v in op.outputs}
            rows.append(f"{op.jaxpr} {given}")
        return f"{[v.type for v in self.inputs]} {rows}"


def run(
    operators: Sequence[Operator], inputs: Sequence[Variable], outputs: Sequence[Variable]
) -> Callable[..., list[Any]]:
    """The function that computes `outputs` from `inputs` by some operators."""

    def function(*values: Any) -> list[Any]:
        # An input of the function may be computed on the way to another one.
        found = evaluated(operators, {v.name: x for v, x in zip(inputs, values, strict=True)})
        return [v.value if v.kind == "literal" else found[v.name] for v in outputs]

    return function
