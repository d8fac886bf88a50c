"""Loops drawn open: in the place of one operator, a box with its body.

What is constant flows into the box. What is carried, or comes one step at a time, has a square of its own in
it: an arrow leads from the operand to it, and back to it from what it is next. A result is what the last
iteration carried, or what all iterations made. A `cond` stays, and takes the results of its branches.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace

from funcprop.drawing.bodies import OpenedBody, bodies, inner_name, inner_prefix
from funcprop.drawing.request import DrawnPlace, Link, Shown
from funcprop.drawing.scopes import scope_path
from funcprop.graph.graph import Graph, Operator, Variable
from funcprop.graph.naming import joined
from funcprop.program.facts import LOOPS

OPENABLE = LOOPS | {"cond"}


def has_loops(graph: Graph) -> bool:
    """Whether there is something to open."""
    return any(op.op in OPENABLE for op in graph.operators)


def open_loops(shown: Shown, levels: int, only: Collection[str] | None = None) -> Shown:
    """Open the loops of a drawing, and the loops in them, to so many levels; `only` loops of these names."""
    if levels < 1 or not has_loops(shown.graph):
        return shown
    opening = _Opening(shown, only)
    operators = opening.opened(shown.graph.operators, levels)
    graph = shown.graph
    return replace(
        shown,
        graph=Graph(
            graph.name, graph.inputs, (*graph.constants, *opening.constants), tuple(operators), graph.outputs
        ),
        roles=opening.roles,
        variable_roles=opening.variable_roles,
        sections=opening.sections,
        links=tuple(opening.links),
        places=opening.places,
        titles=opening.titles,
    )


class _Opening:
    """The variables, operators and places gathered while loops are opened."""

    def __init__(self, shown: Shown, only: Collection[str] | None) -> None:
        self.only = only
        self.roles = dict(shown.roles)
        self.sections = dict(shown.sections)
        self.variable_roles = dict(shown.variable_roles)
        self.constants: list[Variable] = []
        self.links: list[Link] = []
        self.places: dict[DrawnPlace, Variable] = {}
        self.titles: dict[tuple[str, ...], str] = {}

    def opened(self, operators: Iterable[Operator], levels: int) -> list[Operator]:
        """The operators, with those inside of loops in their place."""
        found: list[Operator] = []
        for op in operators:
            is_opened = op.op in OPENABLE and levels and (self.only is None or op.name in self.only)
            found.extend(self.inside(op, levels) if is_opened else [op])
        return found

    def inside(self, op: Operator, levels: int) -> list[Operator]:
        """The operators of a loop; itself if there are none in it."""
        wired = bodies(op)
        if not any(body.graph.operators for body in wired):
            return [op]
        whole = inner_prefix(op.name, "" if len(wired) == 1 else "bodies")
        self.titles[scope_path(whole)] = title(op)
        values = {i: v for body in wired for i, v in self.entering(op, body, whole).items()}
        inner: list[Operator] = []
        ends: list[list[Variable]] = []
        for body in wired:
            moved = self.moved(op, body, joined(whole, body.name), values)
            ends.append([moved(v) for v in body.graph.outputs])
            inner += self.opened(self.renamed(op, body, joined(whole, body.name), moved), levels - 1)
        for body, outputs in zip(wired, ends, strict=True):
            self.connect(op, body, outputs, values)
        if op.op == "cond":
            inner.append(
                replace(op, inputs=(op.inputs[0], *(v for outputs in ends for v in outputs)), bodies={})
            )
        else:
            depth = len(scope_path(whole))
            entered = [v for i, v in values.items() if v is not op.inputs[i]]
            for outside, placed in ((False, entered), (True, op.outputs)):
                for i, v in enumerate(placed):
                    self.places[DrawnPlace(inner[0].name, depth, outside, i)] = v
            self.colour(op, inner, entered)
        return inner

    def entering(self, op: Operator, body: OpenedBody, scope: str) -> dict[int, Variable]:
        """Map each operand's number to what stands for it in the loop: itself, or a square of its own."""
        last = {i: body.graph.outputs[j] for j, i in body.carried.items()}
        values = {}
        for i, (operand, v) in enumerate(zip(body.operands, body.graph.inputs, strict=True)):
            given = op.inputs[operand]
            if i in last:
                label = _step(last[i], "t+1" if op.static.get("reverse") else "t−1")
            elif i in body.sliced:
                label = _step(given, "t")
            else:
                values[operand] = given
                continue
            name = joined(scope, label or v.name)
            made = replace(v, name=name, scope=scope, kind="intermediate", named=bool(label))
            values[operand] = made
            self.links.append(Link(given, made))
        return values

    def moved(
        self, op: Operator, body: OpenedBody, scope: str, values: Mapping[int, Variable]
    ) -> Callable[[Variable], Variable]:
        """Map a body's variables to those of the graph around."""
        of = {id(v): values[i] for v, i in zip(body.graph.inputs, body.operands, strict=True)}
        for v in (*body.graph.constants, *(v for inner in body.graph for v in inner.outputs)):
            of[id(v)] = replace(v, name=joined(scope, v.name), scope=joined(scope, v.scope))
        self.constants += [of[id(v)] for v in body.graph.constants]
        return lambda v: of.get(id(v), v)

    def renamed(
        self, op: Operator, body: OpenedBody, scope: str, moved: Callable[[Variable], Variable]
    ) -> list[Operator]:
        """The operators of a body, as those of the graph around."""
        found = []
        for inner in body.graph:
            name = inner_name(op.name, body.name, inner.name)
            found.append(
                replace(
                    inner,
                    name=name,
                    scope=joined(scope, inner.scope),
                    inputs=tuple(map(moved, inner.inputs)),
                    outputs=tuple(map(moved, inner.outputs)),
                )
            )
            if op.name in self.roles:
                self.roles.setdefault(name, self.roles[op.name])
            if op.name in self.sections:
                self.sections[name] = self.sections[op.name]
        return found

    def connect(
        self, op: Operator, body: OpenedBody, outputs: Sequence[Variable], values: Mapping[int, Variable]
    ) -> None:
        """Arrows from what a body computes to what it is in the next iteration, and to the results."""
        for j, v in enumerate(outputs):
            result = body.results[j]
            if op.op == "cond":
                continue
            if j in body.carried:
                again = values[body.operands[body.carried[j]]]
                if again is not v:
                    self.links.append(Link(v, again, True))
            if result is not None:
                self.links.append(Link(v, op.outputs[result]))

    def colour(self, op: Operator, inner: Sequence[Operator], entered: Sequence[Variable]) -> None:
        """Squares have the colour of what computes them, or of the loop."""
        role = {v.name: self.roles.get(made.name, "") for made in inner for v in made.outputs}
        into = {link.target.name: role[link.source.name] for link in self.links if link.source.name in role}
        for v in (*entered, *op.outputs):
            if op.name in self.roles:
                self.variable_roles[v.name] = into.get(v.name, self.roles[op.name])


def title(op: Operator) -> str:
    """Title a loop: its name, the number of its iterations, and its direction."""
    if op.op != "scan":
        return op.op
    return f"scan × {op.static['length']}" + ", backwards" * bool(op.static.get("reverse"))


def _step(v: Variable, step: str) -> str:
    """The name of a value at a step of the loop, if it has a name."""
    own = v.name.removeprefix(v.scope + "/").rpartition("/")[2]
    return f"{own}[{step}]" if v.named and v.kind != "literal" else ""
