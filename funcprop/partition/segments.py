"""An unchanged loss cut into segments where few bytes cross, of about equal work.

The equations that depend on parameters and on the batch are cut; all others (masks, positions, casts of
weights) are repeated in each segment that reads them, so that they never cross. A parameter that several
segments read, such as a tied embedding, belongs to each of them. The cuts are of positions that few bytes
cross, and minimise the work of the largest segment.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from funcprop import _jax
from funcprop.partition.flat import flattened
from funcprop.program.facts import CALLS
from funcprop.program.flops import flops
from funcprop.program.sizes import nbytes
from funcprop.program.structural_key import SameObject, StructuralKey, structural_key

# A position is narrow if at most so many times the bytes of the narrowest one cross it.
_NARROW = 1.01


@dataclass(frozen=True, eq=False)
class LossSegment:
    """A part of a loss: `run(params, batch, inputs) -> outputs`, lists of arrays; the last returns the loss.

    Attributes:
        params: positions of the leaves of the parameters that it reads.
        batch: of those of the batch.
        inputs: the types of what the segment before hands over.
        outputs: the types of what it hands over.
        flops: operations of the forward sweep.
        equations: how many of them there are.
        key: equal for segments that compute the same, such as the equal layers of a deep model.
    """

    run: Callable[..., list[Any]]
    params: tuple[int, ...]
    batch: tuple[int, ...]
    inputs: tuple[Any, ...]
    outputs: tuple[Any, ...]
    flops: int
    equations: int
    key: StructuralKey

    @property
    def sends(self) -> int:
        """Bytes that it hands to the next one."""
        return sum(map(nbytes, self.outputs))


class CutError(ValueError):
    """A loss cannot be cut into so many segments; `most` is the number that can be."""

    def __init__(self, message: str, most: int) -> None:
        super().__init__(message)
        self.most = most


def opened(eqn: Any) -> bool:
    """Whether a call is opened before cutting: not one with a derivative of its own, nor a checkpoint."""
    if eqn.primitive.name not in CALLS:
        return False
    return not any(
        e.primitive.name == "funcprop_layer"
        for _, body in _jax.sub_jaxprs(eqn)
        for e in _jax.open_jaxpr(body).eqns
    )


class Cuttable:
    """The forward program of a loss at some shapes, with the bytes that cross each of its positions."""

    def __init__(self, loss: Callable[..., Any], params: Any, batch: Any) -> None:
        closed = jax.make_jaxpr(loss)(params, batch)
        self.jaxpr, self.consts = flattened(closed, opened)
        start, count = len(self.consts), len(jax.tree.leaves(params))
        inputs = self.jaxpr.invars
        self.captured, self.params = inputs[:start], inputs[start : start + count]
        self.batch = inputs[start + count :]
        self.main, self.free = self._split()
        self._made = {v: i for i, eqn in enumerate(self.main) for v in eqn.outvars}
        self._last = self._last_readers()
        self.crossed = self._crossed()
        self.work = list(itertools.accumulate(map(flops, self.main), initial=0))

    def _split(self) -> tuple[list[Any], list[Any]]:
        """The equations that depend on both parameters and batch, and the others."""
        of_params, of_batch = set(self.params), set(self.batch)
        main: list[Any] = []
        free: list[Any] = []
        for eqn in self.jaxpr.eqns:
            read = _jax.variables(eqn.invars)
            by_params, by_batch = any(v in of_params for v in read), any(v in of_batch for v in read)
            if by_params:
                of_params.update(eqn.outvars)
            if by_batch:
                of_batch.update(eqn.outvars)
            (main if by_params and by_batch else free).append(eqn)
        return main, free

    def _last_readers(self) -> dict[Any, int]:
        last = {}
        for i, eqn in enumerate(self.main):
            last.update({v: i for v in _jax.variables(eqn.invars) if v in self._made})
        last.update({v: len(self.main) for v in _jax.variables(self.jaxpr.outvars) if v in self._made})
        return last

    def _crossed(self) -> list[int]:
        """The bytes that cross each position."""
        steps = [0] * (len(self.main) + 2)
        for v, made in self._made.items():
            end = self._last.get(v, -1)
            if end > made:
                steps[made + 1] += nbytes(v)
                steps[end + 1] -= nbytes(v)
        return list(itertools.accumulate(steps))[: len(self.main) + 1]

    def crossing(self, position: int) -> list[Any]:
        """What is made before a position and read from there on."""
        return [v for v, made in self._made.items() if made < position <= self._last.get(v, -1)]

    def positions(self) -> list[int]:
        """The narrow positions, from beginning to end."""
        total = self.work[-1]
        inner = [p for p in range(1, len(self.main)) if 0 < self.work[p] < total]
        middle = [p for p in inner if 0.05 * total < self.work[p] < 0.95 * total] or inner
        if not middle:
            return [0, len(self.main)]
        narrow = min(self.crossed[p] for p in middle)
        found: dict[int, int] = {}
        for p in inner:
            if self.crossed[p] <= _NARROW * narrow:
                found.setdefault(self.work[p], p)  # Of positions with the same work before them, the first.
        return [0, *sorted(found.values()), len(self.main)]

    def cuts(self, count: int) -> list[int]:
        """The positions of `count` segments whose largest has the least work.

        Raises:
            CutError: there are not so many narrow positions.
        """
        points = self.positions()
        most = len(points) - 1
        if count > most:
            raise CutError(
                f"the loss can be cut into {most} segments where few bytes cross, not into "
                f"{count}; use at most "
                f"{most} stages.",
                most,
            )
        work = [self.work[p] for p in points]
        best: dict[int, tuple[int, list[int]]] = {0: (0, [])}
        for s in range(1, count + 1):
            new: dict[int, tuple[int, list[int]]] = {}
            for j in range(s, most + 1):
                choices = ((max(best[i][0], work[j] - work[i]), i) for i in best if i < j)
                largest, i = min(choices, default=(0, -1))
                if i >= 0:
                    new[j] = largest, [*best[i][1], j]
            best = new
        return [points[j] for j in [0, *best[most][1]]]

    def segments(self, count: int) -> list[LossSegment]:
        """The loss in so many segments; errors as of `cuts`."""
        cuts = self.cuts(count)
        found: list[LossSegment] = []
        inputs: list[Any] = []
        for s, (start, end) in enumerate(itertools.pairwise(cuts)):
            last = s == count - 1
            outputs = list(self.jaxpr.outvars) if last else self.crossing(end)
            found.append(
                self._segment(self.main[start:end], inputs, outputs, self.work[end] - self.work[start])
            )
            inputs = outputs
        return found

    def _segment(self, main: Sequence[Any], inputs: list[Any], outputs: list[Any], work: int) -> LossSegment:
        inside = {v for eqn in main for v in eqn.outvars}
        wanted = [
            v for eqn in main for v in _jax.variables(eqn.invars) if v not in inside and v not in inputs
        ]
        given = {*self.jaxpr.invars, *inputs, *inside}
        body = [*_jax.needed_equations(self.free, [*wanted, *outputs], given), *main]
        read = {v for eqn in body for v in _jax.variables(eqn.invars)} | set(_jax.variables(outputs))
        params = tuple(i for i, v in enumerate(self.params) if v in read)
        batch = tuple(i for i, v in enumerate(self.batch) if v in read)
        held = [i for i, v in enumerate(self.captured) if v in read]
        invars = [
            *(self.params[i] for i in params),
            *(self.batch[i] for i in batch),
            *inputs,
            *(self.captured[i] for i in held),
        ]
        jaxpr = _jax.jaxpr_of(body, invars, outputs, "segment")
        consts = [self.consts[i] for i in held]

        def run(params: Sequence[Any], batch: Sequence[Any], inputs: Sequence[Any]) -> list[Any]:
            return _jax.evaluate(jaxpr, (), [*params, *batch, *inputs, *consts])

        types = [[_type(v) for v in atoms] for atoms in (inputs, outputs)]
        # One product may be of the batch, and another of what the segment before hands over.
        key = structural_key(jaxpr, len(params), len(batch), *map(SameObject, consts))
        return LossSegment(run, params, batch, tuple(types[0]), tuple(types[1]), work, len(body), key)


def _type(v: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype)
