"""Scopes by the paths of parameters, for frameworks whose modules do not name theirs.

Flax linen and Haiku name a scope for every module. Equinox names the class alone (`eqx.nn.Linear`, three
times), nnx and plain JAX nothing; but what an operator belongs to can be told from the parameter it reads:
`layers/4/weight` is read in `layers/4`.
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from funcprop.graph.graph import Graph, Operator
from funcprop.program.facts import PRODUCTS

Path = tuple[str, ...]

_MOVING = frozenset({"broadcast_in_dim", "reshape", "squeeze", "transpose", "convert_element_type"})
_TOTALS = frozenset({"reduce_sum", "mean"})
_ELEMENTWISE = frozenset({"mul", "add", "sub"})


def with_module_scopes(graph: Graph) -> Graph:
    """The graph with the scope of every operator that reads parameters named by their path.

    Operators that read none are in the scope around the module before them, those of a normalisation in that
    of its scale. A graph whose scopes are the paths already stays as it is.

    Example:
        >>> import jax.numpy as jnp, funcprop as fp
        >>> graph = fp.trace(lambda layers, x: jnp.tanh(x @ layers[0]["w"]) @ layers[1]["w"])(
        ...     [{"w": jnp.ones((3, 3))}, {"w": jnp.ones((3, 2))}], jnp.ones(3))
        >>> from funcprop.graph.module_scopes import with_module_scopes
        >>> [op.scope for op in with_module_scopes(graph).operators]
        ['layers/0', 'layers', 'layers/1']
    """
    owners = _owners(graph)
    chosen: list[Path | None] = []
    for scope, run in itertools.groupby(graph.operators, key=lambda op: op.scope):
        ops = list(run)
        paths = [_shared(owners[op.name]) for op in ops]
        if scope:
            whole = _shared(path for path in paths if path)
            paths = [whole] * len(ops)
        own = set(_parts(scope))
        chosen += [path if path and not own.issuperset(path) else None for path in paths]
    if len(set(chosen) - {None}) < 2:
        return graph
    chosen = _with_what_is_between(graph.operators, _with_normalisations(graph.operators, chosen))
    last = max(i for i, path in enumerate(chosen) if path)
    classes = {
        part for op, path in zip(graph.operators, chosen, strict=True) if path for part in _parts(op.scope)
    }
    scopes: list[str] = []
    around: Path = ()
    for i, (op, path) in enumerate(zip(graph.operators, chosen, strict=True)):
        if path:
            around = path[:-1]
            scopes.append("/".join(path))
        else:
            inside = around if i < last else ()
            own_parts = [part for part in _parts(op.scope) if part not in classes and part not in inside]
            scopes.append("/".join([*inside, *own_parts]))
    operators = tuple(replace(op, scope=scope) for op, scope in zip(graph.operators, scopes, strict=True))
    return replace(graph, operators=operators)


def _parts(scope: str) -> list[str]:
    return [part for part in scope.split("/") if part not in ("", "~", "params")]


def _owners(graph: Graph) -> dict[str, list[Path]]:
    """The modules whose parameters each operator reads, also after they are reshaped or cast."""
    owner = {v.name: tuple(_parts(v.name)[:-1]) for v in graph.inputs}
    found: dict[str, list[Path]] = defaultdict(list)
    readers: dict[str, list[Operator]] = defaultdict(list)
    for op in graph.operators:
        for name in {v.name for v in op.inputs if v.kind != "literal"}:
            readers[name].append(op)
    for op in graph.operators:
        given = [v.name for v in op.inputs if v.kind != "literal"]
        paths = [path for name in given if (path := owner.get(name))]
        found[op.name] = [] if len(paths) == len(given) and _is_penalty(op, readers) else paths
        if op.op in _MOVING and len(given) == 1 and given[0] in owner:
            owner |= {v.name: owner[given[0]] for v in op.outputs}
    return found


def _is_penalty(op: Operator, readers: Mapping[str, list[Operator]]) -> bool:
    """Whether what is computed of parameters alone becomes one number: a decay, which is in no module."""
    while len(op.outputs) == 1 and op.outputs[0].shape != ():
        found = readers[op.outputs[0].name]
        if len(found) != 1 or len({v.name for v in found[0].inputs if v.kind != "literal"}) != 1:
            return False
        (op,) = found
    return len(op.outputs) == 1


def _shared(paths: Iterable[Path]) -> Path:
    """The beginning that all of these have."""
    levels = zip(*paths, strict=False)
    return tuple(level[0] for level in itertools.takewhile(lambda level: len(set(level)) == 1, levels))


def _with_what_is_between(operators: Sequence[Operator], chosen: Sequence[Path | None]) -> list[Path | None]:
    """What stands between operators of one module that holds several matrices is in it: a block."""
    products = Counter(path for op, path in zip(operators, chosen, strict=True) if op.op in PRODUCTS)
    before, after = _last_before(chosen), _last_before(chosen[::-1])[::-1]
    return [
        a if a == b and products[a] > 1 else path for path, a, b in zip(chosen, before, after, strict=True)
    ]


def _last_before(chosen: Sequence[Path | None]) -> list[Path | None]:
    """For every operator its module, or the last one before it."""
    found: list[Path | None] = []
    for path in chosen:
        found.append(path or (found[-1] if found else None))
    return found


def _with_normalisations(operators: Sequence[Operator], chosen: Sequence[Path | None]) -> list[Path | None]:
    """Operators whose results only a normalisation reads (mean, variance) are in its scope."""
    kinds: dict[Path, set[str]] = defaultdict(set)
    readers: dict[str, set[int]] = defaultdict(set)
    for i, (op, path) in enumerate(zip(operators, chosen, strict=True)):
        if path:
            kinds[path].add(op.op)
        for v in op.inputs:
            readers[v.name].add(i)
    norms = {path for path, ops in kinds.items() if ops <= _ELEMENTWISE | _MOVING and "mul" in ops}
    # What mixes several values before anything is added up, such as a mask, is no statistic.
    totals = set[str]()
    found = list(chosen)
    is_total = []
    for op in operators:
        read = {v.name for v in op.inputs if v.kind != "literal"}
        is_total.append(op.op in _TOTALS or len(read) == 1 or bool(read & totals))
        if op.op in _TOTALS or read & totals:
            totals |= {v.name for v in op.outputs}
    for i in range(len(operators) - 1, -1, -1):
        places = {found[r] for v in operators[i].outputs for r in readers[v.name]}
        if found[i] is None and is_total[i] and len(places) == 1 and places <= norms:
            found[i] = places.pop()
    return found
