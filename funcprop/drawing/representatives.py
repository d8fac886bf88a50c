"""What is drawn for what: the first of repeated blocks, a collapsed scope, and the box of a square."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Literal

from funcprop.drawing.folding import Folding
from funcprop.drawing.repetition import folded as repeated
from funcprop.drawing.request import DrawnPlace, Shown
from funcprop.drawing.scopes import Scope, scope_path, scope_tree
from funcprop.graph.graph import Operator, Variable

# Up to this many operators, every value is a square, and the types stand in the picture.
FEW = 40

# Whether repeated blocks are folded, and whether also those that differ in sizes.
Fold = Literal[False, True, "sizes"]


class Representatives:
    """What is drawn for each operator, variable and scope of a graph; nothing is drawn here.

    The arguments are those of `assemble`.
    """

    def __init__(
        self,
        shown: Shown,
        depth: int | None,
        blocks: tuple[Scope, Folding],
        unnamed: bool | None,
        closed: bool,
    ) -> None:
        self.shown, self.graph = shown, shown.graph
        self.depth, self.closed = depth, closed
        # What an operator is in is asked of the operators themselves, also of those that are folded away.
        self.root, self.folding = blocks
        self.scope_of = {op.name: scope for scope, op in self.root.placed()}
        self.unnamed = len(self.scope_of) <= FEW if unnamed is None else unnamed
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
        self.variables = {v.name: v for v in (*self.graph.variables, *shown.places.values())}
        self.alias = self._aliases()
        # The names for which a variable is drawn.
        self.alike: dict[str, list[str]] = defaultdict(list)
        for name, v in self.variables.items():
            self.alike[self.drawn(v).name].append(name)

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

    def maker(self, v: Variable) -> Operator | None:
        """The operator that computes a value; for a loop's result, one inside of it."""
        if v.name in self.producer:
            return self.producer[v.name][0]
        return self.operators[self.place_of[v.name].operator] if v.name in self.place_of else None

    def reads_saved(self, op: Operator) -> bool:
        """Whether an operator belongs to the section for which residuals are saved."""
        return bool(self.saved) and self.shown.sections.get(op.name) == self.shown.saved_for

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
        is_parameter = "/" in variable.name and variable.name not in self.shown.data
        is_inside = is_parameter or variable.kind == "constant"
        box = innermost_common(self.readers(variable, saved=False)) if is_inside else None
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

    def has_square(self, variable: Variable) -> bool:
        """Whether a variable is drawn as a node of its own."""
        if variable.name in self.results:
            return True
        box = self.box_of_variable(variable)
        if box is not None and self.collapsed(box) is not None:
            return False
        return variable.named or variable.name not in self.producer or self.unnamed

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

    def title(self, scope: Scope) -> str:
        """What a scope is called."""
        return self.shown.titles.get(scope.path, scope.label)

    def box_key(self, scope: Scope) -> str | None:
        """The key of the box that a scope is; None for the outermost."""
        return None if scope is self.root else self.keys[id(scope)]


def blocks_of(shown: Shown, fold: Fold) -> tuple[Scope, Folding]:
    """The scopes of a drawing, and which of them are folded."""
    if not fold:
        return scope_tree(shown.graph.operators, lambda op: shown.sections.get(op.name, "")), Folding()
    return repeated(shown, len(shown.graph) > FEW, types=fold != "sizes")


def innermost_common(scopes: Iterable[Scope]) -> Scope | None:
    """The innermost scope around all of these."""
    chains = [list(scope.ancestors())[::-1] for scope in scopes]
    found = None
    for level in zip(*chains, strict=False):
        if any(scope is not level[0] for scope in level):
            break
        found = level[0]
    return found
