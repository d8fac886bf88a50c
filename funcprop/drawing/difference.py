"""`fp.diff`: what one graph has that another has not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from funcprop.drawing.backward import BackwardGraph
from funcprop.drawing.matching import Matching
from funcprop.drawing.opened_loops import ComparedGraphs, Passage, compared
from funcprop.drawing.request import Shown
from funcprop.drawing.second_order import SecondOrderGraph
from funcprop.graph.graph import Graph, Operator, Variable
from funcprop.graph.pictured import Pictured

# The sweeps of a gradient's graph, as the classes of a Hessian-vector product's.
_ROLES = {"forward": "primal", "backward": "cotangent"}


class Arrow(NamedTuple):
    """An arrow of the figure: from a variable into an operator, or from an operator to its result."""

    source: str
    target: str
    type: str

    def __str__(self) -> str:
        return f"{self.source} → {self.target}  {self.type}"


class End(NamedTuple):
    """Where an arrow is: between a variable and an operator, `into` it or out of it.

    The operator may be a `Passage`; then the arrow leads to the value that it makes.
    """

    variable: Variable
    operator: Operator
    into: bool

    @property
    def key(self) -> tuple[str, str, bool]:
        """The key of the arrow in its graph: its ends, and its direction."""
        return self.variable.name, self.operator.name, self.into

    @property
    def arrow(self) -> Arrow:
        """The names of its ends, and its type."""
        v, op = self.variable, self.operator
        name = op.outputs[0].name if isinstance(op, Passage) else op.name
        return Arrow(v.name, name, v.type) if self.into else Arrow(name, v.name, v.type)


@dataclass(frozen=True, eq=False, repr=False)
class Difference(Pictured):
    """Two graphs, and what is only in one of them. `print` lists it, `fp.draw` draws both in one picture.

    Names are those of the graph in which a thing is; what is in a loop is called by its place,
    `scan[body]/add`. `print` shows the operands of an added or removed operator and does not list its arrows
    once more.
    """

    before: Graph
    after: Graph
    comparison: ComparedGraphs

    @property
    def matching(self) -> Matching:
        """The operators and variables that both graphs share, by name."""
        return self.comparison.matching

    @cached_property
    def added(self) -> tuple[Operator, ...]:
        """The operators that are only in the second graph."""
        common = set(self.matching.operators.values())
        return tuple(op for op in self.comparison.second.graph if op.name not in common)

    @cached_property
    def removed(self) -> tuple[Operator, ...]:
        """The operators that are only in the first graph."""
        common = self.matching.operators
        return tuple(op for op in self.comparison.first.graph if op.name not in common)

    @cached_property
    def added_variables(self) -> tuple[Variable, ...]:
        """The variables that are only in the second graph."""
        common = set(self.matching.variables.values())
        return tuple(v for v in self.matching.b.graph.variables if v.name not in common)

    @cached_property
    def removed_variables(self) -> tuple[Variable, ...]:
        """The variables that are only in the first graph."""
        common = self.matching.variables
        return tuple(v for v in self.matching.a.graph.variables if v.name not in common)

    @cached_property
    def added_arrows(self) -> tuple[End, ...]:
        """The ends of the arrows that are only in the second graph."""
        return tuple(end for end in _arrows(self.matching.b.graph) if end.key not in self._common)

    @cached_property
    def removed_arrows(self) -> tuple[End, ...]:
        """The ends of the arrows that are only in the first graph."""
        return tuple(e for e in _arrows(self.matching.a.graph) if self._moved(e) not in self._common)

    @cached_property
    def added_edges(self) -> tuple[Arrow, ...]:
        """The arrows that are only in the second graph."""
        return tuple(end.arrow for end in self.added_arrows)

    @cached_property
    def removed_edges(self) -> tuple[Arrow, ...]:
        """The arrows that are only in the first graph."""
        return tuple(end.arrow for end in self.removed_arrows)

    def __bool__(self) -> bool:
        return bool(self.added or self.removed or self.added_edges or self.removed_edges)

    def _moved(self, end: End) -> tuple[Any, Any, bool]:
        """An arrow of the first graph, by its ends in the second."""
        same = self.matching
        return same.variables.get(end.variable.name), same.operators.get(end.operator.name), end.into

    @cached_property
    def _common(self) -> set[tuple[Any, Any, bool]]:
        own = {end.key for end in _arrows(self.matching.b.graph)}
        return own & {self._moved(end) for end in _arrows(self.matching.a.graph)}

    def __str__(self) -> str:
        if not self:
            return f"{self.before.name} and {self.after.name}: no difference"
        lines = [
            f"{self.before.name} → {self.after.name}: "
            f"added {_counted(self.added, 'operator')} and {_counted(self.added_edges, 'arrow')}, "
            f"removed {_counted(self.removed, 'operator')} and {_counted(self.removed_edges, 'arrow')}"
        ]
        for sign, ops, variables, arrows in (
            ("+", self.added, self.added_variables, self.added_edges),
            ("-", self.removed, self.removed_variables, self.removed_edges),
        ):
            lines += [f"{sign} {v.kind} {v}" for v in variables if v.kind != "intermediate"]
            lines += [f"{sign} {op.name} = {op.op}({', '.join(v.name for v in op.inputs)})" for op in ops]
            own = {op.name for op in ops}
            lines += [f"{sign} {a}" for a in arrows if a.source not in own and a.target not in own]
        return "\n".join(lines)

    __repr__ = __str__


def _counted(things: tuple[Any, ...], noun: str) -> str:
    return f"{len(things)} {noun}{'s' * (len(things) != 1)}"


def _arrows(graph: Graph) -> Iterator[End]:
    """Several uses by one operator are one arrow; what becomes another value is one arrow to it."""
    seen = set()
    for op in graph:
        ends = [End(v, op, True) for v in op.inputs if v.kind != "literal"]
        ends += [] if isinstance(op, Passage) else [End(v, op, False) for v in op.outputs]
        for end in ends:
            if end.key not in seen:
                seen.add(end.key)
                yield end


def diff(a: Graph, b: Graph) -> Difference:
    """The operators and arrows that were added and removed between two graphs.

    Operators are the same if they are of one kind (primitive or layer, parameters, types) and compute the
    same from the same inputs, or are read in the same way, or have neighbours in common. Inputs are the same
    if their names are, named values too. A loop (`scan`, `while`, `cond`) is one operator where it is the
    same in both graphs; where both have one that differs inside, what differs in it is shown.

    Args:
        a, b: what `fp.trace`, `fp.backward_graph` or `fp.second_order_graph` returns.

    Raises:
        TypeError: one of them is not a graph.

    Example:
        >>> import jax.numpy as jnp, funcprop as fp
        >>> W, x, b = jnp.ones((3, 2)), jnp.ones(2), jnp.ones(3)
        >>> plain = fp.trace(lambda W, x: fp.name(W @ x, "z"))(W, x)
        >>> print(fp.diff(plain, fp.trace(lambda W, x, b: fp.name(W @ x + b, "z"))(W, x, b)))
        <lambda> → <lambda>: added 1 operator and 4 arrows, removed 0 operators and 1 arrow
        + input b: float32[3]
        + add = add(dot_general, b)
        + dot_general → dot_general  float32[3]
        - dot_general → z  float32[3]
    """
    for argument, graph in (("a", a), ("b", b)):
        if not isinstance(graph, Graph):
            raise TypeError(
                f"fp.diff: {argument}={graph!r} is not a graph; pass what fp.trace(fun)(*args) returns."
            )
    first, second = (
        g.shown() if isinstance(g, BackwardGraph | SecondOrderGraph) else Shown(g) for g in (a, b)
    )
    return Difference(a, b, compared(first, second, lambda role: _ROLES.get(role, role)))
