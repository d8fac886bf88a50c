"""Convolutional networks and pools, and a small vision transformer."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from benchmark_cases.case import NEVER_WORSE, Case, Row, classified, gradients, normal


class CNN(nn.Module):
    """Three convolutions, each with relu and an overlapping pool, and three dense layers."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for size, channels, padding in ((5, 64, "SAME"), (3, 96, "VALID"), (3, 128, "SAME")):
            x = nn.max_pool(nn.relu(nn.Conv(channels, (size, size), padding=padding)(x)), (3, 3), (2, 2))
        x = x.reshape(len(x), -1)
        for width in (512, 256):
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(10)(x)


def equinox_cnn(batch: int) -> Case:
    """The same network, one example at a time and channels first."""
    keys = jax.random.split(jax.random.key(1), 6)
    pool = eqx.nn.MaxPool2d(3, 2)
    model = eqx.nn.Sequential(
        [
            eqx.nn.Conv2d(3, 64, 5, padding="SAME", key=keys[0]), eqx.nn.Lambda(jax.nn.relu), pool,
            eqx.nn.Conv2d(64, 96, 3, key=keys[1]), eqx.nn.Lambda(jax.nn.relu), pool,
            eqx.nn.Conv2d(96, 128, 3, padding="SAME", key=keys[2]), eqx.nn.Lambda(jax.nn.relu), pool,
            eqx.nn.Lambda(jnp.ravel), eqx.nn.Linear(512, 512, key=keys[3]), eqx.nn.Lambda(jax.nn.relu),
            eqx.nn.Linear(512, 256, key=keys[4]), eqx.nn.Lambda(jax.nn.relu),
            eqx.nn.Linear(256, 10, key=keys[5]),
        ]
    )  # fmt: skip
    params, static = eqx.partition(model, eqx.is_array)

    def loss(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        logits = jax.vmap(eqx.combine(params, static))(x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    return gradients(loss, params, normal(batch, 3, 32, 32), jnp.arange(batch) % 10)


def pool(batch: int) -> Case:
    return gradients(lambda x: jnp.sum(nn.max_pool(x, (2, 2), (2, 2)) ** 2), normal(batch, 32, 32, 64))


def average_pool(batch: int, size: int) -> Case:
    """Windows of this size with stride 2, after a relu."""

    def loss(x: jax.Array, bias: jax.Array) -> jax.Array:
        return jnp.sum(nn.avg_pool(nn.relu(x + bias), (size, size), (2, 2)) ** 2)

    return gradients(loss, normal(batch, 32, 32, 64), normal(64, seed=1))


class ResidualBlock(nn.Module):
    channels: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        norm = lambda: nn.BatchNorm(use_running_average=False, use_bias=True)  # noqa: E731
        y = nn.relu(norm()(nn.Conv(self.channels, (3, 3), (self.stride, self.stride), use_bias=False)(x)))
        y = norm()(nn.Conv(self.channels, (3, 3), use_bias=False)(y))
        if x.shape != y.shape:
            x = norm()(nn.Conv(self.channels, (1, 1), (self.stride, self.stride), use_bias=False)(x))
        return nn.relu(x + y)


class ResNet(nn.Module):
    """The shape of ResNet-18 with a quarter of its channels."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.relu(nn.Conv(16, (3, 3))(x))
        for i, channels in enumerate((16, 32, 64, 128)):
            for j in range(2):
                x = ResidualBlock(channels, 2 if i and not j else 1)(x)
        return nn.Dense(10)(x.mean((1, 2)))


def resnet(batch: int) -> Case:
    model, x = ResNet(), normal(batch, 32, 32, 3)
    variables = jax.jit(model.init)(jax.random.key(1), x)

    def loss(params: Any, stats: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        logits, _ = model.apply({"params": params, "batch_stats": stats}, x, mutable=["batch_stats"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    return gradients(loss, variables["params"], variables["batch_stats"], x, jnp.arange(batch) % 10)


class ViT(nn.Module):
    """A vision transformer of the width of ViT-tiny: patches of 4 × 4, width 192, three heads."""

    blocks: int = 6
    width: int = 192

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Conv(self.width, (4, 4), (4, 4))(x).reshape(len(x), -1, self.width)
        x = x + self.param("position", nn.initializers.normal(0.02), x.shape[1:])
        for _ in range(self.blocks):
            x = x + nn.MultiHeadDotProductAttention(3)(nn.LayerNorm()(x))
            x = x + nn.Dense(self.width)(nn.gelu(nn.Dense(4 * self.width)(nn.LayerNorm()(x))))
        return nn.Dense(10)(nn.LayerNorm()(x).mean(1))


ROWS: dict[str, Row] = {
    "Flax CNN, batch 128": Row(
        lambda: classified(CNN(), normal(128, 32, 32, 3)),
        lambda: classified(CNN(), normal(2, 32, 32, 3)),
        0.50,
        0.55,
    ),
    "Equinox CNN, batch 128": Row(lambda: equinox_cnn(128), lambda: equinox_cnn(2), 0.50, 0.50),
    "2×2 max-pool, 128×32×32×64": Row(lambda: pool(128), lambda: pool(2), 0.18, 0.10),
    "2×2 average-pool, 128×32×32×64": Row(
        lambda: average_pool(128, 2), lambda: average_pool(2, 2), 0.50, 0.25
    ),
    "3×3/2 average-pool, 128×32×32×64": Row(
        lambda: average_pool(128, 3), lambda: average_pool(2, 3), 0.60, 1.02
    ),
    "ResNet with batch norm, batch 64": Row(lambda: resnet(64), lambda: resnet(2), *NEVER_WORSE),
    "ViT-tiny, batch 32": Row(
        lambda: classified(ViT(), normal(32, 32, 32, 3)),
        lambda: classified(ViT(1, 12), normal(2, 8, 8, 3)),
        *NEVER_WORSE,
    ),
}
