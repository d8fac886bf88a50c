"""Graphs of models from shapes alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

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


def cross_entropy(logits: Any) -> Any:
    labels = jnp.zeros(logits.shape[:-1], jnp.int32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
