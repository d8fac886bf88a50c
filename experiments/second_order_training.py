"""Which optimizer lowers the loss fastest: per step, per second, per gradient?

Two problems on the digits of 8 × 8 pixels, minibatches of 256: an autoencoder 64-32-8-32-64 (tanh, squared
error) and a classifier 64-64-32-10 (tanh, cross-entropy). Optimizers: SGD with momentum and Adam; Muon
(Jordan 2024) and Sophia (Liu 2023) of optax; K-FAC (Martens and Grosse 2015), Newton-CG on the Gauss-Newton
matrix with Levenberg-Marquardt damping (Martens 2010) and the Gauss-Newton diagonal of funcprop. All are
tuned alike: one hyperparameter each (the learning rate; of Newton-CG, which has none, the first damping)
from a grid of five, the best by the loss after all steps, the worse of two seeds; all others are the
defaults. Then three more seeds.

The losses are those over all data. A step is timed without them, in turn with the jitted gradient of a
minibatch, which is the unit of work: every optimizer's curve is shown per step, per second, and per gradient.
Timed are the first 31 steps; a later step of Newton-CG can take more products, up to 20, so its curves per
second and per gradient are kind to it. SGD's best rate on the autoencoder, 0.01, is the lowest of its grid.

Found (500 steps): per step, Newton-CG wins on the autoencoder (0.43; Muon 0.48, K-FAC 0.62, Sophia 0.72,
Adam 0.73, SGD 0.77, Gauss-Newton diagonal 0.87) and Muon on the classifier (1e-6; K-FAC and SGD 2e-4, Adam
4e-4, Sophia 8e-4, Newton-CG and the diagonal 9e-3). Per second and per gradient Muon is ahead on both: a
step of it costs 2 gradients, one of K-FAC 5, of Newton-CG 8 to 10, of the diagonal 3 to 7, and none of
funcprop's three makes that up on networks as small as these. Newton-CG stays behind where minibatches of
256 no longer agree on the curvature.

    python experiments/second_order_training.py [--smoke] [--steps N]
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import optax
from running import command_line, write

import funcprop as fp

mpl.use("Agg")
import matplotlib.pyplot as plt

BATCH, SEEDS, TUNING_SEEDS = 256, (1, 2, 3), (11, 12)
BETWEEN = 10  # steps from one evaluation over all data to the next


class Problem(NamedTuple):
    """Sizes of the layers, the loss of one output, and the targets of the examples."""

    widths: tuple[int, ...]
    loss: Callable[[Any, Any], Any]
    target: Callable[[Any, Any], Any]


def squared_error(output: Any, target: Any) -> Any:
    return 0.5 * jnp.sum((output - target) ** 2, -1)


PROBLEMS = {
    "autoencoder": Problem((64, 32, 8, 32, 64), squared_error, lambda images, labels: images),
    "classifier": Problem(
        (64, 64, 32, 10), optax.softmax_cross_entropy_with_integer_labels, lambda images, labels: labels
    ),
}


def initialise(key: jax.Array, widths: tuple[int, ...]) -> list[dict[str, jax.Array]]:
    keys = jax.random.split(key, len(widths) - 1)
    return [
        {"w": jax.random.normal(k, (i, o)) / np.sqrt(i), "b": jnp.zeros(o)}
        for k, i, o in zip(keys, widths, widths[1:], strict=False)
    ]


def model(params: list[dict[str, jax.Array]], x: jax.Array) -> jax.Array:
    for layer in params[:-1]:
        x = jnp.tanh(x @ layer["w"] + layer["b"])
    return x @ params[-1]["w"] + params[-1]["b"]


def mean_loss(problem: Problem, params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    return problem.loss(model(params, x), y).mean()


class Optimizer(NamedTuple):
    """An optax transformation by its one hyperparameter, and the grid from which that is chosen."""

    make: Callable[[Problem, float], optax.GradientTransformation]
    grid: tuple[float, ...]


def gauss_newton(problem: Problem) -> Callable[[Any, Any], Any]:
    def curvature(params: Any, batch: Any) -> Any:
        return fp.ggn(model, lambda outputs, y: problem.loss(outputs, y).mean(), batched=True)(params, *batch)

    return curvature


def sophia(problem: Problem, rate: float) -> optax.GradientTransformation:
    """Optax's Sophia; its Hutchinson estimator takes the loss under a name of its own."""
    inner = optax.contrib.sophia(rate, weight_decay=0.0)

    def update(updates: Any, state: Any, params: Any = None, *, value_fn: Any, **extra: Any) -> Any:
        del extra
        return inner.update(updates, state, params, obj_fn=value_fn)

    return optax.GradientTransformationExtraArgs(inner.init, update)


