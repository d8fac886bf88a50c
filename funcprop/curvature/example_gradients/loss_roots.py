"""Square roots of the loss's Hessian in the output: `∇²ℓ(o) = Σ_c s_c s_cᵀ`, one column `s_c` per sweep.

A Gauss-Newton matrix is `Σ_c (Jᵀ s_c)(Jᵀ s_c)ᵀ`, and with random signs `ε`, `Jᵀ Σ_c ε_c s_c` is one column
whose outer product is the Gauss-Newton matrix in expectation. Three ways to a root:

* softmax cross-entropy (`cross_entropy`), `diag(p) − p pᵀ` with rank `C − 1`: the rows of `√p` times a
  reflection without its first column, which is `√p` itself. One sweep less than the output has entries.
* a sum of functions of single entries (squared error, binary cross-entropy): the root of a diagonal.
* any other: a Cholesky decomposition with pivots of the dense Hessian of one example.

Reference: Botev, Ritter and Barber, "Practical Gauss-Newton optimisation for deep learning", ICML 2017;
Dangel, Kunstner and Hennig, "BackPACK: packing more into backprop", ICLR 2020 (symmetric factorisation of the
loss).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from funcprop.curvature.diagonal.separability import adds_up_entries
from funcprop.curvature.example_gradients.cross_entropy import CrossEntropyForm, cross_entropy_form
from funcprop.operators.parameters import single_at_least
from funcprop.program.program import Program

Loss = Callable[[Any, Any], Any]


class Losses(NamedTuple):
    """The loss of one example as a program, or what a likelihood has; a program is None if it is not needed.

    Attributes:
        value: `(o, y)`, the loss or the negative logarithm of the density.
        fisher: `(o, u)`, the Fisher matrix of a likelihood's outputs times a vector.
        drawn: `(o, key)`, the gradient of the negative logarithm at a target that is drawn.
    """

    value: Loss | None
    fisher: Program | None = None
    drawn: Program | None = None

    def values(self, output: Any, y: Any) -> Any:
        """The value of one example; 0 of a likelihood without targets."""
        return jnp.zeros(()) if self.value is None else self.value(output, y)


class LossRoot(Protocol):
    """The root for one example: all its columns, or their random combination."""

    @property
    def kind(self) -> str:
        """The kind of loss, in words, for the audit."""

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


def root_of(loss: Loss | Losses, output: Any, y: Any) -> LossRoot:
    """The root of a loss, or of a likelihood, for one example whose output and label have these types."""
    losses = loss if isinstance(loss, Losses) else Losses(loss)
    if losses.fisher is not None:
        return FisherRoot(losses, output)
    value = losses.value
    assert value is not None
    form = cross_entropy_form(value, output, y)
    if form is not None:
        return Labelled(form) if form.picks_label() else Softmax(form)
    if is_sum_of_entries(value, output, y):
        return DiagonalRoot(value, output)
    return DenseRoot(value, output)


# --- softmax cross-entropy --------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Softmax:
    """`Σ_r w_r (diag(p_r) − p_r p_rᵀ)`."""

    form: CrossEntropyForm
    kind = "softmax cross-entropy"

    @property
    def columns(self) -> int:
        """How many columns there are."""
        rows, classes = self.form.shape
        return rows * (classes - 1)

    def _scaled(self, output: Any, y: Any) -> tuple[Any, Any]:
        """`√p` of every row, and `√w`."""
        logits, weights = self.form.logits_and_weights(output, y)
        return jnp.sqrt(jax.nn.softmax(logits)), jnp.sqrt(weights)

    def all(self, output: Any, y: Any) -> Any:
        """All columns."""
        root, weight = self._scaled(output, y)
        rows, classes = self.form.shape
        axes = jnp.broadcast_to(jnp.eye(classes - 1, dtype=root.dtype), (rows, classes - 1, classes - 1))
        columns = root[:, None] * _reflected(root[:, None], axes) * weight[:, None, None]
        placed = jnp.einsum("rs,rck->rcsk", jnp.eye(rows, dtype=root.dtype), columns)
        return _like(output, placed.reshape(self.columns, -1))

    def sampled(self, output: Any, y: Any, key: Any) -> Any:
        """Their random combination."""
        root, weight = self._scaled(output, y)
        x = signs(self, key, root.dtype).reshape(len(root), -1)
        return _like(output, (root * _reflected(root, x) * weight[:, None]).reshape(-1))


@dataclass(frozen=True, eq=False)
class Labelled:
    """One row with the class `y`, so that one column is along the gradient `g = p − e_y`:

        diag(p) − p pᵀ = p_y / (1 − p_y) g gᵀ + (1 − p_y) (diag(π) − π πᵀ)

    where `π` are the probabilities of the other classes among themselves.
    """

    form: CrossEntropyForm
    kind = "cross-entropy of a label"

    @property
    def columns(self) -> int:
        """How many columns there are."""
        return self.form.shape[1] - 1

    def _circle(self, output: Any, y: Any) -> tuple[Any, Any, Any]:
        """Compute `√p` of `y` and of the classes after it in a circle, and the norm `√(1 − p_y)` of these."""
        (logits,), _ = self.form.logits_and_weights(output, y)
        (label,) = jax.tree.leaves(y)
        root = jnp.sqrt(jax.nn.softmax(logits)[(label + jnp.arange(len(logits))) % len(logits)])
        return root[0], root[1:], jnp.linalg.norm(root[1:])

    def _placed(self, output: Any, y: Any, x: Any) -> Any:
        """Put the entries of `y` and of the classes after it where they belong."""
        (label,) = jax.tree.leaves(y)
        classes = x.shape[-1]
        return _like(output, x[..., (jnp.arange(classes) - label) % classes])

    def first_weight(self, output: Any, y: Any) -> Any:
        """The square of the multiple of the gradient."""
        label, _, norm = self._circle(output, y)
        # Where the label is certain the gradient vanishes, and so does the column.
        return jnp.where(norm > 0, label**2 / norm**2, 0)

    def others(self, output: Any, y: Any) -> Any:
        """All columns but the first."""
        circle = self._circle(output, y)
        axes = jnp.eye(self.columns - 1, dtype=circle[0].dtype)
        return self._placed(output, y, self._along_others(circle, axes))

    def _along_others(self, circle: tuple[Any, Any, Any], x: Any) -> Any:
        _, root, norm = circle
        unit = jnp.where(norm > 0, root / norm, jnp.ones_like(root) / math.sqrt(self.columns))
        root, unit = (jnp.broadcast_to(u, (*x.shape[:-1], *u.shape)) for u in (root, unit))
        return jnp.concatenate([jnp.zeros((*x.shape[:-1], 1), x.dtype), root * _reflected(unit, x)], -1)

    def _first(self, circle: tuple[Any, Any, Any]) -> Any:
        label, root, norm = circle
        along = jnp.where(norm > 0, label / norm, 0)
        return jnp.concatenate([-label[None] * norm, root**2 * along])

    def all(self, output: Any, y: Any) -> Any:
        """All columns."""
        circle = self._circle(output, y)
        others = self._along_others(circle, jnp.eye(self.columns - 1, dtype=circle[0].dtype))
        return self._placed(output, y, jnp.concatenate([self._first(circle)[None], others]))

    def sampled(self, output: Any, y: Any, key: Any) -> Any:
        """Their random combination."""
        circle = self._circle(output, y)
        x = signs(self, key, circle[0].dtype)
        column = x[0] * self._first(circle) + self._along_others(circle, x[1:])
        return self._placed(output, y, column)


def _reflected(root: Any, x: Any) -> Any:
    """The reflection that exchanges the unit vector `√p` and the first axis, of `x` without its first."""
    v = root.at[..., 0].add(1.0)
    full = jnp.concatenate([jnp.zeros((*x.shape[:-1], 1), x.dtype), x], -1)
    # ‖v‖² = 2 (1 + √p₀).
    return full - v * ((v * full).sum(-1, keepdims=True) / (1 + root[..., :1]))


def _like(output: Any, columns: Any) -> Any:
    """Give columns, whose last axis has all entries, the structure of the output, a single array."""
    (leaf,), tree = jax.tree.flatten(output)
    return jax.tree.unflatten(tree, [columns.reshape(*columns.shape[:-1], *leaf.shape).astype(leaf.dtype)])


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
        return _entries_of(self.output)


def _entries_of(output: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(output))


@dataclass(frozen=True, eq=False)
class DiagonalRoot(_OfLoss):
    """The Hessian is diagonal: its product with ones is its diagonal."""

    kind = "a sum over entries of the output"

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

    kind = "any, by the Hessian of one example as a matrix"

    def _root(self, output: Any, y: Any) -> Any:
        flat, unravel = ravel_pytree(output)
        return _cholesky(jax.hessian(lambda o: self.loss(unravel(o), y))(flat)).astype(flat.dtype)

    def all(self, output: Any, y: Any) -> Any:
        """All columns."""
        return jax.vmap(ravel_pytree(output)[1])(self._root(output, y))

    def sampled(self, output: Any, y: Any, key: Any) -> Any:
        """Their random combination."""
        root = self._root(output, y)
        return ravel_pytree(output)[1](signs(self, key, root.dtype) @ root)


@dataclass(frozen=True, eq=False)
class FisherRoot:
    """A likelihood's Fisher matrix of one example's outputs, and the gradients at targets that are drawn."""

    losses: Losses
    output: Any

    kind = "a likelihood, by the Fisher matrix of one example's outputs"

    @property
    def columns(self) -> int:
        """How many columns there are."""
        return _entries_of(self.output)

    def all(self, output: Any, y: Any) -> Any:
        """All columns."""
        flat, unravel = ravel_pytree(output)
        fisher = self.losses.fisher
        assert fisher is not None
        matrix = jax.vmap(lambda u: ravel_pytree(fisher(output, unravel(u)))[0])(
            jnp.eye(flat.size, dtype=flat.dtype)
        )
        return jax.vmap(unravel)(_cholesky(matrix).astype(flat.dtype))

    def sampled(self, output: Any, y: Any, key: Any) -> Any:
        """The gradient at one target, whose outer product has the Fisher matrix as its mean."""
        assert self.losses.drawn is not None
        return self.losses.drawn(output, key)


def _cholesky(h: Any) -> Any:
    """Rows `r` with `rᵀ r = h`, the largest pivot first: exact for a singular matrix too."""
    h = h.astype(single_at_least(h.dtype))
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
