"""Square roots of the loss's Hessian in the output: `∇²ℓ(o) = Σ_c s_c s_cᵀ`, one column `s_c` per sweep.

A Gauss-Newton matrix is `Σ_c (Jᵀ s_c)(Jᵀ s_c)ᵀ`, and with random signs `ε`, `Jᵀ Σ_c ε_c s_c` is one column
whose outer product is the Gauss-Newton matrix in expectation. Three ways to a root:

* softmax cross-entropy, `diag(p) − p pᵀ` with rank `C − 1`: the rows of `√p` times a reflection without its
  first column, which is `√p` itself. One sweep less than the output has entries.
* a sum of functions of single entries (squared error, binary cross-entropy): the root of a diagonal.
* any other: a Cholesky decomposition with pivots of the dense Hessian of one example.

Reference: Botev, Ritter and Barber, "Practical Gauss-Newton optimisation for deep learning", ICML 2017;
Dangel, Kunstner and Hennig, "BackPACK: packing more into backprop", ICLR 2020 (symmetric factorisation of the
loss).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from funcprop.curvature.diagonal.separability import adds_up_entries
from funcprop.layers.loss import softmax_cross_entropy
from funcprop.program.program import Program

Loss = Callable[[Any, Any], Any]


class LossRoot(Protocol):
    """The root for one example: all its columns, or their random combination."""

    @property
    def columns(self) -> int:
        """How many columns there are."""

    def all(self, output: Any, y: Any) -> Any:
        """All columns, in front of the output's axes."""

    def sampled(self, output: Any, y: Any, key: Any) -> Any:
        """`Σ_c ε_c s_c` with independent signs."""


def signs(root: LossRoot, key: Any, dtype: Any) -> Any:
    """The random signs of all columns of one example."""
    return jax.random.rademacher(key, (root.columns,), dtype)


@runtime_checkable
class SharesGradient(Protocol):
    """A root whose first column is a multiple of the loss's gradient, which need not be swept twice."""

    def first_weight(self, output: Any, y: Any) -> Any:
        """The square of this multiple."""

    def others(self, output: Any, y: Any) -> Any:
        """All columns but the first."""


def root_of(loss: Loss, output: Any, y: Any) -> LossRoot:
    """The root of a loss whose output and label have these types."""
    leaves = jax.tree.leaves(output)
    if len(leaves) == 1 and leaves[0].ndim and leaves[0].shape[-1] > 1:
        tree = jax.tree.structure(output)
        program = Program.of(lambda o, y: loss(jax.tree.unflatten(tree, [o]), y), leaves[0], y)
        for reference, mean in _cross_entropies(leaves[0], y):
            if program.structure == Program.of(reference, leaves[0], y).structure:
                if leaves[0].ndim == 1 and jnp.issubdtype(y.dtype, jnp.integer):
                    return Labelled(leaves[0].shape[0])
                return Softmax(leaves[0].shape, mean)
    if is_sum_of_entries(loss, output, y):
        return DiagonalRoot(loss, output)
    return DenseRoot(loss, output)


# --- softmax cross-entropy --------------------------------------------------------------------


def _cross_entropies(output: Any, y: Any) -> Iterator[tuple[Loss, bool]]:
    """The usual ways to write the cross-entropy of labels like `y`, and whether it is a mean over rows."""
    if not isinstance(y, jax.ShapeDtypeStruct | jax.Array):
        return
    rows: list[Loss] = []
    if jnp.issubdtype(y.dtype, jnp.integer) and y.shape == output.shape[:-1]:
        rows = [optax.softmax_cross_entropy_with_integer_labels, softmax_cross_entropy]
        if not y.shape:
            rows.append(lambda o, y: -jax.nn.log_softmax(o)[y])
    elif jnp.issubdtype(y.dtype, jnp.floating) and y.shape == output.shape:
        rows = [optax.softmax_cross_entropy, softmax_cross_entropy]
    for row in rows:
        if output.ndim == 1:
            yield row, False
        yield partial(_reduced, row, jnp.mean), True
        yield partial(_reduced, row, jnp.sum), False


def _reduced(row: Loss, reduction: Callable[[Any], Any], output: Any, y: Any) -> Any:
    return reduction(row(output, y))


