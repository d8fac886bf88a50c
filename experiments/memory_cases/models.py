"""Further models of fixed kinds and drawn sizes: batch norm, residual nets, U-Nets, loops, 16 bits.

Nothing is computed: parameters and data are shapes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

Shape = jax.ShapeDtypeStruct


class Loss(NamedTuple):
    """A loss and the shapes of its arguments, the parameters first; `has_aux` as in `jax.grad`."""

    name: str
    fun: Callable[..., Any]
    args: tuple[Any, ...]
    has_aux: bool = False


def floats(*dims: int) -> Shape:
    return Shape(dims, jnp.float32)


def integers(*dims: int) -> Shape:
    return Shape(dims, jnp.int32)


def of_flax(name: str, net: nn.Module, x: Any, y: Any) -> Loss:
    """The mean cross-entropy, or squared error, of a net; statistics that it keeps are auxiliary."""
    variables = jax.eval_shape(net.init, jax.random.key(0), x)
    rest = {k: v for k, v in variables.items() if k != "params"}

    def loss(params: Any, rest: Any, x: jax.Array, y: jax.Array) -> Any:
        out, new = net.apply({"params": params, **rest}, x, mutable=list(rest))
        if jnp.issubdtype(y.dtype, jnp.integer):
            return optax.softmax_cross_entropy_with_integer_labels(out, y).mean(), new
        return jnp.mean((out - y) ** 2), new

    return Loss(name, loss, (variables["params"], rest, x, y), has_aux=True)


class Normalised(nn.Module):
    """Convolutions, each with batch norm and a max-pool."""

    features: tuple[int, ...]
    padding: str
    window: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for features in self.features:
            x = nn.BatchNorm(use_running_average=False)(nn.Conv(features, (3, 3), padding=self.padding)(x))
            x = nn.max_pool(nn.relu(x), (self.window, self.window), (2, 2))
        return nn.Dense(10)(x.mean((1, 2)))


class Residual(nn.Module):
    """A stem with a max-pool, and residual blocks of growing width."""

    features: tuple[int, ...]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        norm = functools.partial(nn.BatchNorm, use_running_average=False)
        x = nn.relu(norm()(nn.Conv(self.features[0], (7, 7), (2, 2))(x)))
        x = nn.max_pool(x, (3, 3), (2, 2), "SAME")
        for i, width in enumerate(self.features):
            strides = (2, 2) if i else (1, 1)
            y = nn.relu(norm()(nn.Conv(width, (3, 3), strides, use_bias=False)(x)))
            y = norm()(nn.Conv(width, (3, 3), use_bias=False)(y))
            if x.shape != y.shape:
                x = norm()(nn.Conv(width, (1, 1), strides, use_bias=False)(x))
            x = nn.relu(x + y)
        return nn.Dense(10)(x.mean((1, 2)))


class UNet(nn.Module):
    """Down and up again, with skips, group norm and SiLU."""

    width: int
    depth: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        def block(x: jax.Array, width: int) -> jax.Array:
            h = nn.Conv(width, (3, 3))(nn.silu(nn.GroupNorm(4)(x)))
            return nn.Conv(width, (3, 3))(nn.silu(nn.GroupNorm(4)(h))) + nn.Conv(width, (1, 1))(x)

        channels, skips = x.shape[-1], []
        x = nn.Conv(self.width, (3, 3))(x)
        for level in range(self.depth):
            x = block(x, self.width * 2**level)
            skips.append(x)
            x = nn.avg_pool(x, (2, 2), (2, 2))
        x = block(x, self.width * 2**self.depth)
        for level in reversed(range(self.depth)):
            batch, height, width, depth = x.shape
            x = jax.image.resize(x, (batch, 2 * height, 2 * width, depth), "nearest")
            x = block(jnp.concatenate([x, skips[level]], -1), self.width * 2**level)
        return nn.Conv(channels, (3, 3))(x)


class Atari(nn.Module):
    """The deep torso of IMPALA: pools of 3×3 by 2, and residual blocks."""

    features: tuple[int, ...]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for width in self.features:
            x = nn.max_pool(nn.Conv(width, (3, 3))(x), (3, 3), (2, 2), "SAME")
            for _ in range(2):
                x = x + nn.Conv(width, (3, 3))(nn.relu(nn.Conv(width, (3, 3))(nn.relu(x))))
        return nn.Dense(10)(nn.relu(nn.Dense(128)(nn.relu(x.reshape(x.shape[0], -1)))))


class ActorCritic(nn.Module):
    """The convolutions of PPO, with the policy and the value behind."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for width, size, stride in ((32, 8, 4), (64, 4, 2), (64, 3, 1)):
            x = nn.relu(nn.Conv(width, (size, size), (stride, stride))(x))
        hidden = nn.relu(nn.Dense(256)(x.reshape(x.shape[0], -1)))
        return jnp.concatenate([nn.log_softmax(nn.Dense(4)(hidden)), nn.Dense(1)(hidden)], -1)


class Recurrent(nn.Module):
    """Cells of an LSTM, unrolled or not."""

    width: int
    unroll: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        states: Any = nn.RNN(nn.OptimizedLSTMCell(self.width), unroll=self.unroll)(x)
        return nn.Dense(10)(states[:, -1])


