"""What the library would do with the function on this machine: the rules that fire, and recomputation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import jax

from funcprop.cost.comparison import Measured, compare
from funcprop.memory.remat.rematerialize import remat_plan
from funcprop.rules.matching import matches
from funcprop.rules.rule_set import RuleSet

# The shares of what is held between the sweeps for which recomputation is planned.
SHARES = ("50%", "25%")
_MOST_REASONS = 3
# Each program is run so often to say what rules gain.
_REPEATS = 5


@dataclass(frozen=True)
class RuleUse:
    """An operator for which there is a rule: how often it fires, and why not elsewhere.

    `gains` is what all its calls that have a rule take together, where that was measured.
    """

    operator: str
    fires: int
    left: int
    reasons: tuple[str, ...]
    gains: Measured | None = None


@dataclass(frozen=True)
class Recomputation:
    """A plan to hold a share between the sweeps, with the operations that run again, or why there is none."""

    share: str
    plain: int = 0
    held: int = 0
    again: float = 0.0
    refusal: str = ""


@dataclass(frozen=True)
class OnThisMachine:
    """Rules and plans on a platform; `whole` is value and gradient by autodiff and by rules, if measured."""

    platform: str
    rules: tuple[RuleUse, ...]
    plans: tuple[Recomputation, ...]
    whole: Measured | None = None


def on_this_machine(
    fun: Callable[..., Any],
    argnums: int | Sequence[int],
    args: Sequence[Any],
    kwargs: Any,
    rules: RuleSet | None,
    measure: bool,
) -> OnThisMachine:
    """Ask the rules and the memory room about a function; `measure` what the rules that fire gain."""
    found = matches(fun, rules)(*args, **kwargs)
    measured = None
    if measure and any(m.reason is None for m in found):
        measured = compare(fun, argnums, rules=rules, repeats=_REPEATS)(*args, **kwargs)
    rows = () if measured is None else measured.fired
    fires = Counter(m.operator for m in found if m.reason is None)
    left = Counter(m.operator for m in found if m.reason is not None)
    why = {
        name: Counter(m.reason for m in found if m.operator == name and m.reason) for name in (*fires, *left)
    }
    uses = tuple(
        RuleUse(
            name,
            fires[name],
            left[name],
            tuple(r for r, _ in why[name].most_common(_MOST_REASONS)),
            _together([(row.count, row.measured) for row in rows if row.operator == name and row.measured]),
        )
        for name in dict.fromkeys(m.operator for m in found)
    )
    plans = []
    for share in SHARES:
        try:
            plan = remat_plan(fun, share, argnums=argnums, measure=False)(*args, **kwargs)
        except ValueError as error:
            plans.append(Recomputation(share, refusal=str(error).splitlines()[0]))
        else:
            again = plan.extra_flops / max(plan.forward_flops, 1)
            plans.append(Recomputation(share, plan.plain_residual_bytes, plan.residual_bytes, again))
    whole = None if measured is None else measured.whole
    return OnThisMachine(jax.default_backend(), uses, tuple(plans), whole)


def _together(calls: Sequence[tuple[int, Measured]]) -> Measured | None:
    """What several operators take, each so often."""
    if not calls:
        return None

    def total(of: str) -> Any:
        values = [getattr(found, of) for _, found in calls]
        return None if None in values else sum(n * x for (n, _), x in zip(calls, values, strict=True))

    return Measured(*(total(field.name) for field in fields(Measured)))
