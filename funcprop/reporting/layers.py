"""The memory ledger as bars: bytes at the peak by layer and by what they are for."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from funcprop.graph.graph import shape_text
from funcprop.graph.naming import argument_names
from funcprop.memory.accounting import footprint
from funcprop.memory.ledger import Footprint, Ledger, Row
from funcprop.training.loop import Setup, first_minibatch

# The categories of a ledger that are told apart by a colour; the others are small.
CATEGORIES = (
    "parameters",
    "optimizer state",
    "inputs",
    "saved",
    "activations",
    "cotangents",
    "gradients",
    "other",
)
# More layers than this are not told apart; what is beyond, or too small to be seen, is one bar.
MOST_LAYERS = 16
SMALLEST = 0.005


@dataclass(frozen=True)
class BarPart:
    """A piece of a bar."""

    category: str
    nbytes: int


@dataclass(frozen=True)
class Bar:
    """The bytes of one layer, or value, at the peak of one program."""

    program: str
    parts: tuple[BarPart, ...]

    @property
    def nbytes(self) -> int:
        """The length of the bar."""
        return sum(part.nbytes for part in self.parts)


@dataclass(frozen=True)
class LayerBars:
    """The bars of one layer, or of one value where the function has no named scopes."""

    name: str
    bars: tuple[Bar, ...]


@dataclass(frozen=True)
class Memory:
    """A footprint, what it is of and on which data, and its bars; `unit` says what they are of."""

    subject: str
    data: str
    footprint: Footprint
    unit: str
    layers: tuple[LayerBars, ...]

    @property
    def largest(self) -> int:
        """The length of the longest bar."""
        return max((bar.nbytes for layer in self.layers for bar in layer.bars), default=0) or 1

    @property
    def categories(self) -> list[tuple[str, list[int]]]:
        """Bytes by category in each program, without categories that are nowhere."""
        found = [(c, [_by_category(x.rows)[c] for x in self.footprint.ledgers.values()]) for c in CATEGORIES]
        return [(category, nbytes) for category, nbytes in found if any(nbytes)]


def memory(
    fun: Callable[..., Any],
    argnums: int | Sequence[int],
    args: Sequence[Any],
    kwargs: Any,
    setup: Setup | None,
) -> Memory:
    """The memory of a function and its gradient, or of a step of the training run on one minibatch."""
    if setup is None:
        given = data_shapes(fun, args, kwargs, argnums)
        return _bars("the function and its gradient", given, footprint(fun, argnums)(*args, **kwargs))
    parts = first_minibatch(setup)
    found = footprint(setup.loss, optimizer=setup.optimizer)(setup.params, *parts)
    given = data_shapes(setup.loss, (None, *parts), {}, 0)
    return _bars("the loss of one minibatch, and a whole training step", given, found)


def data_shapes(
    fun: Callable[..., Any], args: Sequence[Any], kwargs: Any, argnums: int | Sequence[int]
) -> str:
    """The names and shapes of the arrays that are not differentiated by: of what a batch is made."""
    chosen = {argnums} if isinstance(argnums, int) else set(argnums)
    chosen = {i % max(len(args), 1) for i in chosen}
    others = tuple(None if i in chosen else x for i, x in enumerate(args))
    leaves = [(path, x) for path, x in jax.tree.leaves_with_path((others, kwargs)) if hasattr(x, "shape")]
    names = argument_names(fun, [path for path, _ in leaves])
    texts = [f"{name}: {shape_text(x.shape)}" for name, (_, x) in zip(names, leaves, strict=True)]
    return ", ".join(texts[:4]) + (f" and {len(texts) - 4} more" if len(texts) > 4 else "") or "none"


def _bars(subject: str, data: str, found: Footprint) -> Memory:
    rows = [row for ledger in found.ledgers.values() for row in ledger.rows]
    layer_of = _layers(rows)

    def group(row: Row) -> str:
        if row.category == "unused":
            return "gaps between buffers"
        return row.name if layer_of is None else layer_of(row) or "outside of layers"

    totals: dict[str, int] = defaultdict(int)
    for row in rows:
        totals[group(row)] += row.nbytes
    largest = sorted(totals, key=lambda name: -totals[name])[:MOST_LAYERS]
    visible = SMALLEST * sum(totals.values())
    kept = [name for name in totals if name in largest and totals[name] >= visible]
    kept = kept if layer_of is None else sorted(kept, key=_natural)
    outermost = {name.partition("/")[0] for name in kept if "/" in name}
    # What all layers are in says nothing of any.
    shared = outermost.pop() + "/" if layer_of is not None and len(outermost) == 1 else ""
    layers = [LayerBars(n.removeprefix(shared), _of(found.ledgers, {n}, group)) for n in kept]
    if len(kept) < len(totals):
        rest = _of(found.ledgers, totals.keys() - kept, group)
        layers.append(LayerBars(f"{len(totals) - len(kept)} more", rest))
    return Memory(subject, data, found, "value" if layer_of is None else "layer", tuple(layers))


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts `Block_2` before `Block_10`."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _of(ledgers: dict[str, Ledger], groups: Collection[str], group: Callable[[Row], str]) -> tuple[Bar, ...]:
    bars = []
    for program, ledger in ledgers.items():
        sums = _by_category(row for row in ledger.rows if group(row) in groups)
        bars.append(Bar(program, tuple(BarPart(c, n) for c, n in sums.items() if n)))
    return tuple(bars)


def _by_category(rows: Iterable[Row]) -> dict[str, int]:
    sums = dict.fromkeys(CATEGORIES, 0)
    for row in rows:
        sums[row.category if row.category in sums else "other"] += row.nbytes
    return sums


def _layers(rows: Sequence[Row]) -> Callable[[Row], str] | None:
    """What tells the layer of a row: its scope, or the module of its parameter where there are more of these.

    None if there are no layers.
    """
    ways: tuple[Callable[[Row], str], ...] = (lambda row: row.scope, lambda row: row.path.rpartition("/")[0])
    found = []
    for way in ways:
        paths = [way(row).split("/") for row in rows if way(row)]
        depth, count = _depth(paths)
        found.append((count, depth, way))
    count, depth, way = max(found, key=lambda one: one[0])
    return (lambda row: "/".join(way(row).split("/")[:depth])) if count > 1 else None


def _depth(paths: Sequence[Sequence[str]]) -> tuple[int, int]:
    """How many parts of the names tell layers apart, and how many layers these are.

    The most parts by which there are no more than can be shown, or the fewest by which there are several.
    """
    deepest = max(map(len, paths), default=0)
    counts = {depth: len({tuple(path[:depth]) for path in paths}) for depth in range(1, deepest + 1)}
    several = [depth for depth, count in counts.items() if count > 1]
    if not several:
        return 0, 0
    depth = max((depth for depth in several if counts[depth] <= MOST_LAYERS), default=several[0])
    return depth, counts[depth]
