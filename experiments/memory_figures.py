"""What the memory room says, against XLA: rows and their peak, the estimate, and rematerialisation.

Forty models are drawn by a seed (`memory_cases/models.py`): the loss, and its gradient or a step of Adam,
with the default rules and by autodiff in turn. For each program the rows' sum is compared with
`argument + output + temp − alias`, the rows without gaps with `temp`, and the estimate with all
compiled bytes.
Then six models are rematerialised at a half and at a quarter of what they hold, and the temporary bytes of
their compiled gradients are compared with the plain ones. Nothing is run, everything is compiled.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import matplotlib.pyplot as plt
import numpy as np
import optax
from memory_cases import Loss, drawn, to_rematerialise
from running import command_line, write

import funcprop as fp
from funcprop._jax import held_bytes, memory_fields

WITHIN = 0.15


def accounted(model: Loss, i: int) -> list[dict[str, Any]]:
    """The lines of a model's programs."""
    optimizer = (None, optax.adam(1e-3))[i % 2]
    rules = (fp.rules.default, fp.rules.autodiff)[i // 2 % 2]
    found = fp.memory.footprint(model.fun, has_aux=model.has_aux, optimizer=optimizer, rules=rules)(
        *model.args
    )
    lines = []
    for name, ledger in found.ledgers.items():
        rows = sum(row.nbytes for row in ledger.rows if row.category != "constants")
        gaps = ledger.by("category").get("unused", 0)
        line = {"model": model.name, "program": name, "rules": rules.name, "adam": optimizer is not None}
        line |= {"rows": rows, "xla": held_bytes(ledger.fields), "live": ledger.fields["live"]}
        line |= {"gaps": gaps, "hidden": ledger.fields["hidden"], "estimate": ledger.estimate}
        lines.append({**line, "ratio": ledger.ratio})
    return lines


def rematerialised(model: Loss, budget: float) -> dict[str, Any]:
    """One model under one budget."""
    plan = fp.memory.remat_plan(model.fun, budget)(*model.args)
    lean = fp.memory.rematerialize(model.fun, budget)

    def temp(fun: Any, options: dict[str, str] | None) -> int:
        gradient = jax.jit(jax.value_and_grad(fun, has_aux=model.has_aux), compiler_options=options)
        return memory_fields(gradient.lower(*model.args).compile())["temporary"]

    line = {"model": model.name, "budget": budget, "held": plan.residual_bytes / plan.plain_residual_bytes}
    line |= {"again": plan.extra_flops / plan.forward_flops, "reason": plan.reason}
    return {**line, "temp": temp(lean, plan.compiler_options or None) / temp(model.fun, None)}


def draw(content: dict[str, Any], path: Path) -> None:
    """The estimate's ratios, and the temporary bytes that are left."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for name in ("inference", "training"):
        ratios = sorted(line["ratio"] for line in content["footprints"] if line["program"] == name)
        left.plot(np.linspace(0, 1, len(ratios)), ratios, ".", label=name)
    left.axhspan(1 - WITHIN, 1 + WITHIN, alpha=0.15)
    left.set_xlabel("share of the models")
    left.set_ylabel("estimate ÷ compiled bytes")
    left.legend()
    for budget in sorted({line["budget"] for line in content["rematerialised"]}):
        lines = [line for line in content["rematerialised"] if line["budget"] == budget]
        right.plot(
            [line["temp"] for line in lines], [line["model"] for line in lines], "o", label=f"{budget:.0%}"
        )
    right.set_xlabel("temporary bytes ÷ plain ones")
    right.legend(title="held between the sweeps")
    figure.savefig(path, dpi=130)


def main() -> None:
    """Measure, print, and write `results/memory_figures.json` and `.png`."""
    parser = command_line(__doc__, smoke="one drawn model, one rematerialised at a half")
    parser.add_argument("--seed", type=int, default=20261129)
    parser.add_argument("--count", type=int, default=40, help="drawn models")
    options = parser.parse_args()
    print(f"jax {jax.__version__}, {jax.default_backend()}")
    footprints: list[dict[str, Any]] = []
    for i, model in enumerate(drawn(options.seed, 1 if options.smoke else options.count)):
        for line in accounted(model, i):
            footprints.append(line)
            same = "=" if line["rows"] == line["xla"] else "≠"
            print(
                f"{line['model']:36} {line['program']:9} {line['rules']:8} rows {line['rows']:>12,} {same} "
                f"XLA {line['xla']:>12,}  gaps {line['gaps']:>9,}  estimate ÷ compiled {line['ratio']:.3f}",
                flush=True,
            )
    near = sum(abs(line["ratio"] - 1) <= WITHIN for line in footprints)
    equal = sum(line["rows"] == line["xla"] for line in footprints)
    print(f"rows equal to XLA in {equal} of {len(footprints)}; estimate within 15 % in {near}")
    remat: list[dict[str, Any]] = []
    for model in to_rematerialise()[-1:] if options.smoke else to_rematerialise():
        for budget in (0.5,) if options.smoke else (0.5, 0.25):
            line = rematerialised(model, budget)
            remat.append(line)
            print(
                f"{line['model']:12} {budget:.0%}: held {line['held']:.2f}, again {line['again']:.2f}, "
                f"temporary {line['temp']:.2f}  {line['reason'] or ''}",
                flush=True,
            )
    write(
        "memory_figures",
        options.smoke,
        {"footprints": footprints, "rematerialised": remat},
        lambda p: draw({"footprints": footprints, "rematerialised": remat}, p),
    )


if __name__ == "__main__":
    main()
