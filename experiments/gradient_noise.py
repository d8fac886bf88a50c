"""Does the gradient's noise scale, from the same pass as the gradient, foretell the useful batch size?

The claim (McCandlish, Kaplan, Amodei and the OpenAI Dota team 2018, "An empirical model of large-batch
training"): with the covariance Σ of the examples' gradients and their mean G, training at batch size B takes
`S(B) = S_min (1 + B_crit / B)` steps to a given loss, and the critical batch size `B_crit` is roughly the
simple noise scale `tr Σ / ‖G‖²`, which grows as the loss falls.

An MLP 64-32-10 with tanh learns the digits by SGD. For every batch size the steps to each target loss are
counted at every step size of a grid, and the fewest are kept (medians over the seeds); `B_crit` is fitted to
them. The noise scale comes from `fp.per_example` with the quantities gradient and variance of a minibatch
(`‖G‖²` without its bias, `‖g‖² − tr Σ / B`) at every step of one run, averaged over the steps up to each
target as sums of numerators and of denominators; beside it, that of the whole training set, no estimate.

Found: the law fits (S_min 21, 43, 88; B_crit 12, 21, 30 for losses of 0.5, 0.2, 0.1), and both grow
together, but the noise scale of all data (59, 86, 119) is four to five times the critical batch size. The
minibatches of 64 estimate it within 17 %.

    python experiments/gradient_noise.py [--smoke] [--seeds N]
"""

from __future__ import annotations

import functools
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

HIDDEN = 32
TARGETS = (0.5, 0.2, 0.1)
BATCHES = (2, 4, 8, 16, 32, 64, 128, 256, 512)
STEP_SIZES = tuple(0.025 * 2**i for i in range(9))
NOISE_BATCH, NOISE_STEP_SIZE = 64, 0.4
MOST_STEPS = 20_000


class Noise(NamedTuple):
    """The squared norm of the gradient and the trace of the examples' covariance, at one step."""

    step: int
    loss: float
    signal: float
    covariance: float

    @property
    def scale(self) -> float:
        """`tr Σ / ‖G‖²`, in examples."""
        return self.covariance / self.signal


def initialise(key: jax.Array) -> dict[str, jax.Array]:
    first, second = jax.random.split(key)
    return {
        "hidden": jax.random.normal(first, (64, HIDDEN)) / 8,
        "hidden bias": jnp.zeros(HIDDEN),
        "out": jax.random.normal(second, (HIDDEN, 10)) / np.sqrt(HIDDEN),
        "out bias": jnp.zeros(10),
    }


def model(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ params["hidden"] + params["hidden bias"]) @ params["out"] + params["out bias"]


