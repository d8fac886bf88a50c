"""`fp.diff`: what one graph has that another has not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

from funcprop.drawing.matching import Matching
from funcprop.drawing.shown import Shown
from funcprop.graph import Graph, Operator, Variable
from funcprop.naming import unique_names

ADDED, REMOVED = "added", "removed"

# The sweeps of a gradient's graph, as the classes of a Hessian-vector product's.
_ROLES = {"forward": "primal", "backward": "cotangent"}


class Arrow(NamedTuple):
    """An arrow of the figure: from a variable into an operator, or from an operator to its result."""

    source: str
    target: str
    type: str

    def __str__(self) -> str:
        return f"{self.source} → {self.target}  {self.type}"


@dataclass(frozen=True, eq=False, repr=False)
class Difference:
    """Two graphs, and what is only in one of them. `print` lists it, `fp.draw` draws both in one picture.

    Names are those of the graph in which a thing is. `print` shows the operands of an added or removed
    operator and does not list its arrows once more.
    """

    before: Graph
    after: Graph
    matching: Matching

    @cached_property
    def added(self) -> tuple[Operator, ...]:
        """The operators that are only in the second graph."""
        common = set(self.matching.operators.values())
        return tuple(op for op in self.after if op.name not in common)

    @cached_property
    def removed(self) -> tuple[Operator, ...]:
        """The operators that are only in the first graph."""
        return tuple(op for op in self.before if op.name not in self.matching.operators)

    @cached_property
    def added_variables(self) -> tuple[Variable, ...]:
        """The variables that are only in the second graph."""
        common = set(self.matching.variables.values())
        return tuple(v for v in self.after.variables if v.name not in common)

    @cached_property
    def removed_variables(self) -> tuple[Variable, ...]:
        """The variables that are only in the first graph."""
        return tuple(v for v in self.before.variables if v.name not in self.matching.variables)

    @cached_property
    def added_edges(self) -> tuple[Arrow, ...]:
        """The arrows that are only in the second graph."""
        return tuple(_arrow(*end) for end in self._arrows(self.after) if end[:3] not in self._common)

    @cached_property
    def removed_edges(self) -> tuple[Arrow, ...]:
        """The arrows that are only in the first graph."""
        return tuple(_arrow(*e) for e in self._arrows(self.before) if self._moved(e) not in self._common)

    def __bool__(self) -> bool:
        return bool(self.added or self.removed or self.added_edges or self.removed_edges)

    def _arrows(self, graph: Graph) -> Iterator[tuple[str, str, bool, Variable]]:
        """Variable, operator, whether it flows into it; several uses by one operator are one arrow."""
        seen = set()
        for op in graph:
            ends = [(v, True) for v in op.inputs if v.kind != "literal"] + [(v, False) for v in op.outputs]
            for v, into in ends:
                if (v.name, op.name, into) not in seen:
                    seen.add((v.name, op.name, into))
                    yield v.name, op.name, into, v

    def _moved(self, end: tuple[str, str, bool, Variable]) -> tuple[Any, Any, bool]:
        """An arrow of the first graph, by its ends in the second."""
        variable, op, into, _ = end
        return self.matching.variables.get(variable), self.matching.operators.get(op), into

    @cached_property
    def _common(self) -> set[tuple[Any, Any, bool]]:
        own = {end[:3] for end in self._arrows(self.after)}
        return own & {self._moved(end) for end in self._arrows(self.before)}

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

    def _repr_svg_(self) -> str | None:
        from funcprop.drawing.draw import notebook_svg  # which draws differences, and so imports this

        return notebook_svg(self)

    def shown(self) -> Shown:
        """What `fp.draw` draws: the second graph, and what only the first has."""
        own = [v.name for v in self.after.variables]
        gone = list(self.removed_variables)
        labels = unique_names([*own, *(v.name for v in gone)])[len(own) :]
        kept = {v.name: v for v in self.after.variables}
        of: dict[str, Variable] = {a: kept[b] for a, b in self.matching.variables.items()}
        of |= {v.name: replace(v, name=label) for v, label in zip(gone, labels, strict=True)}

        def moved(variables: tuple[Variable, ...]) -> tuple[Variable, ...]:
            return tuple(v if v.kind == "literal" else of[v.name] for v in variables)

        names = unique_names([op.name for op in (*self.after, *self.removed)])[len(self.after) :]
        removed = {
            op.name: replace(op, name=name, inputs=moved(op.inputs), outputs=_unless(op, of, kept))
            for op, name in zip(self.removed, names, strict=True)
        }
        after = {op.name: op for op in self.after}
        drawn = {a: after[b] for a, b in self.matching.operators.items()} | removed
        roles = dict.fromkeys((op.name for op in self.added), ADDED)
        roles |= dict.fromkeys((op.name for op in removed.values()), REMOVED)
        # A value that both have is not coloured as what computes it now.
        variable_roles = dict.fromkeys((v.name for v in self.after.variables), "")
        variable_roles |= {v.name: ADDED for v in self.added_variables}
        variable_roles |= {of[v.name].name: REMOVED for v in gone}
        edge_roles = {end[:3]: ADDED for end in self._arrows(self.after) if end[:3] not in self._common}
        missing = []
        for end in self._arrows(self.before):
            if self._moved(end) not in self._common:
                v, op = of[end[0]], drawn[end[1]]
                edge_roles[v.name, op.name, end[2]] = REMOVED
                missing.append((v, op, end[2]))
        graph = Graph(
            self.after.name,
            (*self.after.inputs, *(of[v.name] for v in gone if v.kind == "input")),
            (*self.after.constants, *(of[v.name] for v in gone if v.kind == "constant")),
            (*self.after.operators, *removed.values()),
            self.after.outputs,
        )
        return Shown(
            graph, roles, variable_roles, edge_roles, missing=tuple(missing), legend=(ADDED, REMOVED)
        )


def _counted(things: tuple[Any, ...], noun: str) -> str:
    return f"{len(things)} {noun}{'s' * (len(things) != 1)}"


def _unless(op: Operator, of: dict[str, Variable], kept: dict[str, Variable]) -> tuple[Variable, ...]:
    """A removed operator's results: those that another operator computes now are not its own any more."""
    return tuple(of[v.name] for v in op.outputs if of[v.name].name not in kept)


def _arrow(variable: str, op: str, into: bool, v: Variable) -> Arrow:
    return Arrow(variable, op, v.type) if into else Arrow(op, variable, v.type)


def diff(a: Graph, b: Graph) -> Difference:
    """The operators and arrows that were added and removed between two graphs.

    Operators are the same if they are of one kind (primitive or layer, parameters, types) and compute the
    same from the same inputs, or are read in the same way, or have neighbours in common. Inputs are the same
    if their names are, named values too.

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
    return Difference(a, b, Matching(a, b, _role(a), _role(b)))


def _role(graph: Graph) -> Any:
    roles = getattr(graph, "classes", None) or getattr(graph, "sweeps", None) or {}
    return lambda op: _ROLES.get(roles.get(op.name, ""), roles.get(op.name, ""))
