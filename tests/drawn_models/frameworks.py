"""Models in Equinox, Flax nnx and Haiku."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import optax
from flax import nnx

import funcprop as fp
from drawn_models.tracing import F32, KEY, cross_entropy, shape, shapes, zeros


def equinox_cnn() -> fp.Graph:
    def make() -> Any:
        keys = jax.random.split(KEY, 4)
        return eqx.nn.Sequential([
            eqx.nn.Conv2d(1, 3, 4, key=keys[0], dtype=F32),
            eqx.nn.MaxPool2d(2),
            eqx.nn.Lambda(jax.nn.relu),
            eqx.nn.Lambda(jnp.ravel),
            eqx.nn.Linear(1728, 64, key=keys[1], dtype=F32),
            eqx.nn.Lambda(jax.nn.sigmoid),
            eqx.nn.Linear(64, 64, key=keys[2], dtype=F32),
            eqx.nn.Lambda(jax.nn.relu),
            eqx.nn.Linear(64, 10, key=keys[3], dtype=F32),
        ])  # fmt: skip

    params, rest = eqx.partition(eqx.filter_eval_shape(make), lambda x: isinstance(x, jax.ShapeDtypeStruct))

    def loss(params: Any, x: Any, y: Any) -> Any:
        logits = jax.vmap(eqx.combine(params, rest))(x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    return fp.trace(loss)(params, shape(8, 1, 28, 28), shape(8, dtype="int32"))


def equinox_mlp() -> fp.Graph:
    params, rest = eqx.partition(
        eqx.filter_eval_shape(lambda: eqx.nn.MLP(4, 2, 8, 6, key=KEY, dtype=F32)),
        lambda x: isinstance(x, jax.ShapeDtypeStruct),
    )
    return fp.trace(lambda p, x: jnp.sum(jax.vmap(eqx.combine(p, rest))(x) ** 2))(params, shape(3, 4))


class NnxBlock(nnx.Module):
    def __init__(self, width: int, rngs: nnx.Rngs) -> None:
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, width, decode=False, rngs=rngs)
        self.up, self.down = nnx.Linear(width, 8, rngs=rngs), nnx.Linear(8, width, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        x = x + self.attention(self.norm(x))
        return x + self.down(nnx.gelu(self.up(x)))


class NnxNet(nnx.Module):
    def __init__(self, depth: int, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Embed(7, 4, rngs=rngs)
        self.blocks = nnx.List([NnxBlock(4, rngs) for _ in range(depth)])
        self.head = nnx.Linear(4, 7, rngs=rngs)

    def __call__(self, tokens: Any) -> Any:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def nnx_transformer() -> fp.Graph:
    definition, state = nnx.split(nnx.eval_shape(lambda: NnxNet(3, nnx.Rngs(0))))
    tokens = shape(2, 3, dtype="int32")
    return fp.trace(lambda p, tokens: cross_entropy(nnx.merge(definition, p)(tokens)))(state, tokens)


def haiku_resnet() -> fp.Graph:
    def forward(x: Any) -> Any:
        return hk.nets.ResNet([1, 1, 1, 1], 10, channels_per_group=[4, 8, 16, 32])(x, is_training=True)

    model, x = hk.transform_with_state(forward), shape(2, 32, 32, 3)
    params, state = shapes(lambda: model.init(KEY, *zeros([x])))
    return fp.trace(lambda p, s, x: cross_entropy(model.apply(p, s, None, x)[0]))(params, state, x)


def haiku_mlp() -> fp.Graph:
    model = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([16, 16, 16, 4])(x)))
    params = shapes(lambda: model.init(KEY, jnp.zeros((3, 16), F32)))
    return fp.trace(lambda p, x: cross_entropy(model.apply(p, x)))(params, shape(3, 16))
