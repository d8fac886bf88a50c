"""A small network on 150 digits, full batch, for tests that compare optimizers."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

import funcprop as fp


def network(p: Any, x: Any) -> Any:
    """Logits of one example, or of a batch."""
    return jnp.tanh(x @ p["a"] + p["b"]) @ p["c"] + p["d"]


def cross_entropy(outputs: Any, y: Any) -> Any:
    """Of each example."""
    return optax.softmax_cross_entropy_with_integer_labels(outputs, y)


def loss(p: Any, x: Any, y: Any) -> Any:
    return cross_entropy(network(p, x), y).mean()


@functools.cache
def digits() -> tuple[Any, Any]:
    train, _ = fp.training.digits()
    return jnp.asarray(train.images[:150], float), jnp.asarray(train.labels[:150])


def trained(optimizer: Any, steps: int) -> float:
    """The loss after so many steps."""
    keys = jax.random.split(jax.random.key(0))
    a, c = jax.random.normal(keys[0], (64, 12)) / 8, jax.random.normal(keys[1], (12, 10)) / 4
    params = {"a": a, "b": jnp.zeros(12), "c": c, "d": jnp.zeros(10)}
    advance, state = fp.training.make_step(loss, optimizer), optimizer.init(params)
    for _ in range(steps):
        params, state, _ = advance(params, state, digits())
    return float(jax.jit(loss)(params, *digits()))


@functools.cache
def by_sgd(steps: int) -> float:
    """The loss after so many steps of SGD with the best of three rates; larger ones diverge."""
    return min(trained(optax.sgd(rate), steps) for rate in (0.5, 1.0, 2.0))
