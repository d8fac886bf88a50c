"""Losses of single entries: focal loss of a logit, Huber loss of an error. The values come from `optax`.

Sources: Lin et al., "Focal loss for dense object detection", ICCV 2017; Huber, "Robust estimation of a
location parameter", Annals of Mathematical Statistics, 1964.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Inexact, Num

from funcprop.layers.loss import PredictionAndTarget
from funcprop.rules.equations import Equations, OperatorSymbols, apply
from funcprop.rules.layer import layer
from funcprop.rules.rule import Rule


def _check_shapes(name: str, first: str, x: Any, second: str, y: Any) -> None:
    if jnp.shape(x) != jnp.shape(y):
        raise ValueError(
            f"{name}: {first} has shape {jnp.shape(x)} but {second} has {jnp.shape(y)}; reshape one of them, "
            "nothing is broadcast."
        )


# --- focal loss -------------------------------------------------------------------------------


class LogitsAndTargets(NamedTuple):
    """Both arguments; every factor of the derivative follows from them."""

    logits: Any
    labels: Any


def _factors(x: Any, y: Any, alpha: float | None) -> tuple[Any, Any, Any]:
    """`α_t`, the cross-entropy and `log q`, with `q = 1 − p_t` the probability of the wrong class."""
    log_p, log_q = jax.nn.log_sigmoid(x), jax.nn.log_sigmoid(-x)
    wrong = jax.nn.logsumexp(jnp.stack([log_p, log_q]), axis=0, b=jnp.stack([1 - y, y]))
    balance = jnp.ones_like(y) if alpha is None else alpha * y + (1 - alpha) * (1 - y)
    return balance, -(y * log_p + (1 - y) * log_q), wrong


def _focal_forward(
    logits: Any, labels: Any, *, alpha: float | None, gamma: float
) -> tuple[Any, LogitsAndTargets]:
    return _focal(logits, labels, alpha, gamma), LogitsAndTargets(logits, labels)


def _focal(logits: Any, labels: Any, alpha: float | None, gamma: float) -> Any:
    return optax.sigmoid_focal_loss(logits, labels, alpha=alpha, gamma=gamma)


def _focal_backward(
    residuals: LogitsAndTargets, g: Any, needs: Any, *, alpha: float | None, gamma: float
) -> tuple[Any, Any]:
    x, labels = residuals
    y = labels.astype(x.dtype)
    balance, entropy, wrong = _factors(x, y, alpha)
    modulated = g * jnp.exp(gamma * wrong)
    need_logits, need_labels = needs
    x_bar = y_bar = None
    if need_logits:
        # The derivative of log q, kept in logarithms: q may be 0 where its ratio to σ is not.
        log_sigmas = jax.nn.log_sigmoid(x) + jax.nn.log_sigmoid(-x)
        slope = (1 - 2 * y) * jnp.exp(log_sigmas - wrong)
        # σ(x) − y without cancellation.
        error = (1 - y) * jax.nn.sigmoid(x) - y * jax.nn.sigmoid(-x)
        x_bar = balance * modulated * (error + gamma * entropy * slope)
    if need_labels:
        slope = jnp.exp(jax.nn.log_sigmoid(-x) - wrong) - jnp.exp(jax.nn.log_sigmoid(x) - wrong)
        y_bar = balance * modulated * (gamma * entropy * slope - x)
        if alpha is not None:
            y_bar = y_bar + (2 * alpha - 1) * modulated * entropy
        y_bar = y_bar.astype(labels.dtype)
    return x_bar, y_bar


def _focal_equations(op: OperatorSymbols) -> Equations:
    x, labels = op.args
    alpha, gamma = op.static["alpha"], op.static["gamma"]

    def target(labels: Any) -> Any:
        return labels.astype(x.type.dtype)

    def named(name: str, which: int, latex: str | None = None) -> Any:
        return apply(name, lambda x, y: _factors(x, target(y), alpha)[which], x, labels, latex=latex)

    y = labels if labels.type.dtype == x.type.dtype else apply("target", target, labels)
    balance, entropy = named("α", 0), named("cross_entropy", 1)
    q = apply("q", lambda x, y: jnp.exp(_factors(x, target(y), alpha)[2]), x, labels)
    sigma = apply("σ", jax.nn.sigmoid, x)
    factor = op.cotangent * balance * q**gamma
    slope = sigma - y + gamma * entropy * ((1 - 2 * y) * (sigma * (1 - sigma)) / q)
    return Equations(
        apply(op.name, partial(_focal, alpha=alpha, gamma=gamma), x, labels), (factor * slope, None)
    )


@layer(rule=Rule(_focal_forward, _focal_backward, _focal_equations, platforms=frozenset(), pure=True))
def focal_loss(
    logits: Inexact[Array, "*shape"],
    labels: Num[Array, "*shape"],
    *,
    alpha: float | None = None,
    gamma: float = 2.0,
) -> Inexact[Array, "*shape"]:
    """Sigmoid cross-entropy in which examples that are already right count less, one value for each entry.

    With `p = σ(x)`, labels `y` in [0, 1], `q = (1 − y) p + y (1 − p)` and `α_t = α y + (1 − α)(1 − y)`:
    `L = α_t q^γ CE(x, y)`, `x̄ = L̄ α_t q^γ (p − y + γ CE (1 − 2y) p (1 − p) / q)`. Saves the arguments.

    Raises:
        ValueError: the shapes differ.

    Reference: Lin et al., "Focal loss for dense object detection", ICCV 2017.

    Example:
        >>> import jax.numpy as jnp, funcprop as fp
        >>> print(f"{fp.layers.focal_loss(jnp.array(0.0), jnp.array(1)):.4f}")
        0.1733
    """
    _check_shapes("focal_loss", "logits", logits, "labels", labels)
    return _focal(logits, labels, alpha, gamma)


# --- Huber loss -------------------------------------------------------------------------------


def _huber_forward(prediction: Any, target: Any, *, delta: float) -> tuple[Any, PredictionAndTarget]:
    return optax.huber_loss(prediction, target, delta=delta), PredictionAndTarget(prediction, target)


def _huber_backward(residuals: PredictionAndTarget, g: Any, needs: Any, *, delta: float) -> tuple[Any, Any]:
    prediction, target = residuals
    slope = g * jnp.clip(prediction - target, -delta, delta)
    return slope.astype(prediction.dtype), -slope.astype(target.dtype)


def _huber_equations(op: OperatorSymbols) -> Equations:
    delta = op.static["delta"]
    slope = op.cotangent * apply("clip", lambda e: jnp.clip(e, -delta, delta), op.args[0] - op.args[1])
    return Equations(apply(op.name, partial(optax.huber_loss, delta=delta), *op.args), (slope, -slope))


@layer(rule=Rule(_huber_forward, _huber_backward, _huber_equations, platforms=frozenset(), pure=True))
def huber_loss(
    prediction: Inexact[Array, "*shape"], target: Inexact[Array, "*shape"], *, delta: float = 1.0
) -> Inexact[Array, "*shape"]:
    """Half the squared error up to `δ`, and linear beyond, one value for each entry.

    With `e = p − t`: `L = e²/2` where `|e| ≤ δ`, else `δ (|e| − δ/2)`; `p̄ = L̄ clip(e, −δ, δ)`, `t̄ = −p̄`.
    Saves the arguments.

    Raises:
        ValueError: the shapes differ.

    Reference: Huber, "Robust estimation of a location parameter", Annals of Mathematical Statistics, 1964.

    Example:
        >>> import jax.numpy as jnp, funcprop as fp
        >>> print(fp.layers.huber_loss(jnp.array([0.5, -3.0]), jnp.zeros(2)))
        [0.125 2.5  ]
    """
    _check_shapes("huber_loss", "prediction", prediction, "target", target)
    return optax.huber_loss(prediction, target, delta=delta)