def cross_entropy(outputs: jax.Array, y: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(outputs, y)


def loss(params: dict[str, jax.Array], x: jax.Array, y: jax.Array) -> jax.Array:
    return cross_entropy(model(params, x), y).mean()


@functools.partial(jax.jit, static_argnames=("batch", "most"))
def steps_to_targets(key: jax.Array, x: Any, y: Any, step_size: Any, batch: int, most: int) -> jax.Array:
    """Steps of SGD until the loss over all data is below each target; `most` where it is not in time."""

    def unfinished(carry: Any) -> jax.Array:
        _, _, step, reached = carry
        return (step < most) & (reached[-1] == most)

    def body(carry: Any) -> Any:
        params, key, step, reached = carry
        key, batch_key = jax.random.split(key)
        at = jax.random.randint(batch_key, (batch,), 0, len(x))
        gradient = fp.grad(loss)(params, x[at], y[at])
        params = jax.tree.map(lambda p, g: p - step_size * g, params, gradient)
        below = loss(params, x, y) < jnp.array(TARGETS)
        return params, key, step + 1, jnp.where(below & (reached == most), step + 1, reached)

    start = initialise(jax.random.fold_in(key, 0)), key, 0, jnp.full(len(TARGETS), most)
    return jax.lax.while_loop(unfinished, body, start)[3]


def fewest_steps(x: Any, y: Any, batches: tuple[int, ...], seeds: int, most: int) -> np.ndarray:
    """For every batch size and target, the fewest steps over the step sizes, each the median of the seeds."""
    table: list[np.ndarray] = []
    for batch in batches:
        counts = [
            [
                np.asarray(steps_to_targets(jax.random.key(s), x, y, step_size, batch, most))
                for s in range(seeds)
            ]
            for step_size in STEP_SIZES
        ]
        table.append(np.median(counts, axis=1).min(axis=0))
        print(
            f"  batch {batch:4}: steps to a loss of {TARGETS}: {table[-1].astype(int).tolist()}", flush=True
        )
    return np.array(table)


def fit(batches: tuple[int, ...], steps: np.ndarray, most: int) -> tuple[float, float]:
    """`S_min` and `B_crit` by least relative squares of `S_min (1 + B_crit / B)`, linear in `1/B`."""
    reached = steps < most
    B, S = np.array(batches)[reached], steps[reached]
    (slope, intercept), *_ = np.linalg.lstsq(
        np.stack([1 / B, np.ones_like(S)], 1) / S[:, None], np.ones_like(S)
    )
    return float(intercept), float(slope / intercept)


def squares(tree: Any) -> Any:
    return optax.tree.norm(tree, squared=True)


@jax.jit
def noise_of(params: Any, x: Any, y: Any) -> tuple[jax.Array, jax.Array, Any]:
    """Unbiased `‖G‖²` and `tr Σ` of a minibatch's population, and the minibatch's gradient, in one pass."""
    found = fp.per_example(model, cross_entropy)(params, x, y, quantities={"gradient", "variance"})
    n = len(x)
    covariance = optax.tree.sum(found["variance"]) * n / (n - 1)
    return squares(found["gradient"]) - covariance / n, covariance, found["gradient"]


def follow(x: Any, y: Any, most: int) -> tuple[list[Noise], list[Noise]]:
    """One run of SGD to the last target: the noise of its minibatches, at every tenth step of all data."""
    params, random = initialise(jax.random.key(1)), np.random.default_rng(1)
    estimated, exact = [], []
    total = jax.jit(loss)
    for step in range(most):
        value = float(total(params, x, y))
        if value < TARGETS[-1]:
            break
        at = random.integers(len(x), size=NOISE_BATCH)
        signal, covariance, gradient = noise_of(params, x[at], y[at])
        estimated.append(Noise(step, value, float(signal), float(covariance)))
        if step % 10 == 0:
            n = len(x)
            s, c, _ = noise_of(params, x, y)
            # All data are the population: its covariance has n in the denominator, ‖G‖² no bias.
            c = float(c) * (n - 1) / n
            exact.append(Noise(step, value, float(s) + c / (n - 1), c))
        params = jax.tree.map(lambda p, g: p - NOISE_STEP_SIZE * g, params, gradient)
    return estimated, exact


def averaged(noise: list[Noise], target: float) -> float:
    """`Σ tr Σ / Σ ‖G‖²` over the steps with a loss above the target."""
    kept = [n for n in noise if n.loss >= target]
    return sum(n.covariance for n in kept) / sum(n.signal for n in kept)


def draw(
    batches: tuple[int, ...],
    steps: np.ndarray,
    fits: list[tuple[float, float]],
    exact: list[Noise],
    path: Path,
) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for target, counts, (least, critical) in zip(TARGETS, steps.T, fits, strict=True):
        (points,) = left.loglog(batches, counts, "o", label=f"loss {target}: critical {critical:.0f}")
        left.loglog(batches, least * (1 + critical / np.array(batches)), color=points.get_color())
    left.set(xlabel="batch size", ylabel="fewest steps to the loss (line: fitted)")
    left.legend()
    right.semilogy(
        [n.step for n in exact], [n.scale for n in exact], "o-", color="grey", label="noise scale, all data"
    )
    for i, (target, (_, critical)) in enumerate(zip(TARGETS, fits, strict=True)):
        step = max(n.step for n in exact if n.loss >= target)
        label = f"critical batch size, to a loss of {target}"
        right.plot(step, critical, "*", color=f"C{i}", markersize=12, label=label)
    right.set(xlabel=f"step at batch {NOISE_BATCH}", ylabel="examples")
    right.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    """Count, fit, follow, print, and write `results/gradient_noise.json` and `.png`."""
    parser = command_line(__doc__, smoke="two batch sizes, one seed, 300 steps at most")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    batches, seeds, most = ((64, 256), 1, 300) if options.smoke else (BATCHES, options.seeds, MOST_STEPS)
    data = fp.training.digits().train
    x, y = jnp.asarray(data.images), jnp.asarray(data.labels)
    steps = fewest_steps(x, y, batches, seeds, most)
    fits = [fit(batches, counts, most) for counts in steps.T]
    estimated, exact = follow(x, y, MOST_STEPS)
    print(f"{'loss':>6}{'S_min':>8}{'B_crit':>9}{'noise scale':>13}{'of all data':>13}{'B_crit ÷ it':>13}")
    table = []
    for target, (least, critical) in zip(TARGETS, fits, strict=True):
        scale, of_all = averaged(estimated, target), averaged(exact, target)
        table.append(
            {"target": target, "S_min": least, "B_crit": critical, "estimated": scale, "exact": of_all}
        )
        print(f"{target:6.2f}{least:8.0f}{critical:9.1f}{scale:13.1f}{of_all:13.1f}{critical / of_all:13.2f}")
    content = {"steps": dict(zip(map(str, batches), steps.tolist(), strict=True)), "targets": table}
    content["noise of all data"] = [{**n._asdict(), "scale": n.scale} for n in exact]
    write("gradient_noise", options.smoke, content, lambda path: draw(batches, steps, fits, exact, path))


if __name__ == "__main__":
    main()
