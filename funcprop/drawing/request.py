"""What is to be drawn: a graph, and what else is to be seen of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from funcprop.graph.graph import Graph, Operator, Variable


class Link(NamedTuple):
    """A value that becomes another, where a loop is drawn open.

    An operand becomes what is carried, and so does (`is_next`) what an iteration computes. The source may be
    a literal, from which no arrow is drawn.
    """

    source: Variable
    target: Variable
    is_next: bool = False

    @property
    def end(self) -> str:
        """The name that stands for an operator among the arrows' ends; no operator has it."""
        return f"→ {self.target.name}"


class DrawnPlace(NamedTuple):
    """Where a value of an opened loop stands: in the loop's scope, or outside of it.

    The scope is that of this depth around this operator. `number` counts the values of one loop.
    """

    operator: str
    depth: int
    outside: bool
    number: int


@dataclass(frozen=True)
class Shown:
    """A graph with what else is to be seen of it.

    `roles` colours operators by name, `variable_roles` variables that no operator computes, `edge_roles` the
    arrows between a variable and an operator (`(variable, operator, is_input)`) and, with `Link.end` for the
    operator, those between variables. `sections` are the outermost
    boxes. `residuals` are drawn as values that are saved for the section `saved_for`. `missing` are arrows
    that the graph does not have. Of opened loops, `links` are the arrows from value to value, `places` are
    the values that no operator computes, and `titles` what the boxes are called, by their scope. The
    scopes in `shut` are drawn as one node at any depth. `data` are the inputs that are no parameters.
    """

    graph: Graph
    roles: Mapping[str, str] = field(default_factory=dict)
    variable_roles: Mapping[str, str] = field(default_factory=dict)
    edge_roles: Mapping[tuple[str, str, bool], str] = field(default_factory=dict)
    sections: Mapping[str, str] = field(default_factory=dict)
    residuals: tuple[Variable, ...] = ()
    saved_for: str = ""
    missing: tuple[tuple[Variable, Operator, bool], ...] = ()
    legend: tuple[str, ...] = ()
    links: tuple[Link, ...] = ()
    places: Mapping[DrawnPlace, Variable] = field(default_factory=dict)
    titles: Mapping[tuple[str, ...], str] = field(default_factory=dict)
    shut: frozenset[tuple[str, ...]] = frozenset()
    data: frozenset[str] = frozenset()
