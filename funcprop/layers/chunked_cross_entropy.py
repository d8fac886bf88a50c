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

import functools
import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Inexact, Int

from funcprop.layers.token_chunks import pull_back, statistics
from funcprop.layers.token_loss import TokenLossOptions, denominator, loss_of_logits, reduced_loss
from funcprop.program.dtypes import plus, single_at_least
from funcprop.rules.equations import Equations, OperatorSymbols, apply
from funcprop.rules.layer import layer
from funcprop.rules.machine import (
    Machine,
    costs_traffic,
    dtype_of_factors,
    host,
    least_loss_logits,
    token_chunk,
    vocabulary_piece,
)
from funcprop.rules.rule import Rule


def _smooth(h: Any, w: Any, b: Any, weights: Any, o: TokenLossOptions, transposed: bool) -> Any:
    """The mean over the classes of `w_c z_c` by linearity: `h · (W w) + b · w`, without any logits."""
    dtype = single_at_least(h)
    if not o.label_smoothing:
        return jnp.zeros(h.shape[:-1], dtype)
    h, w = h.astype(dtype), w.astype(dtype)
    classes = w.shape[0 if transposed else 1]
    share = jnp.full(classes, 1 / classes, dtype) if weights is None else weights / classes
    return h @ (share @ w if transposed else w @ share) + (0 if b is None else b @ share)


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
    return single_at_least(*arrays)


def _flat(h: Any, w: Any, labels: Any, b: Any, weights: Any, machine: Machine | None) -> tuple[Any, ...]:
    """Tokens × d, `w` as it is, tokens, vocabulary, vocabulary; what is no factor in the sums' precision."""
    sums = _precision(h, w, b)
    factors = dtype_of_factors(machine or host(), h, w)
    h, w = h.astype(factors), w.astype(factors)
    b, weights = (None if x is None else x.astype(sums) for x in (b, weights))
    return h.reshape(-1, h.shape[-1]), w, labels.reshape(-1), b, weights


def _sizes(h: Any, w: Any, transposed: bool) -> tuple[int, int, int]:
    """Tokens, width, vocabulary."""
    return math.prod(h.shape[:-1]), h.shape[-1], w.shape[0 if transposed else 1]


def _chunks(h: Any, w: Any, transposed: bool, chunk: int | None, machine: Machine | None) -> tuple[int, int]:
    """The tokens in a chunk, and the columns of `W̄` that are added up at a time."""
    tokens, width, vocabulary = _sizes(h, w, transposed)
    machine = machine or host()
    size = min(chunk or token_chunk(tokens, vocabulary, machine), tokens)
    return size, vocabulary_piece(width, vocabulary, machine)


def _saves(h: Any, w: Any, transposed: bool, reduction: str, save: str | None) -> str:
    """The default saves the gradient where that is one number's and `W̄` no larger than the logits."""
    if save is not None:
        return save
    tokens, width, _ = _sizes(h, w, transposed)
    return "gradient" if reduction != "none" and tokens >= width else "normalizer"


def _forward(
    h: Any, w: Any, labels: Any, b: Any = None, weights: Any = None, *, transposed: bool, save: Any,
    chunk: Any, machine: Machine | None = None, **options: Any,
) -> tuple[Any, LinearCrossEntropyResiduals]:  # fmt: skip
    o = TokenLossOptions(**options)
    flat = _flat(h, w, labels, b, weights, machine)
    gradient = _saves(h, w, transposed, o.reduction, save) == "gradient"
    f_h, f_w, f_labels, f_b, f_weights = flat
    sizes = _chunks(h, w, transposed, chunk, machine)
    normalizer, picked, found = statistics(
        f_h, f_w, f_b, f_labels, f_weights, *sizes, o, gradient, transposed
    )
    smooth = _smooth(f_h, f_w, f_b, f_weights, o, transposed)
    loss = reduced_loss(normalizer, picked, smooth, f_labels, f_weights, o)
    loss = loss.reshape(labels.shape) if o.reduction == "none" else loss
    residuals = LinearCrossEntropyResiduals(h, w, labels, b, weights, normalizer, picked, found)
    return loss.astype(_precision(h, w, b)), residuals


