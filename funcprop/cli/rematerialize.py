"""`funcprop rematerialize TARGET`: what to save and what to compute again, within a budget of bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

import funcprop as fp
from funcprop.cli.errors import users_code
from funcprop.cli.options import AsJson, HasAux, TargetName, parse_budget
from funcprop.cli.output import Output, emit, json_text
from funcprop.cli.target import Target, load
from funcprop.progress import bar


def rematerialize(
    target: TargetName,
    budget: Annotated[
        str | None,
        typer.Option(help="what may be held between the sweeps, besides arguments: bytes as 64MB, or 25%"),
    ] = None,
    peak: Annotated[
        str | None, typer.Option(help="also, or instead, what may be held while a segment is recomputed")
    ] = None,
    chunks: Annotated[
        int | None, typer.Option(min=1, help="instead, recompute everything in so many pieces")
    ] = None,
    count_arguments: Annotated[
        bool, typer.Option("--count-arguments", help="count the arguments that are held as well")
    ] = False,
    measure: Annotated[bool, typer.Option(help="compile the gradient both ways, as a proof")] = True,
    has_aux: HasAux = False,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="file to write the JSON to")] = None,
    as_json: AsJson = False,
) -> None:
    """A plan of what is saved and what is recomputed so that the gradient fits, and its proof."""

    def compute() -> Output:
        options = {
            "budget": parse_budget("--budget", budget),
            "peak": parse_budget("--peak", peak),
            "chunks": chunks,
            "count_arguments": count_arguments,
        }
        if budget is None and peak is None and chunks is None:
            options["budget"] = 0.25
        return report(load(target, has_aux), options, measure)

    emit(compute, as_json, out)


def report(target: Target, options: dict[str, Any], measure: bool) -> Output:
    """The plan of `fp.memory.rematerialize`, and what XLA allocates with and without it."""
    with (
        bar(f"{target.label}: rematerialisation", counted=False),
        users_code(f"target {target.label!r}: rematerialisation failed", None),
    ):
        plan = fp.memory.remat_plan(target.function, **options)(*target.args, **target.kwargs)
        text, data = str(plan), {"target": target.label, **plan.as_dict(), "proof": None}
        if measure:
            proof = plan.prove()
            text, data = f"{text}\n\n{proof}", {**data, "proof": proof.as_dict()}
    return Output(text, data, json_text(data, 2) + "\n")
