"""A multilayer perceptron."""

from __future__ import annotations

from flax import linen as nn

from benchmark_cases.case import NEVER_WORSE, Case, Row, classified, normal

MLP = nn.Sequential([nn.Dense(512), nn.relu, nn.Dense(256), nn.relu, nn.Dense(10)])


def mlp(batch: int) -> Case:
    return classified(MLP, normal(batch, 784))


ROWS: dict[str, Row] = {
    "MLP 784-512-256-10, batch 128": Row(lambda: mlp(128), lambda: mlp(2), *NEVER_WORSE),
}
