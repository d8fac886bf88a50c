"""What does `fp.grad` cost besides the numbers? CPU time of calls without jit, and until all is compiled.

A call without jit is python and dispatch: the function runs, is differentiated and forgotten. A jitted
gradient is traced, lowered and compiled once, which starts here with empty caches. `jax.grad` and `fp.grad`
take turns; each turn gives one ratio of CPU times, and the table shows the median of these paired ratios
with its quartiles, beside the median milliseconds of each. Calls are timed by the clock of their thread, the
second of two rounds of them; compilations by that of the process, because XLA compiles in several threads. A
star marks a missed bound.

    python experiments/eager_benchmark.py [--smoke] [--repeats N] [--only NAME ...] [--rules NAME]
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
from benchmark_cases import ROWS
from benchmark_cases.case import normal
from jax import lax
from running import command_line, interleaved, machine, write

import funcprop as fp

mpl.use("Agg")
import matplotlib.pyplot as plt

RULES = {rules.name: rules for rules in (fp.rules.default, fp.rules.handwritten)}


class Program(NamedTuple):
    """A function to differentiate in its first argument, its arguments, and how many calls make a round."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    calls: int = 1


# --- calls without jit ------------------------------------------------------------------------


def mlp(weights: list[jax.Array], x: jax.Array) -> jax.Array:
    for w in weights:
        x = jnp.tanh(x @ w)
    return jnp.mean(x**2)


def plain_mlp() -> Program:
    return Program(mlp, ([normal(32, 32, seed=i) / 6 for i in range(3)], normal(16, 32)), 10)


def jitted_mlp() -> Program:
    return Program(jax.jit(mlp), ([normal(32, 32, seed=i) / 6 for i in range(30)], normal(16, 32)), 5)


def step(carry: Any, x: jax.Array) -> tuple[Any, None]:
    w, h = carry
    return (w, jnp.tanh(h @ w + x)), None


def scan() -> Program:
    """Its body is one function, so that JAX compiles it once."""

    def loss(w: jax.Array, xs: jax.Array) -> jax.Array:
        return jnp.mean(lax.scan(step, (w, jnp.zeros_like(xs[0])), xs)[0][1] ** 2)

    return Program(loss, (normal(32, 32) / 6, normal(5, 16, 32)), 5)


def scan_of_a_closure() -> Program:
    """Its body is a new function in each call, which JAX traces and compiles again."""

    def loss(w: jax.Array, xs: jax.Array) -> jax.Array:
        body = lambda h, x: (jnp.tanh(h @ w + x), None)  # noqa: E731
        return jnp.mean(lax.scan(body, jnp.zeros_like(xs[0]), xs)[0] ** 2)

    return Program(loss, (normal(32, 32) / 6, normal(5, 16, 32)), 5)


def max_pool() -> Program:
    def loss(x: jax.Array) -> jax.Array:
        return jnp.sum(lax.reduce_window(x, -jnp.inf, lax.max, (2, 2), (2, 2), "VALID"))

    return Program(loss, (normal(4, 4),), 10)


def many_numbers() -> Program:
    numbers = {str(i): i for i in range(50_000)}
    return Program(lambda x, numbers: x * numbers["3"], (1.0, numbers), 10)


class Row(NamedTuple):
    """What is measured, and the bound on the ratio that is sought; None where there is none."""

    make: Callable[[], Program]
    bound: float | None


CALLS = {
    "MLP of 3 layers": Row(plain_mlp, 1.25),
    "scan of 5 steps": Row(scan, 1.25),
    "scan of 5 steps, a closure": Row(scan_of_a_closure, 1.25),
    "jitted MLP of 30 layers": Row(jitted_mlp, 1.25),
    "max-pool 4 × 4": Row(max_pool, None),
    "50,000 numbers beside": Row(many_numbers, 1.1),
}

# --- from function to executable --------------------------------------------------------------


def of_benchmark(name: str, smoke: bool) -> Program:
    case = (ROWS[name].small if smoke else ROWS[name].full)()
    return Program(case.function, case.args)


COMPILED = {
    "Flax transformer, 12 blocks": 1.05,
    "Flax CNN, batch 128": 1.10,
    "LSTM, T64 B4 H512": 1.10,
}


# --- measuring --------------------------------------------------------------------------------


class Measured(NamedTuple):
    """Median seconds of one call or compilation by each way, and quartiles of the paired ratios."""

    jax_seconds: float
    fp_seconds: float
    lower_quartile: float
    median: float
    upper_quartile: float
    bound: float | None


def paired(seconds: dict[str, np.ndarray], calls: int, bound: float | None) -> Measured:
    """Of the seconds of both in each turn."""
    by_jax, by_rules = seconds["jax"] / calls, seconds["fp"] / calls
    lower, median, upper = map(float, np.percentile(by_rules / by_jax, [25, 50, 75]))
    return Measured(float(np.median(by_jax)), float(np.median(by_rules)), lower, median, upper, bound)


