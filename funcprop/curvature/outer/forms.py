"""The gradients of a batch of examples in one leaf, in whichever form they are known.

A form answers for moments, for the gradients themselves, for their inner products and for Kronecker factors.
There are four: outer products of one tap, rows of a table, gradients that are at hand, and sums of several.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import lax

from funcprop.curvature.outer import contractions
from funcprop.curvature.outer.contractions import NORMS, SQUARES, SUM, Group, Moments
from funcprop.curvature.outer.operators import OuterForm

# The largest leaf without an outer product whose curvature is kept as a dense matrix.
DENSE = 1024


class Factors(NamedTuple):
    """The two factors of one leaf's curvature, summed over the batch: of activations and of cotangents.

    A factor is a matrix, a stack of matrices for independent blocks, or a vector that stands for a diagonal.
    """

    activations: Any
    cotangents: Any


class Form(Protocol):
    """The gradients `W[c, n]` of columns `c` and examples `n` in one leaf."""

    def part(self, start: Any, count: int) -> Form:
        """The form of some of the examples."""

    def moments(self, wanted: Mapping[str, Group]) -> Moments:
        """For each group of columns sum and sum of squares, like the leaf, and square norms, `[n]`."""

    def each(self, columns: slice) -> Any:
        """The gradients, `[c, n, *leaf]`."""

    def gram(self, columns: slice) -> Any:
        """Inner products, `[n, c, n, c]`."""

    def factors(self, group: Group, reduce: bool) -> Factors:
        """Kronecker factors, summed over examples (see `funcprop.curvature.kronecker` for conventions)."""

    def squares_in(self, basis: Factors, group: Group) -> Any:
        """`Σ (U_aᵀ W U_g)²` in the factors' bases, as `[k, i, o]`; the basis of a diagonal is a vector."""


def _rows(x: Any, start: Any, count: int, axis: int) -> Any:
    return lax.dynamic_slice_in_dim(x, start, count, axis)


# --- gradients at hand ------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class AtHand:
    """The gradients themselves, `[c, n, *leaf]`.

    `positions` are `[c, n, t, o]` where a gradient is a sum over `t`, for the factors of weight sharing.
    """

    w: Any
    limit: int
    positions: Any = None

    def part(self, start: Any, count: int) -> AtHand:
        """The form of some of the examples."""
        positions = None if self.positions is None else _rows(self.positions, start, count, 1)
        return replace(self, w=_rows(self.w, start, count, 1), positions=positions)

    def moments(self, wanted: Mapping[str, Group]) -> Moments:
        """Sum, squares and norms of each group."""
        found: Moments = {}
        for name, group in wanted.items():
            if SUM in group.what:
                found[name, SUM] = group.total(self.w).sum(0)
            if group.what & {SQUARES, NORMS}:
                squares = group.squares(self.w)
            if SQUARES in group.what:
                found[name, SQUARES] = squares.sum(0)
            if NORMS in group.what:
                found[name, NORMS] = squares.sum(tuple(range(1, squares.ndim)))
        return found

    def each(self, columns: slice) -> Any:
        """The gradients, `[c, n, *leaf]`."""
        return self.w[columns]

    def gram(self, columns: slice) -> Any:
        """Inner products, `[n, c, n, c]`."""
        w = jnp.moveaxis(self.w[columns], 0, 1)
        flat = w.reshape(w.shape[0] * w.shape[1], -1)
        return (flat @ flat.T).reshape(*w.shape[:2], *w.shape[:2])

    def factors(self, group: Group, reduce: bool) -> Factors:
        """Kronecker factors, summed over examples."""
        flat = group.scaled(self.w).reshape(-1, math.prod(self.w.shape[2:]))
        if self.positions is not None and not reduce:
            flat = group.scaled(self.positions).reshape(-1, self.positions.shape[-1])
        one = jnp.full((1, 1), self.w.shape[1], flat.dtype)
        if flat.shape[-1] > DENSE:
            return Factors(one, (flat * flat).sum(0))
        return Factors(one, contractions.product(flat, flat))

    def squares_in(self, basis: Factors, group: Group) -> Any:
        """Squares along the factors' eigenvectors."""
        flat = group.scaled(self.w).reshape(-1, math.prod(self.w.shape[2:]))
        if basis.cotangents.ndim == 2:
            flat = flat @ basis.cotangents
        return (flat * flat).sum(0)[None, None]