def kfac(problem: Problem, rate: float) -> optax.GradientTransformation:
    size = problem.widths[0]
    shapes = jax.ShapeDtypeStruct((BATCH, size), jnp.float32), jax.ShapeDtypeStruct((BATCH,), jnp.int32)
    x, labels = shapes
    return fp.training.kfac(model, problem.loss, rate, (x, problem.target(x, labels)))


OPTIMIZERS = {
    "SGD, momentum": Optimizer(lambda _, rate: optax.sgd(rate, momentum=0.9), (0.01, 0.03, 0.3, 1.0, 3.0)),
    "Adam": Optimizer(lambda _, rate: optax.adam(rate), (0.001, 0.003, 0.01, 0.03, 0.1)),
    "Muon": Optimizer(lambda _, rate: optax.contrib.muon(rate), (0.003, 0.01, 0.03, 0.1, 0.3)),
    "Sophia": Optimizer(sophia, (0.0003, 0.001, 0.003, 0.01, 0.03)),
    "K-FAC": Optimizer(kfac, (0.01, 0.03, 0.1, 0.3, 1.0)),
    "Newton-CG": Optimizer(
        lambda p, damping: fp.training.newton_cg(curvature=gauss_newton(p), damping=damping, products=20),
        (0.001, 0.01, 0.1, 1.0, 10.0),
    ),
    "Gauss-Newton diagonal": Optimizer(
        lambda p, rate: fp.training.gauss_newton_diagonal(model, p.loss, rate),
        (0.001, 0.003, 0.01, 0.03, 0.1),
    ),
}


class Run(NamedTuple):
    """Loss over all data, at the start and after every `BETWEEN` steps."""

    losses: np.ndarray

    @property
    def final(self) -> float:
        """The last loss, infinite if it is not finite."""
        return float(self.losses[-1]) if np.isfinite(self.losses[-1]) else np.inf


class Summary(NamedTuple):
    """An optimizer on a problem: the value chosen, its runs, and what a step costs."""

    chosen: float
    on_the_edge: bool
    losses: list[list[float]]
    step_seconds: float
    gradients_per_step: float

    @property
    def final(self) -> list[float]:
        return [curve[-1] for curve in self.losses]


class Program:
    """The jitted step of an optimizer on a problem, and the loss over all data."""

    def __init__(self, problem: Problem, optimizer: optax.GradientTransformation, data: Any) -> None:
        self.problem, self.optimizer, self.data = problem, optimizer, data
        loss = functools.partial(mean_loss, problem)
        self.step = fp.training.make_step(loss, optimizer)
        self.loss = jax.jit(loss)

    def start(self, seed: int) -> tuple[Any, Any]:
        params = initialise(jax.random.key(seed), self.problem.widths)
        return params, self.optimizer.init(params)

    def run(self, seed: int, steps: int) -> Run:
        params, state = self.start(seed)
        random = np.random.default_rng(seed)
        x, y = self.data
        losses = [self.loss(params, x, y)]
        for step in range(1, steps + 1):
            at = random.choice(len(x), BATCH, replace=False)
            params, state, _ = self.step(params, state, (x[at], y[at]))
            if step % BETWEEN == 0:
                losses.append(self.loss(params, x, y))
        return Run(np.asarray(jax.device_get(losses)))

    def cost(self, repeats: int) -> tuple[float, float]:
        """Seconds of a step, and how many gradients of a minibatch take as long; both in turn."""
        x, y = (array[:BATCH] for array in self.data)
        gradient = jax.jit(jax.value_and_grad(functools.partial(mean_loss, self.problem)))
        params, state = self.start(SEEDS[0])
        fixed, _ = self.start(SEEDS[0])
        seconds = []
        for _ in range(repeats + 1):
            begun = time.perf_counter()
            params, state, _ = jax.block_until_ready(self.step(params, state, (x, y)))
            between = time.perf_counter()
            jax.block_until_ready(gradient(fixed, x, y))
            seconds.append((between - begun, time.perf_counter() - between))
        times = np.array(seconds[1:])
        return float(np.median(times[:, 0])), float(np.median(times[:, 0] / times[:, 1]))


