"""A small regression problem, and the loop that everyone writes for it."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from funcprop import training

KEY = jax.random.key(0)
X = jax.random.normal(KEY, (24, 5))
Y = jnp.sin(X @ jnp.arange(5.0))
BATCHES = [(X[i : i + 8], Y[i : i + 8]) for i in (0, 8, 16)]
PARAMS = {"hidden": jax.random.normal(jax.random.key(1), (5, 4)), "out": jnp.ones(4)}


def model(params: Any, x: Any) -> Any:
    return jnp.tanh(x @ params["hidden"]) @ params["out"]


def loss(params: Any, x: Any, y: Any) -> Any:
    return jnp.mean((model(params, x) - y) ** 2)


def last(*args: Any, **options: Any) -> training.Epoch:
    *_, epoch = training.fit(*args, **options)
    return epoch


def by_hand(optimizer: Any, gradient: Any, epochs: int = 2) -> Any:
    """The loop that everyone writes."""
    params, state = PARAMS, optimizer.init(PARAMS)
    for _ in range(epochs):
        for batch in BATCHES:
            updates, state = optimizer.update(gradient(params, *batch), state, params)
            params = optax.apply_updates(params, updates)
    return params


def close(found: Any, expected: Any, rtol: float = 1e-12) -> None:
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol)


def sharded(*axes: str | None) -> Any:
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    return NamedSharding(mesh, PartitionSpec(*axes))


class Plan:
    """What a partition gives: a place for parameters, and a step of its own."""

    mesh = None

    def place(self, params: Any, state: Any) -> Any:
        return jax.device_put((params, state), sharded())

    def step(self, optimizer: Any) -> Any:
        step = training.make_step(loss, optimizer)
        return lambda params, state, batch: step(params, state, jax.device_put(batch, sharded("data")))
