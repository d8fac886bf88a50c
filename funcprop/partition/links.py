"""What an operator says of the axes of its operands and results.

A place is a pair (variable, axis). An equation says which places are one axis of the model, over which places
it sums (so that splitting them needs an all-reduce of the result), and which places cannot be split at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from funcprop import _jax

Place = tuple[Any, int]


@dataclass
class Links:
    """What one equation says of the axes of what it reads and makes.

    Attributes:
        same: pairs of places that are one axis.
        summed: places over which it sums, or picks by an index: splitting them costs an all-reduce.
        blocked: places that it cannot leave split, with the reason.
    """

    same: list[tuple[Place, Place]] = field(default_factory=list)
    summed: list[Place] = field(default_factory=list)
    blocked: list[tuple[Place, str]] = field(default_factory=list)

    def link(self, a: Any, i: int, b: Any, j: int) -> None:
        """Say that axis i of `a` and axis j of `b` are one."""
        if not (isinstance(a, _jax.Literal) or isinstance(b, _jax.Literal)):
            self.same.append(((a, i), (b, j)))

    def block(self, a: Any, i: int, why: str) -> None:
        """Say that axis i of `a` cannot be split."""
        if not isinstance(a, _jax.Literal):
            self.blocked.append(((a, i), why))

    def block_all(self, atoms: Sequence[Any], why: str) -> None:
        """Say that no axis of some arrays can be split."""
        for v in atoms:
            for d in range(rank(v)):
                self.block(v, d, why)

    def total(self, a: Any, axes: Sequence[int]) -> None:
        """Say that the result is a sum over some axes of `a`."""
        if not isinstance(a, _jax.Literal):
            self.summed += [(a, d) for d in axes]

    def together(self, a: Any, b: Any) -> None:
        """Say that two arrays have the same axes, but for those of size 1 that are repeated."""
        if rank(a) == rank(b):
            for d, (size, other) in enumerate(zip(shape(a), shape(b), strict=True)):
                if size == other:
                    self.link(a, d, b, d)


def shape(atom: Any) -> tuple[int, ...]:
    """The sizes of an atom; none for what is no array."""
    return tuple(getattr(atom.aval, "shape", ()))


def rank(atom: Any) -> int:
    """The number of axes of an atom."""
    return len(shape(atom))
