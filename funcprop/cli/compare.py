"""`funcprop compare TARGET`: which rules fire, and what each saves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer

import funcprop as fp
from funcprop.cli.errors import TargetError, users_code
from funcprop.cli.options import ArgnumsOrAll, AsJson, HasAux, TargetName, parse_argnums
from funcprop.cli.output import Output, emit
from funcprop.cli.target import Target, load
from funcprop.progress import bar

_SETS = {"default": fp.rules.default, "handwritten": fp.rules.handwritten}


def compare(
    target: TargetName,
    argnums: ArgnumsOrAll = "0",
    rules: Annotated[str, typer.Option(help="the rule set: default or handwritten")] = "default",
    repeats: Annotated[int, typer.Option(min=1, help="how often each program is run")] = 10,
    has_aux: HasAux = False,
    as_json: AsJson = False,
) -> None:
    """List the rules that fire, their operators, and the time and bytes that each saves against autodiff."""
    emit(lambda: report(load(target, has_aux), parse_argnums(argnums), rules, repeats), as_json)


def report(target: Target, argnums: Sequence[int] | None, rules: str, repeats: int) -> Output:
    """The table of `fp.compare`."""
    if rules not in _SETS:
        raise TargetError(f"--rules {rules!r} is not a rule set; choose one of {', '.join(_SETS)}.")
    with (
        bar(f"{target.label}: by autodiff and by rules", counted=False),
        users_code(f"target {target.label!r}: comparing failed", None),
    ):
        compared = fp.compare(target.function, argnums, rules=_SETS[rules], repeats=repeats)
        found = compared(*target.args, **target.kwargs)
    return Output(str(found), {"target": target.label, **found.as_dict()})
