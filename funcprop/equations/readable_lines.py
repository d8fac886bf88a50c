"""The lines of a graph that a person would write down, with what their names stand for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from funcprop.equations.condense import condense
from funcprop.equations.familiar_operators import familiar
from funcprop.equations.insides import Insides
from funcprop.equations.line_breaks import summands
from funcprop.equations.line_names import short_names
from funcprop.equations.line_writer import LineWriter
from funcprop.equations.plain_graph import plain
from funcprop.equations.verification import Line
from funcprop.graph.graph import Graph, Variable
from funcprop.rules.expressions import Expression


class ReadableLines:
    """Both sweeps of a graph, condensed, by the inputs that its result is differentiated by.

    `legend` are the paths of what was given a short name, `functions` the formulas of the user's own.
    """

    def __init__(self, graph: Graph, result: Variable, inputs: Sequence[Variable]) -> None:
        chosen = [v.name for v in inputs]
        graph = familiar(plain(graph))
        self.insides = Insides(graph, result, chosen)
        self.condensed = self.insides.add_roles(condense(graph, result, chosen))
        self.graph = self.condensed.graph
        names, self.legend = short_names(self.condensed, result, chosen)
        self.writer = LineWriter(
            self.graph, result, inputs, names, writers=self.condensed.writers, smooth=self.condensed.smooth
        )
        functions = self.condensed.functions.items()
        self.functions = tuple((f"{name}(z)", formula) for name, formula in functions)

    def sweeps(self) -> tuple[tuple[Line, ...], tuple[Line, ...]]:
        """The lines of both sweeps."""
        return tuple(self.writer.forward()), tuple(self.writer.backward())


def where(
    functions: Sequence[tuple[str, Expression]], legend: Mapping[str, str], width: int = 98
) -> list[str]:
    """What functions and short names stand for; formulas are broken, a path that is long has its own row."""
    rows = []
    for name, form in functions:
        first, *others = summands(f"{name} = {form.text()}", width - 2)
        rows += [first, *(f"    {row}" for row in others)]
    for names, path in grouped(legend):
        whole = f"{names} = {path}"
        rows += [whole] if len(whole) <= width else [names, f"  = {path}"]
    return rows


def grouped(legend: Mapping[str, str]) -> list[tuple[str, str]]:
    """The short names with their paths, one row a module: `W₁, b₁` and `Dense_0/{kernel, bias}`."""
    modules: dict[str, list[tuple[str, str]]] = {}
    for short, path in legend.items():
        module, _, leaf = path.rpartition("/")
        modules.setdefault(module, []).append((short, leaf))
    rows = []
    for module, found in modules.items():
        leaves = ", ".join(leaf for _, leaf in found)
        end = leaves if len(found) == 1 else f"{{{leaves}}}"
        rows.append((", ".join(short for short, _ in found), f"{module}/{end}" if module else leaves))
    return rows
