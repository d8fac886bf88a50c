"""Footprints of real compiled programs, as JSON; run by itself, without the options that the tests set."""

from __future__ import annotations

import json
import sys
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax import ShapeDtypeStruct

import funcprop as fp
from funcprop._jax import xla_options

D, H, Q = 784, 256, 10


def f32(*dims: int) -> ShapeDtypeStruct:
    return ShapeDtypeStruct(dims, "float32")


def i32(*dims: int) -> ShapeDtypeStruct:
    return ShapeDtypeStruct(dims, "int32")


def chapter(batch: int) -> dict[str, Any]:
    """Exercise 3: prediction, and training with momentum (donated)."""
    params = {"W1": f32(H, D), "W2": f32(Q, H)}

    def loss(params: Any, x: jax.Array, y: jax.Array, λ: jax.Array) -> jax.Array:
        return jax.vmap(fp.models.chapter, (None, 0, 0, None))(params, x, y, λ).mean()

    def predict(params: Any, x: jax.Array) -> jax.Array:
        return jnp.tanh(x @ params["W1"].T) @ params["W2"].T

    inference = fp.memory.footprint(predict, programs=["inference"])(params, f32(batch, D))
    step = fp.memory.footprint(loss, optimizer=optax.sgd(0.1, momentum=0.9), programs=["training"])
    training = step(params, f32(batch, D), i32(batch), f32())
    return {"inference": inference.as_dict()["inference"], "training": training.as_dict()["training"]}


