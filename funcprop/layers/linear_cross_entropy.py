"""A linear map and the cross-entropy of its softmax as one operator: tokens × vocabulary is never held.

With logits `z_t = h_t W + b`, `ℓ_t = log Σ_c exp z_tc` and label `y_t`, a token's loss reads two numbers of
its row of logits: `ℓ_t` and `z_{t y_t}`. So the rows of a chunk of tokens are made, reduced to these two and
dropped. With their cotangents `ℓ̄_t` and `ȳ_t`,

    z̄_tc = ℓ̄_t exp(z_tc − ℓ_t) + ȳ_t [c = y_t],    h̄ = z̄ Wᵀ,    W̄ = hᵀ z̄,    b̄ = Σ_t z̄_t.

What is saved is a choice (`save`):

* `"gradient"`: the forward makes `z̄`, `h̄` and `W̄` for the cotangent 1 while it has the logits, and the
  backward scales them. No product is done twice; right only where the loss is one number.
* `"normalizer"`: `ℓ` is saved and the backward makes the logits again, a third more products. It can be used
  for any reduction, and holds nothing of the size of `W` besides `W̄`.

Sources: Wijmans et al., "Cut your losses in large-vocabulary language models", ICLR 2025, and Hsu et al.,
"Liger kernel", 2024 (the gradient in the forward); Szegedy et al., "Rethinking the inception architecture",
2016 (label smoothing); Chowdhery et al., "PaLM", 2022 (z-loss).
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Inexact, Int

from funcprop import _compat
from funcprop.expressions import Equations, OperatorSymbols, apply
from funcprop.layers.token_loss import (
    Options,
    denominator,
    loss_of_logits,
    pick,
    reduced_loss,
    safe_labels,
    token_losses,
)
from funcprop.registry import Rule, layer

_PIECE = 2048  # columns of W̄ that are added up at a time: what is added stays in the cache


def chunk_size(tokens: int, vocabulary: int) -> int:
    """The default number of tokens in a chunk: a sixteenth, at most 2²³ logits, at least 64 tokens."""
    most = min(-(-tokens // 16), 2**23 // max(vocabulary, 1))
    count = -(-tokens // max(most, 64))
    return -(-tokens // max(count, 1))


def _smooth(h: Any, w: Any, b: Any, weights: Any, o: Options) -> Any:
    """The mean over the classes of `w_c z_c` by linearity: `h · (W w) + b · w`, without any logits."""
    if not o.label_smoothing:
        return jnp.zeros(h.shape[:-1], h.dtype)
    share = jnp.full(w.shape[1], 1 / w.shape[1], h.dtype) if weights is None else weights / w.shape[1]
    return h @ (w @ share) + (0 if b is None else b @ share)


# --- chunks of tokens -------------------------------------------------------------------------


def _logits(h: Any, w: Any, b: Any) -> Any:
    return h @ w if b is None else h @ w + b


def _is_label(labels: Any, vocabulary: int) -> Any:
    """Where the column is the label's; negative labels count from the end, as indices do."""
    return jnp.where(labels < 0, labels + vocabulary, labels)[:, None] == jnp.arange(vocabulary)


def _add_product(total: Any, h: Any, z_bar: Any) -> Any:
    """`total + hᵀ z̄`, some columns at a time."""

    def add(total: Any, start: Any, width: int) -> Any:
        piece = lax.dynamic_slice_in_dim(z_bar, start, width, 1)
        before = lax.dynamic_slice_in_dim(total, start, width, 1)
        # Activations first: the other order makes XLA's CPU backend copy a transpose.
        after = before + lax.dot_general(h, piece, (((0,), (0,)), ((), ())))
        return lax.dynamic_update_slice_in_dim(total, after, start, 1)

    pieces, rest = divmod(total.shape[1], _PIECE)
    if pieces > 1:
        starts = jnp.arange(pieces, dtype=jnp.int32) * _PIECE
        total = lax.scan(lambda total, start: (add(total, start, _PIECE), None), total, starts)[0]
        return add(total, pieces * _PIECE, rest) if rest else total
    return total + lax.dot_general(h, z_bar, (((0,), (0,)), ((), ())))


