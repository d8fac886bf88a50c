"""A jaxpr as the compiler sees it: a flat list of steps between values.

Calls are inlined, equal steps are one, and what is not read is gone. A reshape is a step, a "view": it costs
nothing by itself, but what is computed for two shapes is computed twice. A loop remains one step with a
program inside.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from funcprop.graph.tracing import without_transformations

Kind: TypeAlias = Literal["view", "elementwise", "move", "reduce", "update", "kernel", "loop", "branch"]


@dataclass(eq=False)
class Value:
    """An array of the program. `step` computes it; an argument has none."""

    shape: tuple[int, ...]
    dtype: Any
    nbytes: int
    step: Step | None = None
    users: list[Step] = field(default_factory=list)
    name: str = ""
    argument: int | None = None
    constant: bool = False

    @property
    def size(self) -> int:
        """The number of entries."""
        return math.prod(self.shape)


@dataclass(eq=False)
class Step:
    """What one equation does, or a part of it. `inputs` are the arrays that it reads.

    `reuses` says that entries of the inputs are read more than once; `extra` are bytes of its own; `in_place`
    are pairs of an input and the result that is written over it. A loop has its body in `bodies`, a
    conditional its branches. `late` marks a product that sums over the rows of its left factor: the compiler
    puts it behind other readers of its operands. `order` are the axes of a transposition.
    """

    op: str
    kind: Kind
    scope: str
    inputs: list[Value]
    outputs: list[Value]
    expensive: bool = False
    reuses: bool = False
    extra: int = 0
    late: bool = False
    order: tuple[int, ...] = ()
    bodies: tuple[StepProgram, ...] = ()
    in_place: list[tuple[Value, Value]] = field(default_factory=list)


@dataclass(eq=False)
class StepProgram:
    """Steps in the order of the jaxpr. An output that is None is a number written in the function.

    `donated` says which argument an output is written over.
    """

    arguments: list[Value]
    constants: list[Value]
    steps: list[Step]
    outputs: list[Value | None]
    donated: dict[int, int] = field(default_factory=dict)


def clean(scope: str) -> str:
    """A scope without the marks of transformations."""
    return without_transformations(scope, ("vmap", "jvp", "transpose", "checkpoint", "rematted_computation"))
