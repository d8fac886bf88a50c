"""One comparison: what a rule gave, what it should have given, and what the difference looks like.

Arrays are compared by their largest deviation relative to the largest expected entry. A gradient that is
truly zero has no such scale, so an absolute floor is added, in proportion to the cotangents beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


class CheckError(AssertionError):
    """A check failed; the message names the term, the argument, the deviation and its likely cause."""


@dataclass(frozen=True)
class Tolerances:
    """The tolerances that follow from a unit of rounding `ε`.

    Results that agree but for the order of their sums differ by far less than `ε^⅔` (4e-11 in float64,
    4e-2 in bfloat16); noise around a true zero stays below `ε^⅞` of its neighbours. A central difference
    has its best step at `ε^⅓`, where its error is of order `ε^⅔` times the third derivative.
    """

    eps: float

    @classmethod
    def of(cls, *dtypes: Any) -> Tolerances:
        """The precision of the coarsest of these dtypes."""
        inexact = (d for d in dtypes if jnp.issubdtype(d, jnp.inexact))
        return cls(max((float(jnp.finfo(d).eps) for d in inexact), default=float(np.finfo(float).eps)))

    @classmethod
    def of_tolerance(cls, tolerance: float) -> Tolerances:
        """The precision at which results are compared with this relative tolerance."""
        return cls(tolerance**1.5)

    @property
    def relative(self) -> float:
        """Tolerance relative to the largest expected entry."""
        return float(self.eps ** (2 / 3))

    @property
    def absolute(self) -> float:
        """Tolerance around a true zero, relative to the scale of the other results."""
        return float(self.eps ** (7 / 8))

    @property
    def step(self) -> float:
        """Step of a central difference, and the relative tolerance at which it is believed."""
        return float(self.eps ** (1 / 3))


DOUBLE = Tolerances.of(jnp.float64)


@dataclass(frozen=True)
class Claim:
    """`actual` is `expected`, within `relative · max|expected| + absolute`.

    `where` is the term and its circumstances, `what` the quantity. `dtype` is the dtype that `actual` must
    have (any, if None); `others` are quantities with which it may have been confused.
    """

    where: str
    what: str
    actual: Any
    expected: Any
    relative: float
    absolute: float
    dtype: Any = None
    others: Mapping[str, Any] = field(default_factory=dict)

    note = ""

    def verify(self, subject: str) -> float:
        """The largest deviation relative to its scale.

        Raises:
            CheckError: the claim is false.
        """
        actual, expected = as_numpy(self.actual), as_numpy(self.expected)
        problem = None
        deviation = np.zeros(())
        scale = self.absolute / self.relative + float(np.max(np.abs(expected), initial=0.0))
        if actual.shape != expected.shape:
            problem = f"got shape {actual.shape}, expected {expected.shape}"
        else:
            deviation = deviations(actual, expected)
            largest = np.unravel_index(int(np.argmax(deviation)), deviation.shape) if deviation.size else ()
            worst = float(deviation[largest]) if deviation.size else 0.0
            # `not <=` rather than `>`: a scale that is not finite must not pass.
            wrong_type = self.dtype is not None and self.actual.dtype != self.dtype
            if wrong_type or not (worst <= self.relative * scale or worst == 0.0):
                problem = (
                    f"largest deviation {worst:.3g} (relative {worst / scale:.3g}, tolerance "
                    f"{self.relative:.1g}) at {[int(i) for i in largest]}: got {actual[largest]!s}, "
                    f"expected {expected[largest]!s}"
                )
            deviation = np.asarray(worst)
        if problem is not None:
            hint = diagnose(self)
            raise CheckError(
                f"{subject}: {self.where}: the {self.what} is wrong{'' if hint is None else f': it {hint}'}."
                f"\n  {problem}"
            )
        return float(deviation) / scale if scale else 0.0


@dataclass(frozen=True)
class Limit:
    """`actual` is at most `factor` times autodiff's; there is no limit if `factor` is None.

    No number is compared, so that it has no error.
    """

    where: str
    what: str
    actual: int
    autodiff: int
    factor: float | None
    unit: str
    remedy: str

    @property
    def note(self) -> str:
        """The note about it in the report."""
        limit = (
            "" if self.factor == 1 else ", no limit" if self.factor is None else f", limit {self.factor} ×"
        )
        return f"{self.actual} {self.unit}, autodiff {self.autodiff}{limit}"

    def verify(self, subject: str) -> float:
        """Zero.

        Raises:
            CheckError: it is above the limit.
        """
        if self.factor is not None and self.actual > self.factor * self.autodiff:
            raise CheckError(
                f"{subject}: {self.where}: the {self.what}; at most {self.factor} × autodiff's "
                f"{self.autodiff} {self.unit} are allowed. {self.remedy}."
            )
        return 0.0


def as_numpy(x: Any) -> np.ndarray[Any, Any]:
    """The value in double precision, so that a comparison does not round; PRNG keys as their bits."""
    if hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    kind = np.complex128 if jnp.issubdtype(jnp.result_type(x), jnp.complexfloating) else np.float64
    return np.asarray(x).astype(kind)


def deviations(actual: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Entry-wise |actual − expected|; zero where both are the same infinity or both not a number."""
    same = (actual == expected) | (np.isnan(actual) & np.isnan(expected))
    with np.errstate(invalid="ignore", over="ignore"):
        difference = np.abs(actual - expected)
    return np.where(same, 0.0, np.where(np.isnan(difference), np.inf, difference))


