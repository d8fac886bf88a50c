"""Products of rows with a matrix, `Y = X W`, backwards: the forms that XLA's CPU backend computes fastest.

`W̄ = Xᵀ Ȳ` is one contraction (`contraction`). `X̄ = G Wᵀ` of a few rows, at every step of a loop, is one of

    turned     g U,        U = Wᵀ made once, before the loop
    columns    (W gᵀ)ᵀ     the matrix is the left operand, as it lies in memory; nothing is made
    plain      g Wᵀ        as autodiff writes it

Two x86 cores with 2 MB of L2 cache each, float32, µs a step (median of several runs, ±15 %):

| rows | W           | MB  | plain | turned | columns |
|------|-------------|-----|-------|--------|---------|
| 4    | 256 × 1024  | 1   | 43    | 27     | 32      |
| 4    | 384 × 1536  | 2.3 | 66    | 40     | 47      |
| 12   | 384 × 1536  | 2.3 | 122   | 106    | 145     |
| 4    | 512 × 1536  | 3   | 86    | 85     | 46      |
| 3    | 512 × 2048  | 4   | 120   | 119    | 66      |
| 16   | 512 × 2048  | 4   | 250   | 301    | 204     |
| 30   | 512 × 2048  | 4   | 356   | 393    | 434     |
| 4    | 1024 × 4096 | 16  | 702   | 575    | 383     |
| 1    | 128 × 512   | .25 | 4     | 3      |         |
| 1    | 512 × 1536  | 3   | 26    | 75     |         |
| 1    | 1024 × 4096 | 16  | 1942  | 475    |         |

A single row is a matrix times a vector, for which XLA gives each core the same half at every step; while the
halves stay in the caches, nothing is faster.

Walking the matrix in slices, and these backwards at every other step so that the caches keep a part of it,
gained nothing: 93 µs in two slices and 132 in four, against 69 for the whole (4 rows, forwards, 4 MB).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax

from funcprop.program.dtypes import common_dtype
from funcprop.rules.machine import Machine, row_form


def contraction(x: Any, g: Any, precision: Any = None) -> Any:
    """`Σ xᵀ ȳ` over all leading axes: a matrix of `i × o`, activations first.

    The leading axes are not merged: where one of them is spread over devices, each contracts its own part.
    """
    dtype = common_dtype(x, g)
    leading = tuple(range(x.ndim - 1))
    return lax.dot_general(
        x.astype(dtype), g.astype(dtype), ((leading, leading), ((), ())), precision=precision
    )


def by_columns(g: Any, w: Any, **params: Any) -> Any:
    """`g wᵀ` as `(w gᵀ)ᵀ`; `params` are those of `dot_general`. Two rows or more."""
    rows = g.reshape(-1, g.shape[-1])
    half = rows.shape[0] // 2
    # Transposed in halves: XLA would fold a transpose of the whole into the product and undo the form.
    columns = jnp.concatenate([rows[:half].T, rows[half:].T], 1)
    result = lax.dot_general(w, columns, (((1,), (0,)), ((), ())), **params)
    result = jnp.concatenate([result[:, :half].T, result[:, half:].T], 0)
    return result.reshape(*g.shape[:-1], w.shape[0])


def repeated(w: Any, rows: int, machine: Machine) -> Callable[[Any], Any]:
    """`g ↦ g wᵀ` for so many rows, to be called in a loop; what is made for all steps is made here."""
    form = row_form(rows, w.nbytes, machine)
    if form == "columns":
        return lambda g: by_columns(g, w)
    if form == "plain":
        return lambda g: g @ w.T
    turned = w.T
    return lambda g: g @ turned
