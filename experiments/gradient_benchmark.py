"""Do the rules pay? `fp.value_and_grad` against `jax.value_and_grad` on unchanged models, both jitted.

Data are arguments, never constants (XLA would fold them). The two programs take turns; each turn gives one
ratio of times, and the table shows the median of these paired ratios with its quartiles, beside the fastest
time of each. Bytes are the temporary bytes of the compiled programs.

    python experiments/gradient_benchmark.py [--smoke] [--repeats N] [--only NAME ...]
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import optax
from flax import linen as nn

import funcprop as fp

mpl.use("Agg")
import matplotlib.pyplot as plt

RESULTS = Path(__file__).parent / "results"
Case = tuple[Callable[..., Any], tuple[Any, ...]]


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def classified(model: nn.Module, x: jax.Array, classes: int = 10) -> Case:
    """Cross-entropy of a Flax model on random data."""
    params = jax.jit(model.init)(jax.random.key(1), x)

    def loss(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(model.apply(params, x), y).mean()

    return loss, (params, x, jnp.arange(len(x)) % classes)


class CNN(nn.Module):
    """Three convolutions, each with relu and an overlapping pool, and three dense layers."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for size, channels, padding in ((5, 64, "SAME"), (3, 96, "VALID"), (3, 128, "SAME")):
            x = nn.max_pool(nn.relu(nn.Conv(channels, (size, size), padding=padding)(x)), (3, 3), (2, 2))
        x = x.reshape(len(x), -1)
        for width in (512, 256):
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(10)(x)


class ResidualBlock(nn.Module):
    channels: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        norm = lambda: nn.BatchNorm(use_running_average=False, use_bias=True)  # noqa: E731
        y = nn.relu(norm()(nn.Conv(self.channels, (3, 3), (self.stride, self.stride), use_bias=False)(x)))
        y = norm()(nn.Conv(self.channels, (3, 3), use_bias=False)(y))
        if x.shape != y.shape:
            x = norm()(nn.Conv(self.channels, (1, 1), (self.stride, self.stride), use_bias=False)(x))
        return nn.relu(x + y)


