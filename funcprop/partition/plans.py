"""All plans that were found, in order, and why others were not: a table."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from funcprop.graph.graph import aligned
from funcprop.partition.partition_plan import PartitionPlan


@dataclass(frozen=True)
class RejectedPlan:
    """A kind of plan that cannot be made, and why."""

    name: str
    why: str


@dataclass(frozen=True, eq=False)
class Plans(Sequence[PartitionPlan]):
    """Plans, best first: what fits, by its rough time; then what does not. `print(plans)` is a table."""

    plans: tuple[PartitionPlan, ...]
    rejected: tuple[RejectedPlan, ...]
    examples: int

    def __getitem__(self, i: Any) -> Any:
        return self.plans[i]

    def __len__(self) -> int:
        return len(self.plans)

    def __iter__(self) -> Iterator[PartitionPlan]:
        return iter(self.plans)

    def named(self, name: str) -> PartitionPlan:
        """The first plan whose name begins so.

        Raises:
            KeyError: there is none.
        """
        for plan in self.plans:
            if plan.name.startswith(name):
                return plan
        raise KeyError(
            f"no plan is called {name!r}; there are {', '.join(plan.name for plan in self.plans)}."
        )

    def json(self) -> str:
        """The table as JSON."""
        return json.dumps(self.as_dict())

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "examples": self.examples,
            "plans": [plan.as_dict() for plan in self.plans],
            "rejected": [vars(r) for r in self.rejected],
        }

    def __str__(self) -> str:
        head = "plan", "devices", "bytes/device", "by", "fits"
        rows = [(*head, "FLOPs/device", "communicated", "bubble", "updates")]
        for plan in self.plans:
            fits = {
                None: "",
                True: "yes",
                False: f"{plan.held / (plan.budget or 1):.1f} × too large",
            }
            rows.append(
                (
                    plan.name,
                    f"{math.prod(plan.mesh.values())}",
                    f"{plan.held:,}",
                    "estimate" if plan.compiled_bytes is None else "compiler",
                    fits[plan.fits],
                    f"{plan.flops:,}",
                    f"{plan.communicated:,}",
                    f"{plan.bubble:.0%}",
                    f"{plan.updates}",
                )
            )
        text = aligned(rows, right={1, 2, 5, 6, 7, 8}, widest=60)
        return "\n".join([text, *(f"{r.name}: {r.why}" for r in self.rejected)])
