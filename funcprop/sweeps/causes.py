"""Which values that are not finite lead to others: through operators that do not make them finite again.

A maximum starts from −∞ and a mask adds it, and nothing is wrong: the next operator removes it. So a value
counts as a cause only if values that are not finite lead all the way from it to where one does harm.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import jax
import numpy as np

from funcprop import _jax
from funcprop.graph.graph import Graph, Operator
from funcprop.sweeps.sweeps import Tape

# Where an operator stands: the loops around it, each with its iteration, and its name.
Path: TypeAlias = "Sequence[tuple[str, int] | str]"


@dataclass(eq=False)
class Causes:
    """The values of a graph, at one time, that are not finite, by name; and those `found` to be causes.

    `bodies` are the iterations of the loops in which there are any; `any_found` is of them too.
    """

    graph: Graph
    bad: set[str]
    bodies: dict[str, list[Causes]]
    found: set[str] = field(default_factory=set)
    any_found: bool = False

    @classmethod
    def of(cls, graph: Graph, tape: Tape) -> Causes:
        """Collect the entries of a tape; no cause is found yet."""
        stacked = _Stacked.of(tape)
        return cls._at(graph, stacked.values, stacked.bodies, ())

    @classmethod
    def _at(
        cls,
        graph: Graph,
        entries: Mapping[str, np.ndarray],
        bodies: Mapping[str, _Stacked],
        index: tuple[int, ...],
    ) -> Causes:
        inner: dict[str, list[Causes]] = {}
        bad = {name for name, where in entries.items() if where.any()}
        for op in graph.operators:
            if op.name not in bodies:
                continue
            stacked = bodies[op.name]
            if not stacked.any(index) and not any(v.name in bad for v in op.inputs if v.kind != "literal"):
                continue
            body, consts, carry = op.bodies["jaxpr"], *_jax.scan_counts(op.static)
            given = [entries.get(v.name) if v.kind != "literal" else None for v in op.inputs]
            inner[op.name] = []
            for t in range(op.static["length"]):
                now = {name: where[(*index, t)] for name, where in stacked.values.items()}
                for i, (v, where) in enumerate(zip(body.inputs, given, strict=True)):
                    if where is not None and not consts <= i < consts + carry:
                        now[v.name] = where if i < consts else where[t]
                inner[op.name].append(cls._at(body, now, stacked.bodies, (*index, t)))
        return cls(graph, bad, inner)

    def trace(self, ends: Collection[str], path: Path = ()) -> bool:
        """Find what leads to values of the names `ends`, or to what the operator at `path` reads and makes.

        Returns whether there is anything.
        """
        found = self.found
        found |= self.bad & set(ends)
        for op in reversed(self.graph.operators):
            if path == (op.name,):
                found |= self.bad & {v.name for v in op.outputs}
            leads = path == (op.name,) or any(v.name in found for v in op.outputs)
            if op.name in self.bodies:
                found |= self.bad & self._through_loop(op, path)
            elif leads:
                found |= self.bad & {v.name for v in op.inputs if v.kind != "literal"}
        inside = (now.any_found for iterations in self.bodies.values() for now in iterations)
        self.any_found = bool(found) or any(inside)
        return self.any_found

    def _through_loop(self, op: Operator, path: Path) -> set[str]:
        """The loop's operands that lead to what was found of its results, or to the operator at `path`."""
        body, consts, carry = op.bodies["jaxpr"], *_jax.scan_counts(op.static)
        wanted = [v.name in self.found for v in op.outputs]
        carried, back = wanted[:carry], set()
        for t in reversed(iterations(op)):
            now = self.bodies[op.name][t]
            after = zip(body.outputs, [*carried, *wanted[carry:]], strict=True)
            here = path[1:] if path and path[0] == (op.name, t) else ()
            now.trace({v.name for v, leads in after if leads and v.kind != "literal"}, here)
            leads = [v.name in now.found for v in body.inputs]
            carried = leads[consts : consts + carry]
            back |= {i for i, lead in enumerate(leads) if lead and not consts <= i < consts + carry}
        back |= {consts + i for i, lead in enumerate(carried) if lead}
        return {op.inputs[i].name for i in back if op.inputs[i].kind != "literal"}


@dataclass(frozen=True)
class _Stacked:
    """The entries of a tape that are not finite; those of a loop have leading axes for its iterations."""

    values: dict[str, np.ndarray]
    bodies: dict[str, _Stacked]

    @classmethod
    def of(cls, tape: Tape) -> _Stacked:
        found = {name: bad_entries(value) for name, value in tape.values.items()}
        values = {name: where for name, where in found.items() if where is not None}
        return cls(values, {name: cls.of(body) for name, body in tape.bodies.items()})

    def any(self, index: tuple[int, ...]) -> bool:
        """Whether there is one in the iterations `index` of the loops around."""
        inside = (body.any(index) for body in self.bodies.values())
        return any(where[index].any() for where in self.values.values()) or any(inside)


def iterations(op: Operator) -> list[int]:
    """The iterations of a loop in the order in which it runs, counted along the scanned axis."""
    return list(range(op.static["length"]))[:: -1 if op.static["reverse"] else 1]


def bad_entries(value: Any) -> np.ndarray | None:
    """Mark the entries that are not finite; None for values that are always finite."""
    if not _jax.is_differentiable(jax.typeof(value)):
        return None
    return ~np.isfinite(np.asarray(value, dtype=np.result_type(value.dtype, np.float32)))
