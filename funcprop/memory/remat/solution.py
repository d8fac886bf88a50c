"""The schedule for a jaxpr within limits, and why it is that one."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from funcprop import _jax
from funcprop.memory.remat.chain import StepChain, program
from funcprop.memory.remat.choice import SMALLEST, Choice, GradientProgram, Placement, best, can_compile
from funcprop.memory.remat.limits import BudgetError, RematLimits
from funcprop.memory.remat.plan import RematPlan
from funcprop.memory.remat.saving import Residuals, residuals
from funcprop.memory.remat.schedule import Schedule, cheapest, frontier, in_chunks, kept
from funcprop.program.call import Call


class _Solution(NamedTuple):
    """A schedule, what it was compared with, and what is to be said of it."""

    schedule: Schedule
    choice: Choice | None = None
    reason: str | None = None


class RematSolver:
    """Plans within limits; among schedules it is chosen once for equal programs."""

    def __init__(self, limits: RematLimits) -> None:
        self.limits = limits
        # What was chosen for a program, by the program as text: a function is often traced several times.
        self.chosen: dict[str, Choice] = {}

    def solve(self, closed: Any, name: str, call: Call, args: Sequence[Any]) -> RematPlan:
        """The plan for the jaxpr of a call."""
        jaxpr, consts = _jax.open_jaxpr(closed), _jax.array_constants(closed)
        avals = [v.aval for v in jaxpr.invars]
        found = program(closed, [_jax.is_differentiable(a) for a in avals], [True] * len(avals))
        plain = residuals(lambda *values: _jax.evaluate(jaxpr, consts, values), avals)
        placement = Placement.of(call.values, self.limits.target)
        gradient = GradientProgram(found, self._differentiated(avals, call, args), placement)
        solution = self._solution(gradient, plain, name)
        schedule, choice = solution.schedule, solution.choice
        held = plain if schedule == kept(found.chain) else self._held(found, schedule)
        budget, _ = self.limits.in_bytes(self.limits.counted(plain))
        return RematPlan(
            name,
            self.limits.counted(plain) if budget is None else budget,
            held.computed,
            held.given,
            plain.computed,
            plain.given,
            schedule.peak,
            schedule.flops,
            sum(step.flops for step in found.steps),
            gradient,
            schedule,
            None if choice is None else choice.chosen.temp,
            None if choice is None else choice.plain.temp,
            solution.reason,
        )

    def _solution(self, gradient: GradientProgram, plain: Residuals, name: str) -> _Solution:
        found, counted = gradient.program, self.limits.counted(plain)
        budget, peak = self.limits.in_bytes(counted)
        as_it_is = kept(found.chain)
        if self.limits.chunks is not None:
            return _Solution(self._in_chunks(found, self.limits.chunks, name))
        if budget is not None and counted <= budget and (peak is None or as_it_is.peak <= peak):
            why = f"the budget is met: {name} holds {counted:,} bytes as it stands, so it is left as it is"
            return _Solution(as_it_is, reason=why)
        schedule = self._within(found, plain, budget, peak, name)
        if self._measures(found.closed, plain, gradient):
            target = ((peak if budget is None else budget) or 0) / max(counted, 1)
            most, highest = (np.inf if limit is None else limit for limit in (budget, peak))
            choice = self._chosen(gradient, schedule, most, highest, target)
            reason = _reason(choice, name, target)
            if choice.schedule is not None and not self._fits(found, most, choice.schedule):
                reason = f"{reason} No schedule that holds {budget:,} bytes has so low a peak."
            return _Solution(choice.schedule or as_it_is, choice, reason)
        why_not = None
        if self.limits.measure and not gradient.placement.has_compiler:
            why_not = (
                f"nothing was compiled: this process has no {gradient.placement.platform}; with a topology "
                "as target=, schedules are compared by what its compiler allocates"
            )
        return _Solution(schedule, reason=why_not)

    def _in_chunks(self, found: StepChain, chunks: int, name: str) -> Schedule:
        schedule = in_chunks(found.chain, chunks)
        if schedule is None:
            raise ValueError(
                f"chunks={chunks}: {name} has no more than {len(found.points) - 1} pieces that can be "
                "recomputed; ask for fewer chunks."
            )
        return schedule

    def _differentiated(self, avals: Sequence[Any], call: Call, args: Sequence[Any]) -> tuple[int, ...]:
        """The variables in which the gradient is taken: those at `argnums`, or all if there are none."""
        ends = list(itertools.accumulate((len(jax.tree.leaves(a)) for a in args), initial=0))
        asked = self.limits.argnums
        wanted = {
            i
            for p in ((asked,) if isinstance(asked, int) else asked)
            if -len(args) <= p < len(args)
            for i in range(ends[p % len(args)], ends[p % len(args) + 1])
        }
        smooth = [k for k, aval in enumerate(avals) if _jax.is_differentiable(aval)]
        return tuple(k for k in smooth if call.variables[k] in wanted) or tuple(smooth)

    def _measures(self, closed: Any, plain: Residuals, gradient: GradientProgram) -> bool:
        """Whether schedules are compared by what they compile to."""
        is_large = plain.computed >= SMALLEST and bool(gradient.chosen)
        return self.limits.measure and is_large and gradient.placement.has_compiler and can_compile(closed)

    def _chosen(
        self, gradient: GradientProgram, base: Schedule, budget: float, peak: float, target: float
    ) -> Choice:
        """The choice among schedules, once for equal programs."""
        key = f"{gradient.chosen} {gradient.placement} {gradient.program.closed}"
        if key not in self.chosen:
            fits = functools.partial(self._fits, gradient.program, budget)
            self.chosen[key] = best(gradient, base, fits, budget, peak, target)
        return self.chosen[key]

    def _fits(self, found: StepChain, budget: float, schedule: Schedule) -> bool:
        return self.limits.counted(self._held(found, schedule)) <= budget

    def _held(self, found: StepChain, schedule: Schedule) -> Residuals:
        avals = [v.aval for v in _jax.open_jaxpr(found.closed).invars]
        return residuals(lambda *values: found.run(schedule, values), avals)

    def _within(
        self, found: StepChain, plain: Residuals, budget: int | None, peak: int | None, name: str
    ) -> Schedule:
        """The cheapest schedule of which `jax.vjp` itself holds no more than the budget."""
        counts_all = self.limits.count_arguments
        given = plain.given if counts_all else 0
        room = np.inf if budget is None else budget - given
        limit = np.inf if peak is None else peak - given
        while (schedule := cheapest(found.chain, room, limit)) is not None:
            over = self.limits.counted(self._held(found, schedule)) - (np.inf if budget is None else budget)
            if over <= 0:
                return schedule
            # Where JAX holds more than was counted, the difference is put aside.
            room = schedule.nbytes - max(over, 1)
        smallest = self._smallest(found, given, peak is not None)
        what = "arguments among them" if counts_all else "besides its arguments"
        remedy = (
            "do not count the arguments, which exist anyway"
            if counts_all
            else "make the arguments smaller (a smaller batch)"
        )
        raise BudgetError(
            f"{self.limits}: {name} cannot be differentiated within it. The smallest "
            f"{'peak' if peak is not None else 'number of bytes held between the sweeps'}, {what}, is "
            f"{smallest:,}: raise the limit to that, or {remedy}.",
            smallest,
        )

    def _smallest(self, found: StepChain, given: int, by_peak: bool) -> int:
        leanest = frontier(found.chain)[0]
        if not by_peak:
            return self.limits.counted(self._held(found, leanest))
        low, best = 0, leanest.peak
        while low < best:
            middle = (low + best) // 2
            narrower = frontier(found.chain, peak=middle)
            if narrower:
                best = min(s.peak for s in narrower)
            else:
                low = middle + 1
        return best + given


def _reason(choice: Choice, name: str, target: float) -> str | None:
    """Say why a function is left as it is, or what keeps its peak high."""
    temp, plain = choice.chosen.temp, choice.plain.temp
    if choice.schedule is not None and temp <= target * plain:
        return None
    largest = ", ".join(f"{op} {nbytes:,}" for op, nbytes in choice.chosen.largest)
    way = f" In the way are, at the peak: {largest} bytes." if largest else ""
    if choice.schedule is None:
        return (
            f"no schedule within the budget lowers the peak of {name}, {plain:,} temporary bytes, so it is "
            f"left as it is.{way} A smaller batch, or rules that hold less (fp.with_rules), may help."
        )
    return f"the program's peak falls to {temp / plain:.0%} of {plain:,} temporary bytes.{way}"
