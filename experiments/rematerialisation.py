"""What does memory cost in time? A budget of residual bytes against extra FLOPs, time, and compiled bytes.

For Flax transformers of 4 and 12 blocks and several budgets, each a share of what the function holds as it
stands: what is held, what the plan predicts at the peak, what XLA allocates, its FLOPs, and the time of the
gradient, each beside the plain gradient's. For comparison every block recomputed as a whole (`chunks`), and
`jax.checkpoint` with the plan's policy. The programs take turns, and the table shows the median of paired
ratios with its quartiles.

    python experiments/rematerialisation.py [--smoke] [--repeats N] [--blocks N ...]
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
from compile_cost import transformer
from running import blocking, command_line, interleaved, write

import funcprop as fp

mpl.use("Agg")
import matplotlib.pyplot as plt

SHARES = (0.75, 0.5, 0.35, 0.25, 0.15, 0.1, 0.05)

# The bounds that are sought at a quarter of the bytes.
SHARE, TIME = 0.25, 1.35


class Measured(NamedTuple):
    """One way to compute the gradient; ratios are to the plain gradient."""

    residual_bytes: int
    peak_bytes: int
    temp_bytes: int
    flops: float
    seconds: float
    lower_quartile: float
    median: float
    upper_quartile: float
    plan_seconds: float


class Way(NamedTuple):
    """A function with the same gradient, its compiler options, and what its plan says."""

    fun: Callable[..., Any]
    options: dict[str, str]
    residual_bytes: int
    peak_bytes: int
    plan_seconds: float


def ways(loss: Callable[..., Any], args: Any, blocks: int, smoke: bool) -> dict[str, Way]:
    """The plain function, the budgets, and what people do by hand."""

    def planned(**limits: Any) -> Way:
        start = time.perf_counter()
        plan = fp.memory.remat_plan(loss, **limits)(*args)
        seconds = time.perf_counter() - start
        fun = fp.memory.rematerialize(loss, **limits)
        return Way(fun, plan.compiler_options, plan.residual_bytes, plan.peak_bytes, seconds)

    plan = fp.memory.remat_plan(loss, SHARE)(*args)
    whole = plan.plain_residual_bytes
    by_policy = jax.checkpoint(loss, policy=plan.policy)
    return {
        "plain": Way(loss, {}, whole, whole, 0),
        **{f"budget {share:.0%}": planned(budget=share) for share in ((SHARE,) if smoke else SHARES)},
        "a chunk for each block": planned(chunks=blocks),
        "the plan's policy": Way(by_policy, plan.compiler_options, plan.policy_residual_bytes, whole, 0),
    }


def arguments(shapes: Any) -> Any:
    """Random parameters and tokens."""
    numbers = np.random.default_rng(0)

    def fill(leaf: Any) -> Any:
        if leaf.dtype == jnp.int32:
            return jnp.asarray(numbers.integers(0, 512, leaf.shape), leaf.dtype)
        return jnp.asarray(0.1 * numbers.standard_normal(leaf.shape), leaf.dtype)

    return jax.tree.map(fill, shapes)


def measure(blocks: int, repeats: int, smoke: bool) -> dict[str, Measured]:
    """All ways in turn, after checking that they compute the same gradient."""
    loss, shapes = transformer(blocks)
    args, found = arguments(shapes), ways(loss, shapes, blocks, smoke)
    compiled = {
        name: jax.jit(jax.value_and_grad(way.fun), compiler_options=way.options).lower(*args).compile()
        for name, way in found.items()
    }
    expected = jax.tree.leaves(compiled["plain"](*args))
    largest = max(float(jnp.max(jnp.abs(leaf))) for leaf in expected)
    for program in compiled.values():
        for a, e in zip(jax.tree.leaves(program(*args)), expected, strict=True):
            np.testing.assert_allclose(a, e, rtol=0, atol=1e-4 * largest)
    seconds = interleaved({name: blocking(program, args) for name, program in compiled.items()}, repeats)
    results = {}
    for name, way in found.items():
        lower, median, upper = map(float, np.percentile(seconds[name] / seconds["plain"], [25, 50, 75]))
        xla = fp.memory.CompiledGradient.of(compiled[name])
        results[name] = Measured(
            way.residual_bytes,
            way.peak_bytes,
            xla.temp,
            xla.flops,
            float(seconds[name].min()),
            lower,
            median,
            upper,
            way.plan_seconds,
        )
    return results


COLUMNS = ("held", "peak", "temp", "FLOPs", "time", "quartiles", "ms", "plan s")


def report(blocks: int, results: dict[str, Measured]) -> None:
    """A table of one model, relative to the plain gradient; a star marks a missed bound."""
    plain = results["plain"]
    print(f"{f'transformer, {blocks} blocks':26}" + "".join(f"{column:>12}" for column in COLUMNS))
    for name, m in results.items():
        shares = (
            m.residual_bytes / plain.residual_bytes,
            m.peak_bytes / plain.peak_bytes,
            m.temp_bytes / plain.temp_bytes,
            m.flops / plain.flops,
            m.median,
        )
        missed = "*" if name == f"budget {SHARE:.0%}" and m.median > TIME else ""
        quartiles = f"{m.lower_quartile:.2f}–{m.upper_quartile:.2f}{missed}"
        print(
            f"  {name:24}" + "".join(f"{share:12.3f}" for share in shares)
            + f"{quartiles:>12}{m.seconds * 1e3:12.1f}{m.plan_seconds:12.2f}"
        )  # fmt: skip


def draw(results: dict[int, dict[str, Measured]], path: Path) -> None:
    """The trade-off: residual bytes against time and FLOPs, and against what XLA allocates."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained", sharex=True)
    for blocks, found in results.items():
        plain = found["plain"]
        line = [m for name, m in found.items() if name == "plain" or name.startswith("budget")]
        held = np.array([m.residual_bytes / plain.residual_bytes for m in line])
        medians = np.array([m.median for m in line])
        spread = [
            medians - [m.lower_quartile for m in line],
            [m.upper_quartile for m in line] - medians,
        ]
        color = f"C{list(results).index(blocks)}"
        named = f"{blocks} block" + "s" * (blocks != 1)
        axes[0].errorbar(held, medians, spread, marker="o", color=color, label=f"{named}: time")
        axes[0].plot(
            held, [m.flops / plain.flops for m in line], "--", color=color, label=f"{named}: FLOPs (XLA)"
        )
        axes[1].plot(
            held, [m.temp_bytes / plain.temp_bytes for m in line], "o-", color=color,
            label=f"{named}: temp bytes (XLA)",
        )  # fmt: skip
        axes[1].plot(
            held,
            [m.peak_bytes / plain.peak_bytes for m in line],
            "--",
            color=color,
            label=f"{named}: peak, predicted",
        )
        other = found["a chunk for each block"]
        at, temp = other.residual_bytes / plain.residual_bytes, other.temp_bytes / plain.temp_bytes
        axes[0].plot(at, other.median, "x", color=color, label=f"{named}: a chunk for each")
        axes[1].plot(at, temp, "x", color=color, label=f"{named}: a chunk for each")
    axes[0].axhline(TIME, color="grey", linewidth=0.8, label=f"bound of the time: {TIME}")
    for axis, title in zip(axes, ("time and FLOPs ÷ plain", "bytes ÷ plain"), strict=True):
        axis.set_ylabel(title)
        axis.set_xlabel("bytes held between the sweeps ÷ plain")
        axis.legend(fontsize="small")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    """Measure, print, and write `results/rematerialisation.json` and `.png`."""
    parser = command_line(__doc__, smoke="one block, one turn")
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--blocks", type=int, nargs="*", default=[4, 12])
    options = parser.parse_args()
    repeats = 1 if options.smoke else options.repeats
    print(f"jax {jax.__version__}, {jax.default_backend()}, {repeats} turns; all ÷ the plain gradient")
    results: dict[int, dict[str, Measured]] = {}
    for blocks in [1] if options.smoke else options.blocks:
        results[blocks] = measure(blocks, repeats, options.smoke)
        report(blocks, results[blocks])
    content = {
        f"transformer, {blocks} blocks": {name: m._asdict() for name, m in found.items()}
        for blocks, found in results.items()
    }
    write(
        "rematerialisation",
        options.smoke,
        {"jax": jax.__version__, **content},
        lambda path: draw(results, path),
    )


if __name__ == "__main__":
    main()
