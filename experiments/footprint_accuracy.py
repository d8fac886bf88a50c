"""How far is the predicted memory from the compiled, on models and sizes that nothing was fitted to?

Sizes are drawn by a seed from the ranges that `memory_cases/models.py` states. For every model: the
prediction (inference), and the gradient or a step of SGD or Adam (training, parameters and state donated),
with the default rules and by autodiff in turn. Nothing is run, everything is compiled.

The bounds are 5 % for the MLP (batch at least 1024) and 15 % for the others.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import matplotlib.pyplot as plt
import numpy as np
import optax
from memory_cases import FAMILIES
from running import command_line, write

import funcprop as fp

OPTIMIZERS = {"gradient": None, "sgd": optax.sgd(0.1), "adam": optax.adam(1e-3)}
RULES = (fp.rules.default, fp.rules.autodiff)


def bound(family: str) -> float:
    return 0.05 if family == "MLP" else 0.15


def measure(family: str, seed: int, count: int) -> list[dict[str, Any]]:
    """`count` models of a family: bytes and ratios."""
    rng = np.random.default_rng(seed)
    found = []
    for i in range(count):
        model = FAMILIES[family](rng)
        kind, rules = list(OPTIMIZERS)[i % 3], RULES[i // 3 % 2]
        predict = fp.memory.footprint(model.predict, programs=["inference"])
        train = fp.memory.footprint(
            model.loss, optimizer=OPTIMIZERS[kind], rules=rules, programs=["training"]
        )
        inference = predict(model.params, model.x).inference
        training = train(model.params, model.x, model.y).training
        assert inference is not None
        assert training is not None
        line: dict[str, Any] = {"family": family, "model": model.name, "program": kind, "rules": rules.name}
        line |= {"inference_predicted": inference.predicted, "inference_compiled": inference.compiled}
        line |= {"training_predicted": training.predicted, "training_compiled": training.compiled}
        line |= {"inference": inference.ratio, "training": training.ratio}
        found.append(line)
        print(
            f"{model.name:78} {kind:9} {rules.name:9} {inference.ratio:6.3f} {training.ratio:6.3f}",
            flush=True,
        )
    return found


def draw(lines: list[dict[str, Any]], path: Path) -> None:
    """The ratios of each family, with the bounds."""
    names = list(dict.fromkeys(str(line["family"]) for line in lines))
    figure, axes = plt.subplots(figsize=(9, 4.5), layout="constrained")
    for which, marker, shift in (("inference", "o", -0.12), ("training", "s", 0.12)):
        x = [names.index(str(line["family"])) + shift for line in lines]
        axes.scatter(x, [line[which] for line in lines], marker=marker, alpha=0.7, label=which)
    for i, name in enumerate(names):
        for side in (1 - bound(name), 1 + bound(name)):
            axes.plot([i - 0.4, i + 0.4], [side, side], color="grey", linewidth=1)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xticks(range(len(names)), names, rotation=15)
    axes.set_ylabel("predicted ÷ compiled bytes")
    axes.set_ylim(0.8, 1.2)
    axes.set_title("Memory predicted from the jaxpr, for drawn sizes; grey: the bounds")
    axes.legend()
    figure.savefig(path, dpi=130)


def main() -> None:
    """Measure, print, and write `results/footprint_accuracy.json` and `.png`."""
    parser = command_line(__doc__, smoke="one MLP")
    parser.add_argument("--seed", type=int, default=20261124)
    parser.add_argument("--count", type=int, default=6, help="models of each family")
    parser.add_argument("--only", nargs="*", default=[], help="families whose name contains one of these")
    options = parser.parse_args()
    families = ["MLP"] if options.smoke else list(FAMILIES)
    print(f"jax {jax.__version__}; predicted ÷ compiled for inference and training")
    lines = []
    for family in families:
        if not options.only or any(part in family for part in options.only):
            lines += measure(family, options.seed, 1 if options.smoke else options.count)
    outside = [
        line
        for line in lines
        for which in ("inference", "training")
        if abs(float(str(line[which])) - 1) > bound(str(line["family"]))
    ]
    print(f"{2 * len(lines) - len(outside)} of {2 * len(lines)} ratios within the bounds")
    write("footprint_accuracy", options.smoke, lines, lambda path: draw(lines, path))


if __name__ == "__main__":
    main()
