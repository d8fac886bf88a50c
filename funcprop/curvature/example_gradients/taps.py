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

from collections.abc import Mapping, Sequence
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

    `taps` are those of an equation's result; `perturbed` has the direct taps of operands, by the positions of
    equation and operand (a jaxpr's results count as operands of one equation more). `inner` are the plans of
    bodies.
    """

    jaxpr: Any
    taps: dict[int, list[int]] = field(default_factory=dict)
    perturbed: dict[tuple[int, int], int] = field(default_factory=dict)
    inner: dict[int, TapPlan] = field(default_factory=dict)

    def numbers(self) -> list[int]:
        """All taps in this jaxpr and in its bodies."""
        own = {n for found in self.taps.values() for n in found} | {*self.perturbed.values()}
        return sorted(own.union(*(plan.numbers() for plan in self.inner.values())))

    def renumbered(self, number: Mapping[int, int]) -> TapPlan:
        """Keep the taps that have a new number, and bodies with such taps."""
        inner = {i: plan.renumbered(number) for i, plan in self.inner.items()}
        return TapPlan(
            self.jaxpr,
            {i: [number[n] for n in found if n in number] for i, found in self.taps.items()},
            {at: number[n] for at, n in self.perturbed.items() if n in number},
            {i: plan for i, plan in inner.items() if plan.numbers()},
        )


def find(jaxpr: Any, parameters: range) -> tuple[TapPlan, list[Tap]]:
    """The plan of a self-contained jaxpr whose inputs at some positions are parameters, and its taps."""
    walk = _Walk()
    positions = range(len(jaxpr.invars))
    views = [View(i - parameters.start) if i in parameters else None for i in positions]
    plan, _ = walk.plan(jaxpr, views, (), views_leave=())
    kept = [n for n, tap in enumerate(walk.taps) if not walk.is_refused(tap.view)]
    return plan.renumbered({n: i for i, n in enumerate(kept)}), [walk.taps[n] for n in kept]


class _Walk:
    """The taps found so far, and the operands of loops that are perturbed before the loop, with reasons.

    An operand is refused where a view of it meets an operator that is not linear in it. From then on nothing
    is a view of it, and the taps that it had before do not count.
    """

    def __init__(self) -> None:
        self.taps: list[Tap] = []
        self.refused: dict[Any, str] = {}

    def is_refused(self, view: View) -> bool:
        """Decide whether a view is of a loop's operand that is perturbed before this loop."""
        return any(mark in self.refused for mark in view.marks)

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
    ) -> tuple[TapPlan, list[View | None]]:
        """The plan of a jaxpr whose inputs are these views, inside of loops of these lengths.

        Also the views among its results: those at `views_leave` may be views, all if None.
        """
        jaxpr = _jax.open_jaxpr(closed)
        plan = TapPlan(jaxpr)
        env: dict[Any, View | None] = dict(zip(jaxpr.invars, views, strict=True))
        direct: dict[Any, int] = {}

        def seen(atom: Any) -> View | None:
            view = None if isinstance(atom, _jax.Literal) else env.get(atom)
            return None if view is None or self.is_refused(view) else view

        def perturb(position: int, operand: int, var: Any, reason: str) -> None:
            view = seen(var)
            if view is None:
                return
            if view.mark is not None:
                self.refused[view.mark] = reason
                return
            if var not in direct:
                direct[var] = self.add(view, lengths, var, reason=reason)
            plan.perturbed[position, operand] = direct[var]

        def visit(i: int, eqn: Any) -> None:
            found = [seen(v) for v in eqn.invars]
            which = [k for k, view in enumerate(found) if view is not None]
            name = eqn.primitive.name
            moved = seen_through(eqn, found) if len(which) == 1 else None
            if not which:
                return
            if moved is not None:
                env.update(zip(eqn.outvars, moved, strict=True))
            elif eqn.primitive is boundary_p:
                env.update(zip(eqn.outvars, found[eqn.params["call"].tree.num_leaves :], strict=True))
            elif name in CALLS or name in CHECKPOINTS:
                ((_, body),) = _jax.sub_jaxprs(eqn)
                plan.inner[i], results = self.plan(body, found, lengths, None if name in CALLS else ())
                env.update(zip(eqn.outvars, results, strict=True))
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
                # Without an operand that is refused, the operator may be linear in the others.
                marked = [k for k, view in enumerate(found) if view is not None and view.mark is not None][:1]
                for k in marked or which:
                    perturb(i, k, eqn.invars[k], f"it enters `{_jax.function_name(eqn)}`")
                if marked:
                    visit(i, eqn)

        for i, eqn in enumerate(jaxpr.eqns):
            visit(i, eqn)
        for k, var in enumerate(jaxpr.outvars):
            if views_leave is not None and k not in views_leave:
                perturb(len(jaxpr.eqns), k, var, "it is a result")
        leaving = range(len(jaxpr.outvars)) if views_leave is None else views_leave
        return plan, [seen(v) if k in leaving else None for k, v in enumerate(jaxpr.outvars)]

    def _loop(
        self, eqn: Any, found: list[View | None], lengths: tuple[int, ...]
    ) -> tuple[TapPlan, dict[int, str]]:
        """The plan of a loop's body, and the operands to be perturbed before the loop, with reasons."""
        consts, carries = _jax.scan_counts(eqn.params)
        unchanged = _carried_unchanged(eqn)
        marks = {object(): k for k in range(consts + carries)}
        changed = [k for k in range(consts, consts + carries) if found[k] is not None and k not in unchanged]
        views = [
            None if view is None or k in changed else view.sliced() if k >= consts + carries else view
            for k, view in enumerate(found)
        ]
        for mark, k in marks.items():
            if (view := views[k]) is not None:
                views[k] = replace(view, marks=(*view.marks, mark))
        lengths = (*lengths, eqn.params["length"])
        plan, _ = self.plan(eqn.params["jaxpr"], views, lengths, list(unchanged.values()))
        refused = dict.fromkeys(changed, "a loop carries it on, changed")
        refused |= {marks[m]: f"{why}, in a loop" for m, why in self.refused.items() if m in marks}
        return plan, refused


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
