"""A difference as one picture: the second graph, and in their places what only the first has."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace

from funcprop.drawing.difference import Difference
from funcprop.drawing.opened_loops import Passage, loops_around
from funcprop.drawing.request import DrawnPlace, Link, Shown
from funcprop.drawing.scopes import scope_path, scopes_around
from funcprop.graph.graph import Graph, Operator, Variable
from funcprop.graph.naming import unique_names

ADDED, REMOVED = "added", "removed"


def merged(difference: Difference) -> Shown:
    """Both graphs as one, coloured by what is only in one of them."""
    return _Merging(difference).shown()


class _Merging:
    """The merged graph, and in it the things of the first graph by their names."""

    def __init__(self, difference: Difference) -> None:
        self.difference = difference
        self.first, self.second, self.matching = difference.comparison
        self.second_variables = {v.name: v for v in self.matching.b.graph.variables}
        self.second_operators = {op.name: op for op in self.matching.b.graph}
        self.titles = dict(self.second.titles)
        self.loops = self.moved_loops()
        gone = difference.removed_variables
        labels = unique_names([*self.second_variables, *(v.name for v in gone)])[len(self.second_variables) :]
        self.gone = {
            v.name: replace(v, name=label, scope=self.moved_scope(v.scope))
            for v, label in zip(gone, labels, strict=True)
        }
        kept = self.matching.variables.items()
        self.variables = {a: self.second_variables[b] for a, b in kept} | self.gone
        names = unique_names([op.name for op in (*self.second.graph, *difference.removed)])
        own = zip(difference.removed, names[len(self.second.graph) :], strict=True)
        self.removed = {op.name: self.moved(op, name) for op, name in own}

    def moved_loops(self) -> dict[tuple[str, ...], tuple[str, ...]]:
        """The scopes of the first graph's opened loops, as those of the second's, or as new ones."""
        found: dict[tuple[str, ...], tuple[str, ...]] = {}
        for name, same in self.matching.operators.items():
            scopes = self.matching.a.operators[name].scope, self.second_operators[same].scope
            found |= dict(zip(*map(loops_around, scopes, (self.first, self.second)), strict=False)) | found
        for loop in sorted(self.first.titles, key=len):
            if loop not in found:
                around = next((n for n in range(len(loop) - 1, 0, -1) if loop[:n] in found), 0)
                path = (*found.get(loop[:around], ()), *loop[around:])
                while path in self.titles:
                    path = (*path[:-1], path[-1] + "′")
                found[loop] = path
                self.titles[path] = self.first.titles[loop]
        return found

    def moved_scope(self, scope: str) -> str:
        """A scope of the first graph, in the second's loops."""
        around = loops_around(scope, self.first)
        return "/".join((*self.loops[around[-1]], *scope_path(scope)[len(around[-1]) :])) if around else scope

    def moved(self, op: Operator, name: str) -> Operator:
        """An operator that was removed; its results are not its own any more if another computes them now."""
        inputs = tuple(v if v.kind == "literal" else self.variables[v.name] for v in op.inputs)
        outputs = tuple(self.gone[v.name] for v in op.outputs if v.name in self.gone)
        return replace(op, name=name, scope=self.moved_scope(op.scope), inputs=inputs, outputs=outputs)

    def drawn(self, op: Operator) -> Operator:
        """Translate an operator of the first graph into the merged one."""
        same = self.matching.operators.get(op.name)
        return self.removed[op.name] if same is None else self.second_operators[same]

    def operators(self) -> list[Operator]:
        """List the operators of the second graph, with the removed ones in their places."""
        second = list(self.second.graph.operators)
        place = {op.name: i for i, op in enumerate(second)}
        before = [(scope_path(self.drawn(op).scope), self.drawn(op)) for op in self.first.graph]
        previous = _neighbours(before, place)
        following = _neighbours(before[::-1], place)
        inserted: dict[int, list[Operator]] = defaultdict(list)
        for _, op in before:
            if op.name not in place:
                (shared, index), (others, ahead) = previous[op.name], following[op.name]
                # Not into the middle of a scope in which it is not.
                if others > shared:
                    index, inner = ahead, second[ahead]
                    while index and _shares(second[index - 1], inner, others + 1):
                        index -= 1
                elif index >= 0:
                    inner = second[index]
                    index += 1
                    while index < len(second) and _shares(second[index], inner, shared + 1):
                        index += 1
                else:
                    index = 0
                inserted[index].append(op)
        found: list[Operator] = []
        for index in range(len(second) + 1):
            found += inserted[index]
            found += second[index : index + 1]
        return found

    def places(self) -> dict[DrawnPlace, Variable]:
        """Where the values of opened loops stand, with those that were removed."""
        found = dict(self.second.places)
        scope_of = {op.name: op.scope for op in (*self.second.graph, *self.removed.values())}
        inside: dict[tuple[str, ...], str] = {}
        for name, scope in scope_of.items():
            for path in scopes_around(scope):
                inside.setdefault(path, name)
        numbers = itertools.count(len(found))
        for place, v in self.first.places.items():
            if v.name in self.gone:
                operator = next(op for op in self.first.graph if op.name == place.operator)
                loop = self.loops[scope_path(operator.scope)[: place.depth]]
                found[DrawnPlace(inside[loop], len(loop), place.outside, next(numbers))] = self.gone[v.name]
        return found

    def links(self) -> tuple[list[Link], dict[tuple[str, str, bool], str]]:
        """The arrows from value to value that were removed, and their colour."""
        removed = {end.key for end in self.difference.removed_arrows}
        found = []
        for link in self.first.links:
            if (link.source.name, link.end, True) in removed:
                source, target = (self.variables[v.name] for v in (link.source, link.target))
                found.append(Link(source, target, link.is_next))
        return found, {(link.source.name, link.end, True): REMOVED for link in found}

    def shown(self) -> Shown:
        """The whole."""
        difference, after, gone = self.difference, self.second.graph, self.gone.values()
        roles = dict.fromkeys((op.name for op in difference.added), ADDED)
        roles |= dict.fromkeys((op.name for op in self.removed.values()), REMOVED)
        # A value that both have is not coloured as what computes it now.
        variable_roles = dict.fromkeys(self.second_variables, "")
        variable_roles |= {v.name: ADDED for v in difference.added_variables}
        variable_roles |= {v.name: REMOVED for v in gone}
        edge_roles = {end.key: ADDED for end in difference.added_arrows}
        missing = []
        for end in difference.removed_arrows:
            if not isinstance(end.operator, Passage):
                v, op = self.variables[end.variable.name], self.drawn(end.operator)
                edge_roles[v.name, op.name, end.into] = REMOVED
                missing.append((v, op, end.into))
        links, of_links = self.links()
        return Shown(
            Graph(
                after.name,
                (*after.inputs, *(v for v in gone if v.kind == "input")),
                (*after.constants, *(v for v in gone if v.kind == "constant")),
                tuple(self.operators()),
                after.outputs,
            ),
            roles,
            variable_roles,
            edge_roles | of_links,
            missing=tuple(missing),
            legend=(ADDED, REMOVED),
            links=(*self.second.links, *links),
            places=self.places(),
            titles=self.titles,
        )


def _neighbours(
    operators: Iterable[tuple[tuple[str, ...], Operator]], place: dict[str, int]
) -> dict[str, tuple[int, int]]:
    """For each operator that has no place, the last one before it in the innermost scope that has any.

    As how much of their scopes is the same, and the place; `(-1, …)` for none at all.
    """
    last: dict[tuple[str, ...], int] = {}
    found = {}
    for path, op in operators:
        if op.name in place:
            last |= {path[:n]: place[op.name] for n in range(len(path) + 1)}
        else:
            shared = next((n for n in range(len(path), -1, -1) if path[:n] in last), -1)
            found[op.name] = shared, last.get(path[: max(shared, 0)], -1)
    return found


def _shares(a: Operator, b: Operator, depth: int) -> bool:
    """Whether two operators are in one scope of this depth."""
    first, second = scope_path(a.scope)[:depth], scope_path(b.scope)[:depth]
    return len(first) == depth and first == second
