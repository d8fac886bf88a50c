"""Contractions of activations `a[n, t, i]` and cotangents `g[c, n, t, o]` of one block.

The gradients are `W[c, n] = Σ_t a[n, t] ⊗ g[c, n, t]`. With one position they are never made: `Σ_n W²` is
`(a²)ᵀ(g²)`. With several, one example's are, by one product, and used up: a product for each example of a
loop is four times faster on XLA's CPU backend than one batched product.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from funcprop.operators.parameters import single_at_least

# What a group of columns is asked for: Σ_n W, Σ_{c,n} W², and Σ_c ‖W‖² of every example.
SUM, SQUARES, NORMS = "sum", "squares", "norms"


class WeightedColumns(NamedTuple):
    """Some columns, and what the examples' squares count, `[n]`, if not 1."""

    at: slice
    weight: Any = None

    def scaled(self, g: Any) -> Any:
        """These columns of `g[c, n, …]`, multiplied so that their squares have the weights."""
        here = g[self.at]
        if self.weight is None:
            return here
        return here * jnp.sqrt(self.weight).reshape(-1, *(1,) * (here.ndim - 2))

    def part(self, start: Any, count: int) -> WeightedColumns:
        """The same for some of the examples."""
        if self.weight is None:
            return self
        return self._replace(weight=lax.dynamic_slice_in_dim(self.weight, start, count))


class Group(NamedTuple):
    """Columns whose moments are wanted together, and which moments."""

    members: tuple[WeightedColumns, ...]
    what: frozenset[str] = frozenset()
    # What each example counts in the factor of activations, `[n]`, if not 1; in all else the columns have it.
    examples: Any = None

    @property
    def first(self) -> int:
        """The first column."""
        return min(m.at.start for m in self.members)

    @property
    def last(self) -> int:
        """One past the last column."""
        return max(m.at.stop for m in self.members)

    def total(self, g: Any) -> Any:
        """`Σ_c g[c]`, for `g[c, n, …]`."""
        return over_columns(lambda c: g[c], self.columns())

    def squares(self, g: Any) -> Any:
        """`Σ_c w[n] g[c, n]²`."""
        parts = []
        for at, weight in self.members:
            here = over_columns(lambda c: g[c] * g[c], range(at.start, at.stop))
            parts.append(here if weight is None else here * weight.reshape(-1, *(1,) * (here.ndim - 1)))
        return sum(parts[1:], start=parts[0])

    def scaled(self, g: Any) -> Any:
        """All columns of `g[c, n, …]`, multiplied so that their squares have the weights."""
        parts = [member.scaled(g) for member in self.members]
        return parts[0] if len(parts) == 1 else jnp.concatenate(parts)

    def columns(self) -> range:
        """The columns, if they follow each other."""
        return range(self.first, self.last)

    def part(self, start: Any, count: int) -> Group:
        """The same for some of the examples."""
        examples = self.examples
        if examples is not None:
            examples = lax.dynamic_slice_in_dim(examples, start, count)
        return self._replace(members=tuple(m.part(start, count) for m in self.members), examples=examples)

    def counted(self, size: int, dtype: Any) -> Any:
        """What the examples count together."""
        return jnp.asarray(size if self.examples is None else self.examples.sum(), dtype)


Moments = dict[tuple[str, str], Any]


def product(a: Any, g: Any) -> Any:
    """`aᵀ g`, activations first: in the other order XLA's CPU backend copies a transpose."""
    wide = single_at_least(a.dtype, g.dtype)
    return lax.dot_general(a, g, (((0,), (0,)), ((), ())), preferred_element_type=wide)


def over_columns(term: Callable[[Any], Any], columns: range, unroll: int = 64) -> Any:
    """`Σ_c term(c)`: one after the other, because XLA's CPU backend is slow to sum a leading axis."""
    if len(columns) <= unroll:
        first, *others = [term(c) for c in columns]
        return sum(others, start=first)
    zero = jax.eval_shape(term, columns.start)
    numbers = jnp.arange(columns.start, columns.stop)
    return lax.scan(lambda t, c: (t + term(c), None), jnp.zeros(zero.shape, zero.dtype), numbers)[0]


def combination(g: Any, columns: Sequence[int], factors: Any) -> Any:
    """`Σ_i factors[i][n] g[columns[i], n]`."""
    numbers, factors = jnp.asarray(columns), jnp.stack(factors)

    def term(i: Any) -> Any:
        column = g[columns[i]] if isinstance(i, int) else g[numbers[i]]
        return column * factors[i].reshape(-1, *(1,) * (column.ndim - 1))

    return over_columns(term, range(len(columns)))


def single_position(a: Any, g: Any, wanted: Mapping[str, Group]) -> Moments:
    """Moments for `a[n, i]`, `g[c, n, o]`."""
    found: Moments = {}
    squared = a * a
    for name, group in wanted.items():
        if SUM in group.what:
            found[name, SUM] = product(a, group.total(g))
        if group.what & {SQUARES, NORMS}:
            squares = group.squares(g)
        if SQUARES in group.what:
            found[name, SQUARES] = product(squared, squares)
        if NORMS in group.what:
            found[name, NORMS] = squared.sum(-1) * squares.sum(-1)
    return found


