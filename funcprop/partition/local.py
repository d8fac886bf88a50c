"""The program of one device: a flat program with the sizes of its parts, and its all-reduces as equations.

Independent all-reduces over the same devices are one equation of several arrays, as the compiler joins them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from funcprop import _jax
from funcprop.partition.flat import barrier
from funcprop.partition.layout import MeshLayout

ALL_REDUCE = _jax.Primitive("all_reduce")
ALL_REDUCE.multiple_results = True
_WALKED = frozenset({"scan", "cond"})  # In the bodies of others nothing is split.


def local_program(layout: MeshLayout, platform: str) -> Any:
    """The jaxpr of one device under a layout. It is for reading, not for running."""
    return _Local(layout, platform).program(layout.program.jaxpr)


class _Local:
    """Variables of one device for those of the whole, by the layout."""

    def __init__(self, layout: MeshLayout, platform: str) -> None:
        self._layout, self._reduced = layout, layout.reduced_on(platform)
        self._own: dict[Any, Any] = {}

    def _atom(self, v: Any) -> Any:
        if isinstance(v, _jax.Literal):
            return v
        if v not in self._own:
            self._own[v] = _jax.Var(self._layout.type_of(v))
        return self._own[v]

    def program(self, jaxpr: Any) -> Any:
        """A jaxpr, and the bodies of its loops, of one device."""
        reductions = _Reductions()
        equations: list[Any] = []
        for eqn in jaxpr.eqns:
            results = [self._atom(v) for v in eqn.outvars]
            operands = [self._atom(v) for v in eqn.invars]
            made = list(results)
            sums = [i for i, v in enumerate(eqn.outvars) if v in self._reduced]
            for i in sums:
                made[i] = _jax.Var(results[i].aval)
            params = _jax.map_jaxprs(eqn.params, self._body) if eqn.primitive.name in _WALKED else eqn.params
            equations.append(eqn.replace(invars=operands, outvars=made, params=params))
            depends = reductions.note(operands, made)
            for i in sums:
                reductions.add(self._reduced[eqn.outvars[i]], made[i], results[i], depends)
        inputs = [self._atom(v) for v in [*jaxpr.constvars, *jaxpr.invars]]
        outputs = [self._atom(v) for v in jaxpr.outvars]
        return _jax.jaxpr_of(_in_order([*equations, *reductions.equations()]), inputs, outputs, "local")

    def _body(self, closed: Any) -> Any:
        opened = _jax.open_jaxpr(closed)
        return closed if opened.constvars else _jax.closed_like(closed, self.program(opened))


class _Reductions:
    """All-reduces over the same axes of a mesh are done as one, if none of them depends on another."""

    def __init__(self) -> None:
        self._keys: list[Any] = []
        self._arrays: list[list[tuple[Any, Any]]] = []
        self._before: dict[Any, int] = defaultdict(int)  # Of a variable: a bit for each that it depends on.
        self._upstream: list[int] = []  # The same of each reduction.

    def note(self, reads: Sequence[Any], makes: Sequence[Any]) -> int:
        """Remember on which reductions some results depend."""
        bits = 0
        for v in _jax.variables(reads):
            bits |= self._before[v]
        self._before.update(dict.fromkeys(makes, bits))
        return bits

    def add(self, axes: tuple[str, ...], part: Any, whole: Any, depends: int) -> None:
        """All-reduce a part of a sum, with an earlier one if neither depends on the other."""
        key, before = (axes, part.aval.dtype), self._closure(depends)
        free = (i for i in reversed(range(len(self._keys))) if self._keys[i] == key and not before >> i & 1)
        chosen = next(free, len(self._keys))
        if chosen == len(self._keys):
            self._keys.append(key)
            self._arrays.append([])
            self._upstream.append(0)
        self._arrays[chosen].append((part, whole))
        self._upstream[chosen] |= depends
        self._before[whole] = depends | 1 << chosen

    def _closure(self, bits: int) -> int:
        """The reductions that some depend on, and these themselves."""
        while True:
            found = bits
            for i, upstream in enumerate(self._upstream):
                if bits >> i & 1:
                    found |= upstream
            if found == bits:
                return bits
            bits = found

    def equations(self) -> list[Any]:
        """An equation for each."""
        found = []
        for arrays in self._arrays:
            parts, wholes = map(list, zip(*arrays, strict=True))
            found.append(barrier(parts).replace(primitive=ALL_REDUCE, invars=parts, outvars=wholes))
        return found


def _in_order(equations: list[Any]) -> list[Any]:
    """The equations, each behind those that make what it reads."""
    makers = {v: eqn for eqn in equations for v in eqn.outvars}
    most = sum(1 + len(eqn.invars) for eqn in equations)
    found, done = [], set()
    for eqn in equations:
        waiting = [eqn]
        while waiting:
            last = waiting[-1]
            if id(last) in done:
                waiting.pop()
                continue
            needed = [makers[v] for v in _jax.variables(last.invars) if v in makers]
            needed = [e for e in needed if id(e) not in done]
            if needed:
                assert len(waiting) <= most, "all-reduces that wait for each other"
                waiting += needed
            else:
                found.append(waiting.pop())
                done.add(id(last))
    return found
