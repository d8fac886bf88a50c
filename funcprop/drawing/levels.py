"""A picture that can be taken in: as modules first, and what is inside of each as a picture of its own."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from operator import itemgetter
from typing import NamedTuple

from funcprop.drawing.nodes_and_boxes import FEW, Fold, assemble, assembled
from funcprop.drawing.parameter_groups import layers_of
from funcprop.drawing.picture import Node, Picture
from funcprop.drawing.representatives import blocks_of
from funcprop.drawing.request import Shown
from funcprop.drawing.scopes import scope_path, scopes_around
from funcprop.graph.graph import Graph, Operator, Variable
from funcprop.graph.naming import joined

# A picture of more nodes than this is drawn as its modules.
MOST_NODES = 60
# A net of modules is opened to so many nodes by itself.
_OPEN_MODULES = 30
# So many operators that stand beside the modules are drawn as one node.
_LOOSE = 4
# A module with more than this share of the operators says as little as what is around all of them.
_NEARLY_ALL = 0.75
# What has no modules is drawn as so many runs of operators.
_RUNS = 30
ALL = 10**6


class Fitted(NamedTuple):
    """A picture, and what it is of: some operators may be in scopes of their own for it."""

    picture: Picture
    shown: Shown


def fitted(shown: Shown, fold: Fold, unnamed: bool | None) -> Fitted:
    """The first picture that has at most `MOST_NODES`: all open, then as its modules, then as runs."""
    is_net = len({scope_path(op.scope) for op in shown.graph if _is_module(op)}) > 1
    unnamed = False if is_net else unnamed
    found = Fitted(assemble(shown, None, fold, unnamed), shown)
    if len(found.picture.nodes) <= (_OPEN_MODULES if is_net else MOST_NODES):
        return found
    for level in _smaller(shown, fold, unnamed):
        for candidate in level:
            found = min(found, candidate, key=lambda fitted: len(fitted.picture.nodes))
            if len(found.picture.nodes) <= _OPEN_MODULES:
                return found
        if len(found.picture.nodes) <= MOST_NODES:
            return found
    if len(found.picture.nodes) > MOST_NODES and len(shown.graph) > _RUNS:
        shown = replace(shown, graph=in_runs(shown.graph, _RUNS), links=(), places={})
        found = Fitted(assemble(shown, 0, False, unnamed), shown)
    return found


def _smaller(shown: Shown, fold: Fold, unnamed: bool | None) -> Iterator[Iterable[Fitted]]:
    """Pictures that are smaller and smaller, those of one depth together."""
    sizes: Fold = "sizes" if fold else False
    if unnamed is None and len(shown.graph) <= FEW:
        yield [Fitted(assemble(shown, None, fold, False), shown)]
    shown = _in_layers(shown)
    deepest = max((len(scope_path(op.scope)) for op in shown.graph), default=0)
    first = _first_depth(shown, deepest)
    for opened, depth in [*_opened(shown, first)][::-1] if deepest else ():
        yield _as_modules(opened, depth, fold, unnamed)
    for depth in range(first - 1, -1, -1):
        yield _as_modules(shown, depth, fold, unnamed)
    if not deepest:
        yield [Fitted(assemble(shown, None, sizes, unnamed), shown)]
        yield _as_modules(shown, 0, fold, unnamed)


def _as_modules(shown: Shown, depth: int, fold: Fold, unnamed: bool | None) -> Iterator[Fitted]:
    """Pictures of the modules at a depth: blocks of other sizes folded too, unnamed blocks closed too."""
    grouped = _with_functions(shown, depth)
    kinds: tuple[Fold, ...] = (fold, "sizes") if fold else (False,)
    for kind in dict.fromkeys(kinds):
        blocks = blocks_of(grouped, kind)
        for closed in (False, True):
            yield Fitted(assembled(grouped, depth, blocks, unnamed, closed), grouped)


def _first_depth(shown: Shown, deepest: int) -> int:
    """The first depth at which more than one module is seen: what is around all of them says little."""
    for depth in range(deepest):
        paths = {scope_path(op.scope)[: depth + 1] for op in shown.graph}
        if sum(len(path) == depth + 1 for path in paths) > 1:
            return depth
    return max(deepest - 1, 0)


def _opened(shown: Shown, depth: int) -> Iterator[tuple[Shown, int]]:
    """The drawing and a depth; then with a module opened that is nearly all of it and has some, and so on."""
    yield shown, depth
    paths = [scope_path(op.scope) for op in shown.graph]
    while True:
        modules = Counter(path[: depth + 1] for path in paths if len(path) > depth)
        around, size = max(modules.items(), key=itemgetter(1))
        inside = {path[: depth + 2] for path in paths if path[: depth + 1] == around} - {around}
        if size <= _NEARLY_ALL * len(paths) or len(inside) < 2:
            return
        shown, depth = replace(shown, shut=shown.shut | set(modules) - {around}), depth + 1
        yield shown, depth


def _with_functions(shown: Shown, depth: int) -> Shown:
    """The drawing in which what stands beside its modules is one node, called by the function it is from."""
    graph, scopes, shut = shown.graph, list[str](), set(shown.shut)
    grouped = itertools.groupby(graph.operators, key=lambda op: _loose_in(op, depth, shown.shut))
    runs = [(loose, list(run)) for loose, run in grouped]
    # Of several that are from one function the last has its name.
    last = {loose: i for i, (loose, _) in enumerate(runs)}
    for i, (loose, ops) in enumerate(runs):
        if loose is None:
            scopes += [op.scope for op in ops]
            continue
        scope, function = loose
        # All of it in one node would be no picture.
        short = len(ops) < _LOOSE or len(ops) == len(graph)
        is_result = i == len(runs) - 1 and [v.shape for v in graph.outputs] == [()]
        function = function or "loss" * is_result
        called = function if function and last.get(loose) == i else f"{len(ops)} operators"
        own = scope if short else joined(scope, called)
        shut |= set() if short else {scope_path(own)}
        scopes += [own] * len(ops)
    return replace(shown, graph=_moved(graph, scopes), shut=frozenset(shut))


def _loose_in(op: Operator, depth: int, shut: frozenset[tuple[str, ...]]) -> tuple[str, str] | None:
    """The scope of an operator and the function it comes from; None if it is inside of a module."""
    if len(scope_path(op.scope)) > depth or not shut.isdisjoint(scopes_around(op.scope)):
        return None
    function = (op.source or "").rpartition("(")[2].rstrip(")").rpartition(".")[2]
    return op.scope, "" if function.startswith(("<", "__")) else function


def _in_layers(shown: Shown) -> Shown:
    """The drawing with operators that are in no module in scopes by the parameters that they read."""
    graph = shown.graph
    layers = None if any(map(_is_module, graph)) else layers_of(graph)
    if layers is None:
        return shown
    scopes = [joined(layer, op.scope) for layer, op in zip(layers, graph.operators, strict=True)]
    return replace(shown, graph=_moved(graph, scopes))


def _is_module(op: Operator) -> bool:
    """Whether an operator is in a module: not in a loop or an einsum alone."""
    return any("[" not in part and "->" not in part for part in scope_path(op.scope))


def in_runs(graph: Graph, runs: int) -> Graph:
    """The graph with operators that follow each other in so many scopes."""
    count, length = len(graph), -(-len(graph) // runs)
    scopes = []
    for i, op in enumerate(graph.operators):
        first = i - i % length
        scopes.append(joined(f"operators {first + 1} … {min(first + length, count)}", op.scope))
    return _moved(graph, scopes)


def _moved(graph: Graph, scopes: Sequence[str]) -> Graph:
    """The graph with other scopes of its operators, and of what they compute."""
    of: dict[str, Variable] = {}

    def moved(variables: Sequence[Variable]) -> tuple[Variable, ...]:
        return tuple(of.get(v.name, v) if v.kind != "literal" else v for v in variables)

    operators = []
    for op, scope in zip(graph.operators, scopes, strict=True):
        if scope != op.scope:
            of |= {v.name: replace(v, scope=scope) for v in op.outputs}
        operators.append(replace(op, scope=scope, inputs=moved(op.inputs), outputs=moved(op.outputs)))
    return replace(graph, operators=tuple(operators), outputs=moved(graph.outputs))


def inside(node: Node, shown: Shown) -> Shown:
    """What is inside of a collapsed scope, of repeated ones the first: from what comes in to what leaves."""
    depth, names = len(scope_path(node.name)), set(node.inside)
    operators = [op for op in shown.graph if op.name in names]
    made = {v.name for op in operators for v in op.outputs}
    read = {v.name: v for op in operators for v in op.inputs if v.kind != "literal" and v.name not in made}
    given = {v.name: replace(v, kind="input") if v.kind == "intermediate" else v for v in read.values()}
    others = [v.name for op in shown.graph if op.name not in names for v in op.inputs]
    wanted = {*others, *(v.name for v in shown.graph.outputs)}

    def own(scope: str) -> str:
        return "/".join(scope_path(scope)[depth:])

    def within(v: Variable) -> Variable:
        return given.get(v.name, replace(v, scope=own(v.scope))) if v.kind != "literal" else v

    moved = tuple(
        replace(
            op,
            scope=own(op.scope),
            inputs=tuple(map(within, op.inputs)),
            outputs=tuple(map(within, op.outputs)),
        )
        for op in operators
    )
    results = [v for op in moved for v in op.outputs if v.name in wanted]
    constants = {v.name for v in shown.graph.constants}
    graph = Graph(
        node.label + (f" × {node.count}" if node.count > 1 else ""),
        tuple(v for v in given.values() if v.name not in constants),
        tuple(v for v in given.values() if v.name in constants),
        moved,
        tuple(results or (v for op in moved[-1:] for v in op.outputs)),
    )
    roles = {op.name: shown.roles[op.name] for op in moved if op.name in shown.roles}
    return Shown(
        graph,
        roles=roles,
        variable_roles=shown.variable_roles,
        legend=shown.legend if roles else (),
        data=shown.data,
    )
