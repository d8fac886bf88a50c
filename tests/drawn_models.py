"""Small versions of the models that people draw: `MODELS` has a graph of each, by its name."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import cache
from typing import Any

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import nnx

import funcprop as fp

F32 = "float32"
KEY = jax.random.key(0)


def shape(*sizes: int, dtype: str = F32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, dtype)


def shapes(make: Callable[[], Any]) -> Any:
    return jax.eval_shape(make)


def of_linen(model: nn.Module, *inputs: Any, loss: Callable[..., Any] = jnp.sum, **options: Any) -> fp.Graph:
    state = shapes(lambda: model.init(KEY, *zeros(inputs), **options))

    def objective(params: Any, *inputs: Any) -> Any:
        return loss(model.apply({**state_of(state), "params": params}, *inputs, **options))

    return fp.trace(objective)(state["params"], *inputs)


def state_of(state: Any) -> Any:
    """The collections beside the parameters, as numbers."""
    return jax.tree.map(
        lambda s: jnp.ones(s.shape, s.dtype), {k: v for k, v in state.items() if k != "params"}
    )


def zeros(inputs: Any) -> Any:
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), inputs)


# --- plain JAX ----------------------------------------------------------------------------------


def plain_mlp() -> fp.Graph:
    def loss(layers: Any, x: Any, y: Any) -> Any:
        for w, b in layers[:-1]:
            x = jnp.tanh(x @ w + b)
        w, b = layers[-1]
        logits = x @ w + b
        return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(8), y])

    sizes = [16, 32, 32, 10]
    layers = [(shape(i, o), shape(o)) for i, o in itertools.pairwise(sizes)]
    return fp.trace(loss)(layers, shape(8, 16), shape(8, dtype="int32"))


def convlstm() -> fp.Graph:
    """Twelve steps of a convolutional LSTM, unrolled."""

    def loss(p: Any, frames: Any) -> Any:
        h = c = jnp.zeros((1, 8, 8, 4), F32)
        outs = []
        for t in range(12):
            both = jnp.concatenate([frames[:, t], h], -1)
            gates = jax.lax.conv_general_dilated(
                both, p["w"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            i, f, g, o = jnp.split(gates + p["b"], 4, -1)
            c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            h = jax.nn.sigmoid(o) * jnp.tanh(c)
            outs.append(h)
        return jnp.mean(jnp.stack(outs, 1) ** 2)

    return fp.trace(loss)({"w": shape(3, 3, 7, 16), "b": shape(16)}, shape(1, 12, 8, 8, 3))


def graphnet() -> fp.Graph:
    """Two rounds of messages along edges, with other widths in the first."""

    def mlp(p: Any, x: Any) -> Any:
        return jax.nn.relu(x @ p["w1"] + p["b1"]) @ p["w2"] + p["b2"]

    def loss(rounds: Any, nodes: Any, edges: Any, senders: Any, receivers: Any) -> Any:
        for p in rounds:
            edges = mlp(p["edge"], jnp.concatenate([edges, nodes[senders], nodes[receivers]], -1))
            received = jax.ops.segment_sum(edges, receivers, 10)
            nodes = mlp(p["node"], jnp.concatenate([nodes, received], -1))
        return jnp.mean(nodes**2)

    def mlp_shapes(i: int, o: int) -> Any:
        return {"w1": shape(i, 16), "b1": shape(16), "w2": shape(16, o), "b2": shape(o)}

    rounds = [
        {"edge": mlp_shapes(2 + 2 * 3, 8), "node": mlp_shapes(3 + 8, 8)},
        {"edge": mlp_shapes(8 + 2 * 8, 8), "node": mlp_shapes(8 + 8, 8)},
        {"edge": mlp_shapes(8 + 2 * 8, 8), "node": mlp_shapes(8 + 8, 8)},
    ]
    indices = shape(20, dtype="int32")
    return fp.trace(loss)(rounds, shape(10, 3), shape(20, 2), indices, indices)


def mamba() -> fp.Graph:
    """A selective state space, its scan over 16 steps unrolled."""

    def loss(p: Any, x: Any) -> Any:
        u = jax.nn.silu(x @ p["in"])
        delta, b, c = jax.nn.softplus(u @ p["delta"]), u @ p["b"], u @ p["c"]
        state, outs = jnp.zeros((8, 4), F32), []
        for t in range(16):
            decay = jnp.exp(-delta[t][:, None] * jnp.exp(p["a"]))
            state = decay * state + (delta[t] * u[t])[:, None] * b[t][None, :]
            outs.append(state @ c[t])
        y = jnp.stack(outs) + u * p["d"]
        return jnp.mean((y @ p["out"]) ** 2)

    p = {"in": shape(6, 8), "delta": shape(8, 8), "b": shape(8, 4), "c": shape(8, 4)}
    p |= {"a": shape(8, 4), "d": shape(8), "out": shape(8, 6)}
    return fp.trace(loss)(p, shape(16, 6))


def two_towers() -> fp.Graph:
    """Two equal towers whose results are subtracted: they are read differently."""

    def tower(name: str, p: Any, x: Any) -> Any:
        with jax.named_scope(name):
            return jnp.tanh(jnp.tanh(x @ p["w1"] + p["b1"]) @ p["w2"] + p["b2"])

    def loss(left: Any, right: Any, x: Any) -> Any:
        return jnp.sum((tower("left", left, x) - tower("right", right, x)) ** 2)

    p = {"w1": shape(4, 4), "b1": shape(4), "w2": shape(4, 4), "b2": shape(4)}
    return fp.trace(loss)(p, p, shape(3, 4))


def wavenet() -> fp.Graph:
    """Residual blocks with a skip of each into one sum, and dilations that grow."""

    def loss(blocks: Any, x: Any) -> Any:
        skips = jnp.zeros((1, 32, 4), F32)
        for i, p in enumerate(blocks):
            with jax.named_scope(f"block{i}"):
                y = jax.lax.conv_general_dilated(
                    x, p["w"], (1,), "SAME", rhs_dilation=(2**i,), dimension_numbers=("NWC", "WIO", "NWC")
                )
                gated = jnp.tanh(y[..., :4]) * jax.nn.sigmoid(y[..., 4:])
                x, skips = x + gated @ p["out"], skips + gated @ p["skip"]
        return jnp.mean(skips**2)

    blocks = [{"w": shape(3, 4, 8), "out": shape(4, 4), "skip": shape(4, 4)}] * 4
    return fp.trace(loss)(blocks, shape(1, 32, 4))


# --- Flax linen ---------------------------------------------------------------------------------


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


def cross_entropy(logits: Any) -> Any:
    labels = jnp.zeros(logits.shape[:-1], jnp.int32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


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


# --- Equinox, nnx, Haiku ------------------------------------------------------------------------


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


MODELS: dict[str, Callable[[], fp.Graph]] = {
    f.__name__: cache(f)
    for f in (
        plain_mlp, convlstm, graphnet, mamba, two_towers, wavenet,
        transformer, vit, vae, resnet, unet, lstm, unrolled_lstm, experts, densenet, pyramid, actor_critic,
        equinox_cnn, equinox_mlp, nnx_transformer, haiku_resnet, haiku_mlp,
    )
}  # fmt: skip
