"""Rows of a table: the gradients of a leaf from which examples take rows by their numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from funcprop.curvature.example_gradients import contractions
from funcprop.curvature.example_gradients.contractions import NORMS, SQUARES, SUM, Group, Moments
from funcprop.curvature.example_gradients.gradient_forms import (
    Factors,
    position_shares,
    rows_of,
    seen_total,
)


@dataclass(frozen=True, eq=False)
class Rows:
    """A table of which rows were taken: `ids[n, t]` and the cotangents of the rows, `g[c, n, t, o]`.

    The gradient has a row for each id, the sum of its cotangents; equal rows are joined within an example.
    """

    ids: Any
    g: Any
    rows: int
    to_leaf: Callable[[Any], Any]
    limit: int

    def part(self, start: Any, count: int) -> Rows:
        """The form of some of the examples."""
        return replace(self, ids=rows_of(self.ids, start, count, 0), g=rows_of(self.g, start, count, 1))

    def _scattered(self, ids: Any, values: Any) -> Any:
        zeros = jnp.zeros((self.rows, values.shape[-1]), values.dtype)
        return zeros.at[ids.reshape(-1)].add(values.reshape(-1, values.shape[-1]))

    def moments(self, wanted: Mapping[str, Group]) -> Moments:
        """Sum, squares and norms of each group."""
        found: Moments = {}
        for name, group in wanted.items():
            if SUM in group.what:
                found[name, SUM] = self.to_leaf(self._scattered(self.ids, group.total(self.g)))
            if group.what & {SQUARES, NORMS}:
                squares = jax.vmap(_joined_squares, (0, 1))(self.ids, group.scaled(self.g))
            if SQUARES in group.what:
                found[name, SQUARES] = self.to_leaf(self._scattered(self.ids, squares))
            if NORMS in group.what:
                found[name, NORMS] = squares.sum((1, 2))
        return found

    def each(self, columns: slice) -> Any:
        """The gradients, `[c, n, *leaf]`."""
        one = jax.vmap(lambda ids, g: self.to_leaf(self._scattered(ids, g)))
        return jax.vmap(one, in_axes=(None, 0))(self.ids, self.g[columns])

    def gram(self, columns: slice) -> Any:
        """Inner products, `[n, c, n, c]`."""
        g = jnp.moveaxis(self.g[columns], 0, 1)

        def row(x: tuple[Any, Any]) -> Any:
            ids, g_n = x
            equal = (ids[:, None] == self.ids.reshape(1, -1)).astype(g.dtype)
            joined = jnp.einsum("ts,cto->cso", equal, g_n).reshape(len(g_n), *self.ids.shape, -1)
            return jnp.einsum("cmso,mdso->cmd", joined, g)

        return lax.map(row, (self.ids, g))

    def factors(self, group: Group, reduce: bool) -> Factors:
        """What is taken is one-hot: with the positions as examples, the factor of activations is diagonal."""
        g = group.scaled(self.g)
        (share,), seen = position_shares([g[None]], reduce)
        counted = None if seen is None else seen_total(seen, group)[0].astype(g.dtype)
        share = jnp.ones(self.ids.shape, g.dtype) if share is None else share[0].astype(g.dtype)
        if group.examples is not None:
            share = share * jnp.sqrt(group.examples)[:, None].astype(g.dtype)
        if reduce:
            means = jax.vmap(lambda ids, share: jnp.zeros(self.rows, g.dtype).at[ids].add(share))
            summed = g.sum(2).reshape(-1, g.shape[-1])
            return Factors(
                (means(self.ids, share) ** 2).sum(0), contractions.product(summed, summed), counted
            )
        taken = jnp.zeros(self.rows, g.dtype).at[self.ids.reshape(-1)].add((share**2).reshape(-1))
        flat = g.reshape(-1, g.shape[-1])
        return Factors(taken, contractions.product(flat, flat), counted)

    def kept(self, reduce: bool) -> str:
        """A diagonal, and a matrix."""
        positions = self.ids.shape[1]
        over = f", {'reduce' if reduce else 'expand'} over {positions} positions" if positions > 1 else ""
        return f"A ⊗ G with a diagonal A{over}"

    def squares_in(self, basis: Factors, group: Group) -> Any:
        """Squares along the factors' eigenvectors."""
        turned = replace(self, g=self.g @ basis.cotangents, to_leaf=lambda w: w)
        return turned.moments({"": group._replace(what=frozenset({SQUARES}))})["", SQUARES][None]


def _joined_squares(ids: Any, g: Any) -> Any:
    """`Σ_c` of the squared sums of rows with equal ids, each shared evenly among these; `[t, o]`."""
    equal = (ids[:, None] == ids[None]).astype(g.dtype)
    return (jnp.einsum("ts,cso->cto", equal, g) ** 2).sum(0) / equal.sum(1)[:, None]
