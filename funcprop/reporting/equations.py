"""The equations on the page: typeset, of repeated blocks the first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from markupsafe import Markup

from funcprop.equations.bodies import InsideLines
from funcprop.equations.line_writer import forward_lines
from funcprop.equations.verification import Line
from funcprop.graph.graph import shape_text
from funcprop.reporting.mathml import mathml
from funcprop.reporting.report_data import ReportData

# So many lines of a sweep are read by a person; more are left to `fp.derive`.
_MOST_READABLE = 200


@dataclass(frozen=True)
class Equation:
    """A line: `key` is its id on the page, `name` what it defines, `forms` stand after `sign` and `=`."""

    key: str
    name: str
    left: Markup
    forms: tuple[Markup, ...]
    shape: str
    sign: str = "="


TitledLines: TypeAlias = "tuple[str, tuple[Equation, ...]]"


@dataclass(frozen=True)
class TypesetEquations:
    """Both sweeps, and a step of the open loops.

    `omitted` lines are those of repeated blocks and what is beyond the limit. `readable` are both sweeps with
    a line for what a person would write down, and `where` what their symbols stand for; None where these are
    the same lines.
    """

    forward: tuple[Equation, ...]
    backward: tuple[Equation, ...]
    inside: tuple[Equation, ...]
    omitted: int
    readable: tuple[tuple[Equation, ...], tuple[Equation, ...]] | None = None
    where: tuple[str, ...] = ()
    insides: tuple[tuple[TitledLines, ...], ...] = ()


def equations(report: ReportData, most: int) -> TypesetEquations:
    """The lines of what is drawn, of each sweep no more than `most`."""
    derivation = report.derivation
    chosen = _drawn(report)
    forward = [line for line in derivation.forward if line.key in chosen]
    backward = [line for line in derivation.backward if _about(line.key) in chosen]
    steps = _steps(report)
    inside = [line for line in steps if line.key in chosen]
    omitted = len(derivation.forward) + len(derivation.backward) + len(steps)
    forward, backward, inside = forward[:most], backward[:most], inside[:most]
    readable = report.readable
    if readable is not None and len(readable.backward) > min(most, _MOST_READABLE):
        readable = None
    sweeps = () if readable is None else (readable.forward, readable.backward)
    typeset = [
        tuple(_equation(f"{name}{i}", line) for i, line in enumerate(lines))
        for name, lines in zip("rs", sweeps, strict=False)
    ]
    return TypesetEquations(
        tuple(_equation(f"f{i}", line) for i, line in enumerate(forward)),
        tuple(_equation(f"b{i}", line) for i, line in enumerate(backward)),
        tuple(_equation(f"f{i}", line) for i, line in enumerate(inside, len(forward))),
        omitted - len(forward) - len(backward) - len(inside),
        (typeset[0], typeset[1]) if typeset else None,
        () if readable is None else tuple(readable.where()),
        () if readable is None else tuple(_insides(readable.insides, "l")),
    )


def _insides(insides: Sequence[InsideLines], key: str) -> Iterator[tuple[TitledLines, ...]]:
    """One step of every loop and every branch, forwards and backwards, each under its title."""
    for k, inside in enumerate(insides):
        yield tuple(
            (title, tuple(_equation(f"{key}{sweep}{k}.{i}", line) for i, line in enumerate(lines)))
            for sweep, (title, lines) in zip("fb", inside.own_sections(), strict=False)
        )
        yield from _insides(inside.insides, f"{key}{k}.")


def _steps(report: ReportData) -> list[Line]:
    """One step of every open loop; what is in a loop is written without the name of the loop."""
    shown, variables = report.opened.shown, report.opened.variables
    inner = {v.name: v.name for found in variables.values() for v in found}
    if not inner:
        return []
    written = {name: name.rpartition("]/")[2] for name in inner}
    lines = forward_lines(shown.graph, report.graph.outputs[0], written, shown.places.values())
    return [line for line in lines if line.key in inner]


def _about(key: str) -> str:
    """The variable whose cotangent, or partial derivative, a line is."""
    return key.split("/∂", 1)[-1]


def _drawn(report: ReportData) -> set[str]:
    """Variables that are squares, or results of circles; of folded ones the first, in open scopes only."""
    producer = {op.name: op for op in (*report.opened.shown.graph, *report.graph)}
    found: set[str] = set()
    for node in (node for picture in report.pictures for node in picture.drawing.picture.nodes):
        if node.kind == "variable":
            found.update(node.members[:1])
        elif not node.inside:
            shown = node.members[:1] if node.kind == "operator" else node.members
            found.update(v.name for name in shown for v in producer[name].outputs)
    # An open loop is a line of its own, too.
    return found | {v.name for loop in report.opened.operators for v in producer[loop].outputs}


def _equation(key: str, line: Line) -> Equation:
    return Equation(
        key,
        line.key,
        Markup(mathml(line.left_latex, line.left)),
        tuple(Markup(mathml(form.latex(), form.text())) for form in line.forms),
        shape_text(line.shape),
        line.sign,
    )


def by_variable(lines: tuple[Equation, ...], prefix: str) -> Iterator[tuple[str, str]]:
    """The variable that each line is about, with the line's id; partial derivatives are about none."""
    for line in lines:
        if line.name.startswith(prefix):
            yield line.name.removeprefix(prefix), line.key
