"""Short names: `z₁ = x W₁ + b₁` in place of paths and of names of primitives."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Mapping

from funcprop.equations.condense import Condensed
from funcprop.graph.graph import Variable

_LETTERS = {
    "product": "z",
    "activation": "h",
    "softmax": "p",
    "log_softmax": "ℓ",
    "loss": "L",
    "norm": "n",
    "sum": "r",
    "value": "u",
    "draw": "ε",
    "mask": "m",
    "index": "i",
}
# Of several weights in one line each has a letter of its own.
_WEIGHTS = "WUVQ"
_ROLES = {"weight": "W", "bias": "b", "scale": "γ", "shift": "β", "table": "E"}
_SUBSCRIPT = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")


def short_names(
    condensed: Condensed, result: Variable, active: Collection[str], taken: Collection[str] = ()
) -> tuple[dict[str, str], dict[str, str]]:
    """How every variable is written, and the path of each parameter that was given a short name.

    Names that the user gave stay, without the scopes around them. Arguments stay, if they are one array.
    Letters are numbered in the order of the forward sweep where there are several. None is `taken`.
    """
    graph = condensed.graph
    used = {v.name for op in graph.operators for v in op.inputs} | {result.name}
    lines = [v for op in graph.operators for v in op.outputs if v.name in used]
    wanted: dict[str, tuple[str, str | None]] = {}
    kept: dict[str, str] = {}
    weights = Counter[str]()
    read_at = {v.name: (i, k) for i, op in enumerate(graph.operators) for k, v in enumerate(op.inputs)}
    inputs = [*graph.inputs, *graph.constants]
    # Those that have no role are numbered in the order in which they are read.
    inputs.sort(key=lambda v: (-1, 0) if v.name in condensed.roles else read_at.get(v.name, (0, 0)))
    for v in inputs:
        role = condensed.roles.get(v.name)
        if "/" not in v.name:
            kept[v.name] = v.name
        elif role is not None:
            letter = _ROLES[role[0]]
            if letter == "W":
                letter = _WEIGHTS[min(weights[role[1]], len(_WEIGHTS) - 1)]
                weights[role[1]] += 1
            wanted[v.name] = letter, role[1]
        elif v.name in active:
            wanted[v.name] = "θ", None
        else:
            kept[v.name] = _last_word(v.name)
    for v in lines:
        if v.named:
            kept[v.name] = v.name.rpartition("/")[2]
        elif v.name == result.name:
            kept[v.name] = "J"
        else:
            wanted[v.name] = _LETTERS[condensed.kinds.get(v.name, "value")], v.name
    written = _without_clashes(kept)
    written |= _numbered(wanted, [v.name for v in lines], {*written.values(), *taken})
    read = {v.name for op in graph.operators for v in op.inputs} | set(active)
    renamed = [v.name for v in graph.inputs if written[v.name] != v.name and v.name in read]
    first_read = {v.name: i for i, op in reversed([*enumerate(graph.operators)]) for v in op.inputs}
    renamed.sort(
        key=lambda name: (first_read.get(name, len(graph.operators)), "WUVQEγβbθ".find(written[name][0]))
    )
    return written, {written[name]: name for name in renamed}


def _last_word(path: str) -> str:
    """The last part of a path that is no number, with the numbers after it: `carry/0` is `carry₀`."""
    parts = path.split("/")
    last = max((i for i, part in enumerate(parts) if not part.isdigit()), default=0)
    return parts[last] + ",".join(parts[last + 1 :]).translate(_SUBSCRIPT)


def _without_clashes(kept: Mapping[str, str]) -> dict[str, str]:
    """Names that stay; of names that several variables would share, each but the first is numbered."""
    total, seen, taken = Counter(kept.values()), Counter[str](), set(kept.values())
    written = {}
    # What has no path around its name keeps it.
    for name, short in sorted(kept.items(), key=lambda item: item[0] != item[1]):
        seen[short] += 1
        if total[short] == 1 or seen[short] == 1:
            written[name] = short
            continue
        number = next(k for k in range(seen[short], len(kept) + 2) if f"{short}_{k}" not in taken)
        written[name] = f"{short}_{number}"
        taken.add(written[name])
    return written


def _numbered(
    wanted: Mapping[str, tuple[str, str | None]], lines: list[str], taken: set[str]
) -> dict[str, str]:
    """Letters with numbers: a line's place among those of its letter, a parameter's that of its line."""
    count = Counter(letter for letter, _ in wanted.values())
    places: dict[str, dict[str, int]] = defaultdict(dict)
    for name in lines:
        if name in wanted:
            letter = wanted[name][0]
            places[letter][name] = len(places[letter]) + 1
    place = {name: k for found in places.values() for name, k in found.items()}
    written: dict[str, str] = {}
    used = set(taken)
    for name, (letter, line) in wanted.items():
        number = place.get(name) or (place.get(line) if line is not None else None) or 1
        short = letter if count[letter] == 1 else f"{letter}{number}".translate(_SUBSCRIPT)
        while short in used:
            number += 1
            short = f"{letter}{number}".translate(_SUBSCRIPT)
        used.add(short)
        written[name] = short
    return written
