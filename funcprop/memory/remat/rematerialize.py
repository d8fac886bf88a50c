"""Rematerialisation under a budget: what to save for the backward sweep, and what to compute again.

A program is a chain of steps with cut points between them. Of `N` equal layers cut into `k` recomputed
chunks, `k + N/k` units are held at the peak: `k` inputs of chunks, and the `N/k` layers of the one chunk that
is being differentiated; with `k = √N` that is `2√N` (Chen et al. 2016). Here layers and chunks need not be
equal, what is cheap to hold for its FLOPs is held inside of them, and a schedule is chosen among all by
dynamic programming (`funcprop.memory.remat.schedule`).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from funcprop import _jax
from funcprop._jax import nnx
from funcprop.memory.remat.chain import StepChain, flat, program
from funcprop.memory.remat.choice import SMALLEST, Choice, GradientProgram, Placement, best, can_compile
from funcprop.memory.remat.plan import RematPlan
from funcprop.memory.remat.saving import Residuals, residuals
from funcprop.memory.remat.schedule import Schedule, cheapest, frontier, in_chunks, kept
from funcprop.program.call import Call, is_array, name_of, traced
from funcprop.program.sizes import budget_or_share
from funcprop.rules.machine import Machine

Budget = int | float | str | None


class BudgetError(ValueError):
    """No schedule fits; `smallest` is the number of bytes that would do."""

    def __init__(self, message: str, smallest: int) -> None:
        super().__init__(message)
        self.smallest = smallest


def rematerialize(
    fun: Callable[..., Any],
    budget: Budget = None,
    *,
    peak: Budget = None,
    chunks: int | None = None,
    count_arguments: bool = False,
    argnums: int | Sequence[int] = 0,
    measure: bool = True,
    target: Any = None,
) -> Callable[..., Any]:
    """Bound the bytes that a function's reverse mode holds between its sweeps by `budget`.

    With `S` the values held and `R` the operators run again, it solves

        minimise Σ_{o ∈ R} flops(o)   subject to   Σ_{v ∈ S} bytes(v) ≤ budget,

    where `R` makes everything that the backward sweep reads from `S`, in segments between cut points. What is
    held is not all: a program's peak has cotangents, scratch, and what a segment needs while it is run again.
    So schedules of lower peaks and equal chunks are compared with this one by the temporary bytes of their
    compiled gradients. Of those that reach the budget's share of the plain program's bytes the one of fewest
    FLOPs is taken, or else the one of fewest bytes. If none holds less than the plain program, or the budget
    is met anyway, the function is left as it is.

    Gradients are the same numbers. The result is an ordinary function, made of `jax.checkpoint`s, of bodies
    of `scan` that hold less, and of scans in chunks; it composes with `jit`, `grad`, `jvp`, `vmap`, `fp.grad`
    and frameworks' own transformations.

    The bytes are those of the leaves of `jax.vjp(f, *x)[1]` that are neither arguments nor constants of the
    function, differentiated in all its traced arguments: parameters and data exist anyway. It is planned
    whenever it is traced, so put it under `jax.jit`; and inside `vmap` the budget is that of one example. The
    outermost `jit` needs the plan's `compiler_options` on some backends, see `remat_plan`.

    Rules hold less than autodiff. `fp.grad(rematerialize(f, …))` has them besides the plan; for a budget
    that takes them into account, plan the function with its rules, `rematerialize(fp.with_rules(f), …)`.

    Args:
        fun: any JAX function, also a method.
        budget: bytes if it is an int or text ("8GB"); if it is a float or "25%", a share of what the function
            holds as it stands.
        peak: a second limit in the same units, on the predicted peak: what is held, and what one segment
            needs while it is recomputed and differentiated. Without, it only decides between equal FLOPs.
        chunks: instead of a budget, recompute everything in so many pieces of about equal size.
        count_arguments: count arguments and constants that are held as well, and in shares.
        argnums: the arguments of the gradient that is compiled, as in `fp.grad`.
        measure: whether programs are compiled, about six, while the function is traced. If not, the schedule
            is the one of fewest FLOPs by what is held. So it is where nothing can be compiled by itself (in
            the body of a `shard_map`, or with references), and below 64 KiB held.
        target: what the gradient is compiled for: a platform's name, a device, a topology (that is only
            described, too) or an `fp.Machine`; by default the devices of the arguments, or JAX's own. For a
            platform of which there is no device, nothing is compiled.

    Raises:
        BudgetError: nothing fits; says how many bytes would.
        TypeError, ValueError: a budget that is none.
        RuleError: `target` is no machine.

    Reference: Chen, Xu, Zhang, Guestrin, "Training deep nets with sublinear memory cost", 2016; Griewank,
    Walther, "Algorithm 799: revolve", 2000; Beaumont et al., "Optimal checkpointing for heterogeneous
    chains", 2019; Jain et al., "Checkmate", 2020, for the integer program that the tests compare with.

    Example:
        >>> import jax, jax.numpy as jnp, funcprop as fp
        >>> def loss(ws, x):
        ...     for w in ws:
        ...         x = jnp.tanh(x @ w)
        ...     return jnp.sum(x)
        >>> ws, x = [jnp.eye(3)] * 4, jnp.ones((2, 3))
        >>> lean = fp.memory.rematerialize(loss, 0.5)
        >>> print(jax.jit(jax.grad(lean))(ws, x)[0][0] == jax.grad(loss)(ws, x)[0][0])
        [ True  True  True]
    """
    return RematLimits(budget, peak, chunks, count_arguments, argnums, measure, target).applied(fun)


def _require_unchanged(arguments: Any, leaves: Sequence[Any], tree: Any) -> None:
    """Raise a TypeError if the function has changed its arguments, which are copies of the caller's."""
    try:
        new_leaves, new_tree = jax.tree.flatten(arguments)
    except ValueError:
        return  # An object that is used up, like Equinox's `State`, holds nothing that could be lost.
    if new_tree != tree or any(new is not old for new, old in zip(new_leaves, leaves, strict=True)):
        raise TypeError(
            "rematerialize: the function changes a container among its arguments in place; it is traced with "
            "copies, so the change would be lost. Return the new value, or change the container outside."
        )


