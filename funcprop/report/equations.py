"""The equations on the page: typeset, of repeated blocks the first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from markupsafe import Markup

from funcprop.report.mathml import mathml
from funcprop.verification import Line

if TYPE_CHECKING:
    from funcprop.report.report import Report

# Of a function that does not repeat itself, the page has no more lines than this of each sweep.
MOST_LINES = 400


@dataclass(frozen=True)
class Equation:
    """A line: `key` is its id on the page, `name` what it defines, `forms` what stands after `=`."""

    key: str
    name: str
    left: Markup
    forms: tuple[Markup, ...]
    shape: str


@dataclass(frozen=True)
class Equations:
    """Both sweeps; `omitted` lines are those of repeated blocks and what is beyond the limit."""

    forward: tuple[Equation, ...]
    backward: tuple[Equation, ...]
    omitted: int


def equations(report: Report) -> Equations:
    """The lines of what is drawn."""
    derivation = report.derivation
    chosen = _drawn(report)
    forward = [line for line in derivation.forward if line.key in chosen]
    backward = [line for line in derivation.backward if _about(line.key) in chosen]
    omitted = len(derivation.forward) + len(derivation.backward)
    forward, backward = forward[:MOST_LINES], backward[:MOST_LINES]
    return Equations(
        tuple(_equation(f"f{i}", line) for i, line in enumerate(forward)),
        tuple(_equation(f"b{i}", line) for i, line in enumerate(backward)),
        omitted - len(forward) - len(backward),
    )


def _about(key: str) -> str:
    """The variable whose cotangent, or partial derivative, a line is."""
    return key.split("/∂", 1)[-1]


def _drawn(report: Report) -> set[str]:
    """Variables that are squares, or results of circles; of folded ones the first, in open scopes only."""
    producer = {op.name: op for op in report.graph.operators}
    found: set[str] = set()
    for node in report.drawing.picture.nodes:
        if node.kind == "variable":
            found.update(node.members[:1])
        else:
            shown = node.members[:1] if node.kind == "operator" else node.members
            found.update(v.name for name in shown for v in producer[name].outputs)
    return found


def _equation(key: str, line: Line) -> Equation:
    return Equation(
        key,
        line.key,
        Markup(mathml(line.left_latex, line.left)),
        tuple(Markup(mathml(form.latex(), form.text())) for form in line.forms),
        " × ".join(map(str, line.shape)) or "scalar",
    )


def by_variable(lines: tuple[Equation, ...], prefix: str) -> Iterator[tuple[str, str]]:
    """The variable that each line is about, with the line's id; partial derivatives are about none."""
    for line in lines:
        if line.name.startswith(prefix):
            yield line.name.removeprefix(prefix), line.key