class ResNet(nn.Module):
    """The shape of ResNet-18 with a quarter of its channels."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.relu(nn.Conv(16, (3, 3))(x))
        for i, channels in enumerate((16, 32, 64, 128)):
            for j in range(2):
                x = ResidualBlock(channels, 2 if i and not j else 1)(x)
        return nn.Dense(10)(x.mean((1, 2)))


def resnet(batch: int) -> Case:
    model, x = ResNet(), normal(batch, 32, 32, 3)
    variables = jax.jit(model.init)(jax.random.key(1), x)

    def loss(params: Any, stats: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        logits, _ = model.apply({"params": params, "batch_stats": stats}, x, mutable=["batch_stats"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    return loss, (variables["params"], variables["batch_stats"], x, jnp.arange(batch) % 10)


def equinox_cnn(batch: int) -> Case:
    keys = jax.random.split(jax.random.key(1), 6)
    pool = eqx.nn.MaxPool2d(3, 2)
    model = eqx.nn.Sequential(
        [
            eqx.nn.Conv2d(3, 64, 5, padding="SAME", key=keys[0]), eqx.nn.Lambda(jax.nn.relu), pool,
            eqx.nn.Conv2d(64, 96, 3, key=keys[1]), eqx.nn.Lambda(jax.nn.relu), pool,
            eqx.nn.Conv2d(96, 128, 3, padding="SAME", key=keys[2]), eqx.nn.Lambda(jax.nn.relu), pool,
            eqx.nn.Lambda(jnp.ravel), eqx.nn.Linear(512, 512, key=keys[3]), eqx.nn.Lambda(jax.nn.relu),
            eqx.nn.Linear(512, 256, key=keys[4]), eqx.nn.Lambda(jax.nn.relu),
            eqx.nn.Linear(256, 10, key=keys[5]),
        ]
    )  # fmt: skip
    params, static = eqx.partition(model, eqx.is_array)

    def loss(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        logits = jax.vmap(eqx.combine(params, static))(x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    return loss, (params, normal(batch, 3, 32, 32), jnp.arange(batch) % 10)


def pool(batch: int) -> Case:
    return lambda x: jnp.sum(nn.max_pool(x, (2, 2), (2, 2)) ** 2), (normal(batch, 32, 32, 64),)


def recurrent(cell: Any, steps: int, batch: int, width: int) -> Case:
    model, x = nn.RNN(cell(width)), normal(batch, steps, width)
    params = jax.jit(model.init)(jax.random.key(1), x)
    return lambda params, x: jnp.mean(model.apply(params, x) ** 2), (params, x)


def mlp(batch: int) -> Case:
    layers = [nn.Dense(512), nn.relu, nn.Dense(256), nn.relu, nn.Dense(10)]
    return classified(nn.Sequential(layers), normal(batch, 784))


# Name, case, the same in small for --smoke, and the bounds on time and bytes that are sought.
CASES: dict[str, tuple[Callable[[], Case], Callable[[], Case], tuple[float, float]]] = {
    "Flax CNN, batch 128": (
        lambda: classified(CNN(), normal(128, 32, 32, 3)),
        lambda: classified(CNN(), normal(2, 32, 32, 3)),
        (0.50, 0.55),
    ),
    "Equinox CNN, batch 128": (lambda: equinox_cnn(128), lambda: equinox_cnn(2), (0.50, 0.50)),
    "2×2 max-pool, 128×32×32×64": (lambda: pool(128), lambda: pool(2), (0.18, 0.10)),
    "LSTM, T64 B4 H512": (
        lambda: recurrent(nn.OptimizedLSTMCell, 64, 4, 512),
        lambda: recurrent(nn.OptimizedLSTMCell, 3, 2, 8),
        (0.28, 1.0),
    ),
    "LSTM, T256 B16 H128": (
        lambda: recurrent(nn.OptimizedLSTMCell, 256, 16, 128),
        lambda: recurrent(nn.OptimizedLSTMCell, 4, 2, 4),
        (0.70, 1.15),
    ),
    "GRU, T64 B4 H512": (
        lambda: recurrent(nn.GRUCell, 64, 4, 512),
        lambda: recurrent(nn.GRUCell, 3, 2, 8),
        (0.35, 1.0),
    ),
    "RNN, T256 B16 H128": (
        lambda: recurrent(nn.SimpleCell, 256, 16, 128),
        lambda: recurrent(nn.SimpleCell, 3, 2, 8),
        (0.70, 1.0),
    ),
    "MLP 784-512-256-10, batch 128": (lambda: mlp(128), lambda: mlp(2), (1.03, 1.02)),
    "ResNet with batch norm, batch 64": (lambda: resnet(64), lambda: resnet(2), (1.03, 1.02)),
}


class Measured(NamedTuple):
    """Seconds and bytes of both programs, and the quartiles of the paired ratios of times."""

    jax_seconds: float
    fp_seconds: float
    lower_quartile: float
    median: float
    upper_quartile: float
    jax_bytes: int
    fp_bytes: int
    rules: int

    @property
    def bytes_ratio(self) -> float:
        return self.fp_bytes / max(self.jax_bytes, 1)


def measure(case: Case, repeats: int) -> Measured:
    """Both programs in turn, after checking that they compute the same gradient."""
    loss, args = case
    programs = [jax.jit(way(loss)).lower(*args).compile() for way in (jax.value_and_grad, fp.value_and_grad)]
    expected, actual = (program(*args) for program in programs)
    # Single precision, and batch norm amplifies its rounding; exactness is for the tests.
    largest = max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(expected))
    for e, a in zip(jax.tree.leaves(expected), jax.tree.leaves(actual), strict=True):
        np.testing.assert_allclose(a, e, rtol=0, atol=1e-2 * largest)
    seconds = []
    for _ in range(repeats):
        turn = []
        for program in programs:
            start = time.perf_counter()
            jax.block_until_ready(program(*args))
            turn.append(time.perf_counter() - start)
        seconds.append(turn)
    times = np.array(seconds)
    ratios = np.percentile(times[:, 1] / times[:, 0], [25, 50, 75])
    temp = [program.memory_analysis().temp_size_in_bytes for program in programs]
    fired = sum(match.reason is None for match in fp.matches(loss)(*args))
    return Measured(*times.min(axis=0), *ratios, *temp, fired)


def draw(results: dict[str, Measured], path: Path) -> None:
    """Ratios of time and bytes beside the bounds."""
    figure, axes = plt.subplots(figsize=(8, 0.5 * len(results) + 1.2), layout="constrained")
    rows = np.arange(len(results))
    axes.barh(rows - 0.2, [m.median for m in results.values()], 0.38, label="time")
    axes.barh(rows + 0.2, [m.bytes_ratio for m in results.values()], 0.38, label="temporary bytes")
    bounds = [CASES[name][2] for name in results]
    axes.plot([b[0] for b in bounds], rows - 0.2, "k|", markersize=12, label="bound")
    axes.plot([b[1] for b in bounds], rows + 0.2, "k|", markersize=12)
    axes.axvline(1, color="grey", linewidth=0.8)
    axes.set_yticks(rows, list(results))
    axes.invert_yaxis()
    axes.set_xlabel("fp.value_and_grad ÷ jax.value_and_grad")
    figure.legend(ncols=3, loc="outside upper center")
    figure.savefig(path, dpi=150)


def main() -> None:
    """Measure, print, and write `results/gradient_benchmark.json` and `.png`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true", help="small shapes, one turn")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--only", nargs="*", default=[], help="cases whose name contains one of these")
    options = parser.parse_args()
    results = {}
    print(f"jax {jax.__version__}, {jax.default_backend()}, rules {fp.rules.default.name}")
    columns = {"jax ms": 9, "fp ms": 9, "time": 7, "quartiles": 14, "≤": 6, "bytes": 8, "≤ ": 6, "rules": 7}
    print(f"{'model':34}" + "".join(f"{column:>{width}}" for column, width in columns.items()))
    for name, (full, small, bounds) in CASES.items():
        if options.only and not any(part in name for part in options.only):
            continue
        m = measure((small if options.smoke else full)(), 1 if options.smoke else options.repeats)
        results[name] = m
        quartiles = f"{m.lower_quartile:.2f}–{m.upper_quartile:.2f}"
        print(
            f"{name:34}{m.jax_seconds * 1e3:9.1f}{m.fp_seconds * 1e3:9.1f}{m.median:7.2f} {quartiles:>13}"
            f"{bounds[0]:6.2f}{m.bytes_ratio:8.2f}{bounds[1]:6.2f}{m.rules:7}",
            flush=True,
        )
    RESULTS.mkdir(exist_ok=True)
    content = {name: m._asdict() for name, m in results.items()}
    (RESULTS / "gradient_benchmark.json").write_text(json.dumps(content, indent=2, default=float))
    draw(results, RESULTS / "gradient_benchmark.png")


if __name__ == "__main__":
    main()
