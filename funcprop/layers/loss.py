"""Losses and the weight-decay penalty.

The values come from `optax`; the backward rules are the closed forms of the books.

Source: Bishop, *Pattern Recognition and Machine Learning*, 2006, sections 4.3.4 (the cotangent of logits),
3.1.1 (squared error) and 3.1.4 (weight decay).
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Inexact, Num

from funcprop import _jax
from funcprop.rules.equations import Equations, OperatorSymbols, apply, squared_norm
from funcprop.rules.expressions import number
from funcprop.rules.layer import layer
from funcprop.rules.rule import Rule

# --- softmax cross-entropy --------------------------------------------------------------------


class LogitsAndLabels(NamedTuple):
    """The logits, from which the probabilities are computed again, and the labels."""

    logits: Any
    labels: Any


def _is_index(labels: Any) -> bool:
    return not _jax.is_differentiable(jax.typeof(labels))


def _cross_entropy(logits: Any, labels: Any) -> Any:
    if _is_index(labels):
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return optax.softmax_cross_entropy(logits, labels)


def _target(labels: Any, logits: Any) -> Any:
    return jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype) if _is_index(labels) else labels


def _cross_entropy_forward(logits: Any, labels: Any) -> tuple[Any, LogitsAndLabels]:
    return _cross_entropy(logits, labels), LogitsAndLabels(logits, labels)


def _cross_entropy_backward(residuals: LogitsAndLabels, g: Any, needs: Any) -> tuple[Any, Any]:
    logits, labels = residuals
    need_logits, need_labels = needs
    g = g[..., None]
    if _is_index(labels):
        # The transpose of picking a logit, and no one-hot vector for every example.
        pick = partial(jnp.take_along_axis, indices=labels[..., None], axis=-1)
        (picked,) = jax.linear_transpose(pick, logits)(g)
        return (g * jax.nn.softmax(logits) - picked).astype(logits.dtype), None
    total = labels.sum(-1, keepdims=True)
    return (
        (g * (jax.nn.softmax(logits) * total - labels)).astype(logits.dtype) if need_logits else None,
        (-g * jax.nn.log_softmax(logits)).astype(labels.dtype) if need_labels else None,
    )


def _cross_entropy_equations(op: OperatorSymbols) -> Equations:
    logits, labels = op.args
    forward = apply(op.name, _cross_entropy, logits, labels)
    softmax = apply("softmax", jax.nn.softmax, logits)
    if jnp.issubdtype(labels.type.dtype, jnp.inexact):
        per_row = _over_last_axis(op.cotangent)
        target_sum = apply("sum", lambda t: t.sum(-1, keepdims=True), labels)
        log_softmax = apply("log_softmax", jax.nn.log_softmax, logits)
        return Equations(forward, (per_row * (target_sum * softmax - labels), -(per_row * log_softmax)))
    one_hot = apply("onehot", partial(_target, logits=logits.type), labels)
    return Equations(forward, (_over_last_axis(op.cotangent) * (softmax - one_hot), None))


def _over_last_axis(g: Any) -> Any:
    """A cotangent per example, made to multiply rows."""
    return g if g.shape == () else apply("column", lambda v: v[..., None], g)


@layer(
    rule=Rule(
        _cross_entropy_forward,
        _cross_entropy_backward,
        _cross_entropy_equations,
        platforms=frozenset(),
        pure=True,
    )
)
def softmax_cross_entropy(
    logits: Inexact[Array, "*batch classes"], labels: Num[Array, "..."]
) -> Inexact[Array, "*batch"]:
    """Cross-entropy of the softmax of `logits`, one value for each row, in nats.

    `labels` are class indices of shape `batch` (integers), or probabilities of shape `batch × classes`. With
    `p = softmax(o)`: `L = −Σ_c y_c log p_c`, `ō = L̄ (p Σ_c y_c − y)`. Saves the logits.

    Raises:
        ValueError: the labels do not have one of these shapes; nothing is broadcast.

    Example:
        >>> import jax.numpy as jnp, funcprop as fp
        >>> print(f"{fp.layers.softmax_cross_entropy(jnp.zeros(2), jnp.array(0)):.4f}")
        0.6931
    """
    shape, expected = jnp.shape(labels), jnp.shape(logits)
    if not expected:
        raise ValueError("softmax_cross_entropy: logits has shape (); it needs a last axis, the classes.")
    if _is_index(labels):
        kind, expected = "class indices (integers)", expected[:-1]
        remedy = "One-hot labels must be floating point: `labels.astype(logits.dtype)`"
    else:
        kind = "probabilities (floating point)"
        remedy = "Class indices must be integers: `labels.astype(int)`"
    if shape != expected:
        raise ValueError(
            f"softmax_cross_entropy: labels has shape {shape} but logits has {jnp.shape(logits)}; {kind} "
            f"must have shape {expected}, nothing is broadcast. {remedy}."
        )
    return _cross_entropy(logits, labels)


# --- squared error ----------------------------------------------------------------------------


class PredictionAndTarget(NamedTuple):
    """Both operands; a residual that autodiff keeps too."""

    prediction: Any
    target: Any


def _mse_forward(prediction: Any, target: Any) -> tuple[Any, PredictionAndTarget]:
    return jnp.mean(jnp.square(prediction - target)), PredictionAndTarget(prediction, target)


def _mse_backward(residuals: PredictionAndTarget, g: Any, needs: Any) -> tuple[Any, Any]:
    prediction, target = residuals
    cotangent = (2 / max(prediction.size, 1)) * g * (prediction - target)
    return cotangent.astype(prediction.dtype), -cotangent.astype(target.dtype)


def _mse_equations(op: OperatorSymbols) -> Equations:
    prediction, target = op.args
    size = max(math.prod(prediction.shape), 1)
    error = prediction - target
    slope = op.cotangent * ((2 / size) * error)
    return Equations((1 / size) * squared_norm(error), (slope, -slope))


@layer(rule=Rule(_mse_forward, _mse_backward, _mse_equations, platforms=frozenset(), pure=True))
def mean_squared_error(
    prediction: Inexact[Array, "*shape"], target: Inexact[Array, "*shape"]
) -> Inexact[Array, ""]:
    """Mean of the squared differences over all entries, without a factor ½.

    `L = (1/n) Σ (p − t)²`, `p̄ = (2/n) L̄ (p − t)`, `t̄ = −p̄`. Saves both arguments.

    Raises:
        ValueError: the shapes differ.

    Example:
        >>> import jax.numpy as jnp, funcprop as fp
        >>> print(fp.layers.mean_squared_error(jnp.array([1.0, 3.0]), jnp.zeros(2)))
        5.0
    """
    if jnp.shape(prediction) != jnp.shape(target):
        raise ValueError(
            f"mean_squared_error: prediction has shape {jnp.shape(prediction)} but target has "
            f"{jnp.shape(target)}; reshape one of them, nothing is broadcast."
        )
    return jnp.mean(jnp.square(prediction - target))


# --- weight decay -----------------------------------------------------------------------------


class StrengthAndParameters(NamedTuple):
    """`λ` and the parameters themselves; nothing new is stored."""

    strength: Any
    parameters: Any


def _penalty(strength: Any, parameters: Any) -> Any:
    return strength / 2 * sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(parameters))


def _penalty_forward(strength: Any, parameters: Any) -> tuple[Any, StrengthAndParameters]:
    return _penalty(strength, parameters), StrengthAndParameters(strength, parameters)


def _penalty_backward(residuals: StrengthAndParameters, g: Any, needs: Any) -> tuple[Any, Any]:
    strength, parameters = residuals
    need_strength, _ = needs
    norms = _penalty(jnp.ones_like(strength), parameters)
    return (
        (g * norms).astype(strength.dtype) if need_strength else None,
        jax.tree.map(lambda leaf: (g * strength * leaf).astype(leaf.dtype), parameters),
    )


def _penalty_equations(op: OperatorSymbols) -> Equations:
    strength, parameters = op.args
    norms = [squared_norm(leaf) for leaf in jax.tree.leaves(parameters)]
    if not norms:
        return Equations(number(0) * strength, (number(0) * op.cotangent, parameters))
    total = sum(norms[1:], start=norms[0])
    slopes = jax.tree.map(lambda leaf: op.cotangent * (strength * leaf), parameters)
    return Equations((strength / 2) * total, (op.cotangent * (total / 2), slopes))


@layer(
    rule=Rule(_penalty_forward, _penalty_backward, _penalty_equations, platforms=frozenset(), pure=True),
    symbol="‖·‖²_F",
)
def l2_penalty(strength: Inexact[Array, ""], parameters: Any) -> Inexact[Array, ""]:
    """Weight decay, `s = λ/2 Σ ‖W‖²_F` over the arrays of a pytree; `W̄ = s̄ λ W`.

    Raises:
        ValueError: `strength` is not a scalar.

    Example:
        >>> import jax.numpy as jnp, funcprop as fp
        >>> print(fp.layers.l2_penalty(0.5, {"w": jnp.array([1.0, 3.0])}))
        2.5
    """
    if jnp.shape(strength) != ():
        raise ValueError(
            f"l2_penalty: strength has shape {jnp.shape(strength)}, but it is one number; add a penalty for "
            "each strength."
        )
    return _penalty(strength, parameters)
