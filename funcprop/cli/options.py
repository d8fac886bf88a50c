"""What several subcommands ask for in the same words."""

from __future__ import annotations

from typing import Annotated, TypeAlias

import typer

from funcprop.cli.target import TargetError

TargetName: TypeAlias = Annotated[str, typer.Argument(help="module:function, file.py:function or chapter")]
AsJson: TypeAlias = Annotated[bool, typer.Option("--json", help="one JSON object on stdout")]
Argnums: TypeAlias = Annotated[
    str, typer.Option(help="positions of the arguments to differentiate, as 0 or 0,2")
]
ArgnumsOrAll: TypeAlias = Annotated[
    str, typer.Option(help="positions of the arguments to differentiate, as 0 or 0,2; or all")
]


def parse_argnums(text: str) -> tuple[int, ...] | None:
    """`0,2` as positions, `all` as None."""
    if text == "all":
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise TargetError(f"--argnums {text!r}: write positions, such as 0 or 0,2, or all.") from None