class CNN(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for features in (24, 40):
            x = nn.max_pool(nn.relu(nn.Conv(features, (3, 3))(x)), (2, 2), (2, 2))
        return nn.Dense(10)(x.reshape(x.shape[0], -1))


def lstm(params: Any, x: jax.Array) -> jax.Array:
    def step(carry: Any, x: jax.Array) -> tuple[Any, None]:
        h, c = carry
        i, f, g, o = jnp.split(x @ params["x"] + h @ params["h"], 4, -1)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        return (jax.nn.sigmoid(o) * jnp.tanh(c), c), None

    start = jnp.zeros((x.shape[1], params["h"].shape[0]))
    return jax.lax.scan(step, (start, start), x)[0][0]


class Transformer(nn.Module):
    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = nn.Embed(96, 80)(tokens)
        for _ in range(4):
            y = nn.LayerNorm()(x)
            x = x + nn.MultiHeadDotProductAttention(num_heads=4)(y, y)
            x = x + nn.Dense(80)(nn.gelu(nn.Dense(200)(nn.LayerNorm()(x))))
        return nn.Dense(96)(x)


def classified(predict: Any, params: Any, x: Any, y: Any) -> dict[str, Any]:
    """Inference, and training with SGD."""

    def loss(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(predict(params, x), y).mean()

    inference = fp.memory.footprint(predict, programs=["inference"])(params, x)
    training = fp.memory.footprint(loss, optimizer=optax.sgd(0.1), programs=["training"])(params, x, y)
    notes = [*inference.warnings, *training.warnings]
    found = {"inference": inference.as_dict()["inference"], "training": training.as_dict()["training"]}
    return {**found, "warnings": notes}


def flax(net: nn.Module, x: Any, y: Any) -> dict[str, Any]:
    return classified(net.apply, jax.eval_shape(net.init, jax.random.key(0), x), x, y)


def checkpointed(keep: bool) -> dict[str, Any]:
    """16 equal layers in 4 recomputed chunks, as the compiler makes them, and with barriers kept."""

    def loss(weights: Any, x: jax.Array) -> jax.Array:
        for chunk in range(4):
            part = weights[4 * chunk : 4 * chunk + 4]
            x = jax.checkpoint(lambda x, part: jax.lax.reduce_precision(_chain(x, part), 8, 23))(x, part)
        return jnp.mean(x**2)

    options = {"xla_disable_hlo_passes": "cse_barrier_expander"} if keep else {}
    account = fp.memory.footprint(loss, programs=["training"], compiler_options=options)
    return account([f32(32, 32)] * 16, f32(1024, 32)).as_dict()


def _chain(x: jax.Array, weights: Any) -> jax.Array:
    for w in weights:
        x = jnp.tanh(x @ w)
    return x


def half(batch: int) -> dict[str, Any]:
    """Products of 16-bit numbers."""
    shapes = [ShapeDtypeStruct(dims, "bfloat16") for dims in ((256, 256), (256, 256), (batch, 256))]

    def loss(ws: Any, x: jax.Array) -> jax.Array:
        for w in ws:
            x = jnp.tanh(x @ w)
        return jnp.mean(x.astype("float32") ** 2)

    return fp.memory.footprint(loss)(shapes[:2], shapes[2]).as_dict()


def inner_steps(count: int) -> dict[str, Any]:
    """Gradient steps in a loop that the compiler unrolls."""

    def inner(w: Any, x: jax.Array) -> jax.Array:
        return jnp.mean((jnp.tanh(x @ w["a"]) @ w["b"]) ** 2)

    def train(w: Any, xs: jax.Array) -> Any:
        def body(w: Any, x: jax.Array) -> tuple[Any, None]:
            return jax.tree.map(lambda p, g: p - 0.1 * g, w, jax.grad(inner)(w, x)), None

        return jax.lax.scan(body, w, xs, unroll=True)[0]

    account = fp.memory.footprint(train, kind="step")
    return account({"a": f32(256, 512), "b": f32(512, 64)}, f32(count, 1024, 256)).as_dict()


def associative(length: int) -> dict[str, Any]:
    def combine(p: Any, q: Any) -> Any:
        return p[0] * q[0], p[1] * q[0] + q[1]

    def loss(a: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.mean(jax.lax.associative_scan(combine, (jnp.tanh(a), x))[1] ** 2)

    return fp.memory.footprint(loss)(f32(length, 128), f32(length, 128)).as_dict()


def batch_norm() -> dict[str, Any]:
    """The stem of a residual net."""

    def loss(p: Any, x: jax.Array) -> jax.Array:
        x = jax.lax.conv_general_dilated(
            x, p["kernel"], (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        mean = x.mean((0, 1, 2))
        var = (x**2).mean((0, 1, 2)) - mean**2
        return jnp.mean(jax.nn.relu((x - mean) * jax.lax.rsqrt(var + 1e-5) * p["scale"]) ** 2)

    return fp.memory.footprint(loss)(
        {"kernel": f32(7, 7, 3, 64), "scale": f32(64)}, f32(8, 64, 64, 3)
    ).as_dict()


class Dropout(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(10)(nn.Dropout(0.5, deterministic=False)(nn.relu(nn.Dense(96)(x))))


def dropout() -> dict[str, Any]:
    """Random bits, whose generator holds several words for each."""
    net, x = Dropout(), f32(512, 40)
    params = jax.eval_shape(lambda: net.init(jax.random.key(0), jnp.ones((512, 40))))

    def loss(params: Any, x: jax.Array, y: jax.Array, key: jax.Array) -> jax.Array:
        logits = net.apply(params, x, rngs={"dropout": key})
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    key = jax.eval_shape(lambda: jax.random.key(0))
    return fp.memory.footprint(loss)(params, x, i32(512), key).as_dict()


def mapped() -> dict[str, Any]:
    """A loss inside of a `shard_map` over one device."""
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def local(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        outputs = jnp.tanh(jnp.tanh(x @ params["a"]) @ params["b"])
        return jax.lax.pmean(jnp.mean((outputs - y) ** 2), "data")

    whole, split = jax.P(), jax.P("data")
    loss = jax.shard_map(local, mesh=mesh, in_specs=(whole, split, split), out_specs=whole)
    return fp.memory.footprint(loss)(
        {"a": f32(64, 128), "b": f32(128, 32)}, f32(512, 64), f32(512, 32)
    ).as_dict()


def train_step(donate: bool) -> dict[str, Any]:
    """A user's own step, donating or not."""
    optimizer = optax.adam(1e-3)
    params = {"a": f32(64, 128), "b": f32(128, 10)}

    def step(params: Any, state: Any, x: jax.Array, y: jax.Array) -> Any:
        def loss(params: Any) -> jax.Array:
            logits = jnp.tanh(x @ params["a"]) @ params["b"]
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, updates), state, value

    jitted = jax.jit(step, donate_argnums=(0, 1) if donate else ())
    state = jax.eval_shape(optimizer.init, params)
    return fp.memory.footprint(jitted)(params, state, f32(512, 64), i32(512)).as_dict()


PROGRAMS = {
    "chapter": lambda: chapter(1024),
    "CNN": lambda: flax(CNN(), f32(24, 20, 20, 3), i32(24)),
    "LSTM": lambda: classified(lstm, {"x": f32(24, 320), "h": f32(80, 320)}, f32(40, 12, 24), i32(12)),
    "transformer": lambda: flax(Transformer(), i32(6, 48), i32(6, 48)),
    "16 bits": lambda: half(1024),
    "one inner step": lambda: inner_steps(1),
    "unrolled inner steps": lambda: inner_steps(4),
    "associative scan": lambda: associative(4096),
    "batch norm": batch_norm,
    "dropout": dropout,
    "shard_map": mapped,
    "checkpointed": lambda: checkpointed(False),
    "checkpointed with barriers": lambda: checkpointed(True),
    "step": lambda: train_step(True),
    "step that donates nothing": lambda: train_step(False),
}

if __name__ == "__main__":
    found: dict[str, Any] = {name: program() for name, program in PROGRAMS.items()}
    json.dump({**found, "barrier options": xla_options.barrier_options(jax.default_backend())}, sys.stdout)
