"""Four families of models, in plain JAX, Flax and Equinox, with sizes drawn from stated ranges.

Nothing is computed: parameters and data are shapes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

ACTIVATIONS = (jnp.tanh, jax.nn.relu, jax.nn.gelu, jax.nn.silu)


class Model(NamedTuple):
    """A prediction, its loss, and the shapes of their arguments."""

    name: str
    predict: Callable[..., Any]
    loss: Callable[..., jax.Array]
    params: Any
    x: jax.ShapeDtypeStruct
    y: jax.ShapeDtypeStruct


def shape(*dims: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(dims, dtype)


def labels(*dims: int) -> jax.ShapeDtypeStruct:
    return shape(*dims, dtype=jnp.int32)


def classified(name: str, predict: Callable[..., Any], params: Any, x: Any, y: Any) -> Model:
    """With the mean cross-entropy as loss."""

    def loss(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(predict(params, x), y).mean()

    return Model(name, predict, loss, params, x, y)


def flax(name: str, net: nn.Module, x: Any, y: Any) -> Model:
    return classified(name, net.apply, jax.eval_shape(net.init, jax.random.key(0), x), x, y)


def affine(inputs: int, outputs: int) -> dict[str, jax.ShapeDtypeStruct]:
    return {"w": shape(inputs, outputs), "b": shape(outputs)}


def apply(p: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    return x @ p["w"] + p["b"]


# --- dense ------------------------------------------------------------------------------------


def mlp(batch: int, widths: list[int], activation: Callable[..., jax.Array]) -> Model:
    def predict(params: Any, x: jax.Array) -> jax.Array:
        for layer in params[:-1]:
            x = activation(apply(layer, x))
        return apply(params[-1], x)

    params = [affine(a, b) for a, b in itertools.pairwise(widths)]
    name = f"MLP {'-'.join(map(str, widths))} {activation.__name__}, batch {batch}"
    return classified(name, predict, params, shape(batch, widths[0]), labels(batch))


def drawn_mlp(rng: np.random.Generator) -> Model:
    """1 to 4 hidden layers of 64 to 1024, 32 to 1024 inputs, batch 1024 to 8192."""
    hidden = [between(rng, 64, 1024, 16) for _ in range(between(rng, 1, 4))]
    widths = [between(rng, 32, 1024, 16), *hidden, 10]
    return mlp(between(rng, 1024, 8192, 64), widths, ACTIVATIONS[between(rng, 0, 3)])


# --- convolutional ----------------------------------------------------------------------------


class CNN(nn.Module):
    """Convolution, relu, 2 × 2 max-pool, repeated; two dense layers."""

    channels: tuple[int, ...]
    kernel: int
    hidden: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for features in self.channels:
            x = nn.max_pool(nn.relu(nn.Conv(features, (self.kernel, self.kernel))(x)), (2, 2), (2, 2))
        x = nn.relu(nn.Dense(self.hidden)(x.reshape(x.shape[0], -1)))
        return nn.Dense(10)(x)


def drawn_flax_cnn(rng: np.random.Generator) -> Model:
    """2 or 3 convolutions 3 × 3 or 5 × 5 of 16 to 96 channels on 16² to 32², batch 8 to 128."""
    batch, size = between(rng, 8, 128, 8), between(rng, 16, 32, 8)
    channels = tuple(between(rng, 16, 96, 8) for _ in range(between(rng, 2, 3)))
    net = CNN(channels, between(rng, 1, 2) * 2 + 1, between(rng, 32, 256, 32))
    name = f"Flax CNN {'-'.join(map(str, channels))}, {net.kernel}², on {size}², batch {batch}"
    return flax(name, net, shape(batch, size, size, 3), labels(batch))


class ConvolutionalNet(eqx.Module):
    """Two convolutions with relu and max-pool, channels first, and one dense layer."""

    convolutions: list[eqx.nn.Conv2d]
    head: eqx.nn.Linear

    def __init__(self, channels: tuple[int, ...], size: int) -> None:
        key = jax.random.key(0)
        pairs = itertools.pairwise(channels)
        self.convolutions = [eqx.nn.Conv2d(a, b, 3, padding=1, key=key) for a, b in pairs]
        self.head = eqx.nn.Linear(channels[-1] * (size // 4) ** 2, 10, key=key)

    def __call__(self, x: jax.Array) -> jax.Array:
        for convolution in self.convolutions:
            x = eqx.nn.MaxPool2d(2, 2)(jax.nn.relu(convolution(x)))
        return self.head(x.reshape(-1))


def drawn_equinox_cnn(rng: np.random.Generator) -> Model:
    """2 convolutions 3 × 3 of 16 to 64 channels on 16² to 32², batch 8 to 64."""
    batch, size = between(rng, 8, 64, 8), between(rng, 16, 32, 8)
    channels = (3, between(rng, 16, 64, 8), between(rng, 16, 64, 8))
    net = eqx.filter_eval_shape(ConvolutionalNet, channels, size)
    name = f"Equinox CNN {channels[1]}-{channels[2]}, 3², on {size}², batch {batch}"
    return classified(name, lambda net, x: jax.vmap(net)(x), net, shape(batch, 3, size, size), labels(batch))


# --- recurrent --------------------------------------------------------------------------------


def drawn_lstm(rng: np.random.Generator) -> Model:
    """An LSTM in a `scan`: 16 to 128 steps, width 64 to 384, batch 4 to 64, 16 to 128 inputs."""
    batch, steps = between(rng, 4, 64, 4), between(rng, 16, 128, 8)
    width, inputs = between(rng, 64, 384, 32), between(rng, 16, 128, 16)
    params = {
        "x": shape(inputs, 4 * width),
        "h": shape(width, 4 * width),
        "b": shape(4 * width),
        "out": affine(width, 10),
    }

    def predict(params: Any, x: jax.Array) -> jax.Array:
        def step(carry: Any, x: jax.Array) -> tuple[Any, jax.Array]:
            h, c = carry
            i, f, g, o = jnp.split(x @ params["x"] + h @ params["h"] + params["b"], 4, -1)
            c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            h = jax.nn.sigmoid(o) * jnp.tanh(c)
            return (h, c), h

        start = jnp.zeros((batch, width))
        (h, _), _ = jax.lax.scan(step, (start, start), x)
        return apply(params["out"], h)

    name = f"LSTM {inputs}-{width}, {steps} steps, batch {batch}"
    return classified(name, predict, params, shape(steps, batch, inputs), labels(batch))


class FlaxLSTM(nn.Module):
    """Flax's optimized cell under `nn.RNN`, and a dense layer on the last step."""

    width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        states: Any = nn.RNN(nn.OptimizedLSTMCell(self.width))(x)
        return nn.Dense(10)(states[:, -1])


