"""`fp.compare(fun)(*args)`: which rules fire on a function, where, and what each saves in time and bytes.

Two programs for the whole function, `value_and_grad` by autodiff and by the rules, and two for each operator
that has a rule, are compiled and run in turn; the fastest run of each counts. An operator is measured by
itself, at the types that it has in the function and at random numbers: value and all cotangents.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from funcprop import _jax
from funcprop.cost.timing import fastest
from funcprop.graph.graph import aligned, place_text
from funcprop.graph.naming import without_transformations
from funcprop.graph.objective import Argnums
from funcprop.graph.references import require_no_references
from funcprop.program.call import without_aux
from funcprop.program.structural_key import structural_key
from funcprop.rules.matching import matches
from funcprop.rules.measuring.ruled_programs import RuledProgram, alone, whole
from funcprop.rules.rewrite import Match
from funcprop.rules.rule_set import RuleSet
from funcprop.rules.sets import autodiff, chosen_rules


@dataclass(frozen=True)
class Measured:
    """Seconds and temporary bytes of two compiled programs: by autodiff, and by the rules.

    Seconds are None where only shapes were given.
    """

    autodiff_seconds: float | None
    rules_seconds: float | None
    autodiff_bytes: int
    rules_bytes: int

    @property
    def time(self) -> float | None:
        """The ratio of the times; below 1 the rules are faster."""
        if self.autodiff_seconds is None or self.rules_seconds is None:
            return None
        return self.rules_seconds / self.autodiff_seconds

    @property
    def bytes(self) -> float:
        """The ratio of the temporary bytes; infinite where autodiff needs none and the rules some."""
        if self.autodiff_bytes == 0:
            return 1.0 if self.rules_bytes == 0 else math.inf
        return self.rules_bytes / self.autodiff_bytes


@dataclass(frozen=True)
class OperatorRow:
    """An operator that has a rule: where it is, how often the same is found, and what its rule saves.

    `reason` says why the rule is not used; `measured` is None then, and where an operator cannot be run by
    itself (inside of a `shard_map`).
    """

    operator: str
    scope: str
    source: str | None
    count: int
    reason: str | None
    measured: Measured | None

    @property
    def where(self) -> str:
        """The scope, or the source line where there is none."""
        file, _, line = (self.source or "").rpartition(":")
        return self.scope or f"{Path(file).name}:{line}".lstrip(":")


@dataclass(frozen=True)
class Comparison:
    """The effect of the rules on one function. `print` shows a table, `as_dict` is the same as plain data."""

    name: str
    rules: str
    platform: str
    whole: Measured
    rows: tuple[OperatorRow, ...]

    @property
    def fired(self) -> tuple[OperatorRow, ...]:
        """The operators that are differentiated by a rule."""
        return tuple(row for row in self.rows if row.reason is None)

    @property
    def left(self) -> tuple[OperatorRow, ...]:
        """The operators whose rule is not used, each with the reason."""
        return tuple(row for row in self.rows if row.reason is not None)

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        title = f"{self.name}: value_and_grad by rules {self.rules!r} beside autodiff, on {self.platform}"
        table = [("operator", "count", "time", "bytes", "autodiff ms", "rules ms", "where")]
        table.append(("the whole", "", *_cells(self.whole), ""))
        table += [
            (r.operator, f"{r.count}", *_cells(r.measured), place_text(r.scope, r.source)) for r in self.fired
        ]
        parts = [title, aligned(table, right={1, 2, 3, 4, 5}, widest=60)]
        if not self.fired:
            parts.append("No rule fires; what has no rule is differentiated by JAX.")
        if self.left:
            reasons = [("left to autodiff", "count", "reason", "where")]
            reasons += [
                (r.operator, f"{r.count}", r.reason or "", place_text(r.scope, r.source)) for r in self.left
            ]
            parts.append(aligned(reasons, right={1}, widest=60))
        return "\n\n".join(parts)


def compare(
    fun: Callable[..., Any],
    argnums: Argnums = 0,
    has_aux: bool = False,
    *,
    rules: RuleSet | None = None,
    repeats: int = 10,
) -> Callable[..., Comparison]:
    """Compare rules and autodiff on this function: the rules that fire, their operators, and what each saves.

    `compare(fun, argnums, has_aux)(*args, **kwargs) -> Comparison`. Times are seconds of the fastest of
    `repeats` runs in turn, bytes the temporary bytes of the compiled programs. With shapes
    (`jax.ShapeDtypeStruct`) for arguments nothing is run and only bytes are compared. It is compiled for the
    devices of the arguments, or of their shardings: a topology's TPU as well.

    Args:
        fun: as for `fp.value_and_grad`.
        argnums: the arguments to differentiate; None for all that have a derivative.
        has_aux: as in `fp.value_and_grad`.
        rules: a rule set; `fp.rules.default` if None.
        repeats: how often each program is run.

    Raises:
        ValueError: `repeats` is less than 1, or there is no argument at a position in `argnums`.
        TypeError: `fun` does not return a scalar, as in `jax.grad`, or nothing can be differentiated.

    Example:
        >>> import jax.numpy as jnp, funcprop as fp
        >>> loss = lambda x: jnp.sum(jnp.tanh(x))
        >>> found = fp.compare(loss, rules=fp.rules.handwritten)(jnp.ones(8))
        >>> [(row.operator, row.count) for row in found.fired]
        [('tanh', 1)]
    """
    rules = chosen_rules(rules)
    if repeats < 1:
        raise ValueError(f"compare: repeats={repeats}; every program has to run at least once.")
    scalar = without_aux(fun) if has_aux else fun

    def compared(*args: Any, **kwargs: Any) -> Comparison:
        require_no_references("compare", fun, args, kwargs)
        label = getattr(fun, "__name__", type(fun).__name__)
        program, call = whole(scalar, label, argnums, args, kwargs)
        own = rules.for_arguments(call.values)
        measured = _measured(program, own, repeats)
        found = matches(fun, own)(*args, **kwargs)
        device = next((d for v in call.values if (d := _jax.device_of(v)) is not None), None)

        def of_operator(match: Match) -> Measured:
            return _measured(alone(match.equation, program.runs, device), own, repeats)

        return Comparison(label, own.name, own.platform, measured, tuple(_rows(found, of_operator)))

    return compared


def _rows(found: Sequence[Match], measure: Callable[[Match], Measured]) -> list[OperatorRow]:
    """One row for equal operators with the same outcome, in the order in which they are met."""
    keys = [(m.operator, m.reason, structural_key(_jax.one_equation_jaxpr(m.equation))) for m in found]
    counts = Counter(keys)
    rows: dict[Any, OperatorRow] = {}
    for key, match in zip(keys, found, strict=True):
        if key not in rows:
            measured = None if match.reason is not None or match.mapped else measure(match)
            scope = without_transformations(match.scope, ("vmap",))
            rows[key] = OperatorRow(match.operator, scope, match.source, counts[key], match.reason, measured)
    return list(rows.values())


def _measured(program: RuledProgram, rules: RuleSet, repeats: int) -> Measured:
    compiled = [program.compiled(own) for own in (autodiff, rules)]
    temporary = [_jax.temporary_bytes(program) for program in compiled]
    values = program.operands
    seconds: list[Any] = fastest([(p, values) for p in compiled], repeats) if program.runs else [None, None]
    return Measured(*seconds, *temporary)


def _cells(measured: Measured | None) -> tuple[str, str, str, str]:
    if measured is None:
        return "-", "-", "-", "-"
    both = measured.autodiff_seconds, measured.rules_seconds
    seconds = ["-" if s is None else f"{s * 1e3:.3g}" for s in both]
    ratio = "-" if measured.time is None else f"{measured.time:.2f}"
    return ratio, f"{measured.bytes:.2f}", seconds[0], seconds[1]
