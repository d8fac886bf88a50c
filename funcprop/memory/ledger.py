"""The ledger: what a program holds when it holds most, one row for every buffer."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, TypeAlias

from funcprop.graph.graph import aligned

Category: TypeAlias = Literal[
    "parameters",
    "optimizer state",
    "inputs",
    "constants",
    "saved",
    "activations",
    "cotangents",
    "gradients",
    "results",
    "workspace",
    "unused",
]
CATEGORIES: tuple[Category, ...] = Category.__args__  # type: ignore[attr-defined]

_MEANING = {
    "estimate": "of a liveness analysis, before compiling",
    "compiled": "argument + output + temporary − alias, and constants",
    "hidden": "what fused kernels hold inside, not reported",
    "parameters": "what is differentiated, or carried by a train step",
    "optimizer state": "what the optimizer keeps between steps",
    "inputs": "the other arguments",
    "constants": "arrays written in the function",
    "saved": "of the forward sweep, kept for the backward sweep",
    "activations": "of the forward sweep, only for the forward sweep",
    "cotangents": "of the backward sweep",
    "gradients": "of the parameters; fewer if not yet made at the peak, or written over others",
    "results": "what the program returns in memory of its own",
    "workspace": "what the compiler needs besides",
    "unused": "gaps between buffers",
}


@dataclass(frozen=True)
class Row:
    """A buffer at the peak: whose it is, and what it is for.

    `scope` is the named scope of the operator that made it, `path` the parameter that this operator reads, or
    the nearest before it: it tells layers apart that have no scopes. `sweep` is "forward", "backward",
    "recomputed", "optimizer", or empty outside of them. `operator` is what computed it (`input` for an
    argument); `shape` is that of the whole array on one device, in a loop with the iterations in front.
    """

    name: str
    scope: str
    category: Category
    nbytes: int
    shape: tuple[int, ...]
    dtype: str
    operator: str
    sweep: str = ""
    path: str = ""


@dataclass(frozen=True)
class Ledger:
    """One program: its bytes before and after compiling, and the rows.

    `estimate` is that of a liveness analysis of the jaxpr: arguments, captured constants, results, and the
    temporaries that are live at the peak. `compiled` is `argument + output + temp − alias` of the compiled
    program and the constants in it, of one device; None if it was not compiled. `fields` are these numbers,
    `live`, which is `compiled` without gaps between buffers, and `hidden`, what fused kernels hold without
    reporting it. The rows are XLA's own buffers, whose bytes add up to `compiled`; before compiling they are
    those of the estimate, and add up to that.
    """

    estimate: int
    compiled: int | None
    rows: tuple[Row, ...]
    fields: dict[str, int] = field(default_factory=dict)

    @property
    def predicted(self) -> int:
        """The old name of `estimate`."""
        return self.estimate

    @property
    def held(self) -> int:
        """The bytes to plan with: compiled, those that are hidden among them, or else the estimate."""
        return self.estimate if self.compiled is None else self.compiled + self.fields.get("hidden", 0)

    @property
    def ratio(self) -> float | None:
        """The estimate over the compiled bytes, those that are hidden among them."""
        return None if self.compiled is None else self.estimate / max(self.held, 1)

    def by(self, attribute: str) -> dict[str, int]:
        """Sum the bytes by `category`, `scope`, `path`, `operator`, `sweep`, or another attribute of rows.

        Raises:
            ValueError: rows have no such attribute.
        """
        known = [f.name for f in fields(Row) if f.name != "nbytes"]
        if attribute not in known:
            raise ValueError(
                f"by({attribute!r}): rows have no such attribute; use one of {', '.join(known)}."
            )
        total = Counter[str]()
        for row in self.rows:
            total[str(getattr(row, attribute))] += row.nbytes
        return dict(total)

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {**asdict(self), "ratio": self.ratio}


@dataclass(frozen=True)
class Footprint:
    """Memory of inference and of training. `print` shows tables, `json()` is the same as data.

    `inference` is None for a whole train step, whose one program is `training`; `training` is None for a
    function of which nothing can be differentiated. `warnings` name what would mislead a reader of the
    numbers, with the remedy.
    """

    name: str
    inference: Ledger | None
    training: Ledger | None
    warnings: tuple[str, ...] = ()

    @property
    def ledgers(self) -> dict[str, Ledger]:
        """Those of `inference` and `training` that there are."""
        both = {"inference": self.inference, "training": self.training}
        return {name: ledger for name, ledger in both.items() if ledger is not None}

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        found: dict[str, Any] = {"name": self.name, "inference": None, "training": None}
        found.update({name: ledger.as_dict() for name, ledger in self.ledgers.items()})
        return {**found, "warnings": list(self.warnings)}

    def json(self) -> str:
        """The same as text."""
        return json.dumps(self.as_dict(), indent=2)

    def __str__(self) -> str:
        return table(self)


def table(found: Footprint, largest: int = 12) -> str:
    """Totals, then bytes by category, then the largest rows of each program, and what the others add."""
    ledgers = found.ledgers
    totals = [("bytes", *ledgers)]
    totals.append(("estimate", *(f"{x.estimate:,}" for x in ledgers.values())))
    totals.append(("compiled", *("-" if x.compiled is None else f"{x.compiled:,}" for x in ledgers.values())))
    if hidden := [x.fields.get("hidden", 0) for x in ledgers.values()]:
        totals += [("hidden", *(f"{n:,}" for n in hidden))] if any(hidden) else []
    totals.append(("ratio", *("-" if x.ratio is None else f"{x.ratio:.3f}" for x in ledgers.values())))
    sums = [x.by("category") for x in ledgers.values()]
    totals.extend(
        (category, *(f"{each.get(category, 0):,}" for each in sums))
        for category in CATEGORIES
        if any(category in each for each in sums)
    )
    right = set(range(1, 1 + len(ledgers)))
    meanings = [_MEANING.get(line[0], "") for line in totals]
    parts = [
        f"{found.name}: bytes held at the peak",
        aligned([(*line, text) for line, text in zip(totals, meanings, strict=True)], right, widest=60),
    ]
    for name, ledger in ledgers.items():
        rows = sorted(ledger.rows, key=lambda row: -row.nbytes)
        lines: list[Sequence[str]] = [
            (f"largest in {name}", "bytes", "category", "operator", "type", "scope")
        ]
        lines += [
            (
                row.name,
                f"{row.nbytes:,}",
                row.category,
                row.operator,
                f"{row.dtype}[{','.join(map(str, row.shape))}]",
                row.scope,
            )
            for row in rows[:largest]
        ]
        if rest := rows[largest:]:
            lines.append((f"{len(rest)} more", f"{sum(row.nbytes for row in rest):,}", *[""] * 4))
        parts.append(aligned(lines, right={1}, widest=48))
    parts += [f"Note: {text}" for text in found.warnings]
    return "\n\n".join(parts)
