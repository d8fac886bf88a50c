"""Two models whose exact Hessian diagonal is measured against P separate Hessian-vector products."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from benchmark_cases.case import normal


class Case(NamedTuple):
    """`loss(params, x, y)`, its arguments, and the bound on the ratio."""

    loss: Callable[..., Any]
    args: tuple[Any, ...]
    bound: float


class Block(nn.Module):
    """Pre-norm attention of four heads, then a gelu block, both residual; the mean over the tokens."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = x.shape[-1]
        h = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=4)(h, h)
        x = x + nn.Dense(width)(nn.gelu(nn.Dense(4 * width)(nn.LayerNorm()(x))))
        return nn.Dense(10)(x.mean(1))


class TanhCNN(nn.Module):
    """Two 3 × 3 convolutions, each with tanh and an average-pool, and a dense layer."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for features in (8, 16):
            x = nn.avg_pool(nn.tanh(nn.Conv(features, (3, 3))(x)), (2, 2), (2, 2))
        return nn.Dense(10)(x.reshape(len(x), -1))


def _case(model: nn.Module, x: jax.Array, bound: float) -> Case:
    def loss(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(model.apply(params, x), y).mean()

    return Case(loss, (model.init(jax.random.key(0), x[:1]), x, jnp.arange(len(x)) % 10), bound)


# In full, and in small for `--smoke`.
DIAGONALS: dict[str, tuple[Callable[[], Case], Callable[[], Case]]] = {
    "attention + gelu block, 32 × 16 × 32": (
        lambda: _case(Block(), normal(32, 16, 32), 0.2),
        lambda: _case(Block(), normal(2, 3, 8), 0.2),
    ),
    "tanh CNN, 32 × 16 × 16 × 3": (
        lambda: _case(TanhCNN(), normal(32, 16, 16, 3), 0.3),
        lambda: _case(TanhCNN(), normal(2, 4, 4, 1), 0.3),
    ),
}
