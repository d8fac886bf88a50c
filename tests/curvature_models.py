"""Tiny models of every kind whose curvature is tested, and the losses they are tested with.

`MODELS[name]()` is a `Model`: `apply(params, x)` for ONE example, parameters (fewer than 200, float64) and a
batch `x` of four examples. `LOSSES[name]` is a `Loss`: `of_one(output, target)` for ONE example, and targets
for a batch. What is tested on batches maps them: `batched`, `mean`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import nnx
from zoo.entry import filled, integers, normal, random_key

EXAMPLES = 4


def squared(output: Any, y: Any) -> Any:
    """Half of the squared distance, of one example: its Hessian by the output is 1."""
    return jnp.sum((output - y) ** 2) / 2


def linear(w: Any, x: Any) -> Any:
    """The model whose parameters are its matrix."""
    return x @ w


class Model(NamedTuple):
    """A model of one example, its parameters, a batch of inputs, and how many numbers it returns."""

    apply: Callable[[Any, Any], jax.Array]
    params: Any
    x: jax.Array
    outputs: int


class Loss(NamedTuple):
    """A loss of one example, and targets for the outputs of a batch of `n` examples."""

    of_one: Callable[[jax.Array, jax.Array], jax.Array]
    targets: Callable[[int, int], jax.Array]


def batched(model: Model) -> Callable[[Any, Any], jax.Array]:
    """The model of a batch: the examples are the leading axis."""
    return lambda params, x: jax.vmap(model.apply, (None, 0))(params, x)


def mean(loss: Loss) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """The loss of a batch: the mean over its examples."""
    return lambda outputs, y: jnp.mean(jax.vmap(loss.of_one)(outputs, y))


LOSSES = {
    "softmax cross-entropy": Loss(
        optax.softmax_cross_entropy_with_integer_labels, lambda n, outputs: integers(8, outputs, n)
    ),
    "squared error": Loss(
        lambda output, y: 0.5 * jnp.sum((output - y) ** 2), lambda n, outputs: normal(9, n, outputs)
    ),
    "binary cross-entropy": Loss(
        lambda output, y: jnp.sum(optax.sigmoid_binary_cross_entropy(output, y)),
        lambda n, outputs: integers(7, 2, n, outputs).astype(float),
    ),
}

MODELS: dict[str, Callable[[], Model]] = {}


def _model(outputs: int = 3) -> Callable[[Callable[[], tuple[Any, Any, Any]]], Any]:
    def add(make: Callable[[], tuple[Any, Any, Any]]) -> Any:
        MODELS[make.__name__.removesuffix("_model")] = functools.cache(lambda: Model(*make(), outputs))
        return make

    return add


def _dense(seed: int, inputs: int, outputs: int) -> dict[str, jax.Array]:
    return {
        "w": normal(seed, inputs, outputs, scale=inputs**-0.5),
        "b": normal(seed + 100, outputs, scale=0.3),
    }


def _apply(layer: Any, x: jax.Array) -> jax.Array:
    return x @ layer["w"] + layer["b"]


@_model()
def mlp():
    """Tanh, then relu."""

    def apply(params, x):
        x = jnp.tanh(_apply(params["hidden"][0], x))
        x = jax.nn.relu(_apply(params["hidden"][1], x))
        return _apply(params["out"], x)

    params = {"hidden": [_dense(1, 4, 5), _dense(2, 5, 4)], "out": _dense(3, 4, 3)}
    return apply, params, normal(0, EXAMPLES, 4)


@_model()
def cnn():
    """A convolution, a max-pool, a grouped convolution, an average-pool."""

    def conv(layer, x, padding, groups=1):
        y = jax.lax.conv_general_dilated(
            x[None],
            layer["w"],
            (1, 1),
            padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        )
        return y[0] + layer["b"]

    def apply(params, x):
        x = nn.max_pool(jax.nn.relu(conv(params["conv"], x, "SAME")), (2, 2), (2, 2))
        x = nn.avg_pool(jnp.tanh(conv(params["grouped"], x, "VALID", groups=2)), (2, 2))
        return _apply(params["out"], x.reshape(-1))

    params = {
        "conv": {"w": normal(1, 3, 3, 2, 4, scale=0.3), "b": normal(2, 4, scale=0.3)},
        "grouped": {"w": normal(3, 2, 2, 2, 4, scale=0.4), "b": normal(4, 4, scale=0.3)},
        "out": _dense(5, 4, 3),
    }
    return apply, params, normal(0, EXAMPLES, 6, 6, 2)


@_model()
def residual():
    """Two blocks, each added to its input."""

    def apply(params, x):
        for block in params["blocks"]:
            x = x + jnp.tanh(_apply(block, x))
        return _apply(params["out"], x)

    return (
        apply,
        {"blocks": [_dense(1, 5, 5), _dense(2, 5, 5)], "out": _dense(3, 5, 3)},
        normal(0, EXAMPLES, 5),
    )


def _layer_norm(params, x):
    centred = x - x.mean(-1, keepdims=True)
    return (
        params["scale"] * centred / jnp.sqrt(jnp.mean(centred**2, -1, keepdims=True) + 1e-3) + params["bias"]
    )


@_model()
def attention():
    """A pre-LN block: attention of two heads, then gelu; the mean over three positions."""

    def apply(params, x):
        h = _layer_norm(params["norm1"], x)
        q, k, v = (jnp.einsum("td,dhk->htk", h, params[name]) for name in ("query", "key", "value"))
        weights = jax.nn.softmax(q @ k.swapaxes(1, 2) / jnp.sqrt(2.0))
        x = x + jnp.einsum("htk,hkd->td", weights @ v, params["project"])
        h = jax.nn.gelu(_apply(params["up"], _layer_norm(params["norm2"], x)))
        return _apply(params["out"], (x + _apply(params["down"], h)).mean(0))

    norm = lambda seed: {"scale": 1 + normal(seed, 4, scale=0.2), "bias": normal(seed + 1, 4, scale=0.2)}  # noqa: E731
    params = {name: normal(i, 4, 2, 2, scale=0.6) for i, name in enumerate(("query", "key", "value"))}
    params |= {"project": normal(3, 2, 2, 4, scale=0.6), "norm1": norm(4), "norm2": norm(6)}
    params |= {"up": _dense(8, 4, 5), "down": _dense(9, 5, 4), "out": _dense(10, 4, 3)}
    return apply, params, normal(0, EXAMPLES, 3, 4)


@_model()
def lstm():
    """Three steps under a scan."""

    def apply(params, x):
        def step(state, x):
            h, c = state
            i, f, g, o = jnp.split(x @ params["wx"] + h @ params["wh"] + params["b"], 4)
            c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            h = jax.nn.sigmoid(o) * jnp.tanh(c)
            return (h, c), None

        (h, _), _ = jax.lax.scan(step, (jnp.zeros(3), jnp.zeros(3)), x)
        return _apply(params["out"], h)

    params = {
        "wx": normal(1, 2, 12, scale=0.7),
        "wh": normal(2, 3, 12, scale=0.6),
        "b": normal(3, 12, scale=0.3),
    }
    return apply, params | {"out": _dense(4, 3, 3)}, normal(0, EXAMPLES, 3, 2)


@_model()
def gru():
    """Three steps under a scan; the hidden bias is inside of the reset gate."""

    def apply(params, x):
        def step(h, x):
            xr, xz, xn = jnp.split(x @ params["wx"] + params["b"], 3)
            hr, hz, hn = jnp.split(h @ params["wh"], 3)
            r, z = jax.nn.sigmoid(xr + hr), jax.nn.sigmoid(xz + hz)
            n = jnp.tanh(xn + r * (hn + params["bn"]))
            return (1 - z) * n + z * h, None

        return _apply(params["out"], jax.lax.scan(step, jnp.zeros(3), x)[0])

    params = {
        "wx": normal(1, 2, 9, scale=0.7),
        "wh": normal(2, 3, 9, scale=0.6),
        "b": normal(3, 9, scale=0.3),
    }
    return apply, params | {"bn": normal(4, 3, scale=0.3), "out": _dense(5, 3, 3)}, normal(0, EXAMPLES, 3, 2)


@_model()
def stacked():
    """Three equal layers, stacked and scanned over."""

    def apply(params, x):
        x, _ = jax.lax.scan(lambda h, layer: (jnp.tanh(_apply(layer, h)), None), x, params["layers"])
        return _apply(params["out"], x)

    layers = {"w": normal(1, 3, 4, 4, scale=0.5), "b": normal(2, 3, 4, scale=0.3)}
    return apply, {"layers": layers, "out": _dense(3, 4, 3)}, normal(0, EXAMPLES, 4)


@_model(outputs=5)
def tied():
    """An embedding that is also the output's weights; tokens recur."""

    def apply(params, tokens):
        h = params["embedding"][tokens].mean(0)
        return jnp.tanh(_apply(params["hidden"], h)) @ params["embedding"].T

    tokens = jnp.array([[0, 1, 1], [4, 2, 0], [3, 3, 3], [1, 4, 2]])
    return apply, {"embedding": normal(1, 5, 4, scale=0.7), "hidden": _dense(2, 4, 4)}, tokens


