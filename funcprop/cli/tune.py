"""`funcprop tune TARGET`: measure which rules win for a function on this machine."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated

import typer

import funcprop as fp
from funcprop.cli.errors import TargetError, users_code
from funcprop.cli.options import AsJson, HasAux, TargetName
from funcprop.cli.output import Output, emit
from funcprop.cli.target import Target, load
from funcprop.progress import bar


def tune(
    target: TargetName,
    objective: Annotated[
        str, typer.Option(help="time, bytes, or the weight of time between 0 and 1")
    ] = "time",
    file: Annotated[
        Path | None, typer.Option(help="file in which results are kept, instead of the one in the cache")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="how often each program is run")] = 9,
    has_aux: HasAux = False,
    as_json: AsJson = False,
) -> None:
    """Measure each operator's rule on this machine, and print what is kept for the function and why."""
    emit(lambda: tuned(load(target, has_aux), objective, file, repeats), as_json)


def tuned(target: Target, objective: str, file: Path | None, repeats: int) -> Output:
    """The rule set of `fp.rules.measured`, and the seconds that it took."""
    chosen: str | float = objective
    if objective not in ("time", "bytes"):
        try:
            chosen = float(objective)
        except ValueError:
            raise TargetError(
                f"--objective {objective!r}: write time, bytes, or a number between 0 and 1."
            ) from None
    if chosen != "bytes" and chosen != 0:
        target.require_arrays("a measurement of time", "return arrays, or pass --objective bytes")
    start = time.perf_counter()
    with (
        bar(f"{target.label}: measuring rules", counted=False),
        users_code(f"target {target.label!r}: the rules cannot be measured", None),
    ):
        measure = fp.rules.measured(target.function, None, objective=chosen, repeats=repeats, file=file)
        rules = measure(*target.args, **target.kwargs)
    data = {
        "target": target.label, "objective": objective, "platform": rules.platform,
        "notes": list(rules.notes), "seconds": time.perf_counter() - start,
    }  # fmt: skip
    return Output(repr(rules), json.loads(json.dumps(data)))
