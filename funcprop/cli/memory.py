"""`funcprop memory TARGET`: what a function holds in memory, for inference and for training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import optax
import typer

import funcprop as fp
from funcprop.cli.errors import TargetError, users_code
from funcprop.cli.options import ArgnumsOrAll, AsJson, HasAux, TargetName, parse_argnums, parse_bytes
from funcprop.cli.output import Output, emit, json_text
from funcprop.cli.target import Target, load
from funcprop.progress import bar

# For memory only the kind of an optimizer matters, not its rates.
OPTIMIZERS = {
    "sgd": optax.sgd(0.1),
    "momentum": optax.sgd(0.1, momentum=0.9),
    "adam": optax.adam(1e-3),
    "adamw": optax.adamw(1e-3),
    "none": None,
}


def memory(
    target: TargetName,
    argnums: ArgnumsOrAll = "0",
    optimizer: Annotated[
        str, typer.Option(help="sgd, momentum, adam or adamw: account a train step, not the gradient alone")
    ] = "none",
    measure: Annotated[
        bool, typer.Option(help="compile: rows are XLA's buffers; without, an estimate")
    ] = True,
    budget: Annotated[
        str | None, typer.Option(help="bytes, as 64MB: also the largest batch that fits, by leading axes")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="file to write the JSON to")] = None,
    has_aux: HasAux = False,
    as_json: AsJson = False,
) -> None:
    """Show the buffers held at the peak: of inference and training, compiled, and estimated."""

    def compute() -> Output:
        limit = None if budget is None else parse_bytes("--budget", budget)
        return report(load(target, has_aux), parse_argnums(argnums), optimizer, measure, limit, out)

    emit(compute, as_json, out)


def report(
    target: Target,
    argnums: Sequence[int] | None,
    optimizer: str,
    measure: bool,
    budget: int | None,
    out: Path | None,
) -> Output:
    """The tables of `fp.memory.footprint`, and `fp.memory.batch_limit` where there is a budget."""
    if optimizer not in OPTIMIZERS:
        raise TargetError(f"--optimizer {optimizer!r} is not known; choose one of {', '.join(OPTIMIZERS)}.")
    chosen = OPTIMIZERS[optimizer]
    at = argnums if argnums is None or len(argnums) > 1 else argnums[0]
    using = "" if chosen is None else f" with --optimizer {optimizer}"
    with (
        bar(f"{target.label}: memory", counted=False),
        users_code(f"target {target.label!r}: accounting{using} failed", None),
    ):
        account = fp.memory.footprint(target.function, at, optimizer=chosen, measure=measure)
        found = account(*target.args, **target.kwargs)
    text, data = str(found), {"target": target.label, **found.as_dict()}
    if budget is not None:
        limits = _limits(target, at, chosen, budget, tuple(found.ledgers), measure)
        text += "\n\n" + "\n".join(
            f"largest batch within {budget:,} bytes, {name}: "
            + (limit if isinstance(limit, str) else f"{limit:,}")
            for name, limit in limits.items()
        )
        data |= {"budget": budget, "batch_limit": limits}
    if out is None:
        return Output(text, data)
    return Output(f"{', '.join(found.ledgers)} of {target.label}\n\n{text}", data, json_text(data, 2) + "\n")


def _limits(
    target: Target, argnums: Any, optimizer: Any, budget: int, programs: Sequence[Any], measure: bool
) -> dict[str, int | str]:
    """The largest batch of each program, or why there is none."""
    found: dict[str, int | str] = {}
    by: Any = "checked" if measure else "estimate"
    for program in programs:
        search = fp.memory.batch_limit(
            target.function, budget, argnums, program=program, optimizer=optimizer, by=by
        )
        try:
            limit = search(*target.args, **target.kwargs)
            found[program] = "no limit" if limit == math.inf else int(limit)
        except ValueError as error:
            found[program] = str(error)
    return found
