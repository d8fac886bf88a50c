"""From a graph to a picture: what is a node, what is inside which box, what is folded or collapsed."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from funcprop.drawing.picture import Box, Edge, EdgeKind, Node, Picture, value_text
from funcprop.drawing.scopes import Folding, Scope, fold, scope_path, scope_tree
from funcprop.drawing.symbols import symbol
from funcprop.graph import Graph, Operator, Variable, bytes_text

# Up to this many operators, every value is a square, and the types stand in the picture.
FEW = 40


@dataclass(frozen=True)
class Shown:
    """A graph with what else is to be seen of it.

    `roles` colours operators by name, `variable_roles` variables that no operator computes, `edge_roles` the
    arrows between a variable and an operator (`(variable, operator, is_input)`). `sections` are the outermost
    boxes. `residuals` are drawn as values that are saved for the section `saved_for`. `missing` are arrows
    that the graph does not have.
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


def assemble(shown: Shown, depth: int | None, folded: bool, unnamed: bool | None) -> Picture:
    """The picture of a graph; the arguments are those of `fp.draw`."""
    return _Assembly(shown, depth, folded, unnamed).picture()


class _Assembly:
    def __init__(self, shown: Shown, depth: int | None, folded: bool, unnamed: bool | None) -> None:
        self.shown = shown
        self.graph = shown.graph
        self.depth = depth
        self.root = scope_tree(self.graph.operators, lambda op: shown.sections.get(op.name, ""))
        # What an operator is in is asked of the operators themselves, also of those that are folded away.
        self.folding = fold(self.root, shown.roles) if folded else Folding()
        self.scope_of = {op.name: scope for scope, op in _placed(self.root)}
        self.keys = {id(scope): f"s{i}" for i, scope in enumerate([self.root, *self.root.scopes()])}
        self.producer = {v.name: (op, i) for op in self.graph.operators for i, v in enumerate(op.outputs)}
        self.consumers: dict[str, list[Operator]] = defaultdict(list)
        for op in self.graph.operators:
            for v in op.inputs:
                if v.kind != "literal":
                    self.consumers[v.name].append(op)
        self.results = {v.name for v in self.graph.outputs}
        self.saved = {v.name for v in shown.residuals}
        # Bytes that are saved by the name of what is drawn for them, over all repetitions.
        self.saved_bytes: Counter[str] = Counter()
        self.unnamed = len(self.scope_of) <= FEW if unnamed is None else unnamed
        self.alias = self._aliases()
        self.variables = {v.name: v for v in self.graph.variables}
        for v in shown.residuals:
            self.saved_bytes[self.drawn(v).name] += v.nbytes or 0
        self.nodes: dict[str, Node] = {}
        self.edges: dict[tuple[str, str, EdgeKind, str], list[Edge]] = {}

    # --- what stands for what -----------------------------------------------------------------

    def _aliases(self) -> dict[str, str]:
        """The parameter of the first block, for the corresponding parameters of the folded ones."""
        candidates: dict[str, set[str]] = defaultdict(set)
        given = {v.name for v in (*self.graph.inputs, *self.graph.constants)}
        for op in self.graph.operators:
            for v, first in zip(op.inputs, self.folding.of(op).inputs, strict=True):
                if v.name in given and v.kind != "literal":
                    candidates[v.name].add(first.name if first.name in given else v.name)
        return {name: found.pop() for name, found in candidates.items() if len(found) == 1}

    def drawn(self, variable: Variable) -> Variable:
        """The variable that is drawn for this one."""
        if variable.name in self.producer:
            op, index = self.producer[variable.name]
            return self.folding.of(op).outputs[index]
        return self.variables.get(self.alias.get(variable.name, variable.name), variable)

    def collapsed(self, scope: Scope) -> Scope | None:
        """The outermost scope around, itself included, that is drawn as one node."""
        found = None
        for around in scope.ancestors():
            if self.depth is not None and around.path and not around.section and around.depth >= self.depth:
                found = around
        return found

    def box_of_variable(self, variable: Variable) -> Scope | None:
        """The scope in which a variable's square stands; None for the outermost."""
        if variable.name in self.results:
            return None
        if variable.name in self.producer:
            op = self.producer[variable.name][0]
            path = scope_path(variable.scope) if variable.named else scope_path(op.scope)
            for scope in self.scope_of[op.name].ancestors():
                if scope.section or scope.path == path[: len(scope.path)]:
                    return scope
            return None
        inside_pytree = "/" in variable.name or variable.kind == "constant"
        uses = [self.folding.of(op) for op in self.consumers[variable.name] if not self.reads_saved(op)]
        box = self.common(uses) if inside_pytree and uses else None
        return None if box is self.root else box

    def common(self, ops: Iterable[Operator]) -> Scope | None:
        """The innermost scope around all of these operators."""
        chains = [list(self.scope_of[op.name].ancestors())[::-1] for op in ops]
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
                _operator_tooltip(op),
                op.name,
                self.box_key(scope),
                self.shown.roles.get(op.name, ""),
            )
        return key

    def scope_node(self, scope: Scope) -> str:
        """The key of the node of a collapsed scope."""
        key = self.keys[id(scope)]
        if key not in self.nodes:
            ops = list(scope.operators())
            inside = {op.name for op in ops}
            given = {
                v.name: v.nbytes or 0
                for op in ops
                for v in op.inputs
                if v.name not in self.producer
                and v.kind != "literal"
                and not self.has_square(self.drawn(v))
                and all(self.folding.of(c).name in inside for c in self.consumers[v.name])
            }
            brief = details = f"{len(ops)} operator{'s' * (len(ops) != 1)}"
            if sum(given.values()):
                details += f", {bytes_text(sum(given.values()))} of parameters"
            roles = Counter(self.shown.roles.get(op.name, "") for op in ops)
            label = scope.label
            tooltip = "/".join(scope.path) + "\n" + ", ".join(op.op for op in ops[:12])
            tooltip += ", …" * (len(ops) > 12)
            parent = scope.parent if scope.parent is not self.root else None
            box = None if parent is None else self.box_key(parent)
            role = roles.most_common(1)[0][0]
            self.nodes[key] = Node(
                key, "scope", label, brief, details, tooltip, "/".join(scope.path), box, role, scope.count
            )
        return key

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
        if variable.name in self.producer:
            # Where it stands says what scope it is in.
            label = label.removeprefix(variable.scope + "/")
        elif box is not None and box.path and not box.section:
            own = [part for part in scope_path(label) if part not in box.path and part != "params"]
            label = "/".join(own) or label
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

    def box_key(self, scope: Scope) -> str | None:
        """The key of the box that a scope is; None for the outermost."""
        return None if scope is self.root else self.keys[id(scope)]

    # --- edges --------------------------------------------------------------------------------

    def connect(self, source: str, target: str, variable: Variable, kind: EdgeKind, role: str) -> None:
        """Draw an arrow; two values between the same nodes share one."""
        if source == target:
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
        present = self.edges.setdefault((source, target, kind, role), [])
        if all(e.variable != variable.name for e in present):
            present.append(edge)

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
        uses = [self.folding.of(op) for op in self.consumers[residual.name] if self.reads_saved(op)]
        box = self.common(uses) if uses else None
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

    def draw_edges(self) -> None:
        """All nodes, and the arrows between them."""
        roles = self.shown.edge_roles
        for v in (*self.graph.inputs, *self.graph.constants):
            if self.drawn(v) is v and self.has_square(v):
                self.variable_node(v)
        for op in self.graph.operators:
            drawn_op = self.folding.of(op)
            target = self.operator_node(op)
            for v in op.inputs:
                if v.kind == "literal":
                    continue
                variable = self.drawn(v)
                role = roles.get((v.name, op.name, True), "")
                if self.reads_saved(op) and v.name in self.saved:
                    saved = self.saved_node(variable)
                    start = self.source(variable)
                    if saved is None:
                        if start is not None:
                            self.connect(start, target, variable, "residual", role)
                    else:
                        self.connect(saved, target, variable, "flow", role)
                    continue
                start = self.source(variable)
                made = self.producer.get(v.name)
                again = made is not None and self.folding.apart(made[0], op)
                if start is not None:
                    self.connect(start, target, variable, "repeat" if again else "flow", role)
            if drawn_op is op:
                for v in op.outputs:
                    if self.has_square(v):
                        role = roles.get((v.name, op.name, False), "")
                        self.connect(target, self.variable_node(v), v, "flow", role)
        for variable in dict.fromkeys(self.shown.residuals):
            if variable.kind != "literal" and self.drawn(variable) is variable:
                start, saved = self.source(variable), self.saved_node(variable)
                if start is not None and saved is not None:
                    self.connect(start, saved, variable, "residual", "")
        for variable, op, is_input in self.shown.missing:
            node, square = self.operator_node(op), self.source(variable)
            if square is not None:
                ends = (square, node) if is_input else (node, square)
                self.connect(*ends, variable, "flow", roles.get((variable.name, op.name, is_input), ""))

    def merged(self) -> Iterator[Edge]:
        """One arrow for all values between the same nodes."""
        few = len(self.scope_of) <= FEW
        for edges in self.edges.values():
            edge = edges[0]
            ends = {self.nodes[edge.source].kind, self.nodes[edge.target].kind}
            if len(edges) > 1:
                total = sum(e.nbytes or 0 for e in edges)
                names = ", ".join(e.variable for e in edges)
                edge = replace(edge, variable=names, shape=None, dtype=None, nbytes=total)
                text = f"{len(edges)} values, {bytes_text(total)}"
            else:
                text = value_text(edge.shape, edge.dtype, edge.nbytes)
            if edge.kind == "residual":
                yield replace(edge, label=bytes_text(edge.nbytes or 0))
            elif few and "variable" not in ends:
                yield replace(edge, label=text)
            else:
                yield edge

    # --- the whole ----------------------------------------------------------------------------

    def picture(self) -> Picture:
        """Everything together."""
        self.draw_edges()
        edges = tuple(self.merged())
        boxes = tuple(
            Box(self.keys[id(s)], s.label, "/".join(s.path), self.box_key(s.parent or self.root), s.count)
            for s in self.root.scopes()
            if self.collapsed(s) is None
        )
        goal = next((f"v:{v.name}" for v in self.graph.outputs if f"v:{v.name}" in self.nodes), None)
        members = self.members()
        return Picture(
            self.graph.name,
            tuple(replace(node, members=tuple(members[key])) for key, node in self.nodes.items()),
            edges,
            boxes,
            self.shown.legend,
            self._origin(edges),
            goal,
        )

    def members(self) -> dict[str, list[str]]:
        """The names that each node stands for, by its key."""
        found: dict[str, list[str]] = defaultdict(list)
        for op in self.graph.operators:
            found[self.operator_node(op)].append(op.name)
        for v in self.graph.variables:
            for key in (f"v:{self.drawn(v).name}", f"r:{self.drawn(v).name}"):
                if key in self.nodes:
                    found[key].append(v.name)
        return found

    def _origin(self, edges: Iterable[Edge]) -> str | None:
        """The input that is farthest from the result, and of those the one that is used the least."""
        distance: dict[str, int] = {}
        for op in reversed(self.graph.operators):
            beyond = max((distance.get(v.name, 0) for v in op.outputs), default=0)
            for v in op.inputs:
                distance[v.name] = max(distance.get(v.name, 0), beyond + 1)
        found = [v for v in self.graph.inputs if f"v:{v.name}" in self.nodes]
        ranked = sorted(found, key=lambda v: (-distance.get(v.name, 0), len(self.consumers[v.name])))
        return f"v:{ranked[0].name}" if ranked else None


def _placed(scope: Scope) -> Iterator[tuple[Scope, Operator]]:
    for child in scope.children:
        if isinstance(child, Scope):
            yield from _placed(child)
        else:
            yield scope, child


def _operator_tooltip(op: Operator) -> str:
    results = ", ".join(f"{v.name}: {value_text(v.shape, str(v.dtype), v.nbytes)}" for v in op.outputs)
    lines = [f"{op.op}({', '.join(v.name for v in op.inputs)})", results, f"{op.flops:,} flops"]
    lines += [f"in {op.scope}"] if op.scope else []
    lines += [op.source] if op.source else []
    lines += [f"{key}: {len(body)} operators" for key, body in op.bodies.items()]
    return "\n".join(lines)