def _over_chunks(step: Any, totals: Any, xs: Any, size: int) -> tuple[Any, Any]:
    """Run `totals, ys = step(totals, xs)` over chunks of tokens; a last chunk is filled up with zeros.

    The step is checkpointed: the reverse derivative of the backward makes the logits again, too.
    """
    tokens = jax.tree.leaves(xs)[0].shape[0]
    count = -(-tokens // size)

    def cut(x: Any) -> Any:
        filled = jnp.pad(x, ((0, count * size - tokens), *((0, 0),) * (x.ndim - 1)))
        return filled.reshape(count, size, *x.shape[1:])

    leaves, tree = jax.tree.flatten(totals)
    totals = jax.tree.unflatten(tree, _compat.align_varying_axes([jax.tree.leaves(xs)[0], *leaves])[1:])
    totals, ys = lax.scan(jax.checkpoint(step, prevent_cse=False), totals, jax.tree.map(cut, xs))
    return totals, jax.tree.map(lambda y: y.reshape(-1, *y.shape[2:])[:tokens], ys)


class Totals(NamedTuple):
    """The cotangents that are summed over the tokens."""

    w: Any
    b: Any


def _zeros(w: Any, b: Any, need_w: bool = True, need_b: bool = True) -> Totals:
    return Totals(
        jnp.zeros_like(w) if need_w else None, jnp.zeros_like(b) if need_b and b is not None else None
    )


def _add_gradient(totals: Totals, h: Any, w: Any, z_bar: Any) -> tuple[Totals, Any]:
    """The cotangents of one chunk: those of `W` and `b` added to the totals, and that of `h`."""
    added = Totals(
        None if totals.w is None else _add_product(totals.w, h, z_bar),
        None if totals.b is None else totals.b + z_bar.sum(0),
    )
    return added, lax.dot_general(z_bar, w, (((1,), (1,)), ((), ())))


_staged = partial(jax.jit, inline=True)


@partial(_staged, static_argnames=("size", "options", "gradient"))
def _statistics(
    h: Any, w: Any, b: Any, labels: Any, weights: Any, size: int, options: Options, gradient: bool
) -> tuple[Any, Any, Any]:
    """`ℓ` and `z_y` of every token; with `gradient`, the cotangents of `h, w, b` for the cotangent 1."""
    total_weight = denominator(labels, weights, options, h.dtype)

    def step(totals: Any, x: Any) -> Any:
        h, labels, share = x
        z = _logits(h, w, b)
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
        totals, h_bar = _add_gradient(totals, h, w, z_bar)
        return totals, (normalizer, picked, h_bar)

    shares = jnp.broadcast_to(1 / total_weight, labels.shape).astype(h.dtype)
    totals = _zeros(w, b) if gradient else None
    totals, (normalizer, picked, h_bar) = _over_chunks(step, totals, (h, labels, shares), size)
    return normalizer, picked, (h_bar, totals) if gradient else None


@partial(_staged, static_argnames=("size", "needs"))
def _pull(
    h: Any, w: Any, b: Any, labels: Any, normalizer: Any, normalizer_bar: Any, picked_bar: Any,
    size: int, needs: tuple[bool, bool],
) -> tuple[Any, Totals]:  # fmt: skip
    """The cotangents of `h, w, b` from those of `ℓ` and `z_y`; the logits are made again."""

    def step(totals: Any, x: Any) -> Any:
        h, labels, normalizer, normalizer_bar, picked_bar = (v if v.ndim > 1 else v[:, None] for v in x)
        z = _logits(h, w, b)
        hit = _is_label(labels[:, 0], z.shape[1])
        z_bar = normalizer_bar * jnp.exp(z - normalizer) + jnp.where(hit, picked_bar, 0)
        return _add_gradient(totals, h, w, z_bar)

    xs = (h, labels, normalizer, normalizer_bar, picked_bar)
    totals, h_bar = _over_chunks(step, _zeros(w, b, *needs), xs, size)
    return h_bar, totals


# --- the rule ---------------------------------------------------------------------------------


class LinearCrossEntropyResiduals(NamedTuple):
    """The arguments, `ℓ` and `z_y` of every token, and with `save="gradient"` the cotangents for 1."""

    h: Any
    w: Any
    labels: Any
    b: Any
    weights: Any
    normalizer: Any
    picked: Any
    gradient: Any


def _precision(*arrays: Any) -> Any:
    return jnp.promote_types(jnp.result_type(*(x for x in arrays if x is not None)), jnp.float32)


def _flat(h: Any, w: Any, labels: Any, b: Any, weights: Any, transposed: bool) -> tuple[Any, ...]:
    """Tokens × d, d × vocabulary, tokens, vocabulary, vocabulary; all in the precision of the sums."""
    dtype = _precision(h, w, b)
    h, w, b, weights = (None if x is None else x.astype(dtype) for x in (h, w, b, weights))
    return h.reshape(-1, h.shape[-1]), w.T if transposed else w, labels.reshape(-1), b, weights


def _sizes(h: Any, w: Any, transposed: bool) -> tuple[int, int, int]:
    """Tokens, width, vocabulary."""
    return math.prod(h.shape[:-1]), h.shape[-1], w.shape[0 if transposed else 1]


def _saves(h: Any, w: Any, transposed: bool, reduction: str, save: str | None) -> str:
    """The default saves the gradient where that is one number's and `W̄` no larger than the logits."""
    if save is not None:
        return save
    tokens, width, _ = _sizes(h, w, transposed)
    return "gradient" if reduction != "none" and tokens >= width else "normalizer"


def _forward(
    h: Any, w: Any, labels: Any, b: Any = None, weights: Any = None, *, transposed: bool, save: Any,
    chunk: Any, **options: Any,
) -> tuple[Any, LinearCrossEntropyResiduals]:  # fmt: skip
    o = Options(**options)
    flat = _flat(h, w, labels, b, weights, transposed)
    tokens, _, vocabulary = _sizes(h, w, transposed)
    gradient = _saves(h, w, transposed, o.reduction, save) == "gradient"
    f_h, f_w, f_labels, f_b, f_weights = flat
    size = min(chunk or chunk_size(tokens, vocabulary), tokens)
    normalizer, picked, found = _statistics(f_h, f_w, f_b, f_labels, f_weights, size, o, gradient)
    loss = reduced_loss(normalizer, picked, _smooth(f_h, f_w, f_b, f_weights, o), f_labels, f_weights, o)
    loss = loss.reshape(labels.shape) if o.reduction == "none" else loss
    residuals = LinearCrossEntropyResiduals(h, w, labels, b, weights, normalizer, picked, found)
    return loss.astype(_precision(h, w, b)), residuals


def _backward(
    residuals: LinearCrossEntropyResiduals, g: Any, needs: Any, *, transposed: bool, save: Any, chunk: Any,
    **options: Any,
) -> tuple[Any, ...]:  # fmt: skip
    h, w, labels, b, weights, normalizer, picked, gradient = residuals
    o = Options(**options)
    f_h, f_w, f_labels, f_b, f_weights = _flat(h, w, labels, b, weights, transposed)
    need_h, need_w, _, need_b, need_weights = (bool(need) for need in needs)

    def small(normalizer: Any, picked: Any, smooth: Any, weights: Any) -> Any:
        return reduced_loss(normalizer, picked, smooth, f_labels, weights, o)

    smooth, pull_smooth = jax.vjp(partial(_smooth, o=o), f_h, f_w, f_b, f_weights)
    pull_small = jax.vjp(small, normalizer, picked, smooth, f_weights)[1]
    normalizer_bar, picked_bar, smooth_bar, weights_bar = pull_small(g.reshape(-1) if g.ndim else g)
    if gradient is not None:
        h_bar, totals = jax.tree.map(lambda x: g * x, gradient)
    else:
        tokens, _, vocabulary = _sizes(h, w, transposed)
        size = min(chunk or chunk_size(tokens, vocabulary), tokens)
        h_bar, totals = _pull(
            f_h, f_w, f_b, f_labels, normalizer, normalizer_bar, picked_bar, size, (need_w, need_b)
        )
    found = [h_bar, totals.w, totals.b, weights_bar]
    if o.label_smoothing:
        found = [None if x is None else x + y for x, y in zip(found, pull_smooth(smooth_bar), strict=True)]
    h_bar, w_bar, b_bar, weights_bar = found
    return (
        h_bar.reshape(h.shape).astype(h.dtype) if need_h else None,
        (w_bar.T if transposed else w_bar).astype(w.dtype) if need_w else None,
        None,
        b_bar.astype(b.dtype) if need_b else None,
        weights_bar.astype(weights.dtype) if need_weights else None,
    )


def _applies(h: Any, w: Any, *_: Any, transposed: bool, chunk: Any, save: Any, **static: Any) -> bool | str:
    tokens, _width, vocabulary = _sizes(h, w, transposed)
    if tokens == 0:
        return "there are no tokens"
    # Measured: small logits stay in the cache, and chunks of them cost time (1.3 × for 1024 × 8192).
    if chunk is None and save is None and tokens * vocabulary < 2**25:
        return f"{tokens} × {vocabulary} logits are few; pass `chunk` or `save` for less memory"
    return True


# --- equations --------------------------------------------------------------------------------


def _equations(op: OperatorSymbols) -> Equations:
    h, w, labels, b, weights = op.args
    transposed = op.static["transposed"]
    o = Options(*(op.static[name] for name in Options._fields))
    epsilon = o.label_smoothing
    weight = [] if weights is None else [weights]

    def loss(z: Any, labels: Any, weights: Any = None) -> Any:
        return loss_of_logits(z, labels, weights, o)

    def target(z: Any, labels: Any, weights: Any = None) -> Any:
        classes = jnp.ones(z.shape[-1], z.dtype) if weights is None else weights
        hit = jax.nn.one_hot(labels % z.shape[-1], z.shape[-1], dtype=z.dtype)
        return (1 - epsilon) * (hit * classes).sum(-1, keepdims=True) * hit + epsilon * classes / z.shape[-1]

    def share(g: Any, labels: Any, weights: Any = None) -> Any:
        counted = jnp.where(labels != o.ignore_index, g, 0)
        return (counted / denominator(labels, weights, o, counted.dtype))[..., None]

    normalizer = partial(jax.nn.logsumexp, axis=-1, keepdims=True)
    columns = w.T if transposed else w
    z = h @ columns if b is None else h @ columns + b
    forward = apply(op.name, loss, z, labels, *weight)
    y = apply("target", target, z, labels, *weight)
    slope = y.sum(-1, keepdims=True)
    if o.z_loss:
        slope = slope + (2 * o.z_loss) * apply("logsumexp", normalizer, z)
    softmax = apply("softmax", jax.nn.softmax, z)
    z_bar = apply("share", share, op.cotangent, labels, *weight) * (slope * softmax - y)
    w_bar = None
    if len(h.shape) == 2:
        w_bar = z_bar.T @ h if transposed else h.T @ z_bar
    b_bar = None if b is None else z_bar.sum(tuple(range(len(z.shape) - 1)))
    return Equations(forward, (z_bar @ (w if transposed else w.T), w_bar, None, b_bar, None))


# --- the layer --------------------------------------------------------------------------------


@layer(rule=Rule(_forward, _backward, _equations, platforms=None, applies=_applies))
def linear_cross_entropy(
    h: Inexact[Array, "*batch d"],
    w: Inexact[Array, "d vocabulary"],
    labels: Int[Array, "*batch"],
    b: Inexact[Array, " vocabulary"] | None = None,
    weights: Float[Array, " vocabulary"] | None = None,
    *,
    transposed: bool = False,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: str = "mean",
    save: str | None = None,
    chunk: int | None = None,
) -> Inexact[Array, "..."]:
    """Cross-entropy of `softmax(h W + b)` with integer labels, the output layer of a language model.

    With `ℓ_t = log Σ_c exp z_tc`, class weights `w` and smoothing `ε`, a token's target is
    `y_tc = (1 − ε) w_{y_t} [c = y_t] + ε w_c / C` and its loss

        L_t = Σ_c y_tc (ℓ_t − z_tc) + z_loss · ℓ_t²,    z̄_tc = L̄_t ((Σ_k y_tk + 2 z_loss ℓ_t) p_tc − y_tc),

    zero where `y_t` is `ignore_index`. As in PyTorch's `cross_entropy`, `"mean"` divides the sum by the sum
    of `w_{y_t}` over the tokens that count (their number without weights, also with smoothing and z-loss;
    NaN if there are none). Other labels out of range are as `jnp.take_along_axis` has them: negative ones
    down to `−C` count from the end, all else give NaN losses. Logits and sums are in float32 at least, and
    so is the result. The rule holds the logits of one chunk of tokens at a time.

    Args:
        h: hidden states of any batch shape.
        w: the vocabulary's matrix; vocabulary × d (an embedding table) with `transposed`.
        labels: class indices.
        b: bias.
        weights: class weights; differentiable like the others.
        transposed: orientation of `w`.
        ignore_index: the label of tokens that do not count.
        label_smoothing, z_loss: see above.
        reduction: `"none"` (of shape `batch`), `"sum"` or `"mean"`.
        save: `"gradient"` or `"normalizer"`, see the head of this module; by default the gradient where the
            result is one number and there are at least `d` tokens.
        chunk: tokens in a chunk; by default `chunk_size(tokens, vocabulary)`. With neither `chunk` nor `save`
            given, the rule leaves less than 2²⁵ logits to autodiff, which is quicker there.

    Raises:
        ValueError: the shapes do not fit; a static argument is unknown or does not fit the reduction.

    Example:
        >>> import jax.numpy as jnp, funcprop as fp
        >>> h, w = jnp.zeros((2, 3)), jnp.ones((3, 4))
        >>> print(f"{fp.layers.linear_cross_entropy(h, w, jnp.array([0, 3])):.4f}")
        1.3863
    """
    o = Options(ignore_index, label_smoothing, z_loss, reduction)
    _check(h, w, labels, b, weights, transposed, reduction, save, chunk)
    dtype = _precision(h, w, b)
    z = h.astype(dtype) @ (w.T if transposed else w).astype(dtype)
    if b is not None:
        z = z + b.astype(dtype)
    return loss_of_logits(z, labels, None if weights is None else weights.astype(dtype), o)


def _check(
    h: Any, w: Any, labels: Any, b: Any, weights: Any, transposed: bool, reduction: str, save: Any, chunk: Any
) -> None:
    width, vocabulary = w.shape[::-1] if transposed else w.shape
    classes = [x is None or x.shape == (vocabulary,) for x in (b, weights)]
    if h.shape[-1:] != (width,) or labels.shape != h.shape[:-1] or not all(classes):
        shapes = [None if x is None else x.shape for x in (h, w, labels, b, weights)]
        raise ValueError(
            "linear_cross_entropy: h {}, w {}, labels {}, b {}, weights {} do not fit; pass (*batch, d), "
            "(d, vocabulary) or its transpose with transposed=True, (*batch), (vocabulary,) twice.".format(
                *shapes
            )
        )
    if reduction not in ("none", "sum", "mean"):
        raise ValueError(f"linear_cross_entropy: reduction={reduction!r}; pass 'none', 'sum' or 'mean'.")
    if save not in (None, "gradient", "normalizer") or (save == "gradient" and reduction == "none"):
        raise ValueError(
            f"linear_cross_entropy: save={save!r} with reduction={reduction!r}; pass 'normalizer', or "
            "'gradient' where the result is one number."
        )
    if chunk is not None and chunk < 1:
        raise ValueError(f"linear_cross_entropy: chunk={chunk}; a chunk has at least one token.")