# --- outer products ---------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class OuterProducts:
    """One tap: `raw[n]` is the other operand, `g[c, n]` the cotangent of the operator's result."""

    form: OuterForm
    raw: Any
    g: Any
    limit: int

    @property
    def size(self) -> int:
        """The number of examples."""
        return self.g.shape[1]

    def part(self, start: Any, count: int) -> OuterProducts:
        """The form of some of the examples."""
        return replace(self, raw=_rows(self.raw, start, count, 0), g=_rows(self.g, start, count, 1))

    def folded(self, columns: slice) -> tuple[Any, Any]:
        """`a[k, n, t, i]` and `g[k, c, n, t, o]`."""
        a, g = self.form.activations, self.form.cotangents
        assert a is not None
        return jax.vmap(a, out_axes=1)(self.raw), jax.vmap(jax.vmap(g, out_axes=1), out_axes=1)(
            self.g[columns]
        )

    def moments(self, wanted: Mapping[str, Group]) -> Moments:
        """Sum, squares and norms of each group."""
        if self.form.positions == 1:
            a, g = self.folded(slice(None))

            def one(a: Any, g: Any) -> Moments:
                return contractions.single_position(a, g, wanted)

            found = _over_blocks(one, a[:, :, 0], g[:, :, :, 0])
            found = {k: v.sum(0) if k[1] == NORMS else v for k, v in found.items()}
        else:
            assert self.form.activations is not None
            by_pairs = {name: w for name, w in wanted.items() if w.what == {NORMS} and self._pairs_pay()}
            others = {name: w for name, w in wanted.items() if name not in by_pairs}
            found = {}
            if others:
                arguments = self.form.activations, self.raw, self.form.cotangents, self.g
                found = contractions.by_example(*arguments, others)
            for name, group in by_pairs.items():
                folded = replace(self, g=group.scaled(self.g)).folded(slice(None))
                found[name, NORMS] = jax.vmap(contractions.norms_by_pairs)(*folded).sum(0)
        return {k: v if k[1] == NORMS else self.form.to_leaf(v) for k, v in found.items()}

    def _pairs_pay(self) -> bool:
        """Whether inner products of positions cost less than the gradients."""
        a = jax.eval_shape(self.form.activations, self.raw[0])  # type: ignore[arg-type]
        outputs = jax.eval_shape(self.form.cotangents, self.g[0, 0]).shape[-1]
        return self.form.positions * (a.shape[-1] + outputs) < a.shape[-1] * outputs

    def each(self, columns: slice) -> Any:
        """The gradients, `[c, n, *leaf]`."""
        a, g = self.folded(columns)
        w = jnp.einsum("knti,kcnto->cnkio", a, g)
        return jax.vmap(jax.vmap(self.form.to_leaf))(w)

    def gram(self, columns: slice) -> Any:
        """Inner products, `[n, c, n, c]`."""
        return jax.vmap(lambda a, g: contractions.gram_blocks(a, g, self.limit))(*self.folded(columns)).sum(0)

    def factors(self, group: Group, reduce: bool) -> Factors:
        """Kronecker factors, summed over examples."""
        scaled = replace(self, g=group.scaled(self.g))

        def part(start: Any, count: int) -> Moments:
            a, g = scaled.part(start, count).folded(slice(None))
            if reduce:
                a, g = a.mean(2, keepdims=True), g.sum(3, keepdims=True)
            rows = a.reshape(len(a), -1, a.shape[-1]), g.reshape(len(g), -1, g.shape[-1])
            both = [_over_blocks(lambda x: contractions.product(x, x), x) for x in rows]
            return {("A", SUM): both[0] / a.shape[2], ("G", SUM): both[1]}

        a, g = jax.eval_shape(lambda: scaled.folded(slice(None)))
        each = (a.size * a.dtype.itemsize + g.size * g.dtype.itemsize) // self.size
        found = contractions.in_parts(part, self.size, self.limit // max(1, each))
        return Factors(*(x[0] if len(x) == 1 else x for x in (found["A", SUM], found["G", SUM])))

    def squares_in(self, basis: Factors, group: Group) -> Any:
        """Squares along the factors' eigenvectors."""
        a, g = self.form.activations, self.form.cotangents
        assert a is not None
        turned = OuterForm(
            lambda x: a(x) @ basis.activations,
            lambda x: g(x) @ basis.cotangents,
            lambda w: w,
            self.form.positions,
        )
        wanted = {"": group._replace(what=frozenset({SQUARES}))}
        return replace(self, form=turned).moments(wanted)["", SQUARES]


def _over_blocks(fun: Callable[..., Any], *arrays: Any) -> Any:
    """`fun` for each block; a single one without a batched product."""
    if len(arrays[0]) == 1:
        return jax.tree.map(lambda y: y[None], fun(*(x[0] for x in arrays)))
    return jax.vmap(fun)(*arrays)


# --- rows of a table --------------------------------------------------------------------------


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
        return replace(self, ids=_rows(self.ids, start, count, 0), g=_rows(self.g, start, count, 1))

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
        g, positions = group.scaled(self.g), self.ids.shape[1]
        if reduce:
            counts = jax.vmap(lambda ids: jnp.zeros(self.rows, g.dtype).at[ids].add(1.0))(self.ids)
            summed = g.sum(2).reshape(-1, g.shape[-1])
            return Factors((counts**2).sum(0) / positions**2, contractions.product(summed, summed))
        counts = jnp.zeros(self.rows, g.dtype).at[self.ids.reshape(-1)].add(1.0)
        flat = g.reshape(-1, g.shape[-1])
        return Factors(counts / positions, contractions.product(flat, flat))

    def squares_in(self, basis: Factors, group: Group) -> Any:
        """Squares along the factors' eigenvectors."""
        turned = replace(self, g=self.g @ basis.cotangents, to_leaf=lambda w: w)
        return turned.moments({"": group._replace(what=frozenset({SQUARES}))})["", SQUARES][None]


def _joined_squares(ids: Any, g: Any) -> Any:
    """`Σ_c` of the squared sums of rows with equal ids, each shared evenly among these; `[t, o]`."""
    equal = (ids[:, None] == ids[None]).astype(g.dtype)
    return (jnp.einsum("ts,cso->cto", equal, g) ** 2).sum(0) / equal.sum(1)[:, None]


# --- several taps -----------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Several:
    """The sum of several forms: their gradients add up, their squares do not.

    Whatever is not linear is computed from the gradients of a few examples at a time.
    """

    forms: Sequence[Form]
    leaf: Any
    size: int
    limit: int

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
        one = jnp.full((1, 1), self.size, self.leaf.dtype)
        if self.leaf.size > DENSE:
            squares = self.moments({"": group._replace(what=frozenset({SQUARES}))})
            return Factors(one, squares["", SQUARES].reshape(-1))

        def part(start: Any, count: int) -> Moments:
            w = self.part(start, count).each(slice(0, group.last))
            flat = group.part(start, count).scaled(w).reshape(-1, self.leaf.size)
            return {("G", SUM): contractions.product(flat, flat)}

        few = self._at_a_time(group.last)
        return Factors(one, contractions.in_parts(part, self.size, few)["G", SUM])

    def squares_in(self, basis: Factors, group: Group) -> Any:
        """Squares along the factors' eigenvectors."""
        if basis.cotangents.ndim == 1:
            squares = self.moments({"": group._replace(what=frozenset({SQUARES}))})
            return squares["", SQUARES].reshape(1, 1, -1)

        def part(start: Any, count: int) -> Moments:
            here = AtHand(self.part(start, count).each(slice(0, group.last)), self.limit)
            return {("", SQUARES): here.squares_in(basis, group.part(start, count))}

        return contractions.in_parts(part, self.size, self._at_a_time(group.last))["", SQUARES]