@dataclass(frozen=True)
class Softmax:
    """`Σ_rows w (diag(p) − p pᵀ)`: `w` is a row's sum of labels, over the rows if they are averaged."""

    shape: tuple[int, ...]
    mean: bool

    @property
    def rows(self) -> int:
        """How many rows there are."""
        return math.prod(self.shape[:-1])

    @property
    def columns(self) -> int:
        """How many columns there are."""
        return self.rows * (self.shape[-1] - 1)

    def _scaled(self, output: Any, y: Any) -> tuple[Any, Any]:
        """`√p` of every row, and `√w`."""
        logits = output.reshape(self.rows, -1)
        root = jnp.sqrt(jax.nn.softmax(logits))
        weight = jnp.ones(self.rows, root.dtype)
        if jnp.issubdtype(y.dtype, jnp.floating):
            weight = y.reshape(self.rows, -1).sum(-1).astype(root.dtype)
        return root, jnp.sqrt(weight / self.rows if self.mean else weight)

    def all(self, output: Any, y: Any) -> Any:
        """All columns."""
        root, weight = self._scaled(jax.tree.leaves(output)[0], y)
        classes = self.shape[-1]
        axes = jnp.broadcast_to(jnp.eye(classes - 1, dtype=root.dtype), (self.rows, classes - 1, classes - 1))
        columns = root[:, None] * _reflected(root[:, None], axes) * weight[:, None, None]
        placed = jnp.einsum("rs,rck->rcsk", jnp.eye(self.rows, dtype=root.dtype), columns)
        return _like(output, placed.reshape(self.columns, *self.shape))

    def sampled(self, output: Any, y: Any, key: Any) -> Any:
        """Their random combination."""
        root, weight = self._scaled(jax.tree.leaves(output)[0], y)
        x = signs(self, key, root.dtype).reshape(self.rows, -1)
        return _like(output, (root * _reflected(root, x) * weight[:, None]).reshape(self.shape))


@dataclass(frozen=True)
class Labelled:
    """One row with the class `y`, so that one column is along the gradient `g = p − e_y`:

        diag(p) − p pᵀ = p_y / (1 − p_y) g gᵀ + (1 − p_y) (diag(π) − π πᵀ)

    where `π` are the probabilities of the other classes among themselves.
    """

    columns_and_one: int

    @property
    def columns(self) -> int:
        """How many columns there are."""
        return self.columns_and_one - 1

    def _others(self, output: Any, y: Any) -> tuple[Any, Any]:
        """`√p` of the classes that follow `y` in a circle, and their norm `√(1 − p_y)`."""
        logits = jax.tree.leaves(output)[0]
        following = (y + 1 + jnp.arange(self.columns)) % self.columns_and_one
        root = jnp.sqrt(jax.nn.softmax(logits)[following])
        return root, jnp.linalg.norm(root)

    def _placed(self, output: Any, y: Any, x: Any) -> Any:
        """Entries of the classes that follow `y`, put where they belong."""
        place = (jnp.arange(self.columns_and_one) - y - 1) % self.columns_and_one
        return _like(output, jnp.concatenate([x, jnp.zeros((*x.shape[:-1], 1), x.dtype)], -1)[..., place])

    def first_weight(self, output: Any, y: Any) -> Any:
        """The square of the multiple of the gradient."""
        norm = self._others(output, y)[1]
        # Where the label is certain the gradient vanishes, and so does the column.
        return jnp.where(norm > 0, jax.nn.softmax(jax.tree.leaves(output)[0])[y] / norm**2, 0)

    def others(self, output: Any, y: Any) -> Any:
        """All columns but the first."""
        axes = jnp.eye(self.columns - 1, dtype=jax.tree.leaves(output)[0].dtype)
        return self._along_others(output, y, axes)

    def _along_others(self, output: Any, y: Any, x: Any) -> Any:
        root, norm = self._others(output, y)
        unit = jnp.where(norm > 0, root / norm, jnp.ones_like(root) / math.sqrt(self.columns))
        return self._placed(output, y, root * _reflected(unit, x))

    def _first(self, output: Any, y: Any) -> Any:
        root, norm = self._others(output, y)
        logits = jax.tree.leaves(output)[0]
        label = jnp.sqrt(jax.nn.softmax(logits)[y])
        along = jnp.where(norm > 0, label / norm, 0)
        here = jnp.where(jnp.arange(self.columns_and_one) == y, -label * norm, 0)
        return jax.tree.map(lambda g: g * along + here, self._placed(output, y, root**2))

    def all(self, output: Any, y: Any) -> Any:
        """All columns."""
        return jax.tree.map(
            lambda first, others: jnp.concatenate([first[None], others]),
            self._first(output, y),
            self.others(output, y),
        )

    def sampled(self, output: Any, y: Any, key: Any) -> Any:
        """Their random combination."""
        x = signs(self, key, jax.tree.leaves(output)[0].dtype)
        others = self._along_others(output, y, x[1:])
        return jax.tree.map(lambda first, rest: x[0] * first + rest, self._first(output, y), others)


