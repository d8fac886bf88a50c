"""Shapes that nobody chose: the rules must not lose on them.

| family      | range                                                                                       |
|-------------|---------------------------------------------------------------------------------------------|
| convolution | batch 1–64, side 6–40, kernel 1, 3 or 5, stride 1–2, channels 1–64 to 4–128, relu, 2–3 pool |
| recurrent   | LSTM, GRU or RNN; 4–200 steps, batch 1–48, width 8–384                                      |
| rows        | gelu between two products; batch 1–16, length 4–256, widths 16–768                          |
| average     | average-pool of a relu, 2–5 wide, stride 1–3; batch 1–64, side 6–40, channels 1–128         |
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from benchmark_cases.case import NEVER_WORSE, Case, Row, gradients, normal
from benchmark_cases.recurrent import GRU, LSTM, RNN, recurrent

Drawn = tuple[str, Callable[[], Case]]


def _between(rng: np.random.Generator, low: int, high: int) -> int:
    """An integer whose logarithm is uniform."""
    return round(float(np.exp(rng.uniform(np.log(low), np.log(high)))))


def _convolution(rng: np.random.Generator) -> Drawn:
    batch, side = _between(rng, 1, 64), _between(rng, 6, 40)
    inputs, outputs = _between(rng, 1, 64), _between(rng, 4, 128)
    kernel, stride, window = int(rng.choice([1, 3, 5])), int(rng.integers(1, 3)), int(rng.integers(2, 4))
    name = f"conv {batch}×{side}×{side}×{inputs}→{outputs}, {kernel}×{kernel}/{stride}, pool {window}"

    def case() -> Case:
        def loss(params: tuple[jax.Array, jax.Array], x: jax.Array) -> jax.Array:
            for w in params:
                layout = ("NHWC", "HWIO", "NHWC")
                x = jax.lax.conv_general_dilated(x, w, (stride, stride), "SAME", dimension_numbers=layout)
                x = nn.max_pool(nn.relu(x), (window, window), (2, 2), "SAME")
            return jnp.mean(x**2)

        first, second = normal(kernel, kernel, inputs, outputs), normal(kernel, kernel, outputs, outputs)
        return gradients(loss, (first, second), normal(batch, side, side, inputs))

    return name, case


def _recurrent(rng: np.random.Generator) -> Drawn:
    name, cell = [("LSTM", LSTM), ("GRU", GRU), ("RNN", RNN)][int(rng.integers(3))]
    steps, batch, width = _between(rng, 4, 200), _between(rng, 1, 48), _between(rng, 8, 384)
    return f"{name}, T{steps} B{batch} H{width}", lambda: recurrent(cell, steps, batch, width)


def _rows(rng: np.random.Generator) -> Drawn:
    batch, length = _between(rng, 1, 16), _between(rng, 4, 256)
    width, hidden = _between(rng, 16, 768), _between(rng, 16, 768)

    def case() -> Case:
        def loss(params: tuple[jax.Array, jax.Array], x: jax.Array) -> jax.Array:
            return jnp.mean((nn.gelu(x @ params[0]) @ params[1]) ** 2)

        return gradients(loss, (normal(width, hidden), normal(hidden, width)), normal(batch, length, width))

    return f"rows {batch}×{length}, {width}→{hidden}→{width}", case


def _average(rng: np.random.Generator) -> Drawn:
    batch, side, channels = _between(rng, 1, 64), _between(rng, 6, 40), _between(rng, 1, 128)
    window, stride, padding = (
        int(rng.integers(2, 6)),
        int(rng.integers(1, 4)),
        str(rng.choice(["SAME", "VALID"])),
    )

    def case() -> Case:
        def loss(x: jax.Array) -> jax.Array:
            return jnp.mean(nn.avg_pool(nn.relu(x), (window, window), (stride, stride), padding) ** 2)

        return gradients(loss, normal(batch, side, side, channels))

    return f"average-pool {batch}×{side}×{side}×{channels}, {window}×{window}/{stride} {padding}", case


def drawn(count: int, seed: int) -> dict[str, Row]:
    """Random cases, the families in turn."""
    rng = np.random.default_rng(seed)
    families = (_convolution, _recurrent, _rows, _average)
    cases = [families[i % len(families)](rng) for i in range(count)]
    return {f"random: {name}": Row(case, case, *NEVER_WORSE) for name, case in cases}
