"""Where the first infinity or NaN appears, in the order in which the two sweeps compute.

Forwards: operator by operator; in a loop, iteration by iteration in the order in which the loop runs.
Backwards: the operators in reverse, and in a loop the iterations in reverse. A cotangent is a sum, whose
terms are computed one by one; so where a cotangent is not finite, each operator that contributes to it is
asked again for its contribution, and the first bad one is the answer.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import numpy as np

from funcprop import _jax
from funcprop.graph.graph import Graph, Operator, Variable
from funcprop.rules.rewrite import Rewriter
from funcprop.rules.rule_set import RuleSet
from funcprop.sweeps.activity import active_variables
from funcprop.sweeps.causes import Causes, Path, bad_entries, iterations
from funcprop.sweeps.sweeps import Cotangents, Loop, Tape, contributions, read


@dataclass(frozen=True)
class NonFinite:
    """The first value or cotangent that is not finite.

    `sweep` is "forward" or "backward". In the forward sweep the operator computed the value (`operator` is
    None for what was given), in the backward sweep it used the value and sent the cotangent back.
    `iteration` is where in the loops around it the operator ran, outermost first; it counts along the
    scanned axis, also where the loop runs in reverse. `index` is the position of the first bad entry in
    `values[name]` or `gradients[name]`, with the leading axes of the loops, and `count` the number of bad
    entries that appeared at once.
    """

    sweep: str
    name: str
    operator: str | None
    scope: str
    source: str | None
    index: tuple[int, ...]
    count: int
    iteration: tuple[int, ...] = ()

    def __str__(self) -> str:
        what = "value of" if self.sweep == "forward" else "cotangent of"
        by = "an input or constant" if self.operator is None else f"operator {self.operator}"
        if self.iteration:
            by += f" in iteration {', '.join(map(str, self.iteration))}"
        places = "1 place, at" if self.count == 1 else f"{self.count} places, first at"
        return (
            f"{self.sweep} sweep: {what} {self.name} is not finite in {places} {list(self.index)}; {by}, "
            f"scope {self.scope or '-'}, {self.source or 'no source line'}"
        )


class Place(NamedTuple):
    """Where a value stands in the result: its name, and its position on the leading axes of loops."""

    name: str
    leading: tuple[int, ...]


@dataclass(frozen=True)
class Moment:
    """A graph at one time: the whole function, or one iteration of a loop in it.

    `given` says what the inputs of a loop's body are outside of it; None for what nobody sees.
    """

    graph: Graph
    tape: Tape
    cotangents: Cotangents
    active: Collection[str]
    rules: RuleSet
    prefix: str = ""
    iteration: tuple[int, ...] = ()
    given: Mapping[str, Place | None] = field(default_factory=dict)
    path: Path = ()

    def place(self, variable: Variable) -> Place | None:
        """Where a variable is seen in the result."""
        if variable.kind == "literal":
            return None
        return self.given.get(variable.name, Place(self.prefix + variable.name, self.iteration))

    def inside(self, op: Operator, which: Sequence[int]) -> Iterator[Moment]:
        """Some iterations of a loop."""
        stored = self.tape.bodies[op.name]
        found = self.cotangents.bodies.get(op.name, Cotangents())
        loop = Loop(op, self.rules)
        inputs = [read(v, self.tape.values) for v in op.inputs]
        consts, _, xs = loop.split(inputs)
        sought = loop.sought([v.kind != "literal" and v.name in self.active for v in op.inputs])
        for t in which:
            now = loop.iteration(consts, [x[t] for x in xs], jax.tree.map(lambda a, t=t: a[t], stored))
            yield Moment(
                loop.body,
                now,
                jax.tree.map(lambda a, t=t: a[t], found),
                active_variables(loop.body, sought, Rewriter(self.rules)),
                self.rules,
                f"{self.prefix}{op.name}/",
                (*self.iteration, t),
                {v.name: self._outside(loop, i, t) for i, v in enumerate(loop.body.inputs)},
                (*self.path, (op.name, t)),
            )

    def _outside(self, loop: Loop, i: int, t: int) -> Place | None:
        """Find what input `i` of a loop's body is outside of iteration `t`.

        A constant or a scanned value of the loop, or what an earlier iteration computed.
        """
        body, consts, carry = loop.body, *_jax.scan_counts(loop.op.static)
        before = 1 if loop.op.static["reverse"] else -1
        while consts <= i < consts + carry and 0 <= t + before < loop.op.static["length"]:
            t += before
            source = body.outputs[i - consts]
            if source not in body.inputs:
                prefix = f"{self.prefix}{loop.op.name}/"
                known = source.kind == "intermediate"
                return Place(prefix + source.name, (*self.iteration, t)) if known else None
            i = body.inputs.index(source)
        outer = self.place(loop.op.inputs[i])
        if outer is None or loop.op.inputs[i].name not in self.active:
            return None
        return outer if i < consts + carry else outer._replace(leading=(*outer.leading, t))


def first_nonfinite(whole: Moment, outcome: Any) -> NonFinite | None:
    """Find what made a result or a gradient (the leaves of `outcome`) not finite; None if all is finite.

    That is the first value of the forward sweep from which values that are not finite lead to the objective,
    or to the operator that sends back the first bad cotangent; or else that cotangent.
    """
    if all(_first_bad(leaf) is None for leaf in jax.tree.leaves(outcome)):
        return None
    causes = Causes.of(whole.graph, whole.tape)
    found = None
    if not causes.trace({v.name for v in whole.graph.outputs}):
        sent = _first_cotangent(whole)
        if sent is not None:
            found, moment = sent
            causes.trace((), (*moment.path, found.operator) if found.operator else ())
    return _first_value(whole, causes) or found


def _first_value(moment: Moment, causes: Causes) -> NonFinite | None:
    values = moment.tape.values
    for v in moment.graph.inputs if not moment.iteration else ():
        if v.name in causes.found:
            return _found("forward", moment, v, None, values[v.name])
    for v in moment.graph.constants:
        if (
            v.name in causes.found
            and (found := _found("forward", moment, v, None, values[v.name])) is not None
        ):
            return found
    for op in moment.graph.operators:
        if (inner := causes.bodies.get(op.name)) is not None:
            guilty = [t for t in iterations(op) if inner[t].any_found]
            for t, iteration in zip(guilty, moment.inside(op, guilty), strict=True):
                if (found := _first_value(iteration, inner[t])) is not None:
                    return found
        for v in op.outputs:
            if v.name in causes.found:
                return _found("forward", moment, v, op, values[v.name])
    return None


def _first_cotangent(moment: Moment) -> tuple[NonFinite, Moment] | None:
    """The first cotangent that is not finite, and when that was."""
    graph, totals = moment.graph, moment.cotangents.values
    first_use = {v.name: op for op in reversed(graph.operators) for v in op.inputs}
    bad = {name for name, total in totals.items() if _first_bad(total) is not None}

    def found_in(v: Variable, op: Operator | None, value: Any) -> tuple[NonFinite, Moment] | None:
        found = _found("backward", moment, v, op, value)
        return None if found is None else (found, moment)

    def overflow(v: Variable) -> tuple[NonFinite, Moment] | None:
        """A complete cotangent that is not finite although every contribution was: their sum overflowed."""
        total = totals.get(v.name)
        return None if total is None else found_in(v, first_use.get(v.name), total)

    for op in reversed(graph.operators):
        for v in op.outputs:
            if (found := overflow(v)) is not None:
                return found
        if op.name in moment.cotangents.bodies:
            bad_here = _bad_iterations(moment.cotangents.bodies[op.name], op.static["length"])
            visited = [t for t in reversed(iterations(op)) if bad_here[t]]
            for iteration in moment.inside(op, visited):
                if (found := _first_cotangent(iteration)) is not None:
                    return found
        if any(v.name in bad and v.kind != "literal" for v in op.inputs):
            again = contributions(op, moment.tape, Cotangents(totals), moment.active, moment.rules)
            for v, contribution in zip(op.inputs, again, strict=True):
                if contribution is not None:
                    found = found_in(v, op, contribution)
                    if found is not None:
                        return found
    return next(
        (found for v in (*graph.inputs, *graph.constants) if (found := overflow(v)) is not None), None
    )


def _found(
    sweep: str, moment: Moment, variable: Variable, op: Operator | None, value: Any
) -> NonFinite | None:
    """`value` of a variable as the answer, if it is one."""
    bad, place = _first_bad(value), moment.place(variable)
    if bad is None or place is None:
        return None
    label, scope, source = (None, "", None) if op is None else (op.name, op.scope, op.source)
    first, count = bad
    iteration = () if op is None else moment.iteration
    return NonFinite(sweep, place.name, label, scope, source, (*place.leading, *first), count, iteration)


# --- looking at numbers -----------------------------------------------------------------------


def _first_bad(value: Any) -> tuple[tuple[int, ...], int] | None:
    """The position of the first entry that is not finite, and how many there are."""
    bad = bad_entries(value)
    if bad is None or not bad.any():
        return None
    return tuple(int(i) for i in np.argwhere(bad)[0]), int(bad.sum())


def _bad_iterations(stacked: Tape | Cotangents, length: int) -> np.ndarray:
    """In which iterations of a loop anything is not finite, in loops inside of it too."""
    found = np.zeros(length, bool)
    for value in stacked.values.values():
        bad = bad_entries(value)
        if bad is not None:
            found |= bad.any(axis=tuple(range(1, bad.ndim)))
    for body in stacked.bodies.values():
        # The leading axis of what a nested loop stores is this loop's, the second its own.
        found |= _bad_iterations(body, length)
    return found