def _reflected(root: Any, x: Any) -> Any:
    """The reflection that exchanges the unit vector `√p` and the first axis, of `x` without its first."""
    v = root.at[..., 0].add(1.0)
    full = jnp.concatenate([jnp.zeros((*x.shape[:-1], 1), x.dtype), x], -1)
    # ‖v‖² = 2 (1 + √p₀).
    return full - v * ((v * full).sum(-1, keepdims=True) / (1 + root[..., :1]))


def _like(output: Any, columns: Any) -> Any:
    """Columns in the structure of the output, which is a single array."""
    return jax.tree.unflatten(jax.tree.structure(output), [columns])


# --- sums over entries ------------------------------------------------------------------------


def is_sum_of_entries(loss: Loss, output: Any, y: Any) -> bool:
    """Whether the loss is seen to be a sum of functions of single entries of the output."""
    return adds_up_entries(jax.make_jaxpr(loss)(output, y), len(jax.tree.leaves(output)))


@dataclass(frozen=True, eq=False)
class _OfLoss:
    """What is asked of the loss itself has as many columns as the output has entries."""

    loss: Loss
    output: Any

    @property
    def columns(self) -> int:
        """How many columns there are."""
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(self.output))


@dataclass(frozen=True, eq=False)
class DiagonalRoot(_OfLoss):
    """The Hessian is diagonal: its product with ones is its diagonal."""

    def _root(self, output: Any, y: Any) -> Any:
        ones = jax.tree.map(jnp.ones_like, output)
        gradient = jax.grad(lambda o: self.loss(o, y))
        diagonal = ravel_pytree(jax.jvp(gradient, (output,), (ones,))[1])[0]
        tolerance = 10 * jnp.finfo(diagonal.dtype).eps * jnp.max(jnp.abs(diagonal))
        return jnp.where(diagonal < -tolerance, jnp.nan, jnp.sqrt(jnp.maximum(diagonal, 0)))

    def all(self, output: Any, y: Any) -> Any:
        """All columns."""
        return jax.vmap(ravel_pytree(output)[1])(jnp.diag(self._root(output, y)))

    def sampled(self, output: Any, y: Any, key: Any) -> Any:
        """Their random combination."""
        root = self._root(output, y)
        return ravel_pytree(output)[1](root * signs(self, key, root.dtype))


# --- any other loss ---------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class DenseRoot(_OfLoss):
    """The Hessian of one example as a matrix, and its Cholesky decomposition; NaN where it is indefinite."""

    def _root(self, output: Any, y: Any) -> Any:
        flat, unravel = ravel_pytree(output)
        return _cholesky(jax.hessian(lambda o: self.loss(unravel(o), y))(flat))

    def all(self, output: Any, y: Any) -> Any:
        """All columns."""
        return jax.vmap(ravel_pytree(output)[1])(self._root(output, y))

    def sampled(self, output: Any, y: Any, key: Any) -> Any:
        """Their random combination."""
        root = self._root(output, y)
        return ravel_pytree(output)[1](signs(self, key, root.dtype) @ root)


def _cholesky(h: Any) -> Any:
    """Rows `r` with `rᵀ r = h`, the largest pivot first: exact for a singular matrix too."""
    size, eps = len(h), jnp.finfo(h.dtype).eps
    scale = jnp.max(jnp.abs(h))

    def step(rest: Any, _: Any) -> tuple[Any, Any]:
        pivots = jnp.diagonal(rest)
        j = jnp.argmax(pivots)
        pivot = pivots[j]
        usable = pivot > 10 * size * eps * scale
        row = jnp.where(usable, rest[j] / jnp.sqrt(jnp.where(usable, pivot, 1)), 0)
        return rest - row[:, None] * row[None], row

    rest, rows = jax.lax.scan(step, h, length=size, unroll=size if size <= 16 else 1)
    return jnp.where(jnp.max(jnp.abs(rest)) > 100 * size * eps * scale, jnp.nan, rows)