class Translator(nn.Module):
    """An encoder and a decoder, both an LSTM."""

    width: int

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = nn.Embed(40, self.width)(tokens)
        carry, _ = nn.RNN(nn.OptimizedLSTMCell(self.width), return_carry=True)(x)
        return nn.Dense(40)(nn.RNN(nn.OptimizedLSTMCell(self.width))(x, initial_carry=carry))


class Transformer(nn.Module):
    """Blocks of attention and a feed-forward layer, in 16 or 32 bits."""

    width: int
    blocks: int
    dtype: str = "float32"

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = nn.Embed(96, self.width, dtype=self.dtype)(tokens)
        norm = functools.partial(nn.LayerNorm, dtype=self.dtype)
        dense = functools.partial(nn.Dense, dtype=self.dtype)
        for _ in range(self.blocks):
            x = x + nn.MultiHeadDotProductAttention(num_heads=4, dtype=self.dtype)(norm()(x))
            x = x + dense(self.width)(nn.gelu(dense(4 * self.width)(norm()(x))))
        return dense(96)(norm()(x)).astype("float32")


def associative(rng: np.random.Generator) -> Loss:
    length, width = int(rng.integers(500, 4000)), int(rng.choice([32, 64, 128]))

    def loss(a: jax.Array, x: jax.Array) -> jax.Array:
        def combine(p: Any, q: Any) -> Any:
            return p[0] * q[0], p[1] * q[0] + q[1]

        return jnp.mean(jax.lax.associative_scan(combine, (jnp.tanh(a), x))[1] ** 2)

    return Loss(f"associative scan {length}×{width}", loss, (floats(length, width), floats(length, width)))


def inner_steps(rng: np.random.Generator) -> Loss:
    """Gradient steps inside of a loop of one or several, unrolled or not: the step of meta-learning."""
    count, unroll = int(rng.choice([1, 2, 4])), bool(rng.integers(2))
    hidden = int(rng.choice([128, 256, 512]))

    def inner(w: Any, x: jax.Array) -> jax.Array:
        return jnp.mean((jnp.tanh(x @ w["a"]) @ w["b"]) ** 2)

    def loss(w: Any, xs: jax.Array) -> jax.Array:
        def step(w: Any, x: jax.Array) -> tuple[Any, None]:
            return jax.tree.map(lambda p, g: p - 0.1 * g, w, jax.grad(inner)(w, x)), None

        return inner(jax.lax.scan(step, w, xs, unroll=unroll)[0], xs[0])

    weights = {"a": floats(128, hidden), "b": floats(hidden, 32)}
    return Loss(f"{count} inner steps, unroll={unroll}", loss, (weights, floats(count, 512, 128)))


def _drawn(rng: np.random.Generator, kind: str) -> Loss:
    batch, width = int(rng.choice([8, 16, 24])), int(rng.choice([8, 16]))
    side = int(rng.choice([24, 32]))
    image, labels = floats(batch, side, side, 3), integers(batch)
    if kind == "batch norm":
        net: nn.Module = Normalised(
            (width, 2 * width), str(rng.choice(["SAME", "VALID"])), int(rng.integers(2, 4))
        )
        return of_flax(f"batch norm {width} {side}² × {batch}", net, image, labels)
    if kind == "ResNet":
        image = floats(batch, 2 * side, 2 * side, 3)
        return of_flax(f"ResNet {width} {2 * side}² × {batch}", Residual((width, 2 * width)), image, labels)
    if kind == "U-Net":
        image = floats(batch // 4, side, side, 3)
        return of_flax(f"U-Net {width} {side}² × {batch // 4}", UNet(width, 2), image, image)
    if kind == "LSTM":
        steps, hidden = int(rng.integers(6, 40)), int(rng.choice([48, 64, 96]))
        unroll = steps if steps < 16 else 1
        x = floats(batch, steps, 32)
        return of_flax(f"LSTM {hidden}, {steps} steps, unroll={unroll}", Recurrent(hidden, unroll), x, labels)
    dtype = "bfloat16" if kind == "transformer, 16 bits" else "float32"
    tokens, hidden = integers(batch, 2 * side), int(rng.choice([32, 64, 96]))
    return of_flax(
        f"{kind} {hidden}, {2 * side} tokens × {batch}", Transformer(hidden, 2, dtype), tokens, tokens
    )


KINDS = ("batch norm", "ResNet", "U-Net", "LSTM", "transformer", "transformer, 16 bits")


def drawn(seed: int, count: int) -> list[Loss]:
    """So many models, of all kinds in turn, with sizes drawn by a seed."""
    rng = np.random.default_rng(seed)
    kinds: list[Callable[[np.random.Generator], Loss]] = [
        *(functools.partial(_drawn, kind=kind) for kind in KINDS),
        *(associative, inner_steps),
    ]
    return [kinds[i % len(kinds)](rng) for i in range(count)]


def to_rematerialise() -> list[Loss]:
    """The models of the table of rematerialisation."""
    frames = floats(8, 84, 84, 4)
    return [
        of_flax("ResNet", Residual((16, 32, 64)), floats(16, 64, 64, 3), integers(16)),
        of_flax("Atari", Atari((16, 32)), frames, integers(8)),
        of_flax("PPO", ActorCritic(), frames, floats(8, 5)),
        of_flax("seq2seq", Translator(64), integers(32, 20), integers(32, 20)),
        of_flax("U-Net", UNet(16, 2), floats(4, 32, 32, 3), floats(4, 32, 32, 3)),
        of_flax("transformer", Transformer(64, 4), integers(8, 48), integers(8, 48)),
    ]
