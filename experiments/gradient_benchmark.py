"""Do the rules pay? funcprop against JAX on the same functions, both jitted.

Most models are unchanged ones of Flax and Equinox, differentiated by `jax.value_and_grad` and by
`fp.value_and_grad`. Our own layers have no unchanged model: there the same is written in plain `jax.numpy`.

Data are arguments, never constants (XLA would fold them). The two programs take turns; each turn gives one
ratio of times, and the table shows the median of these paired ratios with its quartiles, beside the fastest
time of each. In its turn a program runs twice and the second run counts: what it finds in memory and caches
is then its own, as in a training loop, and not what the other one left. Bytes are the temporary bytes of the
compiled programs, `all` their arguments, results and temporary bytes together, `compile` the ratio of the
seconds from function to executable. A star marks a bound that is not reached.

    python experiments/gradient_benchmark.py [--smoke] [--repeats N] [--only NAME ...] [--random N] [--seed S]
                                             [--peer torch]
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
from benchmark_cases import ROWS, Case, Row, random_shapes
from running import command_line, write

import funcprop as fp

mpl.use("Agg")
import matplotlib.pyplot as plt


class Measured(NamedTuple):
    """Seconds, bytes and compile seconds of both programs; quartiles of the paired ratios of times."""

    jax_seconds: float
    fp_seconds: float
    lower_quartile: float
    median: float
    upper_quartile: float
    jax_bytes: int
    fp_bytes: int
    jax_total_bytes: int
    fp_total_bytes: int
    jax_compile: float
    fp_compile: float
    rules: int

    @property
    def bytes_ratio(self) -> float:
        return self.fp_bytes / max(self.jax_bytes, 1)


def measure(case: Case, repeats: int) -> Measured:
    """Both programs in turn, after checking that they compute the same."""
    compiled, compile_seconds = [], []
    for program in (case.by_jax, case.by_rules):
        jax.clear_caches()
        start = time.perf_counter()
        compiled.append(jax.jit(program).lower(*case.args).compile())
        compile_seconds.append(time.perf_counter() - start)
    expected, actual = (program(*case.args) for program in compiled)
    # Single precision, and batch norm amplifies its rounding; exactness is for the tests.
    largest = max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(expected))
    for e, a in zip(jax.tree.leaves(expected), jax.tree.leaves(actual), strict=True):
        np.testing.assert_allclose(a, e, rtol=0, atol=1e-2 * largest)
    seconds = []
    for _ in range(repeats):
        turn = []
        for program in compiled:
            jax.block_until_ready(program(*case.args))
            start = time.perf_counter()
            jax.block_until_ready(program(*case.args))
            turn.append(time.perf_counter() - start)
        seconds.append(turn)
    times = np.array(seconds)
    by_jax, by_rules = (fp.memory.CompiledGradient.of(program) for program in compiled)
    fired = sum(match.reason is None for match in fp.matches(case.function)(*case.args))
    lower, median, upper = map(float, np.percentile(times[:, 1] / times[:, 0], [25, 50, 75]))
    return Measured(
        jax_seconds=float(times[:, 0].min()),
        fp_seconds=float(times[:, 1].min()),
        lower_quartile=lower,
        median=median,
        upper_quartile=upper,
        jax_bytes=by_jax.temp,
        fp_bytes=by_rules.temp,
        jax_total_bytes=by_jax.total,
        fp_total_bytes=by_rules.total,
        jax_compile=compile_seconds[0],
        fp_compile=compile_seconds[1],
        rules=fired,
    )


def draw(results: dict[str, Measured], rows: dict[str, Row], path: Path) -> None:
    """Ratios of time and bytes beside the bounds."""
    figure, axes = plt.subplots(figsize=(9, 0.45 * len(results) + 1.4), layout="constrained")
    places = np.arange(len(results))
    medians = np.array([m.median for m in results.values()])
    spread = [
        medians - [m.lower_quartile for m in results.values()],
        [m.upper_quartile for m in results.values()] - medians,
    ]
    axes.barh(places - 0.2, medians, 0.38, xerr=spread, ecolor="grey", label="time (with quartiles)")
    axes.barh(places + 0.2, [m.bytes_ratio for m in results.values()], 0.38, label="temporary bytes")
    axes.plot([rows[name].time for name in results], places - 0.2, "k|", markersize=12, label="bound")
    axes.plot([rows[name].bytes for name in results], places + 0.2, "k|", markersize=12)
    axes.axvline(1, color="grey", linewidth=0.8, zorder=0)
    axes.set_yticks(places, list(results))
    axes.invert_yaxis()
    axes.set_xlabel("funcprop ÷ JAX")
    figure.legend(ncols=3, loc="outside upper center")
    figure.savefig(path, dpi=150)
    plt.close(figure)


COLUMNS = {
    "jax ms": 9, "fp ms": 9, "time": 7, "quartiles": 14, "≤": 7, "bytes": 8, "≤ ": 7, "all": 6, "compile": 9,
    "rules": 7,
}  # fmt: skip


def line(name: str, row: Row, m: Measured) -> str:
    """One line of the table."""
    missed = [
        "*" if value > bound else "" for value, bound in ((m.median, row.time), (m.bytes_ratio, row.bytes))
    ]
    quartiles = f"{m.lower_quartile:.2f}–{m.upper_quartile:.2f}"
    return (
        f"{name:48}{m.jax_seconds * 1e3:9.1f}{m.fp_seconds * 1e3:9.1f}{m.median:7.2f} {quartiles:>13}"
        f"{f'{row.time:.2f}{missed[0]:1}':>7}{m.bytes_ratio:8.2f}{f'{row.bytes:.2f}{missed[1]:1}':>7}"
        f"{m.fp_total_bytes / m.jax_total_bytes:6.2f}{m.fp_compile / m.jax_compile:9.2f}{m.rules:7}"
    )


def measure_torch(results: dict[str, Any], repeats: int, smoke: bool) -> dict[str, dict[str, float]]:
    """The same models in PyTorch, beside the times that were just measured."""
    from benchmark_cases import torch_models

    found: dict[str, dict[str, float]] = {}
    for name in results:
        for label, seconds in torch_models.measure(name, repeats, smoke).items():
            found.setdefault(name, {})[label] = seconds
            ratio = results[name].fp_seconds / seconds
            print(f"{name:48} {label:38} {seconds * 1e3:9.1f} ms, funcprop ÷ it {ratio:.2f}", flush=True)
    return found


def main() -> None:
    """Measure, print, and write `results/gradient_benchmark.json` and `.png`."""
    parser = command_line(__doc__, smoke="every fourth row, small shapes, one turn")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--only", nargs="*", default=[], help="cases whose name contains one of these")
    parser.add_argument("--random", type=int, default=12, help="how many random shapes")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random shapes")
    parser.add_argument("--peer", choices=["torch"], help="the same models in another library, if installed")
    options = parser.parse_args()
    rows = {**ROWS, **random_shapes.drawn(options.random, options.seed)}
    if options.smoke:
        rows = dict(list(ROWS.items())[::4])
    repeats = 1 if options.smoke else options.repeats
    results: dict[str, Measured] = {}
    print(f"jax {jax.__version__}, {jax.default_backend()}, rules {fp.rules.default.name}")
    print(f"{'model':48}" + "".join(f"{column:>{width}}" for column, width in COLUMNS.items()))
    for name, row in rows.items():
        if options.only and not any(part in name for part in options.only):
            continue
        results[name] = measure((row.small if options.smoke else row.full)(), repeats)
        print(line(name, row, results[name]), flush=True)
    peers = measure_torch(results, repeats, options.smoke) if options.peer else {}
    content = {name: {**m._asdict(), "peers": peers.get(name, {})} for name, m in results.items()}
    write("gradient_benchmark", options.smoke, content, lambda path: draw(results, rows, path), default=float)


if __name__ == "__main__":
    main()
