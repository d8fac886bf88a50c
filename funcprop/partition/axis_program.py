"""The classes of equal axes in a program, by union-find.

Nodes are pairs (variable, axis); every operator joins those that are equal (`funcprop.partition.links`).
Splitting a class over devices costs nothing but an all-reduce where an operator sums over it. An axis that
occurs twice in one array, or that an operator cannot leave split, is not split, and says why.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax

from funcprop import _jax
from funcprop.partition.flat import flattened, simplified, with_makers_apart
from funcprop.partition.links import Links, Place, rank, shape
from funcprop.partition.operator_links import links_of
from funcprop.program.facts import PRODUCTS, facts_of
from funcprop.program.flops import flops


@dataclass(frozen=True)
class AxisTotal:
    """An operator that sums over some places; `trips` is how often it runs.

    `joins` says that its result is only added to the carry of a loop, so that one all-reduce behind the loop
    does for all of its steps.
    """

    eqn: Any
    summed: tuple[Place, ...]
    trips: int
    joins: bool = False


class AxisProgram:
    """The flat program of loss and gradient, with the class of every axis of every variable."""

    def __init__(self, jaxpr: Any, consts: list[Any]) -> None:
        self.jaxpr, self.consts = jaxpr, consts
        self._parent: dict[Place, Place] = {}
        self._why: dict[Place, str] = {}
        self.variables: list[Any] = []
        self.totals: list[AxisTotal] = []
        self.equations: list[tuple[Any, int]] = []
        self.makers: dict[Any, Any] = {}
        self._enter(jaxpr.invars)
        self._walk(jaxpr, 1, frozenset())

    def find(self, place: Place) -> Place:
        """The representative of a place's class."""
        while self._parent[place] != place:
            self._parent[place] = self._parent[self._parent[place]]
            place = self._parent[place]
        return place

    def join(self, some: Sequence[Any], others: Sequence[Any]) -> None:
        """Say that arrays are laid out alike, such as parameters and their gradients."""
        for a, b in zip(some, others, strict=True):
            found = Links()
            found.together(a, b)
            for x, y in found.same:
                self._parent[self.find(x)] = self.find(y)

    def _enter(self, atoms: Any) -> None:
        for v in _jax.variables(atoms):
            if (v, -1) not in self._parent:
                self._parent[v, -1] = (v, -1)
                self.variables.append(v)
                self._parent.update({(v, d): (v, d) for d in range(rank(v))})

    def _apply(self, links: Links, eqn: Any, trips: int, joins: bool = False) -> None:
        for a, b in links.same:
            x, y = self.find(a), self.find(b)
            if x != y:
                self._parent[x] = y
        where = _jax.scope(eqn)
        for place, why in links.blocked:
            if shape(place[0])[place[1]] > 1:
                self._why.setdefault(place, f"{why}, in {where}" if where else why)
        if links.summed:
            self.totals.append(AxisTotal(eqn, tuple(links.summed), trips, joins))

    def _walk(self, jaxpr: Any, trips: int, joined: frozenset[Any]) -> None:
        for eqn in jaxpr.eqns:
            self._enter(eqn.outvars)
            self.makers.update(dict.fromkeys(eqn.outvars, eqn))
            bodies = [_jax.open_jaxpr(body) for _, body in _jax.sub_jaxprs(eqn)]
            self.equations.append((eqn, trips))
            if eqn.primitive.name == "scan":
                self._scan(eqn, bodies[0], trips)
            elif eqn.primitive.name == "cond":
                for body in bodies:
                    self._inside(eqn, body, eqn.invars[1:], trips)
            elif eqn.primitive.name == "while" or (bodies and not _combines(eqn)):
                found = Links()
                found.block_all([*eqn.invars, *eqn.outvars], f"it passes through `{eqn.primitive.name}`")
                self._apply(found, eqn, trips)
            else:
                self._apply(links_of(eqn, self.makers), eqn, trips, any(v in joined for v in eqn.outvars))

    def _inside(self, eqn: Any, body: Any, operands: Any, trips: int) -> None:
        self._enter([*body.constvars, *body.invars])
        self._walk(body, trips, frozenset())
        found = Links()
        for a, b in (
            *zip(operands, body.invars, strict=True),
            *zip(eqn.outvars, body.outvars, strict=True),
        ):
            found.together(a, b)
        self._apply(found, eqn, trips)

    def _scan(self, eqn: Any, body: Any, trips: int) -> None:
        consts, carries = _jax.scan_counts(eqn.params)
        self._enter([*body.constvars, *body.invars])
        self._walk(body, trips * eqn.params["length"], added_to_carries(body, consts, carries))
        found = Links()
        for i, (a, b) in enumerate(zip(eqn.invars, body.invars, strict=True)):
            _through(found, a, b, scanned=i >= consts + carries)
        for i, (a, b) in enumerate(zip(eqn.outvars, body.outvars, strict=True)):
            _through(found, a, b, scanned=i >= carries)
            if i < carries:
                found.together(body.invars[consts + i], b)
        self._apply(found, eqn, trips)

    @cached_property
    def classes(self) -> dict[Place, list[Place]]:
        """The places of each axis of size over 1, by representative."""
        found: dict[Place, list[Place]] = defaultdict(list)
        for v in self.variables:
            for d in range(rank(v)):
                if shape(v)[d] > 1:
                    found[self.find((v, d))].append((v, d))
        return found

    @cached_property
    def reasons(self) -> dict[Place, str]:
        """Why an axis cannot be split, by representative; without those that can be."""
        return self._meetings[0]

    @cached_property
    def conflicts(self) -> Mapping[Place, set[Place]]:
        """The axes that occur in one array with another: only one of them goes over one axis of a mesh."""
        return self._meetings[1]

    @cached_property
    def _meetings(self) -> tuple[dict[Place, str], Mapping[Place, set[Place]]]:
        twice: dict[Place, str] = {}
        conflicts: dict[Place, set[Place]] = defaultdict(set)
        for v in self.variables:
            roots = [self.find((v, d)) for d in range(rank(v)) if shape(v)[d] > 1]
            for i, root in enumerate(roots):
                for other in roots[i + 1 :]:
                    if root == other and root not in twice:
                        twice[root] = f"it meets itself: twice in {_described(v, self.makers.get(v))}"
                    elif root != other:
                        conflicts[root].add(other)
                        conflicts[other].add(root)
        reasons: dict[Place, str] = {}
        for place, why in self._why.items():
            reasons.setdefault(self.find(place), why)
        return twice | {root: why for root, why in reasons.items() if root not in twice}, conflicts

    def divides(self, root: Place, parts: int) -> bool:
        """Whether every array that has the axis can be cut into so many equal parts."""
        return self.undivided(root, parts) is None

    def undivided(self, root: Place, parts: int) -> tuple[int, str] | None:
        """The size, and a description, of the first array whose axis cannot be cut into so many parts."""
        for v, d in self.classes[root]:
            if shape(v)[d] % parts:
                return shape(v)[d], _described(v, self.makers.get(v))
        return None

    def work(self) -> dict[Place, int]:
        """Operations of the matrix products that each axis takes part in."""
        found: dict[Place, int] = defaultdict(int)
        for eqn, trips in self.equations:
            if eqn.primitive.name in PRODUCTS:
                atoms = _jax.variables([*eqn.invars, *eqn.outvars])
                for root in {self.find((v, d)) for v in atoms for d in range(rank(v)) if shape(v)[d] > 1}:
                    found[root] += trips * flops(eqn)
        return found


