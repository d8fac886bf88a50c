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
import numpy as np
from jax import lax

# What a group of columns is asked for: Σ_n W, Σ_{c,n} W², and Σ_c ‖W‖² of every example.
SUM, SQUARES, NORMS = "sum", "squares", "norms"


class Wanted(NamedTuple):
    """The columns of a group, and which of their moments are wanted."""

    columns: slice
    what: frozenset[str]


Moments = dict[tuple[str, str], Any]


def product(a: Any, g: Any) -> Any:
    """`aᵀ g`, activations first: in the other order XLA's CPU backend copies a transpose."""
    wide = jnp.promote_types(jnp.result_type(a, g), jnp.float32)
    return lax.dot_general(a, g, (((0,), (0,)), ((), ())), preferred_element_type=wide)


def over_columns(fun: Callable[[Any], Any], g: Any, unroll: int = 64) -> Any:
    """`Σ_c fun(g[c])`: one column after the other, because XLA's CPU backend is slow to sum a leading axis."""
    if len(g) <= unroll:
        first, *others = [fun(g[c]) for c in range(len(g))]
        return sum(others, start=first)
    zero = jax.eval_shape(fun, g[0])
    return lax.scan(lambda total, c: (total + fun(c), None), jnp.zeros(zero.shape, zero.dtype), g)[0]


def single_position(a: Any, g: Any, wanted: Mapping[str, Wanted]) -> Moments:
    """Moments for `a[n, i]`, `g[c, n, o]`."""
    found: Moments = {}
    squared = a * a
    for name, (columns, what) in wanted.items():
        here = g[columns]
        if SUM in what:
            found[name, SUM] = product(a, over_columns(lambda g: g, here))
        if what & {SQUARES, NORMS}:
            squares = over_columns(lambda g: g * g, here)
        if SQUARES in what:
            found[name, SQUARES] = product(squared, squares)
        if NORMS in what:
            found[name, NORMS] = squared.sum(-1) * squares.sum(-1)
    return found


def by_example(
    activations: Callable[[Any], Any],
    raw: Any,
    cotangents: Callable[[Any], Any],
    g: Any,
    wanted: Mapping[str, Wanted],
) -> Moments:
    """Moments by one product for each example, in `[k, i, o]`.

    `activations(raw[n])` is `[k, t, i]`, `cotangents(g[c, n])` is `[k, t, o]`.
    """
    size = g.shape[1]
    sides = {name: g[w.columns] for name, w in wanted.items()}
    fold = jax.vmap(cotangents)

    def one(n: Any) -> tuple[Any, dict[str, Any]]:
        """The activations of an example, and each group's cotangents side by side."""
        here = {name: fold(lax.dynamic_index_in_dim(s, n, 1, keepdims=False)) for name, s in sides.items()}
        beside = {name: jnp.moveaxis(s, 0, 2).reshape(*s.shape[1:3], -1) for name, s in here.items()}
        return activations(lax.dynamic_index_in_dim(raw, n, 0, keepdims=False)), beside

    def step(totals: Moments, n: Any) -> tuple[Moments, Moments]:
        a, beside = one(n)
        g = jnp.concatenate(list(beside.values()), -1)
        w = product(a[0], g[0])[None] if len(a) == 1 else jax.vmap(product)(a, g)
        ends = np.cumsum([s.shape[-1] for s in beside.values()])
        now, each = {}, {}
        for (name, (_, what)), start, end in zip(wanted.items(), [0, *ends[:-1]], ends, strict=True):
            here = w[..., start:end]
            if SUM in what:
                now[name, SUM] = totals[name, SUM] + here
            if SQUARES in what:
                now[name, SQUARES] = totals[name, SQUARES] + here * here
            if NORMS in what:
                each[name, NORMS] = jnp.sum(here * here)
        return now, each

    a, beside = jax.eval_shape(one, 0)
    wide = jnp.promote_types(g.dtype, jnp.float32)
    zeros = {
        (name, kind): jnp.zeros((len(a), a.shape[-1], beside[name].shape[-1]), wide)
        for name, (_, what) in wanted.items()
        for kind in (SUM, SQUARES)
        if kind in what
    }
    totals, each = lax.scan(step, zeros, jnp.arange(size))
    columns = {name: len(s) for name, s in sides.items()}
    return {
        (name, kind): v.reshape(*v.shape[:2], columns[name], -1).sum(2) for (name, kind), v in totals.items()
    } | each


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


def symmetric_product(a: Any, blocks: int = 4, least: int = 256) -> Any:
    """`aᵀ a`, of which only the upper blocks are computed: XLA has no product that knows its symmetry.

    With few rows the product costs no more than writing its result, and is left whole.
    """
    rows, d = a.shape
    if d < least or rows < 4 * d:
        return product(a, a)
    cuts = [round(d * k / blocks) for k in range(blocks + 1)]
    upper = [product(a[:, cuts[i] : cuts[i + 1]], a[:, cuts[i] :]) for i in range(blocks)]
    rows: list[Any] = []
    for i in range(blocks):
        left = [upper[j][:, cuts[i] - cuts[j] : cuts[i + 1] - cuts[j]].T for j in range(i)]
        rows.append(jnp.concatenate([*left, upper[i]], 1))
    return jnp.concatenate(rows, 0)


def in_parts(fun: Callable[[Any, int], Moments], size: int, most: int) -> Moments:
    """`fun(start, count)` over parts of at most `most` of `size` examples: sums add up, norms stand in a row."""
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
        found = {
            k: jnp.concatenate([v, last[k]]) if k[1] == NORMS else v + last[k] for k, v in found.items()
        }
    return found


def part_size(size: int, most: int) -> int:
    """How many of `size` examples make a part: at most `most`, if possible a divisor."""
    most = max(1, min(size, most))
    divisor = max(n for n in range(1, most + 1) if size % n == 0)
    return divisor if 2 * divisor > most else most