# --- what a difference looks like -------------------------------------------------------------

Array = np.ndarray[Any, Any]


def _close(actual: Array, expected: Array, tolerance: float) -> bool:
    if actual.shape != expected.shape or not expected.size:
        return False
    return bool(np.max(deviations(actual, expected)) <= tolerance * np.max(np.abs(expected)))


def _other_dtype(claim: Claim, actual: Array, expected: Array) -> str | None:
    if claim.dtype is None or claim.actual.dtype == claim.dtype:
        return None
    return f"has dtype {claim.actual.dtype} instead of {np.dtype(claim.dtype)}"


def _not_finite(claim: Claim, actual: Array, expected: Array) -> str | None:
    return "is not finite" if np.isfinite(expected).all() and not np.isfinite(actual).all() else None


def _transposed(claim: Claim, actual: Array, expected: Array) -> str | None:
    equal = actual.ndim > 1 and _close(actual.T, expected, claim.relative)
    return "equals the transpose of the expected" if equal else None


def _conjugated(claim: Claim, actual: Array, expected: Array) -> str | None:
    equal = np.iscomplexobj(expected) and _close(actual.conj(), expected, claim.relative)
    return "equals the complex conjugate of the expected" if equal else None


def _scaled(claim: Claim, actual: Array, expected: Array) -> str | None:
    if actual.shape != expected.shape or not np.any(expected):
        return None
    if not np.any(actual):
        return "is zero"
    factor = float((np.vdot(expected, actual) / np.vdot(expected, expected)).real)
    if not _close(actual, factor * expected, max(claim.relative, 1e-9)):
        return None
    if abs(factor - 1) < 0.02:
        return f"is off by {100 * (factor - 1):.2g} %"
    return "has the wrong sign" if abs(factor + 1) < 1e-6 else f"is {factor:.4g} × the expected"


def _not_summed(claim: Claim, actual: Array, expected: Array) -> str | None:
    if actual.ndim < expected.ndim or actual.shape == expected.shape:
        return None
    extra = actual.ndim - expected.ndim
    summed = actual.sum(tuple(range(extra)))
    pairs = zip(summed.shape, expected.shape, strict=True)
    summed = summed.sum(tuple(i for i, (a, e) in enumerate(pairs) if e == 1 < a), keepdims=True)
    equal = _close(summed, expected, claim.relative)
    return "misses the broadcast sum: sum it over the broadcast axes" if equal else None


def _swapped(claim: Claim, actual: Array, expected: Array) -> str | None:
    for name, other in claim.others.items():
        if name != claim.what and _close(actual, as_numpy(other), claim.relative):
            return f"equals the {name} (swapped?)"
    return None


def _same_total(claim: Claim, actual: Array, expected: Array) -> str | None:
    total, tolerance = np.sum(expected), claim.relative * np.sum(np.abs(expected))
    if not expected.size or not np.abs(total) > tolerance or not np.abs(np.sum(actual) - total) <= tolerance:
        return None
    if actual.size == expected.size and _close(
        np.sort(actual, None), np.sort(expected, None), claim.relative
    ):
        return "has the expected entries in another order"
    return "has the expected total but other entries: it is summed over the wrong axis"


# In this order: the first that holds is reported.
HYPOTHESES: tuple[Callable[[Claim, Array, Array], str | None], ...] = (
    _other_dtype, _not_finite, _transposed, _conjugated, _scaled, _not_summed, _swapped, _same_total,
)  # fmt: skip


def diagnose(claim: Claim) -> str | None:
    """Describe a wrong value, as the end of a sentence that begins with "it"."""
    actual, expected = as_numpy(claim.actual), as_numpy(claim.expected)
    with np.errstate(all="ignore"):
        found = (hypothesis(claim, actual, expected) for hypothesis in HYPOTHESES)
        return next((text for text in found if text is not None), None)


# --- the report -------------------------------------------------------------------------------


@dataclass(frozen=True)
class CheckRow:
    """One term: how many comparisons were made, and the largest relative deviation among them."""

    term: str
    comparisons: int
    error: float
    note: str = ""


@dataclass(frozen=True)
class CheckReport:
    """The comparisons of a check and their deviations; `print(report)` is an aligned table."""

    subject: str
    rows: tuple[CheckRow, ...]

    def __getitem__(self, term: str) -> CheckRow:
        return next(row for row in self.rows if row.term == term)

    def __str__(self) -> str:
        width = max(len(row.term) for row in self.rows)
        lines = [f"{self.subject}", f"  {'term':{width}}  comparisons  largest error"]
        for row in self.rows:
            error = f"{row.error:13.1e}" if row.comparisons else f"{'-':>13}"
            lines.append(f"  {row.term:{width}}  {row.comparisons:11d}  {error}  {row.note}".rstrip())
        return "\n".join(lines)
