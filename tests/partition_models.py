"""Small unchanged models of Flax and Equinox, as `loss, params, batch`, for tests of partitioning."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

Case = tuple[Callable[..., Any], Any, Any]


def cross_entropy(logits: Any, labels: Any) -> Any:
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


class Perceptron(nn.Module):
    sizes: tuple[int, ...] = (32, 32, 8)

    @nn.compact
    def __call__(self, x: Any) -> Any:
        for size in self.sizes[:-1]:
            x = nn.tanh(nn.Dense(size, param_dtype=x.dtype)(x))
        return nn.Dense(self.sizes[-1], param_dtype=x.dtype)(x)


class Convolutions(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        for features in (8, 16):
            x = nn.relu(nn.Conv(features, (3, 3), param_dtype=x.dtype)(x))
            x = nn.max_pool(x, (2, 2), (2, 2))
        x = x.reshape(x.shape[0], -1)
        return nn.Dense(8, param_dtype=x.dtype)(nn.relu(nn.Dense(32, param_dtype=x.dtype)(x)))


class Recurrent(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        return nn.Dense(8, param_dtype=x.dtype)(nn.RNN(nn.OptimizedLSTMCell(16, param_dtype=x.dtype))(x))


class Transformer(nn.Module):
    tied: bool
    vocab: int = 32
    width: int = 32
    layers: int = 2
    dtype: Any = jnp.float64

    @nn.compact
    def __call__(self, tokens: Any) -> Any:
        embed = nn.Embed(self.vocab, self.width, param_dtype=self.dtype)
        places = self.param("places", nn.initializers.normal(0.1), (tokens.shape[1], self.width), self.dtype)
        x = embed(tokens) + places
        mask = nn.make_causal_mask(tokens)
        for _ in range(self.layers):
            h = nn.LayerNorm(param_dtype=self.dtype)(x)
            x = x + nn.MultiHeadDotProductAttention(4, param_dtype=self.dtype)(h, mask=mask)
            h = nn.LayerNorm(param_dtype=self.dtype)(x)
            h = nn.Dense(2 * self.width, param_dtype=self.dtype)(h)
            x = x + nn.Dense(self.width, param_dtype=self.dtype)(nn.gelu(h))
        x = nn.LayerNorm(param_dtype=self.dtype)(x)
        return embed.attend(x) if self.tied else nn.Dense(self.vocab, param_dtype=self.dtype)(x)


def of_flax(model: nn.Module, x: Any, labels: Any) -> Case:
    params = jax.jit(model.init)(jax.random.key(0), x)
    return lambda params, batch: cross_entropy(model.apply(params, batch[0]), batch[1]), params, (x, labels)


def of_shape(*sizes: int) -> Any:
    return jax.random.normal(jax.random.key(1), sizes)


def classes(*sizes: int, most: int = 8) -> Any:
    return jax.random.randint(jax.random.key(2), sizes, 0, most)


def mlp(examples: int = 16) -> Case:
    return of_flax(Perceptron(), of_shape(examples, 16), classes(examples))


def cnn(examples: int = 16) -> Case:
    return of_flax(Convolutions(), of_shape(examples, 8, 8, 4), classes(examples))


def lstm(examples: int = 16) -> Case:
    return of_flax(Recurrent(), of_shape(examples, 6, 8), classes(examples, 6))


def transformer(examples: int = 16, tied: bool = False) -> Case:
    tokens = classes(examples, 9, most=32)
    return of_flax(Transformer(tied), tokens[:, :-1], tokens[:, 1:])


def tied(examples: int = 16) -> Case:
    return transformer(examples, tied=True)


def equinox(examples: int = 16) -> Case:
    net = eqx.nn.MLP(16, 8, 32, 2, key=jax.random.key(0))
    params, static = eqx.partition(net, eqx.is_array)

    def loss(params: Any, batch: Any) -> Any:
        return cross_entropy(jax.vmap(eqx.combine(params, static))(batch[0]), batch[1])

    return loss, params, (of_shape(examples, 16), classes(examples))


MODELS = {f.__name__: f for f in (mlp, cnn, lstm, transformer, tied, equinox)}
