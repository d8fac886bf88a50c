"""Models in Flax linen."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

import funcprop as fp
from drawn_models.tracing import F32, KEY, cross_entropy, of_linen, shape, shapes, zeros


class TransformerBlock(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        y = nn.LayerNorm()(x)
        query, key, value = (nn.DenseGeneral((2, 8), name=n)(y) for n in ("query", "key", "value"))
        weights = nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", query, key) / 8**0.5)
        mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, value)
        x = x + nn.DenseGeneral(16, axis=(-2, -1), name="out")(mixed)
        y = nn.gelu(nn.Dense(32, name="up")(nn.LayerNorm()(x)))
        return x + nn.Dense(16, name="down")(y)


class Transformer(nn.Module):
    depth: int = 2

    @nn.compact
    def __call__(self, tokens: Any) -> Any:
        x = nn.Embed(50, 16, name="embed")(tokens)
        x = x + self.param("positions", nn.initializers.zeros, (8, 16))
        for i in range(self.depth):
            x = TransformerBlock(name=f"block{i}")(x)
        return nn.Dense(50, name="head")(nn.LayerNorm(name="norm")(x))


def transformer() -> fp.Graph:
    return of_linen(Transformer(), shape(2, 8, dtype="int32"), loss=cross_entropy)


class VisionTransformer(nn.Module):
    @nn.compact
    def __call__(self, images: Any) -> Any:
        x = nn.Conv(16, (4, 4), strides=(4, 4), name="patches")(images)
        x = x.reshape(x.shape[0], -1, 16)
        cls = self.param("cls", nn.initializers.zeros, (1, 1, 16))
        x = jnp.concatenate([jnp.tile(cls, (x.shape[0], 1, 1)), x], 1)
        x = x + self.param("positions", nn.initializers.zeros, (1, x.shape[1], 16))
        for i in range(3):
            y = nn.LayerNorm(name=f"norm{i}")(x)
            x = x + nn.MultiHeadDotProductAttention(2, name=f"attention{i}")(y)
            y = nn.LayerNorm(name=f"late_norm{i}")(x)
            x = x + nn.Dense(16, name=f"down{i}")(nn.gelu(nn.Dense(32, name=f"up{i}")(y)))
        return nn.Dense(10, name="head")(x[:, 0])


def vit() -> fp.Graph:
    return of_linen(VisionTransformer(), shape(2, 16, 16, 3), loss=cross_entropy)


class Encoder(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        h = nn.relu(nn.Dense(8)(x))
        return nn.Dense(2, name="mean")(h), nn.Dense(2, name="logvar")(h)


class Decoder(nn.Module):
    @nn.compact
    def __call__(self, z: Any) -> Any:
        return nn.Dense(5)(nn.relu(nn.Dense(8)(z)))


class VAE(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        mean, logvar = Encoder(name="encoder")(x)
        z = mean + jnp.exp(0.5 * logvar) * jax.random.normal(jax.random.key(1), mean.shape)
        return Decoder(name="decoder")(z), mean, logvar


def vae() -> fp.Graph:
    def loss(outputs: Any) -> Any:
        logits, mean, logvar = outputs
        kl = -0.5 * jnp.sum(1 + logvar - mean**2 - jnp.exp(logvar))
        return kl + jnp.sum(optax.sigmoid_binary_cross_entropy(logits, jnp.ones_like(logits)))

    return of_linen(VAE(), shape(4, 5), loss=loss)


class ResNet(nn.Module):
    @nn.compact
    def __call__(self, x: Any, train: bool) -> Any:
        def norm(name: str) -> Any:
            return nn.BatchNorm(use_running_average=not train, name=name)

        x = nn.relu(norm("stem_norm")(nn.Conv(8, (3, 3), name="stem")(x)))
        x = nn.max_pool(x, (3, 3), (2, 2), "SAME")
        for stage, width in enumerate((8, 16, 32)):
            for block in range(2):
                x = ResNetBlock(width, 2 if stage and not block else 1, name=f"stage{stage}_{block}")(
                    x, train
                )
        return nn.Dense(10, name="head")(x.mean((1, 2)))


class ResNetBlock(nn.Module):
    width: int
    stride: int

    @nn.compact
    def __call__(self, x: Any, train: bool) -> Any:
        strides = (self.stride, self.stride)
        y = nn.Conv(self.width, (3, 3), strides, use_bias=False)(x)
        y = nn.relu(nn.BatchNorm(use_running_average=not train)(y))
        y = nn.Conv(self.width, (3, 3), use_bias=False)(y)
        y = nn.BatchNorm(use_running_average=not train)(y)
        if x.shape != y.shape:
            x = nn.Conv(self.width, (1, 1), strides, use_bias=False, name="project")(x)
            x = nn.BatchNorm(use_running_average=not train, name="project_norm")(x)
        return nn.relu(x + y)


def resnet() -> fp.Graph:
    """With the moving averages of batch normalisation, which nobody reads."""
    model, x = ResNet(), shape(4, 16, 16, 3)
    state = shapes(lambda: model.init(KEY, *zeros([x]), True))

    def loss(params: Any, stats: Any, x: Any) -> Any:
        logits, _ = model.apply({"params": params, "batch_stats": stats}, x, True, mutable=["batch_stats"])
        return cross_entropy(logits)

    return fp.trace(loss)(state["params"], state["batch_stats"], x)


class UNet(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        skips = []
        for i, width in enumerate((4, 8, 16)):
            x = nn.silu(nn.GroupNorm(2, name=f"norm_down{i}")(nn.Conv(width, (3, 3), name=f"down{i}")(x)))
            skips.append(x)
            x = nn.avg_pool(x, (2, 2), (2, 2))
        x = nn.silu(nn.Conv(16, (3, 3), name="middle")(x))
        for i, width in enumerate((16, 8, 4)):
            x = jax.image.resize(x, (x.shape[0], 2 * x.shape[1], 2 * x.shape[2], x.shape[3]), "nearest")
            x = jnp.concatenate([x, skips.pop()], -1)
            x = nn.silu(nn.GroupNorm(2, name=f"norm_up{i}")(nn.Conv(width, (3, 3), name=f"up{i}")(x)))
        return nn.Conv(3, (1, 1), name="out")(x)


def unet() -> fp.Graph:
    return of_linen(UNet(), shape(2, 16, 16, 3), loss=lambda y: jnp.mean(y**2))


class SequenceModel(nn.Module):
    """An LSTM over a sequence, as a scan."""

    @nn.compact
    def __call__(self, tokens: Any) -> Any:
        x = nn.Embed(30, 8, name="embed")(tokens)
        x = nn.RNN(nn.OptimizedLSTMCell(16), name="lstm")(x)
        return nn.Dense(30, name="head")(x)


def lstm() -> fp.Graph:
    return of_linen(SequenceModel(), shape(2, 6, dtype="int32"), loss=cross_entropy)


class UnrolledLSTM(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        cell = nn.LSTMCell(8, name="cell")
        carry = jnp.zeros((2, 8), F32), jnp.zeros((2, 8), F32)
        outputs = []
        for t in range(6):
            carry, y = cell(carry, x[:, t])
            outputs.append(y)
        return nn.Dense(3, name="head")(jnp.stack(outputs, 1))


def unrolled_lstm() -> fp.Graph:
    return of_linen(UnrolledLSTM(), shape(2, 6, 4))


class Experts(nn.Module):
    """A mixture: every expert reads the same, and the weighted results are added."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        gate = nn.softmax(nn.Dense(4, name="gate")(x))
        experts = [nn.Dense(8, name=f"down{i}")(nn.gelu(nn.Dense(16, name=f"up{i}")(x))) for i in range(4)]
        return sum(gate[..., i : i + 1] * y for i, y in enumerate(experts))