def gradients(program: Program, rules: fp.RuleSet) -> dict[str, Callable[..., Any]]:
    """The two gradients, after checking that they are the same."""
    ways = {"jax": jax.grad(program.function), "fp": fp.grad(program.function, rules=rules)}
    expected, actual = (jax.tree.leaves(way(*program.args)) for way in ways.values())
    for e, a in zip(expected, actual, strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-4, atol=1e-5)
    return ways


def measure_calls(program: Program, rules: fp.RuleSet, bound: float | None, repeats: int) -> Measured:
    """CPU time of the calling thread, for calls without jit."""

    def calls(gradient: Callable[..., Any]) -> None:
        for _ in range(program.calls):
            jax.block_until_ready(gradient(*program.args))

    steps: dict[str, Callable[[], Any]] = {
        name: partial(calls, way) for name, way in gradients(program, rules).items()
    }
    seconds = interleaved(steps, repeats, twice=True, clock=time.thread_time)
    return paired(seconds, program.calls, bound)


def measure_compilation(program: Program, rules: fp.RuleSet, bound: float | None, repeats: int) -> Measured:
    """CPU time of the process, from function to executable with empty caches."""

    def executable(transformation: Callable[..., Any]) -> None:
        jax.jit(transformation(program.function)).lower(*program.args).compile()

    steps: dict[str, Callable[[], Any]] = {
        "jax": lambda: executable(jax.value_and_grad),
        "fp": lambda: executable(partial(fp.value_and_grad, rules=rules)),
    }
    for step in steps.values():  # The first compilation of a process imports and warms up.
        step()
    seconds = interleaved(steps, repeats, before=jax.clear_caches, clock=time.process_time)
    return paired(seconds, 1, bound)


def line(name: str, m: Measured) -> str:
    """One line of the table."""
    bound = "" if m.bound is None else f"{m.bound:.2f}{'*' if m.median > m.bound else ' '}"
    quartiles = f"{m.lower_quartile:.2f}–{m.upper_quartile:.2f}"
    milliseconds = f"{m.jax_seconds * 1e3:10.2f}{m.fp_seconds * 1e3:10.2f}"
    return f"{name:38}{milliseconds}{m.median:8.2f} {quartiles:>13}{bound:>8}"


def draw(results: dict[str, Measured], path: Path) -> None:
    """The ratios beside their bounds."""
    figure, axes = plt.subplots(figsize=(7, 0.4 * len(results) + 1), layout="constrained")
    places = np.arange(len(results))
    medians = np.array([m.median for m in results.values()])
    spread = [
        medians - [m.lower_quartile for m in results.values()],
        [m.upper_quartile for m in results.values()] - medians,
    ]
    axes.barh(places, medians, xerr=spread, ecolor="grey")
    axes.plot([m.bound or np.nan for m in results.values()], places, "k|", markersize=16, label="bound")
    axes.axvline(1, color="grey", linewidth=0.8, zorder=0)
    axes.set_yticks(places, list(results))
    axes.invert_yaxis()
    axes.set_xlabel("CPU time, fp.grad ÷ jax.grad")
    figure.legend(loc="outside upper center")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    """Measure, print, and write `results/eager_benchmark.json` and `.png`."""
    parser = command_line(__doc__, smoke="one small model of those that are compiled, one turn")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--only", nargs="*", default=[], help="rows whose name contains one of these")
    parser.add_argument("--rules", choices=RULES, default=fp.rules.default.name)
    options = parser.parse_args()
    repeats, rules = 1 if options.smoke else options.repeats, RULES[options.rules]
    found: dict[str, Measured] = {}
    print(f"{machine()}; rules {rules.name}, {repeats} turns")
    print(f"{'CPU time':38}{'jax ms':>10}{'fp ms':>10}{'ratio':>8} {'quartiles':>13}{'≤ ':>8}")

    def wanted(name: str) -> bool:
        return not options.only or any(part in name for part in options.only)

    for name, row in CALLS.items():
        if wanted(name):
            found[name] = measure_calls(row.make(), rules, row.bound, repeats)
            print(line(name, found[name]), flush=True)
    for name, bound in list(COMPILED.items())[-1 if options.smoke else 0 :]:
        if wanted(name):
            program = of_benchmark(name, options.smoke)
            found[name] = measure_compilation(program, rules, bound, repeats)
            print(line(f"compile {name}", found[name]), flush=True)
    results = {name: m._asdict() for name, m in found.items()}
    content = {"machine": machine(), "rules": rules.name, "repeats": repeats, "rows": results}
    write("eager_benchmark", options.smoke, content, lambda path: draw(found, path))


if __name__ == "__main__":
    main()
