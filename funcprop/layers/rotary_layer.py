"""Rotary position embedding: pairs of features are rotated by an angle that grows with the position.

    (y₁, y₂) = R(θ) (x₁, x₂) = (x₁ cos θ − x₂ sin θ, x₂ cos θ + x₁ sin θ)
    (x̄₁, x̄₂) = R(−θ) (ȳ₁, ȳ₂)                                   the transpose of a rotation is its inverse
    θ̄ = ȳ₂ y₁ − ȳ₁ y₂                                           where the angles are differentiated

Nothing is kept but the angles (and `y`, where the angles are differentiated). Which features are a pair
differs between models:

| `pairing`       | the pair of feature i < d/2 | models                               |
|-----------------|-----------------------------|--------------------------------------|
| `"half"`        | `x[i]`, `x[i + d/2]`        | GPT-NeoX, Llama as in `transformers` |
| `"interleaved"` | `x[2i]`, `x[2i + 1]`        | RoFormer, GPT-J, Llama's own code    |

Reference: Su et al., "RoFormer: enhanced transformer with rotary position embedding", 2021, section 3.4.2.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal, NamedTuple, TypeAlias

import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from funcprop.layers.normalization import sum_to
from funcprop.program.dtypes import common_dtype, single_at_least, times, together
from funcprop.rules.equations import Equations, OperatorSymbols, apply
from funcprop.rules.layer import layer
from funcprop.rules.rule import Rule

Pairing: TypeAlias = Literal["half", "interleaved"]


class Rotated(NamedTuple):
    """The angles; the result, which their own cotangent alone reads; `x` for its type."""

    angles: Any
    y: Any


def rotary_angles(
    positions: Num[Array, "*shape"], features: int, *, base: float = 10_000.0
) -> Float[Array, "*shape pairs"]:
    """The angles of every position, `θ[t, i] = t · base^(−2i / d)` for pairs `i < d/2`, in float32 at least.

    Example:
        >>> import jax.numpy as jnp, funcprop as fp
        >>> print(fp.layers.rotary_angles(jnp.arange(2), 4))
        [[0.   0.  ]
         [1.   0.01]]
    """
    positions = jnp.asarray(positions)
    dtype = single_at_least(positions)
    frequencies = base ** (-jnp.arange(0, features, 2, dtype=dtype) / features)
    return times(positions.astype(dtype)[..., None], frequencies)


def _pairs(x: Any, pairing: Pairing) -> tuple[Any, Any]:
    if pairing == "half":
        half = x.shape[-1] // 2
        return x[..., :half], x[..., half:]
    return x[..., 0::2], x[..., 1::2]


def _joined(a: Any, b: Any, pairing: Pairing) -> Any:
    if pairing == "half":
        return jnp.concatenate([a, b], -1)
    return jnp.stack([a, b], -1).reshape(*a.shape[:-1], 2 * a.shape[-1])


def _rotated(x: Any, angles: Any, pairing: Pairing, sign: int = 1) -> Any:
    a, b = _pairs(x, pairing)
    a, b, cos, sin = together(a, b, jnp.cos(angles), sign * jnp.sin(angles))
    return _joined(a * cos - b * sin, b * cos + a * sin, pairing).astype(x.dtype)


def _angle_cotangent(y: Any, g: Any, angles: Any, pairing: Pairing) -> Any:
    (y1, y2), (g1, g2) = _pairs(y, pairing), _pairs(g, pairing)
    return sum_to((g2 * y1 - g1 * y2).astype(common_dtype(y, angles)), angles)


def _forward(x: Any, angles: Any, *, pairing: Pairing) -> tuple[Any, Rotated]:
    y = _rotated(x, angles, pairing)
    return y, Rotated(angles, y)


def _backward(residuals: Rotated, g: Any, needs: Any, *, pairing: Pairing) -> tuple[Any, Any]:
    need_x, need_angles = needs
    angles, y = residuals
    return (
        _rotated(g, angles, pairing, -1) if need_x else None,
        _angle_cotangent(y, g, angles, pairing) if need_angles else None,
    )


def _equations(op: OperatorSymbols) -> Equations:
    x, angles = op.args
    pairing = op.static["pairing"]
    rotate = partial(apply, "rotate", partial(_rotated, pairing=pairing))
    turned = partial(_angle_cotangent, pairing=pairing)
    return Equations(
        rotate(x, angles),
        (rotate(op.cotangent, -angles), apply("turn", turned, op.output, op.cotangent, angles)),
    )


# XLA takes sines and cosines out of a loop by itself: no gain was measured.
@layer(rule=Rule(_forward, _backward, _equations, platforms=frozenset(), pure=True))
def rotary(
    x: Float[Array, "*shape features"], angles: Float[Array, "..."], *, pairing: Pairing = "half"
) -> Float[Array, "*shape features"]:
    """Rotate pairs of features by `angles`, one for each pair.

    `y = R(θ) x`, `x̄ = R(−θ) ȳ`. The inner product of a query and a key that are rotated so depends on the
    difference of their positions alone.

    Args:
        x: rows of an even number of features.
        angles: broadcast against `x` with half as many features: for `x` of time × heads × features,
            `rotary_angles(positions, features)[:, None]`.
        pairing: see the module; a model's weights belong to one of them.

    Raises:
        ValueError: `pairing` is unknown, the number of features is odd, or the angles are not half as many.

    Reference: Su et al., "RoFormer: enhanced transformer with rotary position embedding", 2021.

    Example:
        >>> import jax.numpy as jnp, funcprop as fp
        >>> print(fp.layers.rotary(jnp.array([3.0, 4.0]), jnp.array([jnp.pi / 2])).round(4))
        [-4.  3.]
    """
    x, angles = jnp.asarray(x), jnp.asarray(angles)
    if pairing not in ("half", "interleaved"):
        raise ValueError(f"rotary: pairing={pairing!r} is unknown; use 'half' or 'interleaved'.")
    if x.shape[-1] % 2 or angles.shape[-1:] != (x.shape[-1] // 2,):
        raise ValueError(
            f"rotary: x has {x.shape[-1]} features and the angles {angles.shape[-1:]}; the features must be "
            "an even number, with one angle for each pair."
        )
    return _rotated(x, angles, pairing)
