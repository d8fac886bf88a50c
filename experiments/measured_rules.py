"""Does `fp.rules.measured` pay? Models drawn at random, by the rules that it finds and by `fp.rules.default`.

For each model the rules are measured once, into a file; a second call reads them from it, and its seconds are
shown. Then `value_and_grad` by both sets takes turns; time is the median of paired ratios, each the second of
two runs, by the clock on the wall and by that of the process, and bytes are XLA's temporary bytes. Below 1,
what was measured is better than `default`.

    python experiments/measured_rules.py [--smoke] [--seed S] [--count N] [--only PART ...] [--repeats N]
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from matplotlib import pyplot as plt
from model_generator import Drawn, drawn
from running import blocking, both_clocks, command_line, interleaved, machine, write

import funcprop as fp


def compare(model: Drawn, repeats: int, objective: str, file: Path) -> dict[str, Any]:
    """The ratios of what was measured to `default`, and how long both calls of `measured` took."""
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        rules = fp.rules.measured(model.loss, objective=objective, file=file)(*model.args)
        seconds.append(time.perf_counter() - start)
    compiled: list[Any] = [
        jax.jit(fp.value_and_grad(model.loss, rules=each)).lower(*model.args).compile()
        for each in (fp.rules.default, rules)
    ]
    held = [c.memory_analysis().temp_size_in_bytes for c in compiled]
    turns = interleaved(
        {i: blocking(c, model.args) for i, c in enumerate(compiled)}, repeats, twice=True, clock=both_clocks
    )
    wall, cpu = map(float, np.median(turns[1] / turns[0], axis=0))
    return {
        "time": wall, "cpu": cpu, "bytes": held[1] / max(held[0], 1), "first call": seconds[0],
        "second call": seconds[1], "rules": repr(rules),
    }  # fmt: skip


def main() -> None:
    """Measure, print, and write `results/measured_rules.json` and `.png`."""
    parser = command_line(__doc__, smoke="one model, one turn")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--only", nargs="*", default=[], help="models whose name contains one of these")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--objective", choices=["time", "bytes"], default="time")
    options = parser.parse_args()
    print(f"{machine()}; {options.count} models of seed {options.seed}, for {options.objective}")
    print(f"{'time':>6}{'cpu':>6}{'bytes':>7}{'first s':>9}{'second':>7}  model")
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as place:
        for make in drawn(options.seed, 1 if options.smoke else options.count):
            model = make()
            if options.only and not any(part in model.name for part in options.only):
                continue
            repeats = 1 if options.smoke else options.repeats
            found = compare(model, repeats, options.objective, Path(place) / "measured.json")
            results[model.name] = found
            print(
                f"{found['time']:6.2f}{found['cpu']:6.2f}{found['bytes']:7.2f}{found['first call']:9.1f}"
                f"{found['second call']:7.1f}  {model.name}\n{found['rules']}",
                flush=True,
            )
            jax.clear_caches()

    def draw(path: Path) -> None:
        figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
        axes.plot([f["bytes"] for f in results.values()], [f["time"] for f in results.values()], "o")
        axes.set(xlabel="bytes ÷ default's", ylabel="time ÷ default's")
        figure.savefig(path, dpi=150)
        plt.close(figure)

    write("measured_rules", options.smoke, results, draw)


if __name__ == "__main__":
    main()