def experts() -> fp.Graph:
    return of_linen(Experts(), shape(3, 8))


class DenseNet(nn.Module):
    """Every layer reads all that were before it."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        found = [x]
        for i in range(4):
            found.append(nn.relu(nn.Dense(8, name=f"layer{i}")(jnp.concatenate(found, -1))))
        return nn.Dense(1, name="head")(found[-1])


def densenet() -> fp.Graph:
    return of_linen(DenseNet(), shape(3, 8))


class Pyramid(nn.Module):
    """Equal blocks, of which one in the middle is read elsewhere too."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        early = x
        for i in range(6):
            x = x + nn.Dense(8, name=f"outer{i}")(nn.tanh(nn.Dense(8, name=f"inner{i}")(x)))
            early = x if i == 2 else early
        return nn.Dense(2, name="head")(x * early)


def pyramid() -> fp.Graph:
    return of_linen(Pyramid(), shape(3, 8))


class ActorCritic(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = nn.relu(nn.Conv(8, (4, 4), (2, 2), name="conv1")(x / 255.0))
        x = nn.relu(nn.Conv(8, (3, 3), name="conv2")(x)).reshape(x.shape[0], -1)
        x = nn.relu(nn.Dense(32, name="hidden")(x))
        return nn.Dense(1, name="actor")(x), nn.Dense(1, name="critic")(x)


def actor_critic() -> fp.Graph:
    return of_linen(ActorCritic(), shape(2, 12, 12, 3), loss=lambda o: jnp.sum(o[0] ** 2) + jnp.sum(o[1]))