class LinenModel(nn.Module):
    """A convolution over time, a norm with scale and bias, a dense layer."""

    @nn.compact
    def __call__(self, x):
        x = nn.silu(nn.Conv(4, (2,), padding="VALID", param_dtype=float)(x))
        x = nn.LayerNorm(param_dtype=float)(x)
        return nn.Dense(3, param_dtype=float)(x.reshape(*x.shape[:-2], -1))


@_model()
def linen():
    """Flax linen."""
    model, x = LinenModel(), normal(0, EXAMPLES, 3, 2)
    params = filled(jax.eval_shape(model.init, random_key(0), x[0]))
    return model.apply, params, x


@_model()
def nnx_model():
    """Flax nnx: the state of a module is the parameters."""

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.hidden = nnx.Linear(4, 5, param_dtype=float, rngs=rngs)
            self.norm = nnx.RMSNorm(5, param_dtype=float, rngs=rngs)
            self.out = nnx.Linear(5, 3, param_dtype=float, rngs=rngs)

        def __call__(self, x):
            return self.out(self.norm(jnp.tanh(self.hidden(x))))

    graph, state = nnx.split(nnx.eval_shape(lambda: Net(nnx.Rngs(0))))
    return lambda params, x: nnx.merge(graph, params)(x), filled(state), normal(0, EXAMPLES, 4)


@_model()
def equinox():
    """Equinox: a grouped convolution, channels first, and a multilayer perceptron."""

    def make(key):
        perceptron = eqx.nn.MLP(8, 3, 5, 1, jax.nn.softplus, key=key)
        return eqx.nn.Sequential(
            [eqx.nn.Conv1d(4, 4, 2, groups=2, key=key), eqx.nn.Lambda(jnp.ravel), perceptron]
        )

    params, static = eqx.partition(filled(eqx.filter_eval_shape(make, random_key(0))), eqx.is_inexact_array)
    return lambda params, x: eqx.combine(params, static)(x), params, normal(0, EXAMPLES, 4, 3)


@_model()
def haiku():
    """Haiku: layers with a norm of scale and offset."""

    def forward(x):
        x = jnp.tanh(hk.Linear(5)(x))
        return hk.Linear(3)(hk.LayerNorm(-1, create_scale=True, create_offset=True)(x))

    transformed = hk.without_apply_rng(hk.transform(forward))
    x = normal(0, EXAMPLES, 4)
    return transformed.apply, filled(jax.eval_shape(transformed.init, random_key(0), x[0])), x
