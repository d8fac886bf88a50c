"""The arrows of a picture, and the repetitions of folded blocks that they lead from and to."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import replace

from funcprop.drawing.crossing import Crossing, alike, words
from funcprop.drawing.nodes import Nodes
from funcprop.drawing.picture import Edge, EdgeKind
from funcprop.drawing.representatives import Representatives
from funcprop.graph.graph import Operator, Variable


class Arrows:
    """The arrows of a picture: `draw` finds them, `shared` says which are one."""

    def __init__(self, known: Representatives, nodes: Nodes) -> None:
        self.known = known
        self.shown = known.shown
        self.nodes = nodes
        self.edges: dict[tuple[str, str, EdgeKind, str], dict[str, tuple[Edge, list[Crossing]]]] = {}
        # Bytes that are saved by the name of what is drawn for them, over all repetitions.
        self.saved_bytes: Counter[str] = Counter()
        for v in self.shown.residuals:
            self.saved_bytes[known.drawn(v).name] += v.nbytes or 0

    def draw(self) -> None:
        """Draw all arrows, and with them the nodes at their ends."""
        for v in (*self.known.graph.inputs, *self.known.graph.constants):
            if self.known.drawn(v) is v and self.known.has_square(v):
                self.nodes.variable_node(v)
        for op in self.known.graph.operators:
            self._around(op)
        for link in self.known.links:
            end = self.source(self.known.drawn(link.target))
            reader = self.known.operators[self.known.place_of[link.target.name].operator]
            if end is not None:
                role = self._role(link.source, link.end, True)
                self.flow(link.source, reader, end, role, link.is_next)
        for variable in dict.fromkeys(self.shown.residuals):
            if variable.kind != "literal" and self.known.drawn(variable) is variable:
                start, saved = self.source(variable), self.nodes.saved_node(variable)
                if start is not None and saved is not None:
                    self.connect(start, saved, variable, "residual", "")
        for variable, op, is_input in self.shown.missing:
            drawn = self.known.drawn(variable)
            node, square = self.nodes.operator_node(op), self.source(drawn)
            if square is not None:
                ends = (square, node) if is_input else (node, square)
                self.connect(*ends, drawn, "flow", self._role(variable, op.name, is_input))

    def _around(self, op: Operator) -> None:
        """Draw the arrows into an operator and those to its results."""
        node = self.nodes.operator_node(op)
        for v in op.inputs:
            if v.kind != "literal":
                self.flow(v, op, node, self._role(v, op.name, True))
        for v in op.outputs:
            drawn = self.known.drawn(v)
            if self.known.has_square(drawn) and (drawn is v or drawn.name in self.known.results):
                square, role = self.nodes.variable_node(drawn), self._role(v, op.name, False)
                self.connect(node, square, drawn, "flow", role, self.levels(op), self.levels_of(v))

    def _role(self, variable: Variable, operator: str, is_input: bool) -> str:
        return self.shown.edge_roles.get((variable.name, operator, is_input), "")

    def flow(self, v: Variable, reader: Operator, target: str, role: str, is_next: bool = False) -> None:
        """The arrow by which a value gets to an operator, or to a value inside of its loop."""
        variable, made = self.known.drawn(v), self.known.maker(v)
        start, levels, into = self.source(variable), self.levels_of(v), self.levels(reader)
        kind: EdgeKind = "flow"
        if self.known.reads_saved(reader) and v.name in self.known.saved:
            saved = self.nodes.saved_node(variable)
            start, kind, levels = (start, "residual", levels) if saved is None else (saved, "flow", into)
        elif is_next or (made is not None and self.known.folding.apart(made, reader)):
            kind = "repeat"
            if made is not None and variable.name in self.known.results and not is_next:
                # The square of a result is outside of the repetitions.
                start, levels = self.nodes.operator_node(made), self.levels(made)
        if start is not None:
            self.connect(start, target, variable, kind, role, levels, into)

    def source(self, variable: Variable) -> str | None:
        """The node from which a variable's arrows start: its square, or what makes or hides it."""
        if self.known.has_square(variable):
            return self.nodes.variable_node(variable)
        if variable.name in self.known.producer:
            return self.nodes.operator_node(self.known.producer[variable.name][0])
        box = self.known.box_of_variable(variable)
        around = None if box is None else self.known.collapsed(box)
        return None if around is None else self.nodes.scope_node(around)

    def connect(
        self,
        source: str,
        target: str,
        variable: Variable,
        kind: EdgeKind,
        role: str,
        made: Mapping[int, int] | None = None,
        reader: Mapping[int, int] | None = None,
    ) -> None:
        """Draw an arrow; `made` and `reader` are the repetitions that it comes from and leads to."""
        # A node of several operators is not drawn to feed itself; one that is read by its own repetition is.
        if source == target and (kind != "repeat" or not source.startswith("o:")):
            return
        edge = Edge(
            source,
            target,
            variable.name,
            variable.shape,
            None if variable.dtype is None else str(variable.dtype),
            self.saved_bytes[variable.name] if kind == "residual" else variable.nbytes,
            kind,
            role,
        )
        present = self.edges.setdefault((source, target, kind, role), {})
        present.setdefault(variable.name, (edge, []))[1].append(Crossing(made or {}, reader or {}))

    def levels(self, op: Operator) -> dict[int, int]:
        """The repetitions in which an operator is, of those whose box, or node, is in the picture."""
        groups = self.known.folding.groups
        place = self.known.folding.coordinates(op).items()
        return {g: i for g, i in place if self.known.collapsed(groups[g].box) in (None, groups[g].box)}

    def levels_of(self, variable: Variable) -> dict[int, int]:
        """The repetitions in which the start of a variable's arrows is."""
        made = self.known.maker(variable)
        if made is None:
            # A parameter is of the repetitions that have one of their own.
            if len(self.known.alike[self.known.drawn(variable).name]) == 1:
                return {}
            found = [self.levels(op).items() for op in self.known.consumers[variable.name]]
            return dict(item for item in found[0] if all(item in others for others in found)) if found else {}
        drawn = self.known.drawn(variable)
        if not self.known.has_square(drawn):
            return self.levels(made)
        box = self.known.box_of_variable(drawn)
        around = [] if box is None else list(box.ancestors())
        return {g: i for g, i in self.levels(made).items() if self.known.folding.groups[g].box in around}

    def shared(self) -> Iterator[list[Edge]]:
        """The values that go from one node to another, by the arrow that they share."""
        counts = [len(group.blocks) for group in self.known.folding.groups]
        for values in self.edges.values():
            by_words: dict[tuple[tuple[str, ...], tuple[str, ...]], list[Edge]] = defaultdict(list)
            for edge, crossings in values.values():
                for same in alike(crossings):
                    leaves, enters = words(same, counts)
                    by_words[leaves, enters].append(replace(edge, leaves=leaves, enters=enters))
            yield from by_words.values()
