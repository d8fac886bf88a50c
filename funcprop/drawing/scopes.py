"""The tree of scopes of a graph.

A scope is a run of operators that follow each other: a module that is called twice, with something between
the calls, is two scopes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from funcprop.graph.graph import Operator


@dataclass(eq=False)
class Scope:
    """A node of the tree. `path` is what the user called it, from the outside; `last` the last repetition's.

    `section` is a part of the picture (the forward sweep) that is never collapsed and has no depth.
    """

    path: tuple[str, ...]
    children: list[Scope | Operator] = field(default_factory=list)
    parent: Scope | None = None
    section: bool = False
    count: int = 1
    last: str = ""
    sizes_differ: bool = False

    @property
    def depth(self) -> int:
        """How many scopes are around this one; sections, and groups made by folding, are none."""
        return sum(bool(s.path) and not s.section for s in self.ancestors()) - 1

    @property
    def label(self) -> str:
        """Its own name, a range of names for repeated blocks."""
        if not self.path:
            return self.contents_label if self.count > 1 else ""
        own = _own_name(self.path)
        last = _own_name((*self.path[:-1], self.last or self.path[-1]))
        return own if last == own else f"{own} … {last}"

    @property
    def contents_label(self) -> str:
        """What is in a group that nobody named: its first and last scope, or the number of operators."""
        names = [child.label for child in self.children if isinstance(child, Scope)]
        if not names:
            return f"{sum(1 for _ in self.operators())} operators"
        return names[0] if len(names) == 1 else f"{names[0]} … {names[-1]}"

    def ancestors(self) -> Iterator[Scope]:
        """This scope and those around it, from the inside."""
        scope: Scope | None = self
        while scope is not None:
            yield scope
            scope = scope.parent

    def operators(self) -> Iterator[Operator]:
        """All operators inside, in order."""
        for child in self.children:
            if isinstance(child, Scope):
                yield from child.operators()
            else:
                yield child

    def placed(self) -> Iterator[tuple[Scope, Operator]]:
        """All operators inside, each with the scope in which it is directly."""
        for child in self.children:
            if isinstance(child, Scope):
                yield from child.placed()
            else:
                yield self, child

    def scopes(self) -> Iterator[Scope]:
        """All scopes inside, from the outside, in order."""
        for child in self.children:
            if isinstance(child, Scope):
                yield child
                yield from child.scopes()


def _own_name(path: tuple[str, ...]) -> str:
    """The last part of a path, with those before it that number it needs: `layers/4`."""
    named = next((n for n in range(len(path) - 1, 0, -1) if not path[n].isdigit()), 0)
    return "/".join(path[named:])


def scope_path(scope: str) -> tuple[str, ...]:
    """The parts of a scope's name."""
    return tuple(part for part in scope.split("/") if part)


def scopes_around(scope: str) -> list[tuple[str, ...]]:
    """A scope and those around it, from the outside."""
    path = scope_path(scope)
    return [path[:n] for n in range(1, len(path) + 1)]


def scope_tree(operators: Sequence[Operator], section_of: Callable[[Operator], str]) -> Scope:
    """The operators, in order, in the tree of their scopes; the sections are the outermost."""
    root = Scope(())
    sections: dict[str, Scope] = {}
    opened: dict[str, list[Scope]] = {}
    for op in operators:
        section = section_of(op)
        if section not in sections:
            inside = Scope((section,), parent=root, section=True) if section else root
            sections[section], opened[section] = inside, [inside]
            if section:
                root.children.append(inside)
        stack, path = opened[section], scope_path(op.scope)
        common = 0
        while common < min(len(stack) - 1, len(path)) and stack[common + 1].path[common] == path[common]:
            common += 1
        del stack[common + 1 :]
        for level in range(common, len(path)):
            scope = Scope(path[: level + 1], parent=stack[-1])
            stack[-1].children.append(scope)
            stack.append(scope)
        stack[-1].children.append(op)
    return root
