"""Verifying equations: every printed form is evaluated and compared with autodiff.

A form is evaluated from the function's own values and cotangents, so each line is checked by itself, and all
lines together are the function and its gradient. Only cotangents that have a line are asked of autodiff.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np

from funcprop._jax.xla_options import jit_once
from funcprop.equations.deviations import Deviation, deviation
from funcprop.equations.oracle import Oracle, split_key
from funcprop.equations.rounding import spread
from funcprop.graph.tracing import Traced
from funcprop.program.call import has_values
from funcprop.progress import bar
from funcprop.rules.expressions import Expression

Progress: TypeAlias = "bool | Callable[[int, int], Any] | None"

# A derivation with fewer lines is verified before a bar would be looked at.
_MANY_LINES = 40
_TITLE = "Largest deviation from autodiff, relative to the largest entry or the terms that cancel in it"


class DerivationError(AssertionError):
    """A printed equation does not hold; the message names the line and the form."""


@dataclass(frozen=True, eq=False)
class Line:
    """One equation: `left = forms[0] = forms[1] …`.

    `key` is what the line defines in the environment: `z` for a value, `∂J/∂z` for a cotangent, `∂s/∂W1` for
    a partial derivative of one operator. In a loop, `sign` may be `+=`.
    """

    key: str
    left: str
    left_latex: str
    forms: tuple[Expression, ...]
    shape: tuple[int, ...]
    sign: str = "="

    def text(self) -> str:
        """The equation as Unicode text, without its shape."""
        return f"{self.left} {self.sign} " + " = ".join(form.text() for form in self.forms)

    def latex(self) -> str:
        """The equation as LaTeX, aligned at its first equals sign."""
        return f"{self.left_latex} &{self.sign} " + " = ".join(form.latex() for form in self.forms)


@dataclass(frozen=True)
class Verification:
    """The largest relative deviation of each verified line, by what it defines.

    `unchecked` are the lines in which no number could be compared, each with the reason.
    """

    errors: dict[str, float]
    unchecked: dict[str, str] = field(default_factory=dict)

    @classmethod
    def together(cls, found: Sequence[Verification]) -> Verification:
        """Several as one; of lines that define the same, as in two branches, the larger deviation."""
        errors: dict[str, float] = {}
        for key, error in (row for one in found for row in one.errors.items()):
            errors[key] = max(error, errors.get(key, 0.0))
        unchecked = {key: reason for one in found for key, reason in one.unchecked.items()}
        return cls(errors, {key: reason for key, reason in unchecked.items() if key not in errors})

    def __str__(self) -> str:
        rows = {key: f"{error:.1e}" for key, error in self.errors.items()} | self.unchecked
        width = max(map(len, rows), default=0)
        return "\n".join([_TITLE, *(f"{key:{width}}  {found}" for key, found in rows.items())])


def verify(
    lines: Sequence[Line],
    traced: Traced,
    tolerance: float | None = None,
    progress: Progress = None,
    is_optional: bool = False,
) -> Verification:
    """Evaluate every form of every line and compare it with autodiff; see `Derivation.verify`.

    Lines that are `is_optional` may have no finite number: they are of what is not run.
    """
    if not has_values(traced.leaves):
        raise TypeError(
            "verify: derive was given shapes (jax.ShapeDtypeStruct); give it arrays, so that its equations "
            "can be evaluated."
        )
    read = {key for line in lines for form in line.forms for key in (line.key, *form.symbols())}
    oracle = Oracle(traced, {split_key(key)[1] for key in read if key.startswith("∂")})
    environment = oracle.environment()
    errors: dict[str, float] = {}
    unchecked: dict[str, str] = {}
    with _shown(progress, len(lines)) as done:
        for start in range(0, len(lines), _MANY_LINES):
            group = lines[start : start + _MANY_LINES]
            reasons = {line.key: oracle.not_run_again(line.key) for line in group}
            values = _evaluated([line for line in group if reasons[line.key] is None], environment)
            for number, line in enumerate(group, start + 1):
                reason = reasons[line.key]
                if reason is None:
                    found = [
                        _check(line, i, value, oracle, environment, tolerance)
                        for i, value in enumerate(values[line.key])
                    ]
                    if any(one.compared for one in found):
                        errors[line.left] = max(one.error for one in found)
                    else:
                        reason = "no entries" if 0 in line.shape else "no finite entry to compare"
                if reason is not None:
                    unchecked[line.left] = reason
                done(number)
    if not is_optional:
        _require_numbers(lines, oracle, unchecked)
    return Verification(errors, unchecked)


def _evaluated(lines: Sequence[Line], environment: Mapping[str, Any]) -> dict[str, list[Any]]:
    """The values of all forms of some lines, by the lines' keys."""
    read = {key for line in lines for form in line.forms for key in form.symbols()}
    run = jit_once(
        lambda values: {line.key: [form.evaluate(values) for form in line.forms] for line in lines}
    )
    return run({key: environment[key] for key in read})


