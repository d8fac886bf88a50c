"""Attention's logits cut into blocks of queries × keys, and which of their entries are visible."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from funcprop.rules.machine import Machine, attention_blocks

Reach = tuple[int | None, int | None]


def reach_of(causal: bool, window: int | tuple[int, int] | None) -> Reach:
    """How far a query sees to the left and to the right of its own position; None is without limit."""
    left, right = (window, window) if window is None or isinstance(window, int) else window
    return left, (0 if right is None else min(right, 0)) if causal else right


@dataclass(frozen=True)
class Tiling:
    """The blocks of the logits, and which of their entries are visible.

    Where a length is no multiple of its block, the last block begins earlier and what it shares with the one
    before is masked in it: nothing is padded, nothing is copied.
    """

    queries: int
    keys: int
    block: tuple[int, int]
    reach: Reach
    offset: int

    @classmethod
    def of(
        cls, q: Any, k: Any, reach: Reach, offset: int, blocks: tuple[int, int] | None, machine: Machine
    ) -> Tiling:
        """The tiling of queries and keys laid out as the layer's arguments, by default for a machine."""
        queries, keys = q.shape[-3], k.shape[-3]
        heads = math.prod(q.shape[:-3]) * q.shape[-2]
        sizes = attention_blocks(queries, keys, machine, heads) if blocks is None else blocks
        rows, cols = (max(min(size, n), 1) for size, n in zip(sizes, (queries, keys), strict=True))
        return cls(queries, keys, (rows, cols), reach, offset)

    def pairs(self) -> tuple[Any, Any]:
        """The positions of all blocks in which some query may see some key."""
        (rows, cols), (left, right) = self.block, self.reach
        i, j = np.indices((-(-self.queries // rows), -(-self.keys // cols))).reshape(2, -1)
        first, last = i * rows + self.offset, np.minimum((i + 1) * rows, self.queries) - 1 + self.offset
        some = np.ones(i.shape, bool)
        if right is not None:
            some &= j * cols <= last + right
        if left is not None:
            some &= np.minimum((j + 1) * cols, self.keys) - 1 >= first - left
        return i[some].astype(np.int32), j[some].astype(np.int32)

    def _starts(self, i: Any, j: Any) -> tuple[Any, Any]:
        rows, cols = self.block
        return jnp.minimum(i * rows, self.queries - rows), jnp.minimum(j * cols, self.keys - cols)

    def row(self, x: Any, i: Any) -> Any:
        """Block `i` of an array `… × queries × n`."""
        return lax.dynamic_slice_in_dim(x, self._starts(i, 0)[0], self.block[0], axis=-2)

    def col(self, x: Any, j: Any) -> Any:
        """Block `j` of an array `… × keys × n`."""
        return lax.dynamic_slice_in_dim(x, self._starts(0, j)[1], self.block[1], axis=-2)

    def tile(self, x: Any, i: Any, j: Any) -> Any:
        """Block `i, j` of an array `… × queries × keys`, of which either may be 1."""
        for axis, start, size in zip((-2, -1), self._starts(i, j), self.block, strict=True):
            x = x if x.shape[axis] == 1 else lax.dynamic_slice_in_dim(x, start, size, axis)
        return x

    def put_row(self, x: Any, i: Any, block: Any) -> Any:
        """`x` with another block `i` of queries."""
        return lax.dynamic_update_slice_in_dim(x, block, self._starts(i, 0)[0], axis=-2)

    def add_row(self, x: Any, i: Any, block: Any) -> Any:
        """`x` with something added to its block `i` of queries."""
        return self.put_row(x, i, self.row(x, i) + block)

    def add_col(self, x: Any, j: Any, block: Any) -> Any:
        """`x` with something added to its block `j` of keys."""
        return lax.dynamic_update_slice_in_dim(x, self.col(x, j) + block, self._starts(0, j)[1], axis=-2)

    def add_tile(self, x: Any, i: Any, j: Any, block: Any) -> Any:
        """`x`, whose axes may be 1, with something added to its block `i, j`, summed over these axes."""
        zero, before = jnp.int32(0), self.tile(x, i, j)
        starts = [zero if n == 1 else at for n, at in zip(x.shape[-2:], self._starts(i, j), strict=True)]
        after = before + sum_to(block, before.shape)
        return lax.dynamic_update_slice(x, after, [zero] * (x.ndim - 2) + starts)

    def visible(self, i: Any, j: Any) -> Any:
        """Mask the entries of block `i, j` that count; None if all do."""
        starts = self._starts(i, j)
        row, col = (at + jnp.arange(n, dtype=jnp.int32) for at, n in zip(starts, self.block, strict=True))
        row, col = row[:, None], col[None]
        conditions = seen(row, col, self.reach, self.offset)
        if self.queries % self.block[0]:
            conditions.append(row >= i * self.block[0])
        if self.keys % self.block[1]:
            conditions.append(col >= j * self.block[1])
        return all_of(conditions)


def seen(row: Any, col: Any, reach: Reach, offset: int) -> list[Any]:
    """The conditions under which the query at `row` sees the key at `col`."""
    left, right = reach
    return [
        *([] if right is None else [col <= row + (offset + right)]),
        *([] if left is None else [col >= row + (offset - left)]),
    ]


def all_of(conditions: list[Any]) -> Any:
    """Their conjunction, or None if there is none."""
    visible = None
    for condition in conditions:
        visible = condition if visible is None else visible & condition
    return visible


def sum_to(x: Any, shape: tuple[int, ...]) -> Any:
    """The sum over the axes along which an array of this shape and rank was broadcast."""
    stretched = [axis for axis, (n, m) in enumerate(zip(shape, x.shape, strict=True)) if n != m]
    return x.sum(stretched, keepdims=True)
