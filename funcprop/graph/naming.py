"""How arguments, values and operators of a graph are called."""

from __future__ import annotations

import inspect
import itertools
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np


def argument_names(fun: Callable[..., Any], paths: Sequence[Any]) -> list[str]:
    """The argument's own name for an array, the path inside it for a pytree (`layer/W`).

    A function may say how an argument is shown: `fun.__symbols__ = {"decay": "λ"}`. A path that two arguments
    share, or that is only numbers, is prefixed by the argument's name.
    """
    try:
        parameters = list(inspect.signature(fun).parameters.values())
    except (TypeError, ValueError):
        parameters = []
    symbols = getattr(fun, "__symbols__", {})
    positional = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    pieces = []
    for path in paths:
        top, which, *inner = path
        if top.idx == 1:
            argument = str(which.key)
        else:
            argument = positional[which.idx] if which.idx < len(positional) else f"arg{which.idx}"
        pieces.append((symbols.get(argument, argument), [_key(k) for k in inner]))
    short = [("/".join(inner) if inner else argument) for argument, inner in pieces]
    clashes = Counter(short)
    return [
        "/".join([argument, *inner]) if inner and (clashes[s] > 1 or inner[0].isdigit()) else s
        for s, (argument, inner) in zip(short, pieces, strict=True)
    ]


def _key(entry: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(entry, attribute):
            return str(getattr(entry, attribute))
    return str(entry)


def unique_names(labels: Sequence[str]) -> list[str]:
    """The labels, each repeated one with its index: `tanh`, `tanh_1`, `tanh_2`."""
    taken, repeats = set(labels), Counter[str]()
    result = []
    for label in labels:
        candidate = label
        if repeats[label]:
            candidate = next(
                name for k in itertools.count(repeats[label]) if (name := f"{label}_{k}") not in taken
            )
        repeats[label] += 1
        taken.add(candidate)
        result.append(candidate)
    return result


def joined(*parts: str) -> str:
    """A scope and a name, or several scopes, as one path."""
    return "/".join(part for part in parts if part)


def without_transformations(scope: str, names: Sequence[str]) -> str:
    """A scope without the marks of transformations: `vmap` batches a value but does not rename it."""
    mark = re.compile(rf"\b(?:{'|'.join(names)})\(([^()]*)\)")
    previous = None
    while previous != scope:
        previous, scope = scope, mark.sub(r"\1", scope)
    return "/".join(part for part in scope.split("/") if part)


def literal_name(value: Any) -> str:
    """A number as it is written in the graph."""
    if isinstance(value, float | np.floating):
        return f"{value:g}"
    return str(int(value)) if isinstance(value, int) and not isinstance(value, bool) else str(value)
