"""Bytes that one device holds at the peak of a flat program, estimated from its jaxpr.

The liveness analysis knows four things of the compiler: a view has no buffer; an elementwise operator is
fused into what reads it, unless it is expensive and read twice or a kernel reads it; a result may take the
place of an operand that nothing reads any more; and independent all-reduces are one, whose operands and
results live together. Sizes are those of one device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from funcprop import _jax
from funcprop.partition.buffers import BufferNode, Buffers, PartialSum, breadth_first
from funcprop.partition.flat import flattened, simplified
from funcprop.partition.lowered import Lowered, SizeOf
from funcprop.program.facts import facts_of
from funcprop.program.sizes import nbytes

PURPOSES = (
    "parameters",
    "optimizer state",
    "batch",
    "saved",
    "gathered",
    "collectives",
    "temporaries",
    "results",
)


@dataclass(frozen=True)
class DeviceBytes:
    """Bytes of one device at the peak, by purpose.

    "saved" was made in the forward sweep and is still needed;
    "collectives" are operands and results of all-reduces; "results" are new arrays that are handed back.
    """

    by_purpose: Mapping[str, int]

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self.by_purpose.values())


def peak_of(
    jaxpr: Any,
    purposes: Sequence[str],
    size_of: SizeOf = nbytes,
    reduced: Mapping[Any, tuple[str, ...]] | None = None,
    donated: Sequence[bool] = (),
    forward_until: Any = None,
    handed_on: bool = False,
) -> DeviceBytes:
    """Estimate the peak of a flat program.

    Args:
        jaxpr: flat, without dead code.
        purposes: of each input, one of `PURPOSES`.
        size_of: the bytes of a variable on one device.
        reduced: the variables that are all-reduced when they are made, with the axes of the mesh.
        donated: which inputs may be overwritten by results of their size.
        forward_until: the variable with which the forward sweep ends.
        handed_on: whether the results are read by more of the same program, and not handed back.
    """
    lowered = Lowered(jaxpr, size_of, reduced or {})
    jaxpr, size_of = lowered.jaxpr, lowered.bytes_of
    buffers = Buffers(
        jaxpr, size_of, lowered.reduced, lambda eqn: _scratch(eqn, lowered.bytes_of, lowered.reduced)
    )
    order = breadth_first(buffers.nodes())
    donated = donated or [False] * len(jaxpr.invars)
    return _sweep(jaxpr, buffers, order, purposes, donated, forward_until, handed_on)


def _sweep(
    jaxpr: Any,
    buffers: Buffers,
    order: list[BufferNode],
    purposes: Sequence[str],
    donated: Sequence[bool],
    forward_until: Any,
    handed_on: bool,
) -> DeviceBytes:
    """Walk through the nodes, and keep the largest number of bytes with its purposes."""
    size = lambda v: buffers.bytes_of(v.whole if isinstance(v, PartialSum) else v)  # noqa: E731
    last: dict[Any, int] = {}
    for t, node in enumerate(order):
        for v in node.reads:
            last[v] = t
    results = buffers.results
    if handed_on:
        last.update(dict.fromkeys(results, len(order)))
        results = set()
    given: dict[str, int] = dict.fromkeys(PURPOSES, 0)
    inputs = set(jaxpr.invars)
    for v, purpose in zip(jaxpr.invars, purposes, strict=True):
        given[purpose] += size(v)
    # A donated input's place is taken by a result of its size: that result is not counted again.
    free = sorted(size(v) for v, d in zip(jaxpr.invars, donated, strict=True) if d)
    covered = set()
    for v in results:
        if v not in inputs and size(v) in free:
            free.remove(size(v))
            covered.add(v)
    forward_end = next((t for t, node in enumerate(order) if forward_until in node.makes), -1)
    own = sorted((size(v) for v in results if v not in covered and v not in inputs), reverse=True)
    live: dict[Any, str] = {}
    most, peak = 0, dict.fromkeys(PURPOSES, 0)
    for t, node in enumerate(order):
        dying = [v for v in node.reads if v in live and last[v] == t]
        reused: set[Any] = set()
        for v in node.makes:
            if v in results:
                continue
            room = next(
                (d for d in dying if d in node.in_place and d not in reused and size(d) == size(v)), None
            )
            if room is not None:
                reused.add(room)
                live.pop(room)
            collective = node.collective or isinstance(v, PartialSum)
            live[v] = "collectives" if collective else "saved" if t <= forward_end else "temporaries"
        made = [v for v in order[t].makes if v in results and v not in covered]
        for v in made:
            own.remove(size(v))
        total = node.extra + sum(map(size, live))
        if total > most:
            placed = _placed(sorted(((size(v), i) for i, v in enumerate(live)), reverse=True), own)
            total -= sum(n for n, _ in placed)
        if total > most:
            most, inside = total, {i for _, i in placed}
            peak = dict.fromkeys(PURPOSES, 0) | {"temporaries": node.extra}
            for i, (v, purpose) in enumerate(live.items()):
                if i not in inside:
                    read_later = purpose != "saved" or last.get(v, -1) > forward_end
                    peak[purpose if read_later else "temporaries"] += size(v)
        for v in [*node.reads, *node.makes]:
            if v in live and last.get(v, t) <= t:
                live.pop(v)
    new = sum(size(v) for v in results if v not in covered)
    all_of = {name: given[name] + peak[name] + (new if name == "results" else 0) for name in PURPOSES}
    return DeviceBytes({name: n for name, n in all_of.items() if n})


def _placed(values: list[tuple[int, int]], free: list[int]) -> list[tuple[int, int]]:
    """The values that find a place in results that are not made yet; both with the largest first."""
    places = sorted(free, reverse=True)
    found = []
    for n, i in values:
        if places and places[0] >= n:
            places.pop(0)
            found.append((n, i))
    return found


def _scratch(eqn: Any, size_of: SizeOf, reduced: Mapping[Any, tuple[str, ...]]) -> int:
    """Bytes that a loop or a branch needs inside, besides its operands and results.

    A loop writes its carries in place, and has a copy of what it reads of the arrays that it runs along.
    """
    bodies = [_jax.open_jaxpr(body) for _, body in _jax.sub_jaxprs(eqn)]
    if not bodies or facts_of(eqn).combines:
        return 0
    if eqn.primitive.name != "scan":
        return max(_inside(body, size_of, reduced, range(0), len(body.invars)) for body in bodies)
    consts, carries = _jax.scan_counts(eqn.params)
    return _inside(bodies[0], size_of, reduced, range(consts, consts + carries), consts + carries)


def _inside(
    body: Any, size_of: SizeOf, reduced: Mapping[Any, tuple[str, ...]], carried: range, outside: int
) -> int:
    jaxpr = _jax.without_unread_inputs(body, [True] * len(body.invars))[0]
    count = len(jaxpr.invars)
    donated = [i in carried for i in range(count)]
    found = peak_of(jaxpr, ["batch"] * count, size_of, reduced, donated)
    return found.total - sum(size_of(v) for v in jaxpr.invars[:outside])


def flat_jaxpr(closed: Any) -> Any:
    """The flat program of a jaxpr without dead code, for an estimate; its constants are leading inputs."""
    return simplified(flattened(closed)[0])