def remat_plan(
    fun: Callable[..., Any],
    budget: Budget = None,
    *,
    peak: Budget = None,
    chunks: int | None = None,
    count_arguments: bool = False,
    argnums: int | Sequence[int] = 0,
    measure: bool = True,
    target: Any = None,
) -> Callable[..., RematPlan]:
    """Plan what `rematerialize` does: `remat_plan(fun, budget)(*args, **kwargs) -> RematPlan`.

    Nothing is computed; arrays may be `jax.ShapeDtypeStruct`s. `print(plan)` is a report, `plan.prove()`
    compiles the gradient both ways, `plan.compiler_options` belong to the outermost `jit`, and `plan.policy`
    is a coarser way to the same budget for `jax.checkpoint`.

    Args and errors as in `fp.memory.rematerialize`.

    Example:
        >>> import jax, jax.numpy as jnp, funcprop as fp
        >>> def loss(ws, x):
        ...     for w in ws:
        ...         x = jnp.tanh(x @ w)
        ...     return jnp.sum(x)
        >>> square, x = jax.ShapeDtypeStruct((3, 3), "float32"), jax.ShapeDtypeStruct((2, 3), "float32")
        >>> plan = fp.memory.remat_plan(loss, budget=100)([square] * 4, x)
        >>> plan.residual_bytes, plan.forward_flops, 0 < plan.extra_flops < 0.2 * plan.forward_flops
        (96, 174, True)
    """
    return RematLimits(budget, peak, chunks, count_arguments, argnums, measure, target).plan_of(fun)


