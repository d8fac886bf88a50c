"""A jaxpr as a chain of steps: where it can be cut, what each segment would hold, and how a schedule is run.

A segment that is recomputed becomes a `jax.checkpoint` of its equations, a segment that is kept is emitted as
it stands, so both are ordinary JAX. A scan has several *forms*: its body is a program of its own, and every
useful schedule of the body is a form, whose bytes and FLOPs count once for every step of the loop; and so is
the loop in chunks.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np

from funcprop import _jax
from funcprop.memory.remat.nested_loop import chunk_counts, in_chunks
from funcprop.memory.remat.saving import Reads, reads
from funcprop.memory.remat.schedule import CutChain, Schedule, Segment, frontier
from funcprop.program.flops import flops
from funcprop.program.layer_calls import broken_layer_call, layer_call
from funcprop.program.sizes import nbytes
from funcprop.program.structural_key import structural_key

# A program of so few steps may be cut anywhere, a longer one only where the live bytes have a minimum, and of
# those at no more than so many. A schedule is a path among them, and there are as many segments as pairs.
CUT_ANYWHERE = 48
MOST_CUTS = 240

# Segments over more cut points than this go only from one of the slimmest cut points to another.
LONGEST = 40
SLIMMEST = 48

# More schedules of a loop's body are not looked at.
MOST_FORMS = 8


class StepForm(NamedTuple):
    """One way to run a step: its equation, what its derivative reads, and what is run again for it.

    `body` is the program of the loop's body with the schedule that makes this form; None as it stands.
    """

    equation: Any
    reads: Reads
    held: int
    derived: int
    sources: int = 0
    again: int = 0
    peak: int = 0
    body: tuple[StepChain, Schedule] | None = None


class ChainStep(NamedTuple):
    """One equation: the values that it makes and reads, bit by bit, its FLOPs and its forms."""

    made: int
    operands: int
    flops: int
    movable: bool
    forms: tuple[StepForm, ...]


@dataclass(frozen=True, eq=False)
class StepChain:
    """A jaxpr, its steps, the positions of its cut points, and the chain that they are."""

    closed: Any
    bits: dict[Any, int]
    steps: tuple[ChainStep, ...]
    points: tuple[int, ...]
    chain: CutChain
    active: tuple[bool, ...]

    def run(self, schedule: Schedule, args: Sequence[Any], in_loop: bool = False) -> list[Any]:
        """Evaluate the jaxpr by a schedule."""
        jaxpr = _jax.open_jaxpr(self.closed)
        values = dict(zip(jaxpr.constvars, _jax.array_constants(self.closed), strict=True))
        values.update(zip(jaxpr.invars, args, strict=True))
        wanted = {v for v in jaxpr.outvars if not isinstance(v, _jax.Literal)}
        read_after = [wanted]
        for eqn in reversed(jaxpr.eqns):
            read_after.append(read_after[-1] | set(_jax.free_variables([eqn])))
        read_after.reverse()
        for recomputed, equations, stop in self._runs(schedule):
            invars = _jax.free_variables(equations)
            outvars = [v for eqn in equations for v in eqn.outvars if v in read_after[stop]]
            part = _jax.jaxpr_of(equations, invars, outvars, "recomputed" if recomputed else "kept")

            def evaluate(*values: Any, part: Any = part) -> list[Any]:
                return _jax.evaluate(part, (), values)

            if recomputed:
                evaluate = jax.checkpoint(evaluate, prevent_cse=not in_loop)
            values.update(zip(outvars, evaluate(*(values[v] for v in invars)), strict=True))
        return [v.val if isinstance(v, _jax.Literal) else values[v] for v in jaxpr.outvars]

    def _runs(self, schedule: Schedule) -> Iterator[tuple[bool, list[Any], int]]:
        """Each recomputed segment, and the kept ones between them as one; and where it ends."""
        for recomputed, group in itertools.groupby(
            enumerate(schedule.segments), lambda pair: pair[0] if pair[1].recomputed else -1
        ):
            segments = [s for _, s in group]
            equations = [form.equation for s in segments for _, form in self.forms(s)]
            if equations:
                yield recomputed >= 0, equations, self.points[segments[-1].stop]

    def forms(self, segment: Segment) -> Iterator[tuple[ChainStep, StepForm]]:
        """The steps of a segment in the form in which they run."""
        for step in self.steps[self.points[segment.start] : self.points[segment.stop]]:
            yield step, step.forms[segment.variant if len(step.forms) > 1 else 0]

    def run_again(self, segment: Segment) -> list[int]:
        """The FLOPs that each step of a segment is run again for."""
        steps = list(self.forms(segment))
        if not segment.recomputed:
            return [0] * len(steps)
        sweep = _Sweep(self.chain)
        return [sweep.add(step, form) for step, form in reversed(steps)][::-1]


class _Sweep:
    """The needs of a recomputed segment, collected from its last step to its first."""

    def __init__(self, chain: CutChain) -> None:
        self.chain = chain
        self.needed = self.read = self.flops = self.derived = self.size = 0

    def add(self, step: ChainStep, form: StepForm) -> int:
        """Put a step before the others; the FLOPs that it is run again for."""
        self.needed |= form.held
        self.size += self.chain.size(form.held & ~self.read)
        self.read |= form.held
        self.derived += form.derived
        again = 0
        if self.needed & step.made:
            self.needed |= step.operands
            again = step.flops
        elif form.derived:
            self.needed |= form.sources
            again = form.reads.again
        self.flops += again
        return again


def program(
    closed: Any, active: Sequence[bool], given: Sequence[bool], known: dict[Any, Reads] | None = None
) -> StepChain:
    """The program of a jaxpr.

    `active` says of every input whether it is differentiated (or depends on what is), `given` whether it
    exists anyway, so that holding it costs nothing. `known` remembers what equations read.
    """
    known = {} if known is None else known
    jaxpr = _jax.open_jaxpr(closed)
    bits: dict[Any, int] = {}
    sizes: list[int] = []
    for v in [
        *(v for v, free in zip(jaxpr.invars, given, strict=True) if not free),
        *(v for eqn in jaxpr.eqns for v in eqn.outvars),
    ]:
        if size := nbytes(v):
            bits[v] = 1 << len(sizes)
            sizes.append(size)
    depends = dict(zip(jaxpr.invars, active, strict=True))
    steps = []
    for eqn in jaxpr.eqns:
        perturbed = tuple(
            not isinstance(v, _jax.Literal) and depends.get(v, False) and _jax.is_differentiable(v.aval)
            for v in eqn.invars
        )
        step, made_active = _step(eqn, perturbed, bits, known)
        depends.update(zip(eqn.outvars, made_active, strict=True))
        steps.append(step)
    steps = _demanded(jaxpr, steps, depends)
    live = [0]
    for step in reversed(steps):
        live.append((live[-1] & ~step.made) | step.operands)
    live.reverse()
    whole = CutChain((), tuple(sizes), ())
    points = _points([whole.size(mask) for mask in live], [len(step.forms) > 1 for step in steps])
    carried = _mask(bits, jaxpr.invars)
    before = list(itertools.accumulate((step.made for step in steps), int.__or__, initial=carried))
    slim = sorted(range(len(points)), key=lambda i: whole.size(live[points[i]]))[:SLIMMEST]
    segments = _segments(whole, steps, points, before, {0, len(points) - 1, *slim})
    chain = CutChain(tuple(live[p] if i else 0 for i, p in enumerate(points)), tuple(sizes), tuple(segments))
    outputs = tuple(not isinstance(v, _jax.Literal) and depends.get(v, False) for v in jaxpr.outvars)
    return StepChain(closed, bits, tuple(steps), tuple(points), chain, outputs)


def _demanded(jaxpr: Any, steps: Sequence[ChainStep], depends: dict[Any, bool]) -> list[ChainStep]:
    """The steps; those whose results no result of the jaxpr depends on smoothly read nothing.

    The maximum that a softmax subtracts, behind a `stop_gradient`, is one.
    """
    demanded = {v for v in jaxpr.outvars if not isinstance(v, _jax.Literal) and depends.get(v, False)}
    found = []
    for eqn, step in zip(reversed(jaxpr.eqns), reversed(steps), strict=True):
        if any(depends[v] and v in demanded for v in eqn.outvars) or eqn.effects:
            demanded |= {v for v in _jax.free_variables([eqn]) if depends.get(v, False)}
        else:
            step = step._replace(forms=(StepForm(eqn, Reads(), 0, 0),))
        found.append(step)
    return found[::-1]


def _mask(bits: dict[Any, int], atoms: Sequence[Any]) -> int:
    mask = 0
    for atom in atoms:
        if not isinstance(atom, _jax.Literal):
            mask |= bits.get(atom, 0)
    return mask


def _step(
    eqn: Any, perturbed: tuple[bool, ...], bits: dict[Any, int], known: dict[Any, Reads]
) -> tuple[ChainStep, tuple[bool, ...]]:
    """One equation as a step, and which of its results depend on what is differentiated."""
    first = _form(eqn, _remembered(eqn, perturbed, known), bits)
    forms = [first]
    if eqn.primitive.name == "scan" and first.derived:
        forms += [
            _form(changed, reads(changed, perturbed), bits)._replace(
                again=length * schedule.flops, peak=schedule.peak - schedule.nbytes, body=(body, schedule)
            )
            for changed, length, body, schedule in _bodies(eqn, perturbed, known)
        ]
        if not eqn.effects:
            forms += [
                _form(changed, reads(changed, perturbed), bits)._replace(
                    again=first.reads.again, peak=first.derived // count
                )
                for count in chunk_counts(eqn.params["length"])
                for changed in [in_chunks(eqn, count)]
            ]
    operands = _mask(bits, eqn.invars)
    step = ChainStep(_mask(bits, eqn.outvars), operands, flops(eqn), not eqn.effects, tuple(forms))
    return step, first.reads.active


def _form(eqn: Any, found: Reads, bits: dict[Any, int]) -> StepForm:
    held = [eqn.invars[i] for i in found.operands] + [eqn.outvars[i] for i in found.results]
    sources = _mask(bits, [eqn.invars[i] for i in found.sources])
    return StepForm(eqn, found, _mask(bits, held), found.derived, sources)


def _remembered(eqn: Any, perturbed: tuple[bool, ...], known: dict[Any, Reads]) -> Reads:
    """`reads`, once for equations that are the same."""
    key = structural_key(_jax.jaxpr_of([eqn], _jax.free_variables([eqn]), eqn.outvars, ""), perturbed)
    if key not in known:
        known[key] = reads(eqn, perturbed)
    return known[key]


def _bodies(
    eqn: Any, perturbed: Sequence[bool], known: dict[Any, Reads]
) -> Iterator[tuple[Any, int, StepChain, Schedule]]:
    """A scan with each useful schedule of its body, its length, and the schedule."""
    ((_, closed),) = _jax.sub_jaxprs(eqn)
    closed = flat(closed)
    consts, carried = _jax.scan_counts(eqn.params)
    loop = range(consts, consts + carried)
    given = [i not in loop for i in range(len(eqn.invars))]
    active = list(perturbed)
    while True:
        # What one step makes depend on the arguments is carried into the next.
        body = program(closed, active, given, known)
        grown = [a or (i in loop and body.active[i - consts]) for i, a in enumerate(active)]
        if grown == active:
            break
        active = grown
    for schedule in _spread([s for s in frontier(body.chain) if any(p.recomputed for p in s.segments)]):

        def changed(_: Any, schedule: Schedule = schedule) -> Any:
            return _jax.retrace(lambda *args: body.run(schedule, args, in_loop=True), closed)

        yield (
            eqn.replace(params=_jax.map_jaxprs(eqn.params, changed)),
            eqn.params["length"],
            body,
            schedule,
        )


def _spread(schedules: Sequence[Schedule]) -> list[Schedule]:
    """A few of many schedules, from the leanest to the quickest."""
    if len(schedules) <= MOST_FORMS:
        return list(schedules)
    return [schedules[i] for i in np.linspace(0, len(schedules) - 1, MOST_FORMS).round().astype(int)]


def flat(closed: Any) -> Any:
    """A jaxpr with its nested jits inlined: not layers, nor those that say where their values lie."""

    def keep(eqn: Any) -> bool:
        if layer_call(eqn) is not None or broken_layer_call(eqn) is not None:
            return True
        shardings = [*eqn.params.get("in_shardings", ()), *eqn.params.get("out_shardings", ())]
        return any(isinstance(s, jax.sharding.Sharding) for s in shardings)

    return _jax.inlined(closed, keep)


def _points(live: Sequence[int], has_forms: Sequence[bool]) -> list[int]:
    """Positions where the chain may be cut: all, or those where few bytes are live; loops stand alone."""
    last = len(live) - 1
    forced = {0, last}
    forced |= {p for i, several in enumerate(has_forms) if several for p in (i, i + 1)}
    inner = [p for p in range(1, last) if p not in forced]
    if last > CUT_ANYWHERE:
        inner = [p for p in inner if live[p] < live[p - 1] and live[p] <= live[p + 1]]
    room = max(MOST_CUTS - len(forced), 2)
    if len(inner) > room:
        # Equal blocks have equal positions, and none of them is to be preferred: the limit is by size.
        ordered = sorted(live[p] for p in inner)
        smaller = [p for p in inner if live[p] < ordered[room]]
        equal = [p for p in inner if live[p] == ordered[room]]
        take = np.linspace(0, len(equal) - 1, min(len(equal), room - len(smaller))).round().astype(int)
        inner = [*smaller, *(equal[i] for i in take)]
    return sorted({*inner, *forced})


def _segments(
    whole: CutChain, steps: Sequence[ChainStep], points: Sequence[int], before: Sequence[int], slim: set[int]
) -> Iterator[Segment]:
    """List the ways through the segments between two cut points."""
    for i, (start, stop) in enumerate(itertools.pairwise(points)):
        inside = steps[start:stop]
        for variant in range(max((len(step.forms) for step in inside), default=1)):
            forms = [step.forms[variant if len(step.forms) > 1 else 0] for step in inside]
            held, extra = 0, sum(form.derived for form in forms)
            for form in forms:
                held |= form.held
            again, peak = sum(form.again for form in forms), max((form.peak for form in forms), default=0)
            yield Segment(i, i + 1, False, held, extra, again, peak, variant)
            if variant and all(step.movable for step in inside):
                sweep = _Sweep(whole)
                flops_again = again + sum(map(sweep.add, inside, forms))
                needed = sweep.needed & before[start]
                yield Segment(i, i + 1, True, needed, 0, flops_again, extra + peak, variant)
    for j in range(1, len(points)):
        sweep, position = _Sweep(whole), points[j]
        for i in range(j - 1, -1, -1):
            inside = steps[points[i] : position]
            position = points[i]
            if not all(step.movable for step in inside):
                break
            for step in reversed(inside):
                sweep.add(step, step.forms[0])
            if j - i > LONGEST and not (i in slim and j in slim):
                continue
            outside = before[position]
            transient = sweep.size - whole.size(sweep.read & outside) + sweep.derived
            yield Segment(i, j, True, sweep.needed & outside, 0, sweep.flops, transient)
