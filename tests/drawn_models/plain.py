"""Models in plain JAX."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp

import funcprop as fp
from drawn_models.tracing import F32, shape


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
