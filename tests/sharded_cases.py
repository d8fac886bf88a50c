"""Losses of a batch that is spread over devices: operators and layers whose rules must leave it there."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

import funcprop as fp

HANDWRITTEN = fp.rules.handwritten


def numbers(*shape: int, seed: int = 0, scale: float = 1.0) -> jax.Array:
    return jax.device_put(scale * np.random.default_rng(seed).standard_normal(shape))


def labels(*shape: int, classes: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(1).integers(0, classes, shape))


class Case(NamedTuple):
    """`loss(params, *batch)`: parameters are on every device, all arrays of the batch are cut along `axis`.

    `fires` names the operators whose rule must fire with `rules`; `plain` is the same loss written without
    this library, whose collectives are the bound.
    """

    loss: Callable[..., Any]
    params: Any
    batch: tuple[jax.Array, ...]
    fires: tuple[str, ...]
    rules: fp.RuleSet = fp.rules.default
    axis: int = 0
    plain: Callable[..., Any] | None = None


CASES: dict[str, Callable[[], Case]] = {}


def case(make: Callable[[], Case]) -> Callable[[], Case]:
    CASES[make.__name__] = functools.cache(make)
    return CASES[make.__name__]


def weighted(y: Any) -> Any:
    """A mean in which no two features weigh the same."""
    return jnp.mean(y**2 * np.linspace(1, 2, y.shape[-1]))


# --- functions of JAX -------------------------------------------------------------------------


@case
def softmax():
    return Case(
        lambda w, x: weighted(jax.nn.softmax(x @ w)), numbers(6, 5), (numbers(16, 6, seed=1),), ("softmax",)
    )


@case
def activations():
    def loss(w, x):
        for f in (jax.nn.relu, jax.nn.gelu, jax.nn.silu, jnp.tanh):
            x = f(x @ w)
        return weighted(x)

    fires = ("relu", "tanh_gelu", "silu", "tanh")
    return Case(loss, numbers(6, 6), (numbers(16, 6, seed=1),), fires, HANDWRITTEN)


@case
def layer_norm_written_out():
    def loss(p, x):
        mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
        return weighted(((x - mean) * lax.rsqrt(variance + 1e-6) * p["scale"] + p["bias"]) @ p["w"])

    params = {"scale": numbers(6), "bias": numbers(6, seed=1), "w": numbers(6, 5, seed=2)}
    return Case(loss, params, (numbers(16, 6, seed=3),), ("rsqrt",), HANDWRITTEN)


def pooled(x: Any) -> Any:
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")


@case
def max_pool():
    images = numbers(8, 8, 8, 3, seed=1)
    return Case(lambda w, x: weighted(pooled(x * w)), numbers(3), (images,), ("reduce_window_max",))


@case
def relu_and_max_pool():
    images = numbers(8, 8, 8, 3, seed=1)
    return Case(lambda w, x: weighted(pooled(jax.nn.relu(x * w))), numbers(3), (images,), ("relu_max_pool",))


@case
def average_pool():
    def loss(w, x):
        return weighted(lax.reduce_window(x * w, 0.0, lax.add, (1, 2, 2, 1), (1, 2, 2, 1), "VALID"))

    return Case(loss, numbers(3), (numbers(8, 8, 8, 3, seed=1),), ("reduce_window_sum",))


def convolved(x: Any, w: Any) -> Any:
    return lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


@case
def conv_and_max_pool():
    """Images are differentiated too; both cotangents are made a chunk of the batch at a time."""
    fires = ("conv_general_dilated", "reduce_window_max")
    images = numbers(32, 16, 16, 3, seed=1)
    return Case(lambda w, x: weighted(pooled(convolved(x, w))), numbers(3, 3, 3, 48), (images,), fires)


@case
def conv_relu_and_max_pool():
    def loss(p, x):
        return weighted(pooled(jax.nn.relu(convolved(x, p["conv"]) + p["b"])) @ p["out"])

    params = {"conv": numbers(5, 5, 3, 48), "b": numbers(48, seed=1), "out": numbers(48, 2, seed=2)}
    images = numbers(32, 16, 16, 3, seed=3)
    return Case(loss, params, (images,), ("conv_general_dilated", "relu_max_pool"))


@case
def pointwise_conv():
    params, images = numbers(1, 1, 8, 4), numbers(32, 8, 8, 8, seed=1)
    return Case(lambda w, x: weighted(convolved(x, w)), params, (images,), ("conv_general_dilated",))


@case
def rnn_by_scan():
    def loss(p, x):
        def step(h, v):
            h = jnp.tanh(v @ p["x"] + h @ p["h"])
            return h, h

        return weighted(lax.scan(step, jnp.zeros_like(x[0] @ p["x"]), x)[1])

    params = {"x": numbers(4, 64), "h": numbers(64, 64, seed=1, scale=0.1)}
    return Case(loss, params, (numbers(6, 8, 4, seed=2),), ("scan",), axis=1)


@case
def lstm_by_scan():
    def loss(p, x):
        def step(state, v):
            h, c = state
            i, f, g, o = jnp.split(v @ p["x"] + h @ p["h"] + p["b"], 4, axis=-1)
            c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            h = jax.nn.sigmoid(o) * jnp.tanh(c)
            return (h, c), h

        zeros = jnp.zeros_like(x[0] @ p["x"][:, :64])
        return weighted(lax.scan(step, (zeros, zeros), x)[1])

    params = {"x": numbers(4, 256), "h": numbers(64, 256, seed=1, scale=0.1), "b": numbers(256, seed=2)}
    return Case(loss, params, (numbers(6, 8, 4, seed=3),), ("scan",), axis=1)


@case
def dense_and_tanh():
    params = {"w": numbers(6, 5), "b": numbers(5, seed=1)}
    loss = lambda p, x: weighted(jnp.tanh(x @ p["w"] + p["b"]))  # noqa: E731
    return Case(loss, params, (numbers(16, 3, 6, seed=2),), ("tanh",), HANDWRITTEN)


def heads(w: Any, x: Any) -> Any:
    return jnp.einsum("btd,ndhk->nbthk", x, w)


def attended(w: Any, x: Any) -> Any:
    q, k, v = heads(w, x)
    causal = np.tril(np.ones((x.shape[1], x.shape[1]), bool))
    scores = jnp.einsum("bqhk,bthk->bhqt", q, k) / np.sqrt(q.shape[-1])
    p = jax.nn.softmax(jnp.where(causal, scores, -jnp.inf))
    return weighted(jnp.einsum("bhqt,bthk->bqhk", p, v))


@case
def attention_written_out():
    return Case(attended, numbers(3, 6, 2, 4), (numbers(8, 5, 6, seed=1),), ("softmax",))


# --- layers of this library -------------------------------------------------------------------


@case
def attention_by_blocks():
    def loss(w, x):
        return weighted(fp.layers.attention(*heads(w, x), causal=True, blocks=(8, 8)))

    return Case(loss, numbers(3, 6, 2, 4), (numbers(8, 24, 6, seed=1),), ("attention",), plain=attended)


def token_losses(p: Any, h: Any, y: Any) -> Any:
    return optax.softmax_cross_entropy_with_integer_labels(h @ p["w"] + p["b"], y).mean()


def of_tokens(*batch: int, **options: Any) -> Case:
    def loss(p, h, y):
        return fp.layers.linear_cross_entropy(h, p["w"], y, p["b"], **options)

    params = {"w": numbers(6, 40), "b": numbers(40, seed=1)}
    data = numbers(*batch, 6, seed=2), labels(*batch, classes=40)
    return Case(loss, params, data, ("linear_cross_entropy",), plain=token_losses)


def of_layer(apply: Callable[..., Any], params: Any, *batch: Any, name: str, **options: Any) -> Case:
    """A layer whose plain function is the layer itself, without its rule."""
    return Case(lambda p, *xs: weighted(apply(p, *xs)), params, batch, (name,), HANDWRITTEN, **options)


NORM = {"scale": numbers(6), "bias": numbers(6, seed=1)}
HIDDEN = {"w_up": numbers(6, 8), "w_down": numbers(8, 6, seed=1)}
ROWS, IMAGES, SEQUENCES = numbers(16, 6, seed=9), numbers(8, 8, 8, 6, seed=9), numbers(5, 8, 6, seed=9)
CLASSES = labels(16, classes=6)


def recurrent(layer: Callable[..., Any], gates: int, states: int = 1) -> Case:
    """A recurrent layer; its first state is made of the input, and so lies as the batch does."""

    def apply(p, x):
        zeros = 0 * (x[0] @ p["w"][:, :4])
        return layer(x, p["w"], p["u"], p["b"], initial=(zeros,) * states)

    params = {"w": numbers(6, 4 * gates), "u": numbers(4, 4 * gates, seed=1), "b": numbers(4 * gates, seed=2)}
    return of_layer(apply, params, SEQUENCES, name=layer.__name__, axis=1)


CASES |= {
    "linear_cross_entropy, gradient saved": lambda: of_tokens(64, save="gradient", chunk=16),
    "linear_cross_entropy, normalizer saved": lambda: of_tokens(64, save="normalizer", chunk=16),
    "linear_cross_entropy, chunk that does not divide": lambda: of_tokens(64, save="normalizer", chunk=24),
    "linear_cross_entropy, chunk of a device": lambda: of_tokens(64, save="normalizer", chunk=8),
    "linear_cross_entropy, one chunk": lambda: of_tokens(64, save="gradient", chunk=64),
    "linear_cross_entropy, sequences": lambda: of_tokens(16, 4, chunk=8),
    "layer_norm": lambda: of_layer(lambda p, x: fp.layers.layer_norm(x, **p), NORM, ROWS, name="layer_norm"),
    "rms_norm": lambda: of_layer(lambda p, x: fp.layers.rms_norm(x, p), NORM["scale"], ROWS, name="rms_norm"),
    "group_norm": lambda: of_layer(
        lambda p, x: fp.layers.group_norm(x, **p, groups=2), NORM, IMAGES, name="group_norm"
    ),
    "batch_norm": lambda: of_layer(
        lambda p, x: fp.layers.batch_norm(x, **p)[0], NORM, ROWS, name="batch_norm"
    ),
    "dense": lambda: of_layer(
        lambda p, x: fp.layers.dense(x, *p), (numbers(6, 5), numbers(5)), ROWS, name="dense"
    ),
    "norm_dense": lambda: of_layer(
        lambda p, x: fp.layers.norm_dense(x, *p), (numbers(6, 5), numbers(5)), ROWS, name="norm_dense"
    ),
    "feed_forward": lambda: of_layer(
        lambda p, x: fp.layers.feed_forward(x, **p), HIDDEN, ROWS, name="feed_forward"
    ),
    "swiglu": lambda: of_layer(
        lambda p, x: fp.layers.swiglu(x, *p), (numbers(6, 8), numbers(6, 8, seed=1)), ROWS, name="swiglu"
    ),
    # The batch is the second axis: rows of all leading axes must not be made one axis.
    "dense, time first": lambda: of_layer(
        lambda p, x: fp.layers.dense(x, *p), (numbers(6, 5), numbers(5)), SEQUENCES, name="dense", axis=1
    ),
    "feed_forward, time first": lambda: of_layer(
        lambda p, x: fp.layers.feed_forward(x, **p), HIDDEN, SEQUENCES, name="feed_forward", axis=1
    ),
    "norm_dense, time first": lambda: of_layer(
        lambda w, x: fp.layers.norm_dense(x, w), numbers(6, 5), SEQUENCES, name="norm_dense", axis=1
    ),
    "softmax_cross_entropy": lambda: of_layer(
        lambda w, x, y: fp.layers.softmax_cross_entropy(x @ w, y)[..., None],
        numbers(6, 6),
        ROWS,
        CLASSES,
        name="softmax_cross_entropy",
    ),
    "embedding": lambda: of_layer(
        lambda w, x: fp.layers.embedding(x, w), numbers(6, 4), CLASSES, name="embedding"
    ),
    "conv": lambda: of_layer(lambda w, x: fp.layers.conv(x, w), numbers(3, 3, 6, 4), IMAGES, name="conv"),
    "max_pool": lambda: of_layer(
        lambda w, x: fp.layers.max_pool(x * w, window=(2, 2)), numbers(6), IMAGES, name="max_pool"
    ),
    "avg_pool": lambda: of_layer(
        lambda w, x: fp.layers.avg_pool(x * w, window=(2, 2)), numbers(6), IMAGES, name="avg_pool"
    ),
    "rnn": lambda: recurrent(fp.layers.rnn, 1),
    "gru": lambda: recurrent(fp.layers.gru, 3),
    "lstm": lambda: recurrent(fp.layers.lstm, 4, states=2),
    "dropout": lambda: of_layer(
        lambda w, x: fp.layers.dropout(x * w, jax.random.key(0), rate=0.5, save="key"),
        numbers(6),
        ROWS,
        name="dropout",
    ),
    "rotary": lambda: of_layer(
        lambda w, x: fp.layers.rotary(x * w, fp.layers.rotary_angles(np.arange(16), 6)),
        numbers(6),
        ROWS,
        name="rotary",
    ),
}