def drawn_flax_lstm(rng: np.random.Generator) -> Model:
    """The same ranges."""
    batch, steps = between(rng, 4, 64, 4), between(rng, 16, 128, 8)
    width, inputs = between(rng, 64, 384, 32), between(rng, 16, 128, 16)
    name = f"Flax LSTM {inputs}-{width}, {steps} steps, batch {batch}"
    return flax(name, FlaxLSTM(width), shape(batch, steps, inputs), labels(batch))


# --- transformer ------------------------------------------------------------------------------


class Block(nn.Module):
    """Attention and a feed-forward part, each after a layer norm, each with a residual connection."""

    heads: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y, mask = nn.LayerNorm()(x), nn.make_causal_mask(jnp.ones(x.shape[:2]))
        x = x + nn.MultiHeadDotProductAttention(num_heads=self.heads)(y, y, mask=mask)
        y = nn.gelu(nn.Dense(4 * x.shape[-1])(nn.LayerNorm()(x)))
        return x + nn.Dense(x.shape[-1])(y)


class Transformer(nn.Module):
    """A causal language model of 4 blocks."""

    width: int
    heads: int
    vocabulary: int

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = nn.Embed(self.vocabulary, self.width)(tokens)
        x = x + self.param("positions", nn.initializers.normal(0.02), (tokens.shape[1], self.width))
        for _ in range(4):
            x = Block(self.heads)(x)
        return nn.Dense(self.vocabulary)(nn.LayerNorm()(x))


def drawn_flax_transformer(rng: np.random.Generator) -> Model:
    """2 to 8 heads of 16 to 48, 32 to 256 tokens, batch 2 to 16, vocabulary 128 to 1024."""
    batch, tokens, heads = between(rng, 2, 16, 2), between(rng, 32, 256, 16), 2 ** between(rng, 1, 3)
    width, vocabulary = heads * between(rng, 16, 48, 8), between(rng, 128, 1024, 64)
    name = f"Flax transformer {width}, {heads} heads, {tokens} tokens, batch {batch}, {vocabulary} words"
    net = Transformer(width, heads, vocabulary)
    return flax(name, net, labels(batch, tokens), labels(batch, tokens))


def drawn_transformer(rng: np.random.Generator) -> Model:
    """The same ranges; RMS norms, one product for queries, keys and values, silu."""
    batch, tokens, heads = between(rng, 2, 16, 2), between(rng, 32, 256, 16), 2 ** between(rng, 1, 3)
    width, vocabulary = heads * between(rng, 16, 48, 8), between(rng, 128, 1024, 64)
    block: dict[str, Any] = {"qkv": affine(width, 3 * width), "o": affine(width, width)}
    block |= {"up": affine(width, 4 * width), "down": affine(4 * width, width)}
    block |= {"scales": shape(2, width)}
    params: dict[str, Any] = {"embedding": shape(vocabulary, width), "positions": shape(tokens, width)}
    params |= {"blocks": [block] * 4, "out": affine(width, vocabulary)}

    def norm(x: jax.Array, scale: jax.Array) -> jax.Array:
        return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * scale

    def predict(params: Any, t: jax.Array) -> jax.Array:
        x = params["embedding"][t] + params["positions"]
        past = jnp.tril(jnp.ones((tokens, tokens), bool))
        for p in params["blocks"]:
            qkv = apply(p["qkv"], norm(x, p["scales"][0])).reshape(batch, tokens, heads, -1)
            q, k, v = jnp.split(qkv, 3, -1)
            scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * (width // heads) ** -0.5
            weights = jax.nn.softmax(jnp.where(past, scores, -1e9), -1)
            x = x + apply(p["o"], jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(batch, tokens, width))
            x = x + apply(p["down"], jax.nn.silu(apply(p["up"], norm(x, p["scales"][1]))))
        return apply(params["out"], x)

    name = f"transformer {width}, {heads} heads, {tokens} tokens, batch {batch}, {vocabulary} words"
    return classified(name, predict, params, labels(batch, tokens), labels(batch, tokens))


def between(rng: np.random.Generator, low: int, high: int, multiple: int = 1) -> int:
    """A multiple of `multiple` in a range that includes both ends."""
    return int(rng.integers(low // multiple, high // multiple + 1)) * multiple


FAMILIES: dict[str, Callable[[np.random.Generator], Model]] = {
    "MLP": drawn_mlp,
    "Flax CNN": drawn_flax_cnn,
    "Equinox CNN": drawn_equinox_cnn,
    "LSTM": drawn_lstm,
    "Flax LSTM": drawn_flax_lstm,
    "transformer": drawn_transformer,
    "Flax transformer": drawn_flax_transformer,
}
