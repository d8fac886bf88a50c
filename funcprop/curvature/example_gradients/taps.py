"""Which operators parameters enter through: a walk over the jaxpr of one example.

A parameter is followed through views (`views`). Where a view meets an operator that is linear in it and whose
other operand is no parameter, there is a *tap*: the operator's result is perturbed, and the cotangent of this
perturbation, with the other operand, tells the parameter's gradient. Where a view meets anything else, the
view itself is perturbed by each example's own zeros (a *direct* tap): the cotangent is the gradient.

Loops are entered. What a loop closes over is used in every iteration, so that its taps have an axis of time;
what it scans is one layer for each iteration. If what it closes over meets an operator that is not linear,
the perturbation stands before the loop. So it does before branches, `while` and custom derivatives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from funcprop import _jax
from funcprop.curvature.example_gradients.parameter_views import View, seen_through
from funcprop.program.facts import ALL, CALLS, CHECKPOINTS, SUMS, facts_of, is_linear
from funcprop.program.layer_calls import boundary_p


class LoopAroundTap(NamedTuple):
    """A loop around a tap: how often it runs, and whether each iteration sees its own slice of the leaf."""

    length: int
    slices: bool


@dataclass(frozen=True, eq=False)
class Tap:
    """A place where a leaf enters: the equation `eqn` is linear in its operand `operand`, a view of the leaf.

    `shape` and `dtype` are those of the equation's result, which is perturbed. A direct tap has no equation:
    what is perturbed is the view itself, and `reason` says why.
    """

    view: View
    loops: tuple[LoopAroundTap, ...]
    shape: tuple[int, ...]
    dtype: Any
    eqn: Any = None
    operand: int = 0
    reason: str | None = None

    @property
    def scale(self) -> float:
        """What the view and the operator multiply the leaf by."""
        negated = self.eqn is not None and self.eqn.primitive.name == "sub" and self.operand == 1
        return -self.view.scale if negated else self.view.scale

    @property
    def perturbation(self) -> jax.ShapeDtypeStruct:
        """The type of one example's perturbation: an axis for every loop, then those of the result."""
        return jax.ShapeDtypeStruct((*(loop.length for loop in self.loops), *self.shape), self.dtype)

    @property
    def partner(self) -> int | None:
        """The operand that the parameter is multiplied by, if any."""
        if self.eqn is None or self.eqn.primitive.name in SUMS:
            return None
        return 1 - self.operand


@dataclass(eq=False)
class TapPlan:
    """What to do with each equation of a jaxpr; taps are given by their numbers.

    `taps` are those of an equation's result, `direct` those of variables; `perturbed` are the equations and
    operands that read the perturbed variable (a jaxpr's results count as operands of one equation more).
    `inner` are the plans of bodies; `results` the views among the results.
    """

    jaxpr: Any
    taps: dict[int, list[int]] = field(default_factory=dict)
    direct: dict[Any, int] = field(default_factory=dict)
    perturbed: set[tuple[int, int]] = field(default_factory=set)
    inner: dict[int, TapPlan] = field(default_factory=dict)
    results: list[View | None] = field(default_factory=list)

    def numbers(self) -> list[int]:
        """All taps in this jaxpr and in its bodies."""
        own = [n for found in self.taps.values() for n in found] + list(self.direct.values())
        return sorted(own + [n for plan in self.inner.values() for n in plan.numbers()])


def find(jaxpr: Any, parameters: range) -> tuple[TapPlan, list[Tap]]:
    """The plan of a self-contained jaxpr whose inputs at some positions are parameters, and its taps."""
    walk = _Walk()
    positions = range(len(jaxpr.invars))
    views = [View(i - parameters.start) if i in parameters else None for i in positions]
    return walk.plan(jaxpr, views, (), views_leave=()), walk.taps


class _RefusedError(Exception):
    """A view that a loop closes over meets an operator that is not linear in it."""

    def __init__(self, view: View, reason: str) -> None:
        self.mark, self.reason = view.mark, reason


