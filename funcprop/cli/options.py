"""What several subcommands ask for in the same words."""

from __future__ import annotations

from typing import Annotated, TypeAlias

import typer

from funcprop.cli.errors import TargetError
from funcprop.program.sizes import budget_bytes, budget_or_share

TargetName: TypeAlias = Annotated[str, typer.Argument(help="module:function, file.py:function or chapter")]
AsJson: TypeAlias = Annotated[bool, typer.Option("--json", help="one JSON object on stdout")]
Argnums: TypeAlias = Annotated[
    str, typer.Option(help="positions of the arguments to differentiate, as 0 or 0,2")
]
ArgnumsOrAll: TypeAlias = Annotated[
    str, typer.Option(help="positions of the arguments to differentiate, as 0 or 0,2; or all")
]
HasAux: TypeAlias = Annotated[
    bool, typer.Option("--has-aux", help="the function returns (result, auxiliary data)")
]


def parse_argnums(text: str) -> tuple[int, ...] | None:
    """`0,2` as positions, `all` as None."""
    if text == "all":
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise TargetError(f"--argnums {text!r}: write positions, such as 0 or 0,2, or all.") from None


def parse_bytes(option: str, text: str, *others: str) -> int:
    """`64MB`, `1.5 GiB` or `100000` as bytes."""
    try:
        return budget_bytes(text, option)
    except ValueError:
        ways = ", ".join(["100000", "64MB", *others])
        raise TargetError(f"{option} {text!r}: write bytes, such as {ways} or 1.5GiB.") from None


def parse_budget(option: str, text: str | None) -> int | float | None:
    """`25%` as a share, anything else as bytes."""
    if text is None or not text.strip().endswith("%"):
        return None if text is None else parse_bytes(option, text, "25%")
    try:
        return budget_or_share(text, option)
    except ValueError:
        raise TargetError(f"{option} {text!r}: write a share as 25%, or bytes as 64MB.") from None