def _check(
    line: Line,
    index: int,
    value: Any,
    oracle: Oracle,
    environment: Mapping[str, Any],
    tolerance: float | None,
) -> Deviation:
    """How far one form is from autodiff.

    Raises:
        DerivationError: further than allowed.
    """
    form = line.forms[index]

    def rounding() -> np.ndarray:
        """How far rounding can carry the form or the truth."""
        fun, args = oracle.local(line.key)
        of_form = spread(form.evaluate, {key: environment[key] for key in form.symbols()})
        return np.maximum(spread(fun, *args), of_form)

    found = deviation(value, oracle.truth(line.key), tolerance, rounding)
    if found.is_allowed:
        return found
    if (op := oracle.not_linear(line.key)) is not None:
        raise DerivationError(
            f"verify: `{line.text()}` does not hold, because the backward function of {op.name} "
            f"({op.op}) is not linear in its cotangent: it is not the derivative of any function. "
            "Clip, scale or reverse gradients outside of the function that is derived."
        )
    raise DerivationError(
        f"verify: form {index + 1} of `{line.text()}` deviates from autodiff by {found.error:.3g} relative "
        f"to the largest entry or term (allowed {found.allowed:.3g})."
    )


def _require_numbers(lines: Sequence[Line], oracle: Oracle, unchecked: Mapping[str, str]) -> None:
    """Raise if nothing was compared in one of the sweeps, or nothing is known of the gradient.

    Raises:
        ValueError: with the first line that could not be compared, and why.
    """
    remedy = (
        "so nothing about it was verified. Derive at arguments where the function and its gradient are "
        "finite; fp.backprop(fun)(…).first_nonfinite() says what is not."
    )
    for sweep, is_forward in (("forward propagation", True), ("backpropagation", False)):
        telling = [
            line
            for line in lines
            if (line.key in oracle.values) == is_forward and any(form.symbols() for form in line.forms)
        ]
        if telling and all(line.left in unchecked for line in telling):
            raise ValueError(
                f"verify: no line of {sweep} has a number that can be compared ({telling[0].left}: "
                f"{unchecked[telling[0].left]}), {remedy}"
            )
    arguments = [oracle.cotangents[v.name] for v in oracle.graph.inputs if v.name in oracle.cotangents]
    if arguments and all(np.isnan(np.asarray(ct, complex)).all() for ct in arguments):
        what = "is NaN" if any(ct.size for ct in arguments) else "has no entries"
        raise ValueError(f"verify: the gradient {what}, {remedy}")


@contextlib.contextmanager
def _shown(progress: Progress, total: int) -> Iterator[Callable[[int], None]]:
    """Make the callback that is told the number of lines done."""
    if callable(progress):
        yield lambda number: progress(number, total)
    elif progress or (progress is None and total >= _MANY_LINES and importlib.util.find_spec("rich")):
        with bar("verifying", total) as update:
            yield lambda number: update(completed=number)
    else:
        yield lambda number: None