def added_to_carries(body: Any, consts: int, carries: int) -> frozenset[Any]:
    """The variables of a loop's body that are only added to one of its carries, perhaps moved before."""
    readers: dict[Any, list[Any]] = defaultdict(list)
    for eqn in body.eqns:
        for v in _jax.variables(eqn.invars):
            readers[v].append(eqn)
    made = {v: eqn for eqn in body.eqns for v in eqn.outvars}
    results = list(body.outvars)
    found = set()
    for i in range(carries):
        carry, result = body.invars[consts + i], results[i]
        eqn = made.get(result) if not isinstance(result, _jax.Literal) else None
        if eqn is None or eqn.primitive.name not in ("add", "add_any") or carry not in eqn.invars:
            continue
        if len(readers[carry]) > 1 or readers[result] or results.count(result) > 1:
            continue
        term = eqn.invars[1] if eqn.invars[0] is carry else eqn.invars[0]
        while not isinstance(term, _jax.Literal) and len(readers[term]) == 1 and term not in results:
            found.add(term)
            source = made.get(term)
            if source is None or source.primitive.name not in _MOVED:
                break
            term = source.invars[0]
    return frozenset(found)


_MOVED = frozenset({"transpose", "reshape", "squeeze", "convert_element_type", "copy"})


def _combines(eqn: Any) -> bool:
    """Whether the jaxprs of an equation only say how two numbers become one."""

    return facts_of(eqn).combines


def _through(found: Links, outside: Any, inside: Any, scanned: bool) -> None:
    """Join an array outside of a loop with what its body sees of it."""
    if not scanned:
        found.together(outside, inside)
        return
    found.block(outside, 0, "the steps of a loop (`scan`) run along it")
    for d in range(rank(inside)):
        found.link(outside, d + 1, inside, d)


def _described(v: Any, eqn: Any) -> str:
    kind = f"{v.aval.dtype}[{','.join(map(str, shape(v)))}]"
    if eqn is None:
        return f"an argument {kind}"
    where = _jax.scope(eqn)
    return f"the {kind} of `{eqn.primitive.name}`" + (f" in {where}" if where else "")


def flat_program(fun: Callable[..., Any], *shapes: Any) -> AxisProgram:
    """The flat program of any function of pytrees, with the classes of its axes."""
    jaxpr, consts = flattened(jax.make_jaxpr(fun)(*shapes))
    return AxisProgram(with_makers_apart(simplified(jaxpr)), consts)
