"""Recurrent networks of Flax, unchanged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from benchmark_cases.case import Case, Row, gradients, normal


def recurrent(
    cell: Any, steps: int, batch: int, width: int, compared: Callable[..., Case] = gradients
) -> Case:
    """Mean square of all states of a network whose input is as wide as its state."""
    model, x = nn.RNN(cell(width)), normal(batch, steps, width)
    params = jax.jit(model.init)(jax.random.key(1), x)

    def mean_square(params: Any, x: jax.Array) -> jax.Array:
        states: Any = model.apply(params, x)
        return jnp.mean(states**2)

    return compared(mean_square, params, x)


def small(cell: Any, compared: Callable[..., Case] = gradients) -> Callable[[], Case]:
    return lambda: recurrent(cell, 3, 2, 8, compared)


LSTM, GRU, RNN = nn.OptimizedLSTMCell, nn.GRUCell, nn.SimpleCell
ROWS: dict[str, Row] = {
    "LSTM, T64 B4 H512": Row(lambda: recurrent(LSTM, 64, 4, 512), small(LSTM), 0.28, 1.0),
    "LSTM, T256 B16 H128": Row(lambda: recurrent(LSTM, 256, 16, 128), small(LSTM), 0.70, 1.15),
    "GRU, T64 B4 H512": Row(lambda: recurrent(GRU, 64, 4, 512), small(GRU), 0.35, 1.0),
    "RNN, T256 B16 H128": Row(lambda: recurrent(RNN, 256, 16, 128), small(RNN), 0.70, 1.0),
}