def by_example(
    activations: Callable[[Any], Any],
    raw: Any,
    cotangents: Callable[[Any], Any],
    g: Any,
    wanted: Mapping[str, Group],
) -> Moments:
    """Moments by one product for each example, in `[k, i, o]`.

    `activations(raw[n])` is `[k, t, i]`, `cotangents(g[c, n])` is `[k, t, o]`.
    """
    # All columns from the first to the last that is wanted, as they lie.
    first = min(group.first for group in wanted.values())
    last = max(group.last for group in wanted.values())
    fold = jax.vmap(cotangents)

    def one(n: Any) -> tuple[Any, Any]:
        """The activations of an example, and its columns' cotangents side by side."""
        here = fold(lax.dynamic_index_in_dim(g, n, 1, keepdims=False)[first:last])
        beside = jnp.moveaxis(here, 0, 2).reshape(*here.shape[1:3], -1)
        return activations(lax.dynamic_index_in_dim(raw, n, 0, keepdims=False)), beside

    a, beside = jax.eval_shape(one, 0)
    width = beside.shape[-1] // (last - first)
    shape, dtype = (a.shape[0], a.shape[2], width), single_at_least(g.dtype)

    def step(totals: Moments, n: Any) -> tuple[Moments, Moments]:
        a, beside = one(n)
        w = product(a[0], beside[0])[None] if len(a) == 1 else jax.vmap(product)(a, beside)

        def column(c: Any) -> Any:
            return lax.dynamic_slice_in_dim(w, (c - first) * width, width, axis=-1)[None]

        now, each = {}, {}
        for name, group in wanted.items():
            here = group.part(n, 1)
            if SUM in group.what:
                now[name, SUM] = totals[name, SUM] + over_columns(column, group.columns())[0]
            if group.what & {SQUARES, NORMS}:
                squares = here.squares(_Lazily(column))[0]
            if SQUARES in group.what:
                now[name, SQUARES] = totals[name, SQUARES] + squares
            if NORMS in group.what:
                each[name, NORMS] = jnp.sum(squares)
        return now, each

    kinds = [(name, kind) for name, group in wanted.items() for kind in (SUM, SQUARES) if kind in group.what]
    totals, each = lax.scan(step, {k: jnp.zeros(shape, dtype) for k in kinds}, jnp.arange(g.shape[1]))
    return totals | each


class _Lazily:
    """Columns that are made when they are read."""

    def __init__(self, column: Callable[[Any], Any]) -> None:
        self.column = column

    def __getitem__(self, c: Any) -> Any:
        return self.column(c)


def norms_by_pairs(a: Any, g: Any) -> Any:
    """`Σ_c ‖W‖²` of every example from its positions' inner products: `Σ_{t,s} (a_t·a_s)(g_t·g_s)`."""

    def one(a: Any, g: Any) -> Any:
        return jnp.sum((a @ a.T) * jnp.einsum("cto,cso->ts", g, g))

    return lax.map(lambda x: one(*x), (a, jnp.moveaxis(g, 1, 0)))


def gram_blocks(a: Any, g: Any, limit: int) -> Any:
    """`⟨W[c, n], W[d, m]⟩` as `[n, c, m, d]`, from `limit` bytes of gradients at a time."""
    c, n, t, o = g.shape
    if t == 1:
        left = a[:, 0] @ a[:, 0].T
        flat = jnp.moveaxis(g[:, :, 0], 0, 1).reshape(n * c, o)
        return (flat @ flat.T).reshape(n, c, n, c) * left[:, None, :, None]
    rows = a.shape[-1]
    step = max(1, min(rows, limit // max(1, n * c * o * g.dtype.itemsize)))
    total = jnp.zeros((n * c, n * c), g.dtype)
    side = jnp.moveaxis(g, 0, 2)  # n t c o
    for start in range(0, rows, step):
        w = jnp.einsum("nti,ntco->ncio", a[:, :, start : start + step], side).reshape(n * c, -1)
        total = total + w @ w.T
    return total.reshape(n, c, n, c)


def in_parts(fun: Callable[[Any, int], Moments], size: int, most: int) -> Moments:
    """`fun(start, count)` over parts of at most `most` of `size` examples: sums add up, norms are a row."""
    count = part_size(size, most)
    if count == size:
        return fun(0, size)

    def step(totals: Moments, i: Any) -> tuple[Moments, Moments]:
        found = fun(i * count, count)
        sums = {k: totals[k] + v for k, v in found.items() if k[1] != NORMS}
        return sums, {k: v for k, v in found.items() if k[1] == NORMS}

    shapes = jax.eval_shape(lambda: fun(0, count))
    zeros = {k: jnp.zeros(v.shape, v.dtype) for k, v in shapes.items() if k[1] != NORMS}
    sums, norms = lax.scan(step, zeros, jnp.arange(size // count))
    found = sums | {k: v.reshape(-1) for k, v in norms.items()}
    if rest := size % count:
        last = fun(size - rest, rest)
        found = {k: jnp.concatenate([v, last[k]]) if k[1] == NORMS else v + last[k] for k, v in found.items()}
    return found


def part_size(size: int, most: int) -> int:
    """How many of `size` examples make a part: at most `most`, if possible a divisor."""
    most = max(1, min(size, most))
    divisor = max(n for n in range(1, most + 1) if size % n == 0)
    return divisor if 2 * divisor > most else most
