"""From a graph to a picture: what is a node, what is inside which box, what is folded or collapsed."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Literal

from funcprop.drawing.crossing import Crossing, alike, words
from funcprop.drawing.labels import merged, operator_tooltip, origin
from funcprop.drawing.picture import Box, Edge, EdgeKind, Node, Picture, value_text
from funcprop.drawing.repetition import folded as repeated
from funcprop.drawing.request import DrawnPlace, Shown
from funcprop.drawing.scopes import Folding, Scope, scope_path, scope_tree
from funcprop.drawing.symbols import symbol
from funcprop.graph.graph import Operator, Variable, bytes_text

# Up to this many operators, every value is a square, and the types stand in the picture.
FEW = 40


# Whether repeated blocks are folded, and whether also those that differ in sizes.
Fold = Literal[False, True, "sizes"]


def assemble(
    shown: Shown, depth: int | None, fold: Fold, unnamed: bool | None, closed: bool = False
) -> Picture:
    """The picture of a graph; the arguments are those of `fp.draw`.

    `closed` also makes one node of repeated blocks that nobody named, at the depth at which scopes are.
    """
    return _Assembly(shown, depth, fold, unnamed, closed).picture()


class _Assembly:
    def __init__(
        self, shown: Shown, depth: int | None, fold: Fold, unnamed: bool | None, closed: bool
    ) -> None:
        self.closed = closed
        self.shown = shown
        self.graph = shown.graph
        self.depth = depth
        # What an operator is in is asked of the operators themselves, also of those that are folded away.
        self.root, self.folding = (
            repeated(shown, len(self.graph) > FEW, types=fold != "sizes")
            if fold
            else (scope_tree(self.graph.operators, lambda op: shown.sections.get(op.name, "")), Folding())
        )
        self.scope_of = {op.name: scope for scope, op in self.root.placed()}
        self.keys = {id(scope): f"s{i}" for i, scope in enumerate([self.root, *self.root.scopes()])}
        self.operators = {op.name: op for op in self.graph.operators}
        self.place_of = {v.name: place for place, v in shown.places.items()}
        self.producer = {v.name: (op, i) for op in self.graph.operators for i, v in enumerate(op.outputs)}
        self.consumers: dict[str, list[Operator]] = defaultdict(list)
        for op in self.graph.operators:
            for v in op.inputs:
                if v.kind != "literal":
                    self.consumers[v.name].append(op)
        self.links = [link for link in shown.links if link.source.kind != "literal"]
        self.onward: dict[str, list[Variable]] = defaultdict(list)
        for link in self.links:
            self.onward[link.source.name].append(link.target)
        self.results = {v.name for v in self.graph.outputs}
        self.saved = {v.name for v in shown.residuals}
        # Bytes that are saved by the name of what is drawn for them, over all repetitions.
        self.saved_bytes: Counter[str] = Counter()
        self.unnamed = len(self.scope_of) <= FEW if unnamed is None else unnamed
        self.alias = self._aliases()
        self.variables = {v.name: v for v in (*self.graph.variables, *shown.places.values())}
        self.alike: dict[str, list[str]] = defaultdict(list)
        for name, v in self.variables.items():
            self.alike[self.drawn(v).name].append(name)
        for v in shown.residuals:
            self.saved_bytes[self.drawn(v).name] += v.nbytes or 0
        self.nodes: dict[str, Node] = {}
        self.edges: dict[tuple[str, str, EdgeKind, str], dict[str, tuple[Edge, list[Crossing]]]] = {}

    # --- what stands for what -----------------------------------------------------------------

    def _aliases(self) -> dict[str, str]:
        """The parameter of the first block, for the corresponding parameters of the folded ones."""
        candidates: dict[str, set[str]] = defaultdict(set)
        given = {v.name for v in (*self.graph.inputs, *self.graph.constants)}
        for op in self.graph.operators:
            for v, first in zip(op.inputs, self.folding.of(op).inputs, strict=True):
                if v.name in given and v.kind != "literal":
                    candidates[v.name].add(first.name if first.name in given else v.name)
        operand = {link.target.name: link.source.name for link in self.links if not link.is_next}
        for link in self.links:
            if link.source.name in given:
                name = operand.get(self.drawn(link.target).name, link.source.name)
                candidates[link.source.name].add(name if name in given else link.source.name)
        return {name: found.pop() for name, found in candidates.items() if len(found) == 1}

    def drawn(self, variable: Variable) -> Variable:
        """The variable that is drawn for this one."""
        if variable.name in self.producer:
            op, index = self.producer[variable.name]
            value = self.folding.of(op).outputs[index]
            # A result of the last repetition alone is not what the others compute.
            return variable if variable.name in self.results and value.name not in self.results else value
        place = self.place_of.get(variable.name)
        if place is not None:
            first = self.folding.of(self.operators[place.operator])
            return self.shown.places.get(place._replace(operator=first.name), variable)
        return self.variables.get(self.alias.get(variable.name, variable.name), variable)

    def collapsed(self, scope: Scope) -> Scope | None:
        """The outermost scope around, itself included, that is drawn as one node."""
        found = None
        for around in scope.ancestors():
            is_block = bool(around.path) or (self.closed and around.count > 1)
            level = around.depth + (not around.path)
            is_deep = self.depth is not None and level >= self.depth
            if is_block and not around.section and (is_deep or around.path in self.shown.shut):
                found = around
        return found

    def box_of_variable(self, variable: Variable) -> Scope | None:
        """The scope in which a variable's square stands; None for the outermost."""
        if variable.name in self.results:
            return None
        if variable.name in self.place_of:
            place = self.place_of[variable.name]
            loop = self.loop_scope(place)
            box = loop.parent if place.outside else loop
            return None if box is self.root else box
        if variable.name in self.producer:
            op = self.folding.of(self.producer[variable.name][0])
            path = scope_path(variable.scope) if variable.named else scope_path(op.scope)
            for scope in self.scope_of[op.name].ancestors():
                # A value of every repetition stands in the box of the repetitions.
                if scope.section or scope.count > 1 or scope.path == path[: len(scope.path)]:
                    return scope
            return None
        inside_pytree = "/" in variable.name or variable.kind == "constant"
        box = self.common(self.readers(variable, saved=False)) if inside_pytree else None
        return None if box is self.root else box

    def loop_scope(self, place: DrawnPlace) -> Scope:
        """The box of the opened loop of a value."""
        around = self.scope_of[self.folding.of(self.operators[place.operator]).name].ancestors()
        return next(scope for scope in around if not scope.section and len(scope.path) == place.depth)

    def readers(self, variable: Variable, saved: bool) -> list[Scope]:
        """The scopes in which a value is read; as one that is saved for the other section, or as itself."""
        ops = self.consumers[variable.name]
        scopes = [self.scope_of[self.folding.of(op).name] for op in ops if self.reads_saved(op) == saved]
        for target in self.onward[variable.name]:
            place = self.place_of[target.name]
            if self.reads_saved(self.operators[place.operator]) == saved:
                loop = self.loop_scope(place)
                scopes.append(loop if place.outside else loop.parent or loop)
        return scopes

    def common(self, scopes: Iterable[Scope]) -> Scope | None:
        """The innermost scope around all of these."""
        chains = [list(scope.ancestors())[::-1] for scope in scopes]
        found = None
        for level in zip(*chains, strict=False):
            if any(scope is not level[0] for scope in level):
                break
            found = level[0]
        return found

    def has_square(self, variable: Variable) -> bool:
        """Whether a variable is drawn as a node of its own."""
        if variable.name in self.results:
            return True
        box = self.box_of_variable(variable)
        if box is not None and self.collapsed(box) is not None:
            return False
        return variable.named or variable.name not in self.producer or self.unnamed

    # --- nodes --------------------------------------------------------------------------------

    def operator_node(self, op: Operator) -> str:
        """The key of the node that an operator is, or is inside of."""
        op = self.folding.of(op)
        scope = self.scope_of[op.name]
        around = self.collapsed(scope)
        if around is not None:
            return self.scope_node(around)
        key = f"o:{op.name}"
        if key not in self.nodes:
            self.nodes[key] = Node(
                key,
                "operator",
                symbol(op),
                times := f"× {op.static['length']}" if op.op == "scan" else "",
                times,
                operator_tooltip(op),
                op.name,
                self.box_key(scope),
                self.shown.roles.get(op.name, ""),
            )
        return key

    def scope_node(self, scope: Scope) -> str:
        """The key of the node of a collapsed scope."""
        key = self.keys[id(scope)]
        if key not in self.nodes:
            ops = self.inside(scope)
            inside = {self.folding.of(op).name for op in ops}
            own = {v.name for op in ops for v in op.outputs}
            read = {v.name: v for op in ops for v in op.inputs if v.kind != "literal" and v.name not in own}
            given = [
                v
                for v in read.values()
                if v.name not in self.producer
                and v.name not in self.place_of
                and not self.has_square(self.drawn(v))
                and all(self.folding.of(c).name in inside for c in self.consumers[v.name])
            ]
            coming = [v for v in read.values() if all(v is not other for other in given)]
            first = {op.name for op in ops}
            leaving = [
                v
                for op in ops
                for v in op.outputs
                if v.name in self.results or any(c.name not in first for c in self.consumers[v.name])
            ]
            brief = f"{_shapes(coming)} → {_shapes(leaving)}"
            numbers = sum(math.prod(v.shape or ()) for v in given)
            if numbers:
                nbytes = bytes_text(sum(v.nbytes or 0 for v in given))
                brief += f"\n{numbers:,} parameters, {nbytes}"
            roles = Counter(self.shown.roles.get(op.name, "") for op in ops)
            label = self.title(scope)
            tooltip = "/".join(scope.path) + f"\n{len(ops)} operator{'s' * (len(ops) != 1)}: "
            tooltip += ", ".join(op.op for op in ops[:12]) + ", …" * (len(ops) > 12)
            if scope.sizes_differ:
                brief += "\nsizes differ"
            parent = scope.parent if scope.parent is not self.root else None
            path = next(s.path for s in scope.ancestors() if s.path or s.parent is None)
            box = None if parent is None else self.box_key(parent)
            role = roles.most_common(1)[0][0]
            self.nodes[key] = Node(
                key, "scope", label, brief, brief, tooltip, "/".join(path), box, role, scope.count
            )
            self.nodes[key] = replace(self.nodes[key], inside=tuple(op.name for op in ops))
        return key

    def inside(self, scope: Scope) -> list[Operator]:
        """The operators of a scope, of repeated ones those of the first."""
        around = list(scope.ancestors())
        outer = [g for g, group in enumerate(self.folding.groups) if group.box in around]
        found = []
        for op in self.graph.operators:
            place = self.folding.coordinates(op)
            is_first = all(place.get(g, 0) == 0 for g in outer)
            if is_first and scope in self.scope_of[self.folding.of(op).name].ancestors():
                found.append(op)
        return found

    def variable_node(self, variable: Variable) -> str:
        """The key of a variable's square."""
        key = f"v:{variable.name}"
        if key not in self.nodes:
            box = self.box_of_variable(variable)
            made = self.producer.get(variable.name)
            role = self.shown.roles.get(made[0].name, "") if made else ""
            role = self.shown.variable_roles.get(variable.name, role)
            self.nodes[key] = self._square(key, variable, box, role)
        return key

    def _square(self, key: str, variable: Variable, box: Scope | None, role: str) -> Node:
        label = variable.name
        if variable.name in self.producer or variable.name in self.place_of:
            # Where it stands says what scope it is in.
            label = label.removeprefix(variable.scope + "/")
        elif box is not None and box.path and not box.section:
            own = [part for part in scope_path(label) if part not in box.path and part != "params"]
            label = "/".join(own) or label
        if variable.kind == "input" and not variable.named:
            # What comes into a scope that is drawn by itself.
            label = label.rpartition("/")[2]
        # A square that nobody named shows its shape alone: its name would be that of its operator.
        if not variable.named and variable.kind == "intermediate":
            label = ""
        shape = " × ".join(map(str, variable.shape or ())) or ("" if label else "scalar")
        type_ = value_text(variable.shape, str(variable.dtype), variable.nbytes)
        return Node(
            key,
            "variable",
            label,
            shape,
            type_,
            f"{variable.name}: {type_}\n{variable.kind}",
            variable.name,
            None if box is None else self.box_key(box),
            role,
        )

    def title(self, scope: Scope) -> str:
        """What a scope is called."""
        return self.shown.titles.get(scope.path, scope.label)

    def box_key(self, scope: Scope) -> str | None:
        """The key of the box that a scope is; None for the outermost."""
        return None if scope is self.root else self.keys[id(scope)]

    # --- edges --------------------------------------------------------------------------------

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
        groups = self.folding.groups
        place = self.folding.coordinates(op).items()
        return {g: i for g, i in place if self.collapsed(groups[g].box) in (None, groups[g].box)}

    def levels_of(self, variable: Variable) -> dict[int, int]:
        """The repetitions in which the start of a variable's arrows is."""
        made = self.maker(variable)
        if made is None:
            # A parameter is of the repetitions that have one of their own.
            if len(self.alike[self.drawn(variable).name]) == 1:
                return {}
            found = [self.levels(op).items() for op in self.consumers[variable.name]]
            return dict(item for item in found[0] if all(item in others for others in found)) if found else {}
        drawn = self.drawn(variable)
        if not self.has_square(drawn):
            return self.levels(made)
        box = self.box_of_variable(drawn)
        around = [] if box is None else list(box.ancestors())
        return {g: i for g, i in self.levels(made).items() if self.folding.groups[g].box in around}

    def arrows(self) -> Iterator[list[Edge]]:
        """The values that go from one node to another, by the arrow that they share."""
        counts = [len(group.blocks) for group in self.folding.groups]
        for values in self.edges.values():
            shared: dict[tuple[tuple[str, ...], tuple[str, ...]], list[Edge]] = defaultdict(list)
            for edge, crossings in values.values():
                for same in alike(crossings):
                    leaves, enters = words(same, counts)
                    shared[leaves, enters].append(replace(edge, leaves=leaves, enters=enters))
            yield from shared.values()

    def source(self, variable: Variable) -> str | None:
        """The node from which a variable's arrows start: its square, or what makes or hides it."""
        if self.has_square(variable):
            return self.variable_node(variable)
        if variable.name in self.producer:
            return self.operator_node(self.producer[variable.name][0])
        box = self.box_of_variable(variable)
        around = None if box is None else self.collapsed(box)
        return None if around is None else self.scope_node(around)

    def saved_node(self, residual: Variable) -> str | None:
        """The square of a value that is saved for the other section; None inside of a collapsed scope."""
        box = self.common(self.readers(residual, saved=True))
        if box is not None and self.collapsed(box) is not None:
            return None
        key = f"r:{residual.name}"
        if key not in self.nodes:
            role = "saved"
            square = self._square(key, residual, box, role)
            self.nodes[key] = replace(square, tooltip=square.tooltip + f"\nsaved for {self.shown.saved_for}")
        return key

    def reads_saved(self, op: Operator) -> bool:
        """Whether an operator belongs to the section for which residuals are saved."""
        return bool(self.saved) and self.shown.sections.get(op.name) == self.shown.saved_for

    def flow(self, v: Variable, reader: Operator, target: str, role: str, is_next: bool = False) -> None:
        """The arrow by which a value gets to an operator, or to a value inside of its loop."""
        variable, made = self.drawn(v), self.maker(v)
        start, levels, into = self.source(variable), self.levels_of(v), self.levels(reader)
        kind: EdgeKind = "flow"
        if self.reads_saved(reader) and v.name in self.saved:
            saved = self.saved_node(variable)
            start, kind, levels = (start, "residual", levels) if saved is None else (saved, "flow", into)
        elif is_next or (made is not None and self.folding.apart(made, reader)):
            kind = "repeat"
            if made is not None and variable.name in self.results and not is_next:
                # The square of a result is outside of the repetitions.
                start, levels = self.operator_node(made), self.levels(made)
        if start is not None:
            self.connect(start, target, variable, kind, role, levels, into)

    def maker(self, v: Variable) -> Operator | None:
        """The operator that computes a value; for a loop's result, one inside of it."""
        if v.name in self.producer:
            return self.producer[v.name][0]
        return self.operators[self.place_of[v.name].operator] if v.name in self.place_of else None

    def draw_edges(self) -> None:
        """All nodes, and the arrows between them."""
        roles = self.shown.edge_roles
        for v in (*self.graph.inputs, *self.graph.constants):
            if self.drawn(v) is v and self.has_square(v):
                self.variable_node(v)
        for op in self.graph.operators:
            target = self.operator_node(op)
            for v in op.inputs:
                if v.kind == "literal":
                    continue
                role = roles.get((v.name, op.name, True), "")
                self.flow(v, op, target, role)
            for v in op.outputs:
                drawn = self.drawn(v)
                if self.has_square(drawn) and (drawn is v or drawn.name in self.results):
                    role = roles.get((v.name, op.name, False), "")
                    result, into = self.variable_node(drawn), self.levels_of(v)
                    self.connect(target, result, drawn, "flow", role, self.levels(op), into)
        for link in self.links:
            end = self.source(self.drawn(link.target))
            reader = self.operators[self.place_of[link.target.name].operator]
            if end is not None:
                role = roles.get((link.source.name, link.end, True), "")
                self.flow(link.source, reader, end, role, link.is_next)
        for variable in dict.fromkeys(self.shown.residuals):
            if variable.kind != "literal" and self.drawn(variable) is variable:
                start, saved = self.source(variable), self.saved_node(variable)
                if start is not None and saved is not None:
                    self.connect(start, saved, variable, "residual", "")
        for variable, op, is_input in self.shown.missing:
            drawn = self.drawn(variable)
            node, square = self.operator_node(op), self.source(drawn)
            if square is not None:
                ends = (square, node) if is_input else (node, square)
                self.connect(*ends, drawn, "flow", roles.get((variable.name, op.name, is_input), ""))

    # --- the whole ----------------------------------------------------------------------------

    def picture(self) -> Picture:
        """Everything together."""
        self.draw_edges()
        edges = tuple(merged(self.arrows(), self.nodes, few=len(self.scope_of) <= FEW))
        boxes = tuple(
            Box(
                self.keys[id(s)],
                self.title(s),
                "/".join(s.path),
                self.box_key(s.parent or self.root),
                s.count,
                s.sizes_differ,
            )
            for s in self.root.scopes()
            if self.collapsed(s) is None
        )
        first = origin(self.shown, {key.removeprefix("v:") for key in self.nodes})
        goal = next((f"v:{v.name}" for v in self.graph.outputs if f"v:{v.name}" in self.nodes), None)
        members = self.members()
        return Picture(
            self.graph.name,
            tuple(self.with_members(node, members[key]) for key, node in self.nodes.items()),
            edges,
            boxes,
            self.shown.legend,
            None if first is None else f"v:{first}",
            goal,
        )

    def with_members(self, node: Node, members: list[str]) -> Node:
        """A node with what it stands for; where sizes differ, a square has them all."""
        if node.kind == "variable":
            shapes = [self.variables[name].shape for name in members]
            if any(found != shapes[0] for found in shapes):
                text = _shapes_of_all([found or () for found in shapes])
                node = replace(
                    node, brief=text, details=text, tooltip=f"{node.tooltip}\nsizes differ: {text}"
                )
        return replace(node, members=tuple(members))

    def members(self) -> dict[str, list[str]]:
        """The names that each node stands for, by its key."""
        found: dict[str, list[str]] = defaultdict(list)
        for op in self.graph.operators:
            found[self.operator_node(op)].append(op.name)
        for v in self.variables.values():
            for key in (f"v:{self.drawn(v).name}", f"r:{self.drawn(v).name}"):
                if key in self.nodes:
                    found[key].append(v.name)
        return found


def _shapes(values: Iterable[Variable], most: int = 1) -> str:
    """The shapes of what comes into a scope, or leaves it."""
    texts = list(dict.fromkeys(_shape(v.shape) for v in values))
    return ", ".join(texts[:most]) + ", …" * (len(texts) > most) or "nothing"


def _shape(shape: tuple[int, ...] | None) -> str:
    return " × ".join(map(str, shape or ())) or "scalar"


def _shapes_of_all(shapes: Sequence[tuple[int, ...]]) -> str:
    """`3 × 3 × 8…32 × 16…64`: the least and the largest length of every axis."""
    if len({len(shape) for shape in shapes}) > 1:
        return " or ".join(dict.fromkeys(map(_shape, shapes)))
    axes = [(min(axis), max(axis)) for axis in zip(*shapes, strict=True)]
    return " × ".join(str(low) if low == high else f"{low}…{high}" for low, high in axes)
