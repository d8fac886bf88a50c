"""What a page says, before it is written."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property

from funcprop.cost.second_order import SecondOrderCost
from funcprop.drawing.draw import Drawing
from funcprop.drawing.opening_page import PagePicture, pictures
from funcprop.equations.derivation import Derivation
from funcprop.graph.graph import Graph
from funcprop.reporting.cost import Kind, kinds
from funcprop.reporting.curves import Curves
from funcprop.reporting.exercises import Exercise
from funcprop.reporting.inspection import InspectedValue, Inspection
from funcprop.reporting.layers import Memory
from funcprop.reporting.loop_contents import Opened
from funcprop.reporting.on_machine import OnThisMachine
from funcprop.reporting.spectrum import Top

# All pictures of a page together have at most so many nodes, so that it stays below 2 MB.
MOST_PICTURED = 300
# Up to this many values are all in the table.
FEW = 60


@dataclass(frozen=True)
class ReportData:
    """All that is known of a function; a section is None where there is nothing to show."""

    title: str
    derivation: Derivation
    opened: Opened = field(repr=False)
    drawing: Drawing = field(repr=False)
    collapsed: tuple[str, ...]
    inspection: Inspection = field(repr=False)
    value: float | None
    nonfinite: str | None
    cost: SecondOrderCost = field(repr=False)
    memory: Memory = field(repr=False)
    spectrum: Top | None = field(repr=False, default=None)
    curves: Curves | None = field(repr=False, default=None)
    data: str = ""
    machine: OnThisMachine | None = field(repr=False, default=None)
    readable: Derivation | None = field(repr=False, default=None)
    exercises: tuple[Exercise, ...] = field(repr=False, default=())

    @cached_property
    def pictures(self) -> list[PagePicture]:
        """The pictures of the page: the whole, and what is inside of modules."""
        return pictures(self.drawing, MOST_PICTURED)

    @property
    def graph(self) -> Graph:
        """The graph that the page is about."""
        return self.derivation.traced.graph

    @property
    def parameters(self) -> int:
        """How many numbers are differentiated by."""
        return sum(math.prod(q.shape or ()) for q in self._parameters)

    @property
    def _parameters(self) -> list[InspectedValue]:
        return [q for q in self.inspection.quantities.values() if q.is_parameter]

    @property
    def value_bytes(self) -> int:
        """The bytes of everything that the forward sweep stores, arguments included."""
        return sum(v.nbytes or 0 for v in self.graph.variables)

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The operators of the function by kind."""
        return kinds(self.graph)

    @property
    def rows(self) -> list[InspectedValue]:
        """The given and the named values, or all of them if they are few."""
        quantities = self.inspection.quantities
        if len(quantities) <= FEW:
            return list(quantities.values())
        shown = {v.name for v in self.graph.variables if v.named or v.kind == "input"}
        return [q for name, q in quantities.items() if name in shown]