def _backward(
    residuals: LinearCrossEntropyResiduals, g: Any, needs: Any, *, transposed: bool, save: Any, chunk: Any,
    machine: Machine | None = None, **options: Any,
) -> tuple[Any, ...]:  # fmt: skip
    h, w, labels, b, weights, normalizer, picked, gradient = residuals
    o = TokenLossOptions(**options)
    f_h, f_w, f_labels, f_b, f_weights = _flat(h, w, labels, b, weights, machine)
    need_h, need_w, _, need_b, need_weights = (bool(need) for need in needs)

    def small(normalizer: Any, picked: Any, smooth: Any, weights: Any) -> Any:
        return reduced_loss(normalizer, picked, smooth, f_labels, weights, o)

    smooth, pull_smooth = jax.vjp(partial(_smooth, o=o, transposed=transposed), f_h, f_w, f_b, f_weights)
    pull_small = jax.vjp(small, normalizer, picked, smooth, f_weights)[1]
    normalizer_bar, picked_bar, smooth_bar, weights_bar = pull_small(g.reshape(-1) if g.ndim else g)
    if gradient is not None:
        h_bar, totals = jax.tree.map(lambda x: g * x, gradient)
    else:
        h_bar, totals = pull_back(
            f_h,
            f_w,
            f_b,
            f_labels,
            normalizer,
            normalizer_bar,
            picked_bar,
            *_chunks(h, w, transposed, chunk, machine),
            (need_w, need_b),
            transposed,
        )
    found = [h_bar, totals.w, totals.b, weights_bar]
    if o.label_smoothing:
        found = [None if x is None else x + y for x, y in zip(found, pull_smooth(smooth_bar), strict=True)]
    h_bar, w_bar, b_bar, weights_bar = found
    return (
        h_bar.reshape(h.shape).astype(h.dtype) if need_h else None,
        w_bar.astype(w.dtype) if need_w else None,
        None,
        b_bar.astype(b.dtype) if need_b else None,
        weights_bar.astype(weights.dtype) if need_weights else None,
    )


def _applies(
    h: Any, w: Any, *_: Any, transposed: bool, chunk: Any, save: Any, machine: Machine | None = None,
    **static: Any,
) -> bool | str:  # fmt: skip
    tokens, _width, vocabulary = _sizes(h, w, transposed)
    if tokens == 0:
        return "there are no tokens"
    # Measured: small logits stay in the cache, and chunks of them cost time (1.3 × for 1024 × 8192).
    if chunk is not None or save is not None:
        return True
    machine = machine or host()
    if dtype_of_factors(machine, h, w).itemsize < 4 and costs_traffic(tokens * vocabulary, machine):
        return "on a GPU, chunks of so few logits of 16 bits cost traffic; pass `chunk` or `save`"
    if tokens * vocabulary < least_loss_logits(machine):
        return f"{tokens} × {vocabulary} logits are few; pass `chunk` or `save` for less memory"
    return True


# --- equations --------------------------------------------------------------------------------


def _equations(op: OperatorSymbols) -> Equations:
    h, w, labels, b, weights = op.args
    transposed = op.static["transposed"]
    o = TokenLossOptions(*(op.static[name] for name in TokenLossOptions._fields))
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


@functools.cache
def _ways() -> dict[str, Rule]:
    return {f"chunks of {n} tokens": _RULE.with_static(chunk=n) for n in (128, 256, 512, 1024, 2048)}


_RULE = Rule(_forward, _backward, _equations, applies=_applies, pure=True, sized=True, ways=_ways)


@layer(rule=_RULE)
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
        chunk: tokens in a chunk; by default that for the machine that is compiled for
            (`rules.machine.token_chunk`). With neither `chunk` nor `save`
            given, the rule leaves less than 2²⁵ logits to autodiff, which is quicker there.

    Raises:
        ValueError: the shapes do not fit; a static argument is unknown or does not fit the reduction.

    Example:
        >>> import jax.numpy as jnp, funcprop as fp
        >>> h, w = jnp.zeros((2, 3)), jnp.ones((3, 4))
        >>> print(f"{fp.layers.linear_cross_entropy(h, w, jnp.array([0, 3])):.4f}")
        1.3863
    """
    o = TokenLossOptions(ignore_index, label_smoothing, z_loss, reduction)
    _check(h, w, labels, b, weights, transposed, reduction, save, chunk)
    dtype = _precision(h, w, b)
    z = h.astype(dtype) @ (w.T if transposed else w).astype(dtype)
    z = z if b is None else plus(z, b)
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
