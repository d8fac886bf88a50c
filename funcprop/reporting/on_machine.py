"""What the library would do with the function on this machine: the rules that fire, and recomputation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from funcprop.memory.remat.rematerialize import remat_plan
from funcprop.rules.matching import matches
from funcprop.rules.rule_set import RuleSet

# The shares of what is held between the sweeps for which recomputation is planned.
SHARES = ("50%", "25%")
_MOST_REASONS = 3


@dataclass(frozen=True)
class RuleUse:
    """An operator for which there is a rule: how often it fires, and why not elsewhere."""

    operator: str
    fires: int
    left: int
    reasons: tuple[str, ...]


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
    """Rules and plans on a platform."""

    platform: str
    rules: tuple[RuleUse, ...]
    plans: tuple[Recomputation, ...]


def on_this_machine(
    fun: Callable[..., Any],
    argnums: int | Sequence[int],
    args: Sequence[Any],
    kwargs: Any,
    rules: RuleSet | None,
) -> OnThisMachine:
    """Ask the rules and the memory room about a function."""
    found = matches(fun, rules)(*args, **kwargs)
    fires = Counter(m.operator for m in found if m.reason is None)
    left = Counter(m.operator for m in found if m.reason is not None)
    why = {
        name: Counter(m.reason for m in found if m.operator == name and m.reason) for name in (*fires, *left)
    }
    uses = tuple(
        RuleUse(name, fires[name], left[name], tuple(r for r, _ in why[name].most_common(_MOST_REASONS)))
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
    return OnThisMachine(jax.default_backend(), uses, tuple(plans))
