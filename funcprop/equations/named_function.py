"""A function with a name, and how its equations are written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from funcprop.rules.equations import Equations
from funcprop.rules.expressions import Expression

# `write(function, operands, cotangent, output)`, in which `output` is what the result is written as.
Write = Callable[[Callable[..., Any], Sequence[Expression], Expression, Expression], Equations]


@dataclass(frozen=True)
class NamedFunction:
    """A function with a name, and how its equations are written.

    `kind` is what a reader calls such a function; `roles` are those of its operands after the first.
    """

    name: str
    kind: str
    reference: Callable[..., Any]
    write: Write
    roles: tuple[str | None, ...] = ()
