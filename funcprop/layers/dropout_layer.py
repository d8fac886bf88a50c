"""Dropout, whose mask may be drawn again from its key instead of being kept.

    y = m ⊙ x / (1 − p),    m ∼ Bernoulli(1 − p) from the key,    x̄ = m ⊙ ȳ / (1 − p)

| `save`   | keeps                         | backward                                                       |
|----------|-------------------------------|----------------------------------------------------------------|
| `"mask"` | one byte for each entry       | one selection: what autodiff does, and left to it; the default |
| `"key"`  | the key: two numbers for each | draws the same bits again, which takes longer than reading them |

References: Srivastava et al., "Dropout: a simple way to prevent neural networks from overfitting", JMLR
2014; for bits as a function of a key, Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from funcprop.rules.equations import Equations, OperatorSymbols, apply
from funcprop.rules.layer import layer
from funcprop.rules.rule import Rule

Save: TypeAlias = Literal["mask", "key"]


class Key(NamedTuple):
    """The key alone: the mask is a function of it."""

    key: Any


def _masked(x: Any, key: Any, rate: float, broadcast_axes: tuple[int, ...]) -> Any:
    axes = {axis % x.ndim for axis in broadcast_axes}
    shape = [1 if i in axes else n for i, n in enumerate(x.shape)]
    mask = jnp.broadcast_to(jax.random.bernoulli(key, 1 - rate, shape), x.shape)
    return jnp.where(mask, x / (1 - rate), jnp.zeros_like(x))


def _forward(
    x: Any, key: Any, *, rate: float, broadcast_axes: tuple[int, ...], save: Save
) -> tuple[Any, Key]:
    return _masked(x, key, rate, broadcast_axes), Key(key)


def _backward(
    residuals: Key, g: Any, needs: Any, *, rate: float, broadcast_axes: tuple[int, ...], save: Save
) -> tuple[Any, None]:
    return _masked(g, residuals.key, rate, broadcast_axes), None


def _applies(x: Any, key: Any, *, rate: float, save: Save, **_: Any) -> bool | str:
    if rate in (0, 1):
        return f"rate={rate} has no mask"
    return True if save == "key" else "save='mask' is what autodiff keeps"


def _equations(op: OperatorSymbols) -> Equations:
    x, key = op.args
    static = op.static

    def masked(x: Any, key: Any) -> Any:
        return _value(x, key, static["rate"], static["broadcast_axes"])

    return Equations(apply("dropout", masked, x, key), (apply("dropout", masked, op.cotangent, key), None))


def _value(x: Any, key: Any, rate: float, broadcast_axes: tuple[int, ...]) -> Any:
    if rate == 0:
        return x
    return jnp.zeros_like(x) if rate == 1 else _masked(x, key, rate, broadcast_axes)


@layer(rule=Rule(_forward, _backward, _equations, applies=_applies, pure=True))
def dropout(
    x: Float[Array, "*shape"],
    key: PRNGKeyArray | None = None,
    *,
    rate: float,
    broadcast_axes: tuple[int, ...] = (),
    save: Save = "mask",
) -> Float[Array, "*shape"]:
    """Zero each entry with probability `rate` and divide the others by `1 − rate`.

    `y = m ⊙ x / (1 − p)`, `x̄ = m ⊙ ȳ / (1 − p)`. `rate=0` (predictions) is the identity and needs no key;
    `rate=1` is zero, and so is its gradient.

    Args:
        x: any shape.
        key: a PRNG key; use each once.
        rate: `p`, the share that is dropped.
        broadcast_axes: axes along which the mask is the same.
        save: `"mask"`, or `"key"` to draw the mask again in the backward.

    Raises:
        ValueError: `rate` is outside of [0, 1], `save` is unknown, or the key is missing.

    Reference: Srivastava et al., "Dropout: a simple way to prevent neural networks from overfitting", 2014.

    Example:
        >>> import jax, jax.numpy as jnp, funcprop as fp
        >>> print(fp.layers.dropout(jnp.ones(6), jax.random.key(0), rate=0.5, save="key"))
        [0. 0. 2. 2. 0. 2.]
    """
    if not 0 <= rate <= 1:
        raise ValueError(f"dropout: rate={rate} is not a probability; it is the share that is dropped.")
    if save not in ("mask", "key"):
        raise ValueError(f"dropout: save={save!r} is not a saving policy; use 'mask' or 'key'.")
    if key is None and 0 < rate < 1:
        raise ValueError(f"dropout: rate={rate} needs a PRNG key; pass one, or rate=0 for predictions.")
    return _value(jnp.asarray(x), key, rate, broadcast_axes)
