"""`funcprop second TARGET`: what second derivatives cost, predicted and measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

import funcprop as fp
from funcprop.cli.errors import TargetError, users_code
from funcprop.cli.options import ArgnumsOrAll, AsJson, HasAux, TargetName, parse_argnums
from funcprop.cli.output import Output, emit, json_text
from funcprop.cli.target import Target, load
from funcprop.progress import bar


def second(
    target: TargetName,
    argnums: ArgnumsOrAll = "0",
    output: Annotated[
        str | None, typer.Option(help="the model's output, by its name in `funcprop forward`")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="how often each program is run")] = 10,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="file to write: .txt the table, .json the data")
    ] = None,
    has_aux: HasAux = False,
    as_json: AsJson = False,
) -> None:
    """Matrix products, bytes and time of gradient, HVP, Gauss-Newton product and Hessian."""
    emit(lambda: report(load(target, has_aux), parse_argnums(argnums), output, repeats, out), as_json, out)


def report(
    target: Target, argnums: Sequence[int] | None, output: str | None, repeats: int, out: Path | None
) -> Output:
    """The table of `fp.second_order_cost`, also written to a file if there is one."""
    if out is not None and out.suffix not in (".txt", ".json"):
        raise TargetError(f"--out {str(out)!r}: its suffix does not say what to write; use .txt or .json.")
    with (
        bar(f"{target.label}: second derivatives", counted=False),
        users_code(f"target {target.label!r}: counting failed", None),
    ):
        costs = fp.second_order_cost(target.function, argnums, output=output, repeats=repeats)
        found = costs(*target.args, **target.kwargs)
    text, data = str(found), {"target": target.label, **found.as_dict()}
    if out is None:
        return Output(text, data)
    content = text if out.suffix == ".txt" else json_text(data)
    return Output(f"the table of {target.label}\n\n{text}", data, content + "\n")
