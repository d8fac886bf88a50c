"""`funcprop derive TARGET`: the equations of both sweeps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import typer

import funcprop as fp
from funcprop.cli.errors import users_code
from funcprop.cli.options import ArgnumsOrAll, AsJson, HasAux, TargetName, parse_argnums
from funcprop.cli.output import Output, emit, number
from funcprop.cli.target import Target, load
from funcprop.equations.verification import Line
from funcprop.progress import bar


def derive(
    target: TargetName,
    argnums: ArgnumsOrAll = "0",
    latex: Annotated[bool, typer.Option("--latex", help="LaTeX instead of text")] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="evaluate every line and compare it with autodiff")
    ] = False,
    operators: Annotated[bool, typer.Option("--operators", help="a line for every operator")] = False,
    has_aux: HasAux = False,
    as_json: AsJson = False,
) -> None:
    """The equations of forward propagation and backpropagation."""
    detail: Literal["layers", "operators"] = "operators" if operators else "layers"
    emit(lambda: report(load(target, has_aux), parse_argnums(argnums), latex, verify, detail), as_json)


def report(
    target: Target,
    argnums: Sequence[int] | None,
    latex: bool,
    verify: bool,
    detail: Literal["layers", "operators"] = "layers",
) -> Output:
    """The derivation as text or LaTeX, followed by the deviations if they were asked for."""
    if verify:
        target.require_arrays("--verify", "the equations alone take shapes")
    with (
        bar(f"{target.label}: deriving", counted=False) as update,
        users_code(f"target {target.label!r}: deriving failed", None),
    ):
        derivation = fp.derive(target.function, argnums, detail=detail)(*target.args, **target.kwargs)

        def progress(done: int, total: int) -> None:
            update(description=f"{target.label}: verifying", completed=done, total=total)

        verification = derivation.verify(progress=progress) if verify else None
    text = derivation.latex() if latex else derivation.text()
    if verification is not None:
        mark = "% " if latex else ""
        text += "\n\n" + "\n".join(mark + line for line in str(verification).splitlines())
    data = {
        "target": target.label,
        "forward": [_data(line) for line in derivation.forward],
        "backward": [_data(line) for line in derivation.backward],
        "insides": [
            {"title": title, "lines": [_data(line) for line in lines]}
            for inside in derivation.insides
            for title, lines in inside.sections()
        ],
        "latex": derivation.latex(),
        "deviations": None
        if verification is None
        else {key: number(error) for key, error in verification.errors.items()},
        "unchecked": {} if verification is None else verification.unchecked,
    }
    return Output(text, data)


def _data(line: Line) -> dict[str, Any]:
    return {
        "name": line.key,
        "text": line.text(),
        "latex": line.latex(),
        "shape": list(line.shape),
        "left": line.left,
        "forms": [form.text() for form in line.forms],
    }
