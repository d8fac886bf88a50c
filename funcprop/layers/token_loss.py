"""Cross-entropy of one token from the two numbers that it reads of its row of logits, and its reductions.

These are the normalizer `ℓ = log Σ_c exp z_c` and the logit at the label, `z_y`; with label smoothing also
the weighted mean of the logits. All that has the size of the vocabulary is left to the caller.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from funcprop.program.dtypes import times


class TokenLossOptions(NamedTuple):
    """The static parameters of the loss itself."""

    ignore_index: int
    label_smoothing: float
    z_loss: float
    reduction: str


def token_losses(
    normalizer: Any, picked: Any, smooth: Any, labels: Any, weights: Any, o: TokenLossOptions
) -> Any:
    """Each token's loss from `ℓ`, `z_y` and the mean over the classes of `w_c z_c`."""
    valid = labels != o.ignore_index
    weight = _weight_of(labels, weights, o)
    loss = weight * (normalizer - picked)
    if o.label_smoothing:
        mean_weight = 1.0 if weights is None else weights.mean()
        loss = (1 - o.label_smoothing) * loss + o.label_smoothing * (mean_weight * normalizer - smooth)
    if o.z_loss:
        loss = loss + o.z_loss * normalizer**2
    return jnp.where(valid, loss, 0)


def safe_labels(labels: Any, o: TokenLossOptions) -> Any:
    """The labels, and class 0 where they are ignored."""
    return jnp.where(labels == o.ignore_index, 0, labels)


def pick(z: Any, labels: Any) -> Any:
    """The logit at the label; negative labels count from the end, others out of range give NaN."""
    return jnp.take_along_axis(z, labels[..., None], axis=-1)[..., 0]


def _weight_of(labels: Any, weights: Any, o: TokenLossOptions) -> Any:
    if weights is None:
        return 1.0
    return jnp.take(weights, safe_labels(labels, o), mode="fill")


def denominator(labels: Any, weights: Any, o: TokenLossOptions, dtype: Any) -> Any:
    """Compute the divisor of the sum of losses: for `"mean"` the weight of all tokens that count."""
    if o.reduction != "mean":
        return jnp.ones((), dtype)
    return jnp.where(labels != o.ignore_index, _weight_of(labels, weights, o), 0).sum(dtype=dtype)


def reduced_loss(
    normalizer: Any, picked: Any, smooth: Any, labels: Any, weights: Any, o: TokenLossOptions
) -> Any:
    """The losses, their sum, or their mean."""
    losses = token_losses(normalizer, picked, smooth, labels, weights, o)
    if o.reduction == "none":
        return losses
    return losses.sum() / denominator(labels, weights, o, losses.dtype)


def loss_of_logits(z: Any, labels: Any, weights: Any, o: TokenLossOptions) -> Any:
    """The loss from all logits."""
    picked = pick(z, safe_labels(labels, o))
    smooth = (z if weights is None else times(z, weights)).mean(-1)
    return reduced_loss(jax.nn.logsumexp(z, axis=-1), picked, smooth, labels, weights, o)
