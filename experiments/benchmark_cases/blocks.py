"""Our own layers in residual blocks and recurrent networks, against the same in plain `jax.numpy`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import funcprop as fp
from benchmark_cases.case import Case, Row, gradients, normal, products


def residual(ours: Any, plain: Any, x: jax.Array, *params: jax.Array) -> Case:
    """Blocks `x + f(x)` in a loop; the parameters have a leading axis, one entry for each block."""

    def model(f: Any) -> Callable[..., jax.Array]:
        def loss(params: Any, x: jax.Array) -> jax.Array:
            return jnp.mean(jax.lax.scan(lambda x, p: (x + f(x, *p), None), x, params)[0] ** 2)

        return loss

    return gradients(model(ours), params, x, plain=model(plain))


def norm_dense(steps: int, width: int) -> Case:
    """Eight times `x + LN(x) W`."""

    def ours(x: jax.Array, scale: jax.Array, shift: jax.Array, w: jax.Array) -> jax.Array:
        return fp.layers.norm_dense(x, w, None, scale, shift)

    def plain(x: jax.Array, scale: jax.Array, shift: jax.Array, w: jax.Array) -> jax.Array:
        centred = x - x.mean(-1, keepdims=True)
        return (centred * jax.lax.rsqrt(x.var(-1, keepdims=True) + 1e-6) * scale + shift) @ w

    w = normal(8, width, width, seed=1) * width**-0.5
    return residual(ours, plain, normal(steps, width), jnp.ones((8, width)), jnp.zeros((8, width)), w)


def feed_forward(steps: int, width: int, hidden: int) -> Case:
    """Eight times `x + gelu(x W1 + b) W2`."""

    def ours(x: jax.Array, w1: jax.Array, b1: jax.Array, w2: jax.Array) -> jax.Array:
        return fp.layers.feed_forward(x, w1, w2, b1)

    def plain(x: jax.Array, w1: jax.Array, b1: jax.Array, w2: jax.Array) -> jax.Array:
        return jax.nn.gelu(x @ w1 + b1) @ w2

    w1 = normal(8, width, hidden, seed=1) * width**-0.5
    w2 = normal(8, hidden, width, seed=2) * hidden**-0.5
    return residual(ours, plain, normal(steps, width), w1, jnp.zeros((8, hidden)), w2)


def lstm(compare: Callable[..., Case], steps: int, batch: int, width: int) -> Case:
    """An LSTM over time; `compare` makes the case of its gradient or of its Hessian-vector product."""

    def ours(params: Any, x: jax.Array) -> jax.Array:
        return jnp.mean(fp.layers.lstm(x, *params) ** 2)

    def plain(params: Any, x: jax.Array) -> jax.Array:
        w, u, b = params

        def step(state: Any, x: jax.Array) -> Any:
            c, h = state
            i, f, g, o = jnp.split(x @ w + h @ u + b, 4, -1)
            c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            h = jax.nn.sigmoid(o) * jnp.tanh(c)
            return (c, h), h

        zeros = jnp.zeros((batch, width))
        return jnp.mean(jax.lax.scan(step, (zeros, zeros), x)[1] ** 2)

    weights = (normal(width, 4 * width, seed=seed) * width**-0.5 for seed in (1, 2))
    return compare(ours, (*weights, jnp.zeros(4 * width)), normal(steps, batch, width), plain=plain)


ROWS: dict[str, Row] = {
    "8 × (x + LN(x) W), T512 d512": Row(lambda: norm_dense(512, 512), lambda: norm_dense(4, 8), 0.90, 0.50),
    "8 × gelu MLP block, T512 d512": Row(
        lambda: feed_forward(512, 512, 2048), lambda: feed_forward(4, 8, 16), 0.82, 0.36
    ),
    "LSTM layer, T64 B4 H512": Row(
        lambda: lstm(gradients, 64, 4, 512), lambda: lstm(gradients, 3, 2, 8), 0.28, 1.0
    ),
    "LSTM layer, T256 B16 H128": Row(
        lambda: lstm(gradients, 256, 16, 128), lambda: lstm(gradients, 3, 2, 8), 0.70, 1.15
    ),
    "HVP of the LSTM layer, T64 B4 H512": Row(
        lambda: lstm(products, 64, 4, 512), lambda: lstm(products, 3, 2, 8), 0.50, 1.1
    ),
    "HVP of the LSTM layer, T256 B16 H128": Row(
        lambda: lstm(products, 256, 16, 128), lambda: lstm(products, 3, 2, 8), 0.50, 1.1
    ),
}
