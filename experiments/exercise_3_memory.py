"""Exercise 3: the memory of training and of prediction, predicted and measured.

The chapter's model with weight decay, `d` inputs, `h` hidden units, `q` classes, batch `B`, 4-byte floats,
`P = hd + qh` parameters. In bytes,

    prediction            4 (P + Bd + Bh + Bq)
    training with SGD     4 (P + Bd + B + P + 2 Bh)      parameters donated
    with momentum         + 4 P
    with Adam             + 8 P

Beside each formula stand the bytes that `fp.memory.footprint` predicts from the jaxpr, and those of the
compiled program. The formula of training holds where `Bh ≥ P`: in a smaller batch, gradients take the place
of activations that are no longer needed. Programs are compiled without the kernels of XLA's library, which
hold a few rows more; by default they add 0.7 % at a batch of 4096.

    python experiments/exercise_3_memory.py [file.py:function] [--smoke]
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib as mpl
import matplotlib.pyplot as plt
import optax
from jax import ShapeDtypeStruct
from running import write
from running.exercises import answered, exercise_line

import funcprop as fp

OPTIMIZERS = {
    "SGD": (optax.sgd(0.1), 0),
    "momentum": (optax.sgd(0.1, momentum=0.9), 1),
    "Adam": (optax.adam(1e-3), 2),
}


def loss(params: dict[str, jax.Array], x: jax.Array, y: jax.Array, λ: jax.Array) -> jax.Array:
    """The mean of the chapter's objective over a batch."""
    return jax.vmap(fp.models.chapter, (None, 0, 0, None))(params, x, y, λ).mean()


def predict(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ params["W1"].T) @ params["W2"].T


def measure(batch: int, d: int, h: int, q: int) -> list[dict[str, Any]]:
    """Formula, prediction and measurement of the four programs."""
    params = {"W1": ShapeDtypeStruct((h, d), "float32"), "W2": ShapeDtypeStruct((q, h), "float32")}
    x, y = ShapeDtypeStruct((batch, d), "float32"), ShapeDtypeStruct((batch,), "int32")
    λ, p = ShapeDtypeStruct((), "float32"), h * d + q * h
    options = {"xla_cpu_experimental_ynn_fusion_type": ""}
    inference = fp.memory.footprint(predict, programs=["inference"])(params, x).inference
    programs = {"prediction": (4 * (p + batch * d + batch * h + batch * q), inference)}
    for name, (optimizer, states) in OPTIMIZERS.items():
        account = fp.memory.footprint(
            loss, optimizer=optimizer, programs=["training"], compiler_options=options
        )
        formula = 4 * (p + batch * d + batch + p + 2 * batch * h + states * p)
        programs[name] = formula, account(params, x, y, λ).training
    lines: list[dict[str, Any]] = []
    for name, (formula, ledger) in programs.items():
        assert ledger is not None
        line: dict[str, Any] = {"program": name, "batch": batch, "formula": formula}
        line |= {"predicted": ledger.predicted, "compiled": ledger.compiled, "by": ledger.by("category")}
        lines.append(line)
        ratios = ledger.predicted / formula, (ledger.compiled or 0) / formula
        print(
            f"{name:12} {batch:6} {formula:14,} {ledger.predicted:14,} {ledger.compiled:14,}"
            f" {ratios[0]:10.5f} {ratios[1]:10.5f}",
            flush=True,
        )
    return lines


def draw(lines: list[dict[str, Any]], path: Path) -> None:
    """What is held, by purpose, with the formula and the compiled bytes as marks."""
    batches = list(dict.fromkeys(line["batch"] for line in lines))
    figure = plt.figure(figsize=(max(4 * len(batches), 6), 4.6), layout="constrained")
    purposes = list(dict.fromkeys(purpose for line in lines for purpose in line["by"]))
    for axes, batch in zip(figure.subplots(1, len(batches), squeeze=False)[0], batches, strict=True):
        chosen = [line for line in lines if line["batch"] == batch]
        names, bottom = [str(line["program"]) for line in chosen], [0.0] * len(chosen)
        for color, purpose in zip(mpl.color_sequences["tab10"], purposes, strict=False):
            heights = [line["by"].get(purpose, 0) / 1e6 for line in chosen]
            axes.bar(names, heights, bottom=bottom, label=purpose, color=color)
            bottom = [a + b for a, b in zip(bottom, heights, strict=True)]
        for marker, key in (("_", "formula"), ("x", "compiled")):
            heights = [line[key] / 1e6 for line in chosen]
            axes.scatter(names, heights, marker=marker, s=120, c="black", label=key)
        axes.set_title(f"batch {batch}")
        axes.set_ylabel("MB at the peak")
        axes.set_xticks(range(len(names)), names, rotation=20, ha="right", rotation_mode="anchor")
        axes.set_ylim(0, 1.08 * max(line["formula"] for line in chosen) / 1e6)
    handles, names = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside right center")
    figure.suptitle("bars: predicted, by purpose; marks: formula and compiled program")
    figure.savefig(path, dpi=130)


def main() -> None:
    """Measure, print, and write `results/exercise_3_memory.json` and `.png`."""
    parser = exercise_line(__doc__, smoke="one batch size")
    options = parser.parse_args()
    if answered(3, options):
        return
    columns = f"{'formula':>14} {'predicted':>14} {'compiled':>14} {'predicted÷':>10} {'compiled÷':>10}"
    print(f"{'program':12} {'batch':>6} {columns}")
    batches = [1024] if options.smoke else [256, 1024, 4096]
    lines = [line for batch in batches for line in measure(batch, 784, 256, 10)]
    write("exercise_3_memory", options.smoke, lines, lambda path: draw(lines, path))


if __name__ == "__main__":
    main()
