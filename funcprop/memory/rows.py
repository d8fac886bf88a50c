"""From the buffers of a program to the rows of its ledger."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from funcprop import _jax
from funcprop.memory.cases import AccountedProgram
from funcprop.memory.heap import Buffer
from funcprop.memory.ledger import Category, Row
from funcprop.memory.liveness import Timeline, timeline
from funcprop.memory.lowering import Lowering
from funcprop.memory.steps import Step, StepProgram, Value, clean

_POINTER = 8


@dataclass(frozen=True, eq=False)
class Predicted:
    """The rows of a program and their sum; `temporary` and `captured` bytes of it."""

    total: int
    temporary: int
    captured: int
    rows: tuple[Row, ...]


def predicted(case: AccountedProgram, library: bool, barriers: bool = False) -> Predicted:
    """Account a program without compiling it; `library` as in `kernels`, `barriers` as in `Lowering`."""
    program = Lowering(barriers).program(case.jaxpr, case.names)
    program.donated = case.aliases
    time = timeline(program, library)
    constants = list(_constants(program))
    rows = [*_arguments(program, case, time), *constants, *_results(program, case)]
    rows += _Temporaries(program, case).rows(time, "")
    total, captured = (sum(row.nbytes for row in some) for some in (rows, constants))
    return Predicted(total, time.temporary, captured, tuple(rows))


def peak_bytes(closed: Any) -> int:
    """Estimate the peak bytes of a jaxpr as a program of its own, without captured constants."""
    count = len(_jax.open_jaxpr(closed).invars)
    found = predicted(AccountedProgram(closed, [""] * count, ["inputs"] * count), library=True)
    return found.total - found.captured


def _arguments(program: StepProgram, case: AccountedProgram, time: Timeline) -> Iterable[Row]:
    """The arguments that are read: others are not given to the program."""
    read = {id(v) for kernel in time.order for v in kernel.reads}
    read |= {id(v) for v in program.outputs if v is not None}
    read |= {id(s.inputs[0]) for v in program.outputs if v is not None and (s := v.step) and s.kind == "view"}
    scopes = _scopes_of(program, case)
    for value, name, category in zip(program.arguments, case.names, case.categories, strict=True):
        if id(value) in read:
            yield _row(name, scopes.get(name, ""), category, value, "input")


def _constants(program: StepProgram) -> Iterable[Row]:
    """The arrays that are captured and read, in loops too: they are part of the executable."""
    for value in program.constants:
        if value.users:
            yield _row(value.name, clean(value.users[0].scope), "constants", value, "constant")
    for step in program.steps:
        for body in step.bodies:
            yield from _constants(body)


def _scopes_of(program: StepProgram, case: AccountedProgram) -> dict[str, str]:
    """Where an argument is first read; the optimizer's state belongs to the parameter of its name."""
    found = {
        name: clean(value.users[0].scope)
        for value, name in zip(program.arguments, case.names, strict=True)
        if value.users
    }
    parameters = [n for n, c in zip(case.names, case.categories, strict=True) if c == "parameters"]
    for name, category in zip(case.names, case.categories, strict=True):
        if category == "optimizer state":
            owners = [p for p in parameters if name.endswith(f"/{p}")]
            found[name] = found.get(max(owners, key=len), "") if owners else found.get(name, "")
    return found


def _results(program: StepProgram, case: AccountedProgram) -> Iterable[Row]:
    """What is returned in memory of its own, and the table of pointers to several results."""
    overwriting = set(program.donated.values())
    for j, value in enumerate(program.outputs):
        if j in overwriting or value is None:
            continue
        gradient = value.step is not None and "transpose(" in value.step.scope
        category: Category = "gradients" if gradient else "results"
        operator = "input" if value.step is None else value.step.op
        scope = "" if value.step is None else clean(value.step.scope)
        yield _row(value.name or f"result {j}", scope, category, value, operator)
    literals = sum(value is None for value in program.outputs)
    if literals:
        yield Row("numbers", "", "results", 4 * literals, (literals,), "float32", "literal")
    if len(program.outputs) > 1:
        count = len(program.outputs)
        yield Row("pointers", "", "results", _POINTER * count, (count,), "uint64", "tuple")


def _row(name: str, scope: str, category: Category, value: Value, operator: str) -> Row:
    return Row(name, scope, category, value.nbytes, value.shape, str(value.dtype), operator)


class _Temporaries:
    """What is neither argument nor result, and what it is for."""

    def __init__(self, program: StepProgram, case: AccountedProgram) -> None:
        self.argument = {
            id(v): (name, category)
            for v, name, category in zip(program.arguments, case.names, case.categories, strict=True)
        }

    def rows(self, time: Timeline, prefix: str) -> list[Row]:
        """The buffers that are live at the peak, those in loops included, and what gaps there are."""
        starts = {id(v): i for i, kernel in enumerate(time.order) for v in kernel.outputs}
        readers: dict[int, list[str]] = {}
        for kernel in time.order:
            for value in kernel.reads:
                readers.setdefault(id(value), []).append(kernel.root.scope)
        found = []
        for buffer in time.live:
            if isinstance(buffer.values[0], Step):
                found += self._scratch(buffer.values[0], buffer.nbytes, time, prefix)
            else:
                found.append(self._row(buffer, starts, readers, time.at, prefix))
        gaps = time.temporary - sum(row.nbytes for row in found)
        if gaps > 0:
            found.append(Row("gaps", clean(prefix), "unused", gaps, (gaps,), "uint8", "placement"))
        return found

    def _scratch(self, step: Step, nbytes: int, time: Timeline, prefix: str) -> list[Row]:
        """What a kernel holds for itself: the peak of a loop's body, or room of its own."""
        scope = _joined(prefix, step.scope)
        if id(step) in time.inside:
            return self.rows(time.inside[id(step)], scope)
        return [Row(step.op, clean(scope), "activations", nbytes, (nbytes,), "uint8", step.op)]

    def _row(
        self,
        buffer: Buffer,
        starts: Mapping[int, int],
        readers: Mapping[int, Sequence[str]],
        at: int,
        prefix: str,
    ) -> Row:
        """A buffer, by the value that it holds at a time."""
        values = [v for v in buffer.values if isinstance(v, Value)]
        value = [v for v in values if starts.get(id(v), 0) <= at][-1]
        step = value.step
        assert step is not None
        scope = _joined(prefix, step.scope)
        name, category = value.name or step.op, self._category(value, scope, readers.get(id(value), ()))
        return _row(name, clean(scope), category, value, step.op)

    def _category(self, value: Value, scope: str, later: Sequence[str]) -> Category:
        """By the sweep that makes a value, and those of the kernels that read it."""
        step = value.step
        assert step is not None
        if step.op == "copy" and id(step.inputs[0]) in self.argument:
            return self.argument[id(step.inputs[0])][1]
        if "transpose(" in scope:
            return "gradients" if any("transpose(" not in user for user in later) else "cotangents"
        if "optimizer" in scope.split("/"):
            return "gradients"
        return "saved" if any("transpose(" in user for user in later) else "activations"


def _joined(prefix: str, scope: str) -> str:
    return "/".join(part for part in (prefix, scope) if part)


def largest(rows: Sequence[Row], count: int = 3) -> str:
    """The largest rows as text."""
    chosen = sorted(rows, key=lambda row: -row.nbytes)[:count]
    return ", ".join(f"{row.name} {row.nbytes:,} ({row.category})" for row in chosen)
