"""How the entries of a leaf lie in the matrices of its outer form: a reshape, flips and a transpose."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

# One run of a leaf's entries along one of the axes k, i, o: its length, the axis and the step along it;
# that is negative where the operator has them in reverse.
Run = tuple[int, int, int]


@dataclass(frozen=True)
class MatrixLayout:
    """`flip(leaf.reshape(sizes), flips).transpose(order).reshape(matrix)` are the blocks `[k, i, o]`."""

    leaf: tuple[int, ...]
    sizes: tuple[int, ...]
    order: tuple[int, ...]
    matrix: tuple[int, int, int]
    flips: tuple[int, ...] = ()

    @classmethod
    def of(
        cls, to_leaf: Callable[[Any], Any], matrix: tuple[int, int, int], leaf: tuple[int, ...]
    ) -> MatrixLayout:
        """The layout of a map from blocks to the leaf that only moves entries.

        Raises:
            ValueError: it is no reshape, flip and transpose.
        """
        with jax.ensure_compile_time_eval():
            grids = np.meshgrid(*map(np.arange, matrix), indexing="ij")
            where = [np.asarray(to_leaf(np.asarray(grid, float))).astype(int) for grid in grids]
        runs: list[Run] = []
        for axis, length in enumerate(leaf):
            at = tuple(slice(None) if d == axis else 0 for d in range(len(leaf)))
            runs += _runs(np.stack([w[at] for w in where]), length)
        order = sorted(range(len(runs)), key=lambda r: (runs[r][1], -abs(runs[r][2])))
        flips = tuple(r for r, run in enumerate(runs) if run[2] < 0)
        found = cls(tuple(leaf), tuple(run[0] for run in runs), tuple(order), matrix, flips)
        if any((found.to_matrix(w) != grid).any() for w, grid in zip(where, grids, strict=True)):
            raise ValueError(
                f"a parameter of shape {leaf} is no reshape, flip and transpose of blocks {matrix}."
            )
        return found

    def to_matrix(self, leaf: Any) -> Any:
        """The leaf as blocks `[k, i, o]`."""
        return self._flipped(leaf.reshape(self.sizes)).transpose(self.order).reshape(self.matrix)

    def to_leaf(self, blocks: Any) -> Any:
        """Blocks as the leaf."""
        moved = blocks.reshape([self.sizes[d] for d in self.order])
        return self._flipped(moved.transpose(np.argsort(self.order))).reshape(self.leaf)

    def to_leaves(self, blocks: Any) -> list[Any]:
        """Blocks as the leaf, which is alone."""
        return [self.to_leaf(blocks)]

    def _flipped(self, split: Any) -> Any:
        """Of NumPy's arrays, one of NumPy's, also under `jit`."""
        ways = (-1 if d in self.flips else 1 for d in range(len(self.sizes)))
        return split[tuple(slice(None, None, way) for way in ways)] if self.flips else split


def _runs(line: np.ndarray, length: int) -> list[Run]:
    """An axis of the leaf as nested runs, the outermost first; `line` are the coordinates along it."""
    if length == 1:
        return []
    axis = int(np.argmax(line[:, 1] != line[:, 0]))
    step = int(line[axis, 1] - line[axis, 0])
    ideal = np.repeat(line[:, :1], length, 1)
    ideal[axis] += step * np.arange(length)
    same = (line == ideal).all(0)
    most = length if same.all() else int(np.argmin(same))
    run = max(n for n in range(2, most + 1) if length % n == 0)
    return [*_runs(line[:, ::run], length // run), (run, axis, step)]
