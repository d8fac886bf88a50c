"""Chunks of tokens: their logits are made, reduced to what the loss or its cotangents read, and dropped.

The matrix stays as it lies, `d × vocabulary` or, `transposed`, `vocabulary × d`: turned it would be a copy of
its size, and so would its cotangent.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from funcprop import _jax
from funcprop.layers.token_loss import TokenLossOptions, denominator, pick, safe_labels, token_losses
from funcprop.program.dtypes import plus, single_at_least, together


def _logits(h: Any, w: Any, b: Any, transposed: bool) -> Any:
    z = _product(h, w, 1, 1 if transposed else 0)
    return z if b is None else plus(z, b)


def _product(a: Any, b: Any, left: int, right: int) -> Any:
    """The contraction of two matrices over an axis of each."""
    axes = (((left,), (right,)), ((), ()))
    return lax.dot_general(a, b, axes, preferred_element_type=single_at_least(a, b))


def _is_label(labels: Any, vocabulary: int) -> Any:
    """Where the column is the label's; negative labels count from the end, as indices do."""
    labels = jnp.where(labels < 0, labels + vocabulary, labels)[:, None]
    labels, columns = together(labels, jnp.arange(vocabulary))
    return labels == columns


def _add_product(total: Any, h: Any, z_bar: Any, transposed: bool, columns: int) -> Any:
    """`total + hᵀ z̄`, or its transpose, so many columns of the vocabulary at a time."""
    axis = 0 if transposed else 1

    def product(piece: Any) -> Any:
        # Activations first: the other order makes XLA's CPU backend copy a transpose.
        return _product(piece, h, 0, 0) if transposed else _product(h, piece, 0, 0)

    def add(total: Any, start: Any, width: int) -> Any:
        piece = lax.dynamic_slice_in_dim(z_bar, start, width, 1)
        before = lax.dynamic_slice_in_dim(total, start, width, axis)
        return lax.dynamic_update_slice_in_dim(total, before + product(piece), start, axis)

    pieces, rest = divmod(z_bar.shape[1], columns)
    if pieces > 1:
        starts = jnp.arange(pieces, dtype=jnp.int32) * columns
        total = lax.scan(lambda total, start: (add(total, start, columns), None), total, starts)[0]
        return add(total, pieces * columns, rest) if rest else total
    return total + product(z_bar)


