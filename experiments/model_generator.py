"""Models that nobody tuned for, drawn at random: kinds, layers and sizes follow from a seed.

Convolutional networks with every padding, stride, dilation, pooling and normalisation, residual networks,
networks of grouped and pointwise convolutions, U-Nets, recurrent networks, transformers and graph networks,
each with a loss, at sizes that take some milliseconds.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from block_networks import block_net
from flax import linen as nn


class Drawn(NamedTuple):
    """A loss with its arguments, the first of which are the parameters, and what was drawn."""

    name: str
    loss: Callable[..., jax.Array]
    args: tuple[Any, ...]


def drawn(seed: int, count: int) -> list[Callable[[], Drawn]]:
    """Models of a seed; each is made when it is called, so that one is in memory at a time."""
    kinds = list(_KINDS.items())

    def make(i: int) -> Callable[[], Drawn]:
        def model() -> Drawn:
            rng = random.Random(f"{seed}/{i}")
            kind, build = kinds[i % len(kinds)]
            text, module, x = build(rng)
            return _classified(f"{seed}/{i} {kind}: {text}", module, x, rng)

        return model

    return [make(i) for i in range(count)]


def _classified(name: str, module: nn.Module, x: Any, rng: random.Random) -> Drawn:
    inputs = x if isinstance(x, tuple) else (x,)
    variables = jax.jit(module.init)(jax.random.key(1), *inputs)
    params, rest = variables["params"], {k: v for k, v in variables.items() if k != "params"}
    outputs: Any = jax.eval_shape(
        lambda p: module.apply({"params": p, **rest}, *inputs, mutable=list(rest))[0], params
    )
    labels = jax.random.randint(jax.random.key(2), outputs.shape[:-1], 0, outputs.shape[-1])

    def loss(params: Any, labels: jax.Array, *inputs: Any) -> jax.Array:
        logits, _ = module.apply({"params": params, **rest}, *inputs, mutable=list(rest))
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    return Drawn(name, loss, (params, labels, *inputs))


def _normal(*shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(0), shape)


ACTIVATIONS: dict[str, Callable[[Any], Any]] = {
    "relu": nn.relu, "gelu": nn.gelu, "tanh": nn.tanh, "silu": nn.silu, "elu": nn.elu, "leaky": nn.leaky_relu,
}  # fmt: skip


def _norm(kind: str) -> Callable[[Any], Any]:
    return {
        "none": lambda x: x,
        "batch": lambda x: nn.BatchNorm(use_running_average=False)(x),
        "layer": lambda x: nn.LayerNorm()(x),
        "group": lambda x: nn.GroupNorm(num_groups=4)(x),
        "rms": lambda x: nn.RMSNorm()(x),
    }[kind]


# --- convolutional networks -------------------------------------------------------------------


class Stage(NamedTuple):
    """A convolution, a normalisation, an activation, and a pool or none."""

    features: int
    kernel: int
    stride: int
    dilation: int
    padding: str
    pool: str
    window: int
    pool_stride: int
    pool_padding: str


class ConvNet(nn.Module):
    """Stages, then a dense head."""

    stages: tuple[Stage, ...]
    norm: str
    activation: str
    mean: bool

    @nn.compact
    def __call__(self, x: Any) -> Any:
        for s in self.stages:
            x = nn.Conv(s.features, (s.kernel,) * 2, s.stride, s.padding, kernel_dilation=s.dilation)(x)
            x = ACTIVATIONS[self.activation](_norm(self.norm)(x))
            size = min(x.shape[1:3])
            if s.pool != "none" and size >= s.window:
                pool = nn.max_pool if s.pool == "max" else nn.avg_pool
                x = pool(x, (s.window,) * 2, (s.pool_stride,) * 2, s.pool_padding)
        x = x.mean((1, 2)) if self.mean else x.reshape(len(x), -1)
        return nn.Dense(10)(x)


def _conv_net(rng: random.Random) -> tuple[str, nn.Module, Any]:
    size, batch = rng.choice([17, 24, 28, 32, 48]), rng.choice([8, 16, 31, 32, 64, 96])
    stages, here = [], size
    for _ in range(rng.randint(2, 4)):
        kernel, dilation = rng.choice([1, 2, 3, 3, 3, 5, 7]), rng.choice([1, 1, 1, 2])
        padding = rng.choice(["SAME", "SAME", "VALID"])
        if (kernel - 1) * dilation + 1 > here // 2:
            kernel, dilation, padding = 3, 1, "SAME"
        window = rng.choice([2, 2, 3, 4])
        stage = Stage(
            rng.choice([8, 16, 24, 32, 48, 64, 96]), kernel, rng.choice([1, 1, 1, 2]), dilation, padding,
            rng.choice(["max", "max", "mean", "none"]), window, rng.choice([window, 2, 1]),
            rng.choice(["VALID", "SAME"]),
        )  # fmt: skip
        stages.append(stage)
        here = max(1, (here if padding == "SAME" else here - (kernel - 1) * dilation) // stage.stride)
        here = here if stage.pool == "none" else max(1, here // stage.pool_stride)
        if here < 6:
            break
    norm, activation = rng.choice(["none", "none", "batch", "group", "layer"]), rng.choice(list(ACTIVATIONS))
    net = ConvNet(tuple(stages), norm, activation, rng.random() < 0.4)
    text = f"{batch}×{size}², {norm}, {activation}, " + "; ".join(
        f"{s.features}c{s.kernel}/{s.stride}d{s.dilation}{s.padding[0]} {s.pool}{s.window}/{s.pool_stride}"
        for s in stages
    )
    return text, net, _normal(batch, size, size, rng.choice([1, 3, 8, 16]))


class ResNet(nn.Module):
    """Residual blocks, each stage of half the resolution."""

    widths: tuple[int, ...]
    blocks: int
    norm: str
    activation: str

    @nn.compact
    def __call__(self, x: Any) -> Any:
        act, norm = ACTIVATIONS[self.activation], _norm(self.norm)
        x = act(norm(nn.Conv(self.widths[0], (3, 3))(x)))
        for i, width in enumerate(self.widths):
            for j in range(self.blocks):
                stride = 2 if i and not j else 1
                y = act(norm(nn.Conv(width, (3, 3), stride)(x)))
                y = norm(nn.Conv(width, (3, 3))(y))
                x = x if x.shape == y.shape else nn.Conv(width, (1, 1), stride)(x)
                x = act(x + y)
        return nn.Dense(10)(x.mean((1, 2)))


def _resnet(rng: random.Random) -> tuple[str, nn.Module, Any]:
    widths = rng.choice([(16, 32, 64), (32, 64), (24, 48, 96), (8, 16, 32), (64, 128)])
    batch, size = rng.choice([8, 16, 32, 48]), rng.choice([16, 24, 32])
    norm, blocks = rng.choice(["batch", "batch", "group", "none"]), rng.randint(1, 2)
    activation = rng.choice(["relu", "silu"])
    text = f"{batch}×{size}², widths {widths}, {blocks} blocks, {norm}, {activation}"
    return text, ResNet(widths, blocks, norm, activation), _normal(batch, size, size, 3)


def _block_net(rng: random.Random) -> tuple[str, nn.Module, Any]:
    text, net, shape = block_net(rng, _norm, ACTIVATIONS)
    return text, net, _normal(*shape)


class UNet(nn.Module):
    """Two levels down and up, with what was there before beside it."""

    width: int
    norm: str
    pool: str

    @nn.compact
    def __call__(self, x: Any) -> Any:
        def block(x: Any, width: int) -> Any:
            for _ in range(2):
                x = nn.relu(_norm(self.norm)(nn.Conv(width, (3, 3))(x)))
            return x

        kept = []
        for level in range(2):
            x = block(x, self.width << level)
            kept.append(x)
            pool = nn.max_pool if self.pool == "max" else nn.avg_pool
            x = pool(x, (2, 2), (2, 2))
        x = block(x, self.width << 2)
        for level in reversed(range(2)):
            x = nn.ConvTranspose(self.width << level, (2, 2), (2, 2))(x)
            x = block(jnp.concatenate([x, kept[level]], -1), self.width << level)
        return nn.Conv(4, (1, 1))(x)


def _unet(rng: random.Random) -> tuple[str, nn.Module, Any]:
    width, batch, size = rng.choice([8, 16, 24]), rng.choice([2, 4, 8]), rng.choice([32, 48, 64])
    norm, pool = rng.choice(["none", "batch", "group"]), rng.choice(["max", "mean"])
    return (
        f"{batch}×{size}², width {width}, {norm}, {pool}",
        UNet(width, norm, pool),
        _normal(batch, size, size, 3),
    )


# --- sequences --------------------------------------------------------------------------------


class Recurrent(nn.Module):
    """Layers of a cell, and a head for every step or the last."""

    cell: Any
    width: int
    layers: int
    last: bool

    @nn.compact
    def __call__(self, x: Any) -> Any:
        for _ in range(self.layers):
            x = nn.RNN(self.cell(self.width))(x)
        return nn.Dense(16)(x[:, -1] if self.last else x)


def _recurrent(rng: random.Random) -> tuple[str, nn.Module, Any]:
    cell = rng.choice([nn.LSTMCell, nn.OptimizedLSTMCell, nn.GRUCell, nn.SimpleCell, nn.MGUCell])
    steps, batch, width = (
        rng.choice([10, 33, 64, 100]),
        rng.choice([1, 4, 16, 32]),
        rng.choice([32, 64, 96, 128, 256]),
    )
    inputs, layers, last = rng.choice([16, 64, width]), rng.randint(1, 2), rng.random() < 0.5
    text = f"{cell.__name__} T{steps} B{batch} H{width} from {inputs}, {layers} layers" + ", last" * last
    return text, Recurrent(cell, width, layers, last), _normal(batch, steps, inputs)


class Transformer(nn.Module):
    """Pre-norm blocks over embedded tokens."""

    width: int
    heads: int
    layers: int
    vocabulary: int
    norm: str
    activation: str
    gated: bool

    @nn.compact
    def __call__(self, tokens: Any) -> Any:
        x = nn.Embed(self.vocabulary, self.width)(tokens)
        mask = nn.make_causal_mask(tokens)
        for _ in range(self.layers):
            x = x + nn.MultiHeadDotProductAttention(self.heads)(_norm(self.norm)(x), mask=mask)
            y = _norm(self.norm)(x)
            up = ACTIVATIONS[self.activation](nn.Dense(4 * self.width)(y))
            x = x + nn.Dense(self.width)(up * nn.Dense(4 * self.width)(y) if self.gated else up)
        return nn.Dense(self.vocabulary)(_norm(self.norm)(x))


def _transformer(rng: random.Random) -> tuple[str, nn.Module, Any]:
    width, heads = rng.choice([(64, 4), (96, 3), (128, 8), (192, 3)])
    batch, length, layers = rng.choice([1, 2, 4, 8]), rng.choice([32, 64, 100, 128, 256]), rng.randint(1, 3)
    norm, activation, gated = (
        rng.choice(["layer", "rms"]),
        rng.choice(["gelu", "relu", "silu"]),
        rng.random() < 0.3,
    )
    vocabulary = rng.choice([64, 500, 2048])
    text = (
        f"{batch}×{length}, d{width} h{heads}, {layers} layers, V{vocabulary}, {norm}, {activation}"
        + " gated" * gated
    )
    tokens = jax.random.randint(jax.random.key(0), (batch, length), 0, vocabulary)
    return text, Transformer(width, heads, layers, vocabulary, norm, activation, gated), tokens


# --- graphs -----------------------------------------------------------------------------------


class GraphNet(nn.Module):
    """Messages along edges, summed or maximised at nodes."""

    width: int
    layers: int
    reduce: str
    nodes: int

    @nn.compact
    def __call__(self, x: Any, senders: Any, receivers: Any) -> Any:
        total = jax.ops.segment_sum if self.reduce == "sum" else jax.ops.segment_max
        x = nn.Dense(self.width)(x)
        for _ in range(self.layers):
            message = nn.relu(nn.Dense(self.width)(jnp.concatenate([x[senders], x[receivers]], -1)))
            here = total(message, receivers, self.nodes)
            here = jnp.where(jnp.isfinite(here), here, 0)
            x = nn.LayerNorm()(x + nn.Dense(self.width)(here))
        return nn.Dense(8)(x)


def _graph_net(rng: random.Random) -> tuple[str, nn.Module, Any]:
    nodes, degree, width = rng.choice([200, 1000, 3000]), rng.choice([4, 8, 16]), rng.choice([16, 32, 64])
    layers, reduce = rng.randint(1, 3), rng.choice(["sum", "max"])
    edges = jax.random.randint(jax.random.key(3), (2, nodes * degree), 0, nodes)
    text = f"{nodes} nodes, degree {degree}, width {width}, {layers} layers, {reduce}"
    return text, GraphNet(width, layers, reduce, nodes), (_normal(nodes, 16), edges[0], edges[1])


_KINDS: dict[str, Callable[[random.Random], tuple[str, nn.Module, Any]]] = {
    "CNN": _conv_net, "ResNet": _resnet, "recurrent": _recurrent, "CNN ": _conv_net, "U-Net": _unet,
    "transformer": _transformer, "CNN  ": _conv_net, "GNN": _graph_net, "blocks": _block_net,
}  # fmt: skip
