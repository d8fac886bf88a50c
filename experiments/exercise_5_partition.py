"""Exercise 5: a graph too large for one device. What does partitioning gain over a smaller minibatch?

A Flax language model of bytes learns the sources of Python's standard library under each plan that fits into
the same number of bytes on each device. The loss is shown against the epochs, and against the seconds. For a
loss of your own, every plan is compiled, and its bytes stand beside those that were predicted.

    python experiments/exercise_5_partition.py [file.py:function] [--smoke]
"""

from __future__ import annotations

import json
import math
import os
import sysconfig
import time
from pathlib import Path
from typing import Any

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import jax
import jax.numpy as jnp
import numpy as np
import optax
from running.exercises import answered, exercise_line
from running.language_model import LanguageModel

import funcprop as fp

RESULTS = Path(__file__).parent / "results"
KINDS = (
    "data",
    "data 2 × tensor",
    "tensor",
    "zero",
    "pipeline",
    "accumulation",
    "minibatch",
    "rematerialisation",
)


def text(count: int) -> np.ndarray:
    """The first bytes of the standard library's sources, in the order of their names."""
    found = bytearray()
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        found += path.read_bytes()
        if len(found) >= count:
            break
    return np.frombuffer(bytes(found[:count]), np.uint8).astype(np.int32)


def batches(data: np.ndarray, examples: int, length: int, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """One epoch, shuffled by its seed."""
    rows = data[: len(data) // (length + 1) * (length + 1)].reshape(-1, length + 1)
    rows = rows[np.random.default_rng(seed).permutation(len(rows))]
    cut = [rows[i : i + examples] for i in range(0, len(rows) - examples + 1, examples)]
    return [(part[:, :-1], part[:, 1:]) for part in cut]


def main() -> None:
    """Plan, train under each plan, and write figures and a picture."""
    parser = exercise_line(__doc__, smoke="a tiny model for a few steps")
    parser.add_argument("--share", type=float, default=0.6, help="of what one device would need")
    chosen = parser.parse_args()
    if answered(5, chosen):
        return
    width, layers, length, examples, size, epochs = (
        (16, 1, 4, 4, 500, 1) if chosen.smoke else (64, 4, 64, 32, 400_000, 2)
    )
    model = LanguageModel(width, layers, length)
    data = text(size)
    first = batches(data, examples, length, 0)[0]
    params = model.init(jax.random.key(0), first[0])

    def loss(params: Any, batch: Any) -> Any:
        logits = model.apply(params, batch[0])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()

    optimizer = optax.adam(3e-3)
    make = lambda budget: fp.partition.plan(loss, optimizer=optimizer, budget=budget)  # noqa: E731
    one = make(None)(params, first, devices=1).named("one device").predicted.total
    # Where everything fits, no schedule of recomputation is looked for beyond the first.
    budget = int((1.0 if chosen.smoke else chosen.share) * one)
    plans = make(budget)(params, first, devices=8 if not chosen.smoke else 2)
    print(f"one device needs {one:,} bytes; each has {budget:,}\n\n{plans}\n")
    curves = {}
    for kind in KINDS[:4] if chosen.smoke else KINDS:
        plan = next((plan for plan in plans if plan.name.startswith(kind)), None)
        if plan is None or not plan.fits:
            print(f"{kind}: no plan that fits")
            continue
        curves[plan.name] = train(plan, optimizer, params, data, examples, length, epochs)
        curve = curves[plan.name]
        print(f"{plan.name:28} loss {curve['loss'][-1]:.4f}, {curve['seconds'][-1]:.1f} s")
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / "exercise_5_partition.json"
    path.write_text(json.dumps({"table": plans.as_dict(), "curves": curves}))
    draw(curves, RESULTS / "exercise_5_partition.svg")
    print(f"written: {path} and a picture beside it")


def train(
    plan: fp.partition.PartitionPlan,
    optimizer: optax.GradientTransformation,
    params: Any,
    data: np.ndarray,
    examples: int,
    length: int,
    epochs: int,
) -> dict[str, list[float]]:
    """Losses with the epochs and seconds that had passed; the first step, which compiles, is not timed."""
    placed, state = plan.place(params, optimizer.init(params))
    step = plan.step(optimizer)
    found: dict[str, list[float]] = {"epochs": [], "seconds": [], "loss": []}
    passed, count = 0.0, 0
    for epoch in range(epochs):
        every = batches(data, examples, length, epoch)
        for i, batch in enumerate(every):
            start = time.perf_counter()
            placed, state, value = step(placed, state, jax.tree.map(jnp.asarray, batch))
            measured = float(value)
            passed += time.perf_counter() - start if count else 0.0
            count += 1
            found["epochs"].append(epoch + (i + 1) / len(every))
            found["seconds"].append(passed)
            found["loss"].append(measured)
            assert math.isfinite(measured)
    return found


def draw(curves: dict[str, dict[str, list[float]]], path: Path) -> None:
    """The losses against epochs and against seconds."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    figure, sides = plt.subplots(1, 2, figsize=(11, 4), sharey=True)
    for name, curve in curves.items():
        for side, along in zip(sides, ("epochs", "seconds"), strict=True):
            side.plot(curve[along], curve["loss"], label=name)
            side.set_xlabel(along)
    sides[0].set_ylabel("loss")
    sides[0].legend()
    figure.savefig(path)


if __name__ == "__main__":
    main()