def _over_chunks(step: Any, totals: Any, xs: Any, cotangents: Any, size: int) -> tuple[Any, Any]:
    """Run `totals, ys = step(totals, (*xs, *cotangents))` over chunks of tokens.

    Chunk i has the tokens i, i + count, i + 2 count …: where the tokens are spread over devices, each device
    has a part of every chunk, and none has to be sent. What is missing at the end is filled up with copies
    of the last token, whose logits are as finite as its own; their cotangents are zero. The step is
    checkpointed: the reverse derivative of the backward makes the logits again, too.
    """
    tokens = xs[0].shape[0]
    least = -(-tokens // size)
    # A number of chunks that divides the tokens, if one is below twice as many: nothing is filled up then.
    count = next((n for n in range(least, 2 * least) if tokens % n == 0), least)
    size = -(-tokens // count)

    def cut(x: Any, mode: str) -> Any:
        filled = jnp.pad(x, ((0, count * size - tokens), *((0, 0),) * (x.ndim - 1)), mode)
        return filled.reshape(size, count, *x.shape[1:])

    leaves, tree = jax.tree.flatten(totals)
    totals = jax.tree.unflatten(tree, _jax.align_varying_axes([xs[0], *leaves])[1:])
    chunks = *(cut(x, "edge") for x in xs), *(cut(x, "constant") for x in cotangents)

    def of_chunk(totals: Any, i: Any) -> Any:
        return step(totals, tuple(lax.dynamic_index_in_dim(x, i, 1, keepdims=False) for x in chunks))

    each = jnp.arange(count, dtype=jnp.int32)
    totals, ys = lax.scan(jax.checkpoint(of_chunk, prevent_cse=False), totals, each)
    return totals, jax.tree.map(lambda y: jnp.moveaxis(y, 1, 0).reshape(-1, *y.shape[2:])[:tokens], ys)


class Totals(NamedTuple):
    """The cotangents that are summed over the tokens."""

    w: Any
    b: Any


def _zeros(w: Any, b: Any, need_w: bool = True, need_b: bool = True) -> Totals:
    return Totals(
        jnp.zeros(w.shape, single_at_least(w)) if need_w else None,
        jnp.zeros_like(b) if need_b and b is not None else None,
    )


def _add_gradient(
    totals: Totals, h: Any, w: Any, z_bar: Any, transposed: bool, columns: int
) -> tuple[Totals, Any]:
    """The cotangents of one chunk: those of `W` and `b` added to the totals, and that of `h`."""
    factor = z_bar.astype(h.dtype)
    added = Totals(
        None if totals.w is None else _add_product(totals.w, h, factor, transposed, columns),
        None if totals.b is None else totals.b + z_bar.sum(0),
    )
    return added, _product(factor, w, 1, 0 if transposed else 1)


_staged = partial(jax.jit, inline=True)


@partial(_staged, static_argnames=("size", "columns", "options", "gradient", "transposed"))
def statistics(
    h: Any, w: Any, b: Any, labels: Any, weights: Any, size: int, columns: int, options: TokenLossOptions,
    gradient: bool, transposed: bool,
) -> tuple[Any, Any, Any]:  # fmt: skip
    """`ℓ` and `z_y` of every token; with `gradient`, the cotangents of `h, w, b` for the cotangent 1."""
    total_weight = denominator(labels, weights, options, single_at_least(h))

    def step(totals: Any, x: Any) -> Any:
        h, labels, share = x
        z = _logits(h, w, b, transposed)
        named = safe_labels(labels, options)
        hit = _is_label(named, z.shape[1])
        largest = z.max(-1, keepdims=True)
        # What is subtracted from the logits cancels, and so it has no derivative.
        largest = lax.stop_gradient(jnp.where(jnp.isfinite(largest), largest, 0))
        exponentials = jnp.exp(z - largest)
        total = exponentials.sum(-1, keepdims=True)
        normalizer, picked = (largest + jnp.log(total))[:, 0], pick(z, named)
        if not gradient:
            return totals, (normalizer, picked, None)
        losses = partial(token_losses, smooth=0.0, labels=labels, weights=weights, o=options)
        normalizer_bar, picked_bar = jax.vjp(losses, normalizer, picked)[1](share)
        slope = normalizer_bar[:, None] / total
        z_bar = slope * exponentials + jnp.where(hit, picked_bar[:, None], 0)
        totals, h_bar = _add_gradient(totals, h, w, z_bar, transposed, columns)
        return totals, (normalizer, picked, h_bar)

    shares = jnp.broadcast_to(1 / total_weight, labels.shape).astype(total_weight.dtype)
    totals = _zeros(w, b) if gradient else None
    totals, (normalizer, picked, h_bar) = _over_chunks(step, totals, (h, labels), (shares,), size)
    return normalizer, picked, (h_bar, totals) if gradient else None


@partial(_staged, static_argnames=("size", "columns", "needs", "transposed"))
def pull_back(
    h: Any, w: Any, b: Any, labels: Any, normalizer: Any, normalizer_bar: Any, picked_bar: Any,
    size: int, columns: int, needs: tuple[bool, bool], transposed: bool,
) -> tuple[Any, Totals]:  # fmt: skip
    """The cotangents of `h, w, b` from those of `ℓ` and `z_y`; the logits are made again."""

    def step(totals: Any, x: Any) -> Any:
        h, labels, normalizer, normalizer_bar, picked_bar = (v if v.ndim > 1 else v[:, None] for v in x)
        z = _logits(h, w, b, transposed)
        hit = _is_label(labels[:, 0], z.shape[1])
        z_bar = normalizer_bar * jnp.exp(z - normalizer) + jnp.where(hit, picked_bar, 0)
        return _add_gradient(totals, h, w, z_bar, transposed, columns)

    cotangents = normalizer_bar, picked_bar
    totals, h_bar = _over_chunks(step, _zeros(w, b, *needs), (h, labels, normalizer), cotangents, size)
    return h_bar, totals
