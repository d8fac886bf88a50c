"""A leaf that enters a model at several places."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from funcprop.curvature.example_gradients import contractions
from funcprop.curvature.example_gradients.contractions import SQUARES, SUM, Group, Moments
from funcprop.curvature.example_gradients.gradient_forms import (
    DENSE,
    AtHand,
    Factors,
    block_or_diagonal,
    both,
    kronecker,
)
from funcprop.operators.parameters import single_at_least


@dataclass(frozen=True, eq=False)
class Several:
    """The sum of several forms: their gradients add up, their squares do not.

    Whatever is not linear is computed from the gradients of a few examples at a time. `alike` says that all
    are outer products with the same blocks; else `why` says why not.
    """

    forms: Sequence[Any]
    leaf: Any
    size: int
    limit: int
    alike: bool = False
    why: str = ""

    def part(self, start: Any, count: int) -> Several:
        """The form of some of the examples."""
        return replace(self, forms=[f.part(start, count) for f in self.forms], size=count)

    def _at_a_time(self, columns: int) -> int:
        return self.limit // max(1, columns * self.leaf.size * self.leaf.dtype.itemsize)

    def moments(self, wanted: Mapping[str, Group]) -> Moments:
        """Sum, squares and norms of each group."""
        sums = {name: g._replace(what=frozenset({SUM})) for name, g in wanted.items() if SUM in g.what}
        parts = [form.moments(sums) for form in self.forms] if sums else []
        found: Moments = {(name, SUM): sum(p[name, SUM] for p in parts) for name in sums}
        for name, group in wanted.items():
            if rest := group.what - {SUM}:

                def of_part(start: Any, count: int, group: Group = group, rest: Any = rest) -> Moments:
                    here = AtHand(self.part(start, count).each(slice(0, group.last)), self.limit)
                    return here.moments({"": group.part(start, count)._replace(what=rest)})

                squares = contractions.in_parts(of_part, self.size, self._at_a_time(group.last))
                found |= {(name, kind): v for (_, kind), v in squares.items()}
        return found

    def each(self, columns: slice) -> Any:
        """The gradients, `[c, n, *leaf]`."""
        first, *others = [form.each(columns) for form in self.forms]
        return sum(others, start=first)

    def gram(self, columns: slice) -> Any:
        """Inner products, `[n, c, n, c]`."""
        most = max(1, self._at_a_time(2 * (columns.stop - columns.start)))
        few = max(k for k in range(1, min(most, self.size) + 1) if self.size % k == 0)
        starts = jnp.arange(0, self.size, few)

        def flat(start: Any) -> Any:
            w = jnp.moveaxis(self.part(start, few).each(columns), 0, 1)
            return w.reshape(few * w.shape[1], -1)

        def row(start: Any) -> Any:
            left = flat(start)
            return lax.map(lambda other: left @ flat(other).T, starts)

        blocks = lax.map(row, starts)  # by examples of the left, of the right, then rows and columns
        count = columns.stop - columns.start
        joined = jnp.moveaxis(blocks, 2, 1).reshape(self.size * count, self.size * count)
        return joined.reshape(self.size, count, self.size, count)

    def factors(self, group: Group, reduce: bool) -> Factors:
        """Kronecker factors, summed over examples."""
        if self.expands:
            return kronecker(self.forms, group, reduce)
        one = group.counted(self.size, single_at_least(self.leaf.dtype)).reshape(1, 1)
        if self.leaf.size > DENSE:
            squares = self.moments({"": group._replace(what=frozenset({SQUARES}))})
            return Factors(one, squares["", SQUARES].reshape(-1))

        def part(start: Any, count: int) -> Moments:
            w = self.part(start, count).each(slice(0, group.last))
            flat = group.part(start, count).scaled(w).reshape(-1, self.leaf.size)
            return {("G", SUM): contractions.product(flat, flat)}

        few = self._at_a_time(group.last)
        return Factors(one, contractions.in_parts(part, self.size, few)["G", SUM])

    @property
    def expands(self) -> bool:
        """Whether the factors are those of all uses together, because the block itself would be too large."""
        return self.alike and self.leaf.size > DENSE

    def kept(self, reduce: bool) -> str:
        """A whole block if it is small, else the factors of all uses together, else a diagonal."""
        if self.expands:
            return both(self.forms, reduce)
        return block_or_diagonal(self.leaf.size, why=f", and {self.why}")

    def squares_in(self, basis: Factors, group: Group) -> Any:
        """Squares along the factors' eigenvectors."""
        if self.expands:
            turned = [form.turned(basis) for form in self.forms]
            shape = jax.eval_shape(lambda: turned[0].each(slice(0, 1)))
            here = replace(self, forms=turned, leaf=jax.ShapeDtypeStruct(shape.shape[2:], shape.dtype))
            return here.moments({"": group._replace(what=frozenset({SQUARES}))})["", SQUARES]
        if basis.cotangents.ndim == 1:
            squares = self.moments({"": group._replace(what=frozenset({SQUARES}))})
            return squares["", SQUARES].reshape(1, 1, -1)

        def part(start: Any, count: int) -> Moments:
            here = AtHand(self.part(start, count).each(slice(0, group.last)), self.limit)
            return {("", SQUARES): here.squares_in(basis, group.part(start, count))}

        return contractions.in_parts(part, self.size, self._at_a_time(group.last))["", SQUARES]