def study(name: str, problem: Problem, data: Any, steps: int, smoke: bool) -> Summary:
    """Tune, run, time."""
    optimizer = OPTIMIZERS[name]
    grid, seeds = (optimizer.grid[2:3], SEEDS[:1]) if smoke else (optimizer.grid, SEEDS)
    programs = {value: Program(problem, optimizer.make(problem, value), data) for value in grid}
    finals = {
        value: max(program.run(seed, steps).final for seed in TUNING_SEEDS[: len(seeds)])
        for value, program in programs.items()
    }
    chosen = min(finals, key=finals.__getitem__)
    runs = [programs[chosen].run(seed, steps) for seed in seeds]
    seconds, gradients = programs[chosen].cost(2 if smoke else 30)
    edge = chosen in (optimizer.grid[0], optimizer.grid[-1])
    return Summary(chosen, edge, [run.losses.tolist() for run in runs], seconds, gradients)


def draw(found: dict[str, dict[str, Summary]], path: Path) -> None:
    figure, panels = plt.subplots(
        len(found), 3, figsize=(13, 4 * len(found)), layout="constrained", squeeze=False, sharey="row"
    )
    for row, (problem, summaries) in zip(panels, found.items(), strict=True):
        for name, s in summaries.items():
            steps = np.arange(len(s.losses[0])) * BETWEEN
            median = np.median(s.losses, axis=0)
            for axes, unit in zip(row, (1, s.step_seconds, s.gradients_per_step), strict=True):
                axes.loglog(np.maximum(steps, 1) * unit, median, label=name)
        row[0].set_ylabel(f"loss of the {problem}, median")
    for axes, label in zip(panels[-1], ("steps", "seconds", "gradients"), strict=True):
        axes.set_xlabel(label)
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    """Train, print, and write `results/second_order_training.json` and `.png`."""
    parser = command_line(__doc__, smoke="one problem, 20 steps, one value and one seed")
    parser.add_argument("--steps", type=int, default=500)
    options = parser.parse_args()
    steps = 2 * BETWEEN if options.smoke else options.steps
    train = fp.training.digits().train
    found: dict[str, dict[str, Summary]] = {}
    head = f"loss after {steps} steps, by seed"
    print(f"{'':37}{'chosen':>8}{head:>34}{'ms/step':>9}{'gradients/step':>16}")
    for problem_name, problem in list(PROBLEMS.items())[: 1 if options.smoke else None]:
        data = train.images, np.asarray(problem.target(train.images, train.labels))
        found[problem_name] = {}
        for name in OPTIMIZERS:
            s = study(name, problem, data, steps, options.smoke)
            found[problem_name][name] = s
            finals = " ".join(f"{loss:10.3g}" for loss in s.final)
            edge = "*" if s.on_the_edge else " "
            print(
                f"{problem_name:13}{name:24}{s.chosen:7g}{edge}{finals:>34}{s.step_seconds * 1e3:9.2f}"
                f"{s.gradients_per_step:16.1f}",
                flush=True,
            )
    print("*: the best value is at an end of its grid")
    content = {p: {n: s._asdict() for n, s in each.items()} for p, each in found.items()}
    write("second_order_training", options.smoke, content, lambda path: draw(found, path))


if __name__ == "__main__":
    main()
