"""`funcprop draw TARGET`: the computational graph as a picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

import funcprop as fp
from funcprop.cli.errors import TargetError, users_code
from funcprop.cli.options import Argnums, AsJson, HasAux, TargetName, parse_argnums
from funcprop.cli.output import Output, emit
from funcprop.cli.target import Target, load
from funcprop.drawing.draw import SUFFIXES

FORMATS = tuple(dict.fromkeys(SUFFIXES.values()))


class Choices(NamedTuple):
    """The options of the picture."""

    sweeps: str | None
    argnums: Sequence[int] | None
    depth: int | None
    loops: int | None
    fold: bool
    types: bool | None


def draw(
    target: TargetName,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="file to write: .svg .html .png .pdf .dot .gv .mmd .json"),
    ] = None,
    written_as: Annotated[
        str | None, typer.Option("--format", help="svg (the default), html, png, pdf, dot, mermaid or json")
    ] = None,
    depth: Annotated[
        int | None, typer.Option(min=0, help="collapse scopes that have this many around them; 0 for all")
    ] = None,
    loops: Annotated[
        int | None,
        typer.Option(min=0, help="open loops to this many levels; by default one, in small graphs"),
    ] = None,
    fold: Annotated[bool, typer.Option(help="draw repeated blocks once, with their number")] = True,
    types: Annotated[
        bool | None, typer.Option(help="write dtypes and bytes; by default of up to 12 operators")
    ] = None,
    backward: Annotated[bool, typer.Option("--backward", help="both sweeps, and what is saved")] = False,
    second: Annotated[
        bool, typer.Option("--second", help="the Hessian-vector product, coloured by class")
    ] = False,
    order: Annotated[
        str, typer.Option(help="of --second: forward-over-reverse or reverse-over-reverse")
    ] = "forward-over-reverse",
    argnums: Argnums = "0",
    has_aux: HasAux = False,
    as_json: AsJson = False,
) -> None:
    """The graph as a picture: squares are variables, circles operators, arrows data flow."""

    def compute() -> Output:
        if backward and second:
            raise TargetError("--backward and --second are two pictures; ask for one of them.")
        sweeps = "backward" if backward else order if second else None
        choices = Choices(sweeps, parse_argnums(argnums), depth, loops, fold, types)
        return report(load(target, has_aux), choices, out, written_as)

    emit(compute, as_json, out)


def report(target: Target, choices: Choices, out: Path | None, written_as: str | None) -> Output:
    """Draw, write the file if there is one, and say what was drawn."""
    chosen = _format(out, written_as)
    if out is None and chosen in ("png", "pdf"):
        raise TargetError(f"--format {chosen} is a file of bytes; say which, as --out graph.{chosen}.")
    with users_code(f"target {target.label!r}: drawing failed", None):
        graph = _graph(target, choices)
    drawing = fp.draw(graph, depth=choices.depth, loops=choices.loops, fold=choices.fold, types=choices.types)
    try:
        text = getattr(drawing, chosen)()
    except fp.DrawingError as error:
        raise TargetError(str(error)) from None
    picture = drawing.picture
    data: dict[str, Any] = {
        "target": target.label,
        "out": None,
        "format": chosen,
        "picture": json.loads(drawing.json()),
    }
    if isinstance(graph, fp.BackwardGraph):
        data["residual_bytes"] = graph.residual_bytes
    if isinstance(graph, fp.SecondOrderGraph):
        data["classes"] = graph.count()
    if out is None:
        return Output(text, data)
    return Output(f"{len(picture.nodes)} nodes, {len(picture.edges)} arrows", data, text)


def _format(out: Path | None, written_as: str | None) -> str:
    if written_as is not None and written_as not in FORMATS:
        raise TargetError(f"--format {written_as!r} is not known; choose one of {', '.join(FORMATS)}.")
    if out is None:
        return written_as or "svg"
    by_ending = SUFFIXES.get(out.suffix)
    if by_ending is None and written_as is None:
        raise TargetError(
            f"--out {str(out)!r}: its suffix does not say what to write; use one of {', '.join(SUFFIXES)}, "
            "or --format."
        )
    if by_ending is not None and written_as not in (None, by_ending):
        raise TargetError(f"--out {str(out)!r} is not --format {written_as}; leave one of them out.")
    return written_as or str(by_ending)


def _graph(target: Target, choices: Choices) -> fp.Graph:
    args, kwargs = target.args, target.kwargs
    if choices.sweeps is None:
        return fp.trace(target.function)(*args, **kwargs)
    if choices.argnums is None:
        raise TargetError("--argnums all is not for `draw`; give positions, as 0 or 0,2.")
    if choices.sweeps == "backward":
        return fp.backward_graph(target.function, choices.argnums)(*args, **kwargs)
    order: Any = choices.sweeps
    return fp.second_order_graph(target.function, choices.argnums, order=order)(*args, **kwargs)