class _Walk:
    def __init__(self) -> None:
        self.taps: list[Tap] = []

    def add(self, view: View, lengths: Sequence[int], var: Any, **how: Any) -> int:
        """A new tap, whose perturbation is that of `var`; its number."""
        loops = tuple(LoopAroundTap(n, sliced) for n, sliced in zip(lengths, view.loops, strict=True))
        self.taps.append(Tap(view, loops, tuple(var.aval.shape), var.aval.dtype, **how))
        return len(self.taps) - 1

    def plan(
        self,
        closed: Any,
        views: Sequence[View | None],
        lengths: tuple[int, ...],
        views_leave: Sequence[int] | None = None,
    ) -> TapPlan:
        """The plan of a jaxpr whose inputs are these views, inside of loops of these lengths.

        `views_leave` are the results that may be views, all if None.
        """
        jaxpr = _jax.open_jaxpr(closed)
        plan = TapPlan(jaxpr)
        env: dict[Any, View | None] = dict(zip(jaxpr.invars, views, strict=True))

        def seen(atom: Any) -> View | None:
            return None if isinstance(atom, _jax.Literal) else env.get(atom)

        def perturb(position: int, operand: int, var: Any, reason: str) -> None:
            view = seen(var)
            assert view is not None
            if view.mark is not None:
                raise _RefusedError(view, reason)
            if var not in plan.direct:
                plan.direct[var] = self.add(view, lengths, var, reason=reason)
            plan.perturbed.add((position, operand))

        for i, eqn in enumerate(jaxpr.eqns):
            found = [seen(v) for v in eqn.invars]
            count = sum(view is not None for view in found)
            if not count:
                continue
            name = eqn.primitive.name
            moved = seen_through(eqn, found) if count == 1 else None
            if moved is not None:
                env.update(zip(eqn.outvars, moved, strict=True))
            elif eqn.primitive is boundary_p:
                env.update(zip(eqn.outvars, found[eqn.params["call"].tree.num_leaves :], strict=True))
            elif name in CALLS or name in CHECKPOINTS:
                ((_, body),) = _jax.sub_jaxprs(eqn)
                leave = None if name in CALLS else ()
                inner = plan.inner[i] = self.plan(body, found, lengths, leave)
                env.update(zip(eqn.outvars, inner.results, strict=True))
            elif name == "scan":
                plan.inner[i], refused = self._loop(eqn, found, lengths)
                for k, reason in refused.items():
                    perturb(i, k, eqn.invars[k], reason)
                for k, carried in _carried_unchanged(eqn).items():
                    if k not in refused:
                        env[eqn.outvars[carried]] = found[k]
            elif (operands := _linear_in(eqn, found)) is not None:
                plan.taps[i] = [
                    self.add(view, lengths, eqn.outvars[0], eqn=eqn, operand=k)
                    for k, view in enumerate(found)
                    if k in operands and view is not None
                ]
            else:
                for k, view in enumerate(found):
                    if view is not None:
                        perturb(i, k, eqn.invars[k], f"it enters `{_jax.function_name(eqn)}`")
        plan.results = [seen(v) for v in jaxpr.outvars]
        for k, var in enumerate(jaxpr.outvars):
            if plan.results[k] is not None and views_leave is not None and k not in views_leave:
                perturb(len(jaxpr.eqns), k, var, "it is a result")
                plan.results[k] = None
        return plan

    def _loop(
        self, eqn: Any, found: list[View | None], lengths: tuple[int, ...]
    ) -> tuple[TapPlan, dict[int, str]]:
        """The plan of a loop's body, and the operands to be perturbed before the loop, with reasons."""
        consts, carries = _jax.scan_counts(eqn.params)
        unchanged = _carried_unchanged(eqn)
        marks = [object() for _ in found]
        refused: dict[int, str] = {}
        for k in range(consts, consts + carries):
            if found[k] is not None and k not in unchanged:
                refused[k] = "a loop carries it on, changed"
        while True:
            before = len(self.taps)
            views: list[View | None] = []
            for k, view in enumerate(found):
                if view is None or k in refused:
                    views.append(None)
                elif k < consts + carries:
                    views.append(replace(view, loops=(*view.loops, False), mark=marks[k]))
                else:
                    views.append(view.sliced())
            try:
                body = eqn.params["jaxpr"]
                leave = list(unchanged.values())
                return self.plan(body, views, (*lengths, eqn.params["length"]), leave), refused
            except _RefusedError as refusal:
                if refusal.mark not in marks:
                    raise
                # The walk begins anew without this operand; its taps are taken back.
                del self.taps[before:]
                refused[marks.index(refusal.mark)] = f"{refusal.reason}, in a loop"


def _carried_unchanged(eqn: Any) -> dict[int, int]:
    """The operands of a loop that it carries on as they are, each with its place among the results."""
    consts, carries = _jax.scan_counts(eqn.params)
    body = _jax.open_jaxpr(eqn.params["jaxpr"])
    return {consts + i: i for i in range(carries) if body.outvars[i] is body.invars[consts + i]}


def _linear_in(eqn: Any, views: list[View | None]) -> list[int] | None:
    """The operands in which an equation is linear, if all that are views are among them."""
    which = [k for k, view in enumerate(views) if view is not None]
    if not jnp.issubdtype(eqn.outvars[0].aval.dtype, jnp.floating):
        return None  # a real leaf times complex numbers: see `views`
    # A tap keeps the cotangent and one other operand: an operator that is not a sum multiplies by it.
    multiplies = len(eqn.invars) == 2 and ALL not in facts_of(eqn).linear_in
    return which if is_linear(eqn, which) and (multiplies or eqn.primitive.name in SUMS) else None