class RematLimits:
    """The limits asked for, checked before anything is traced.

    Among schedules it is chosen once for equal programs, by whatever of both methods is called first.
    """

    def __init__(
        self,
        budget: Budget = None,
        peak: Budget = None,
        chunks: int | None = None,
        count_arguments: bool = False,
        argnums: int | Sequence[int] = 0,
        measure: bool = True,
        target: Any = None,
    ) -> None:
        if (budget is None and peak is None) == (chunks is None):
            raise ValueError(
                f"budget={budget!r}, peak={peak!r}, chunks={chunks!r}: give a budget or a peak (bytes as an "
                "int, or a share of the residual bytes as a float), or a number of chunks, and not both."
            )
        if chunks is not None and (isinstance(chunks, bool) or not isinstance(chunks, int) or chunks < 1):
            raise ValueError(f"chunks={chunks!r} is not a number of pieces; pass an int of at least 1.")
        self.budget, self.peak = _limit("budget", budget), _limit("peak", peak)
        self.chunks, self.count_arguments = chunks, count_arguments
        self.argnums = (argnums,) if isinstance(argnums, int) else tuple(argnums)
        self.measure, self.target = measure, target
        if target is not None:
            Machine.of(target)
        # What was chosen for a program, by the program as text: a function is often traced several times.
        self.chosen: dict[str, Choice] = {}

    def applied(self, fun: Callable[..., Any]) -> Callable[..., Any]:
        """Bound what a function holds, as `rematerialize`."""

        def run(fun: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            call = Call.of(args, kwargs, _jax.is_traced)
            structure: list[Any] = []

            def arrays(*values: Any) -> list[Any]:
                leaves = call.filled(values)
                given = call.arguments(leaves)
                result = fun(*given[0], **given[1])
                _require_unchanged(given, leaves, call.tree)
                results, tree = jax.tree.flatten(result)
                kept = [None if _jax.is_traced(x) else (x,) for x in results]
                structure.append((tree, kept))
                return [x for x, k in zip(results, kept, strict=True) if k is None]

            closed = traced(arrays, call.values, fun, "a differentiated argument")
            found = self.solve(flat(closed), name_of(fun), call, args)
            outputs = found.program.run(found.schedule, call.values)
            outvars = _jax.open_jaxpr(closed).outvars
            computed = iter([_jax.as_array(x, v.aval) for x, v in zip(outputs, outvars, strict=True)])
            tree, kept = structure[-1]
            return jax.tree.unflatten(tree, [next(computed) if k is None else k[0] for k in kept])

        @functools.wraps(fun)
        def lean(*args: Any, **kwargs: Any) -> Any:
            if nnx.has_models((args, kwargs)):
                return nnx.call(run, fun, args, kwargs)
            return run(fun, args, kwargs)

        return lean

    def plan_of(self, fun: Callable[..., Any]) -> Callable[..., RematPlan]:
        """Plan that, as `remat_plan`."""

        def planned(*args: Any, **kwargs: Any) -> RematPlan:
            def plan(fun: Callable[..., Any], args: Any, kwargs: Any) -> RematPlan:
                call = Call.of(args, kwargs, is_array)

                def arrays(*values: Any) -> list[Any]:
                    call_args, call_kwargs = call.arguments(call.filled(values))
                    results = jax.tree.leaves(fun(*call_args, **call_kwargs))
                    return [x for x in results if isinstance(x, jax.core.Tracer)]

                closed = flat(traced(arrays, call.values, fun))
                return self.solve(closed, name_of(fun), call, args)

            if nnx.has_models((args, kwargs)):
                return nnx.call(lambda *call: (plan(*call), None), fun, args, kwargs)
            return plan(fun, args, kwargs)

        return planned

    def solve(self, closed: Any, name: str, call: Call, args: Sequence[Any]) -> RematPlan:
        """The plan for the jaxpr of a call."""
        jaxpr, consts = _jax.open_jaxpr(closed), _jax.array_constants(closed)
        avals = [v.aval for v in jaxpr.invars]
        found = program(closed, [_jax.is_differentiable(a) for a in avals], [True] * len(avals))
        plain = residuals(lambda *values: _jax.evaluate(jaxpr, consts, values), avals)
        counted = plain.all if self.count_arguments else plain.computed
        budget, peak = _bytes(self.budget, counted), _bytes(self.peak, counted)
        placement = Placement.of(call.values, self.target)
        gradient = GradientProgram(found, self._differentiated(avals, call, args), placement)
        as_it_is = kept(found.chain)
        choice: Choice | None = None
        reason: str | None = None
        if self.chunks is not None:
            schedule = in_chunks(found.chain, self.chunks)
            if schedule is None:
                raise ValueError(
                    f"chunks={self.chunks}: {name} has no more than {len(found.points) - 1} pieces that can "
                    "be recomputed; ask for fewer chunks."
                )
            held = self._held(found, schedule)
        elif budget is not None and counted <= budget and (peak is None or as_it_is.peak <= peak):
            schedule, held = as_it_is, plain
            reason = f"the budget is met: {name} holds {counted:,} bytes as it stands, so it is left as it is"
        else:
            schedule, held = self._within(found, plain, budget, peak, name)
            if self._measures(closed, plain, gradient):
                target = ((peak if budget is None else budget) or 0) / max(counted, 1)
                most, highest = (np.inf if limit is None else limit for limit in (budget, peak))
                choice = self._chosen(gradient, schedule, most, highest, target)
                if choice.schedule is None:
                    schedule, held = as_it_is, plain
                elif choice.schedule is not schedule:
                    schedule, held = choice.schedule, self._held(found, choice.schedule)
                reason = _reason(choice, name, target)
            elif self.measure and not placement.has_compiler:
                reason = (
                    f"nothing was compiled: this process has no {placement.platform}; with a topology as "
                    "target=, schedules are compared by what its compiler allocates"
                )
        return RematPlan(
            name,
            counted if budget is None else budget,
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
            reason,
        )

    def _differentiated(self, avals: Sequence[Any], call: Call, args: Sequence[Any]) -> tuple[int, ...]:
        """The variables in which the gradient is taken: those at `argnums`, or all if there are none."""
        ends = list(itertools.accumulate((len(jax.tree.leaves(a)) for a in args), initial=0))
        wanted = {
            i
            for p in self.argnums
            if -len(args) <= p < len(args)
            for i in range(ends[p % len(args)], ends[p % len(args) + 1])
        }
        smooth = [k for k, aval in enumerate(avals) if _jax.is_differentiable(aval)]
        return tuple(k for k in smooth if call.variables[k] in wanted) or tuple(smooth)

    def _measures(self, closed: Any, plain: Residuals, gradient: GradientProgram) -> bool:
        """Whether schedules are compared by what they compile to."""
        is_large = plain.computed >= SMALLEST and bool(gradient.chosen)
        return self.measure and is_large and gradient.placement.has_compiler and can_compile(closed)

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
        held = self._held(found, schedule)
        return (held.all if self.count_arguments else held.computed) <= budget

    def _held(self, found: StepChain, schedule: Schedule) -> Residuals:
        avals = [v.aval for v in _jax.open_jaxpr(found.closed).invars]
        return residuals(lambda *values: found.run(schedule, values), avals)

    def _within(
        self, found: StepChain, plain: Residuals, budget: int | None, peak: int | None, name: str
    ) -> tuple[Schedule, Residuals]:
        """The cheapest schedule of which `jax.vjp` itself holds no more than the budget."""
        given = plain.given if self.count_arguments else 0
        room = np.inf if budget is None else budget - given
        limit = np.inf if peak is None else peak - given
        while (schedule := cheapest(found.chain, room, limit)) is not None:
            held = self._held(found, schedule)
            over = (held.all if self.count_arguments else held.computed) - (
                np.inf if budget is None else budget
            )
            if over <= 0:
                return schedule, held
            # Where JAX holds more than was counted, the difference is put aside.
            room = schedule.nbytes - max(over, 1)
        smallest = self._smallest(found, given, peak is not None)
        which = f"budget={self.budget!r}" if peak is None else f"budget={self.budget!r}, peak={self.peak!r}"
        what = "arguments among them" if self.count_arguments else "besides its arguments"
        raise BudgetError(
            f"{which}: {name} cannot be differentiated within it. The smallest "
            f"{'peak' if peak is not None else 'number of bytes held between the sweeps'}, {what}, is "
            f"{smallest:,}: raise the limit to that"
            + (", or do not count the arguments, which exist anyway." if self.count_arguments else ", ")
            + ("" if self.count_arguments else "or make the arguments smaller (a smaller batch)."),
            smallest,
        )

    def _smallest(self, found: StepChain, given: int, by_peak: bool) -> int:
        leanest = frontier(found.chain)[0]
        if not by_peak:
            held = self._held(found, leanest)
            return held.all if self.count_arguments else held.computed
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


def _limit(name: str, limit: Budget) -> int | float | None:
    """A limit as a number: `"64MB"` is bytes, `"25%"` a share."""
    if isinstance(limit, str):
        limit = budget_or_share(limit, name)
    if limit is None:
        return None
    meaning = "an int is bytes, a float a share of the residual bytes"
    if isinstance(limit, bool) or not isinstance(limit, int | float | np.integer | np.floating):
        raise TypeError(f"{name}={limit!r} is not a number: {meaning}.")
    if not limit >= 0:
        raise ValueError(f"{name}={limit!r} is {'negative' if limit < 0 else 'not a number'}: {meaning}.")
    if isinstance(limit, float | np.floating) and limit > 1:
        raise ValueError(
            f"{name}={limit!r}: a float is a share of the residual bytes, between 0 and 1; for bytes pass "
            f"the int {int(limit)}."
        )
    return limit


def _bytes(limit: float | None, whole: int) -> int | None:
    """A limit in bytes."""
    if limit is None:
        return None
    return int(limit * whole) if isinstance(limit, float | np.floating) else int(limit)
