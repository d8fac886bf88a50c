"""What is asked of rematerialisation, checked before anything is traced."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from funcprop.memory.remat.saving import Residuals
from funcprop.program.sizes import budget_or_share
from funcprop.rules.machine import Machine

Budget = int | float | str | None


class BudgetError(ValueError):
    """No schedule fits; `smallest` is the number of bytes that would do."""

    def __init__(self, message: str, smallest: int) -> None:
        super().__init__(message)
        self.smallest = smallest


@dataclass(frozen=True)
class RematLimits:
    """A budget, a peak or a number of chunks, and how schedules are compared; see `rematerialize`."""

    budget: Budget = None
    peak: Budget = None
    chunks: int | None = None
    count_arguments: bool = False
    argnums: int | Sequence[int] = 0
    measure: bool = True
    target: Any = None

    def __post_init__(self) -> None:
        budget, peak, chunks = self.budget, self.peak, self.chunks
        if (budget is None and peak is None) == (chunks is None):
            raise ValueError(
                f"budget={budget!r}, peak={peak!r}, chunks={chunks!r}: give a budget or a peak (bytes as an "
                "int, or a share of the residual bytes as a float), or a number of chunks, and not both."
            )
        if chunks is not None and (isinstance(chunks, bool) or not isinstance(chunks, int) or chunks < 1):
            raise ValueError(f"chunks={chunks!r} is not a number of pieces; pass an int of at least 1.")
        for name, limit in (("budget", budget), ("peak", peak)):
            object.__setattr__(self, name, _limit(name, limit))
        if self.target is not None:
            Machine.of(self.target)

    def counted(self, held: Residuals) -> int:
        """Those of the bytes held that count."""
        return held.all if self.count_arguments else held.computed

    def in_bytes(self, whole: int) -> tuple[int | None, int | None]:
        """Budget and peak in bytes, where a function holds `whole`."""
        budget, peak = (
            int(x * whole) if isinstance(x, float | np.floating) else x for x in (self.budget, self.peak)
        )
        return budget, peak  # type: ignore[return-value]

    def __str__(self) -> str:
        budget = f"budget={self.budget!r}"
        return budget if self.peak is None else f"{budget}, peak={self.peak!r}"


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
