"""Models drawn at random: does `fp.rules.default` ever lose against autodiff, and by which rule?

Time is the median of paired ratios, each the second of two runs in turn, by the clock on the wall and by that
of the process (`cpu`), which other processes disturb less; bytes are XLA's temporary bytes of the compiled
programs. Where a whole function loses, it is compiled and run without one rule after the other,
and the rule without which it does not lose is named. `--bytes` runs nothing and compares bytes alone.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from matplotlib import pyplot as plt
from model_generator import Drawn, drawn
from running import blocking, both_clocks, command_line, interleaved, machine, write

import funcprop as fp

TIME, BYTES = 1.03, 1.02


def measure(model: Drawn, rules: fp.RuleSet, repeats: int) -> dict[str, float]:
    """The ratios of time by both clocks (NaN if nothing is run) and bytes."""
    programs = jax.value_and_grad(model.loss), fp.value_and_grad(model.loss, rules=rules)
    compiled: list[Any] = [jax.jit(program).lower(*model.args).compile() for program in programs]
    held = [c.memory_analysis().temp_size_in_bytes for c in compiled]
    wall = cpu = float("nan")
    if repeats:
        steps = {i: blocking(c, model.args) for i, c in enumerate(compiled)}
        seconds = interleaved(steps, repeats, twice=True, clock=both_clocks)
        wall, cpu = map(float, np.median(seconds[1] / seconds[0], axis=0))
    return {"time": wall, "cpu": cpu, "bytes": held[1] / max(held[0], 1), "autodiff bytes": held[0]}


def loses(found: dict[str, float]) -> bool:
    return found["bytes"] > BYTES or found["time"] > TIME


def line(found: dict[str, float]) -> str:
    return f"{found['time']:6.2f}{found['cpu']:6.2f}{found['bytes']:7.3f}"


def losing_rules(model: Drawn, repeats: int) -> dict[str, dict[str, float]]:
    """The ratios without one rule at a time, of those rules without which the function does not lose."""
    fired = {m.operator for m in fp.matches(model.loss)(*model.args) if m.reason is None}
    found = {}
    for name in sorted(fired):
        operator: Any = getattr(fp.layers, name, name)
        without = measure(model, fp.rules.default.replace({operator: None}), repeats)
        if not loses(without):
            found[name] = without
    return found


def main() -> None:
    """Measure, print, and write `results/never_worse.json` and `.png`."""
    parser = command_line(__doc__, smoke="three models, bytes alone")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=60)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--bytes", action="store_true", help="compare bytes, run nothing")
    parser.add_argument("--only", nargs="*", default=[], help="models whose name contains one of these")
    options = parser.parse_args()
    repeats = 0 if options.bytes or options.smoke else options.repeats
    print(f"{machine()}; {options.count} models of seed {options.seed}, rules {fp.rules.default.name}")
    print(f"{'time':>6}{'cpu':>6}{'bytes':>7}{'rules':>7}  model")
    results: dict[str, Any] = {}
    for make in drawn(options.seed, 3 if options.smoke else options.count):
        model = make()
        if options.only and not any(part in model.name for part in options.only):
            continue
        found: dict[str, Any] = measure(model, fp.rules.default, repeats)
        fired = sum(m.reason is None for m in fp.matches(model.loss)(*model.args))
        mark = "*" if loses(found) else ""
        print(f"{line(found)}{fired:7}{mark:2}{model.name}", flush=True)
        if mark:
            found["without"] = losing_rules(model, repeats)
            for name, ratios in found["without"].items():
                print(f"{line(ratios)}         without {name}", flush=True)
        results[model.name] = {**found, "rules": fired}
        jax.clear_caches()
    lost = [name for name, found in results.items() if loses(found)]
    print(f"{len(lost)} of {len(results)} lose: time above {TIME} or bytes above {BYTES}")

    def draw(path: Any) -> None:
        figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
        axes.plot([f["bytes"] for f in results.values()], [f["time"] for f in results.values()], "o")
        axes.axhline(TIME, color="grey")
        axes.axvline(BYTES, color="grey")
        axes.set(xlabel="bytes ÷ autodiff's", ylabel="time ÷ autodiff's")
        figure.savefig(path, dpi=150)
        plt.close(figure)

    write("never_worse", options.smoke, results, draw, default=float)


if __name__ == "__main__":
    main()
