"""What do second-order quantities cost? Each against plain jitted `jax.value_and_grad` of the same loss.

Two classifiers at batch 128, mean cross-entropy: an MLP 784-512-256-10, and a CNN of three convolutions
(each with relu and an overlapping max-pool) and three dense layers. Data and parameters are arguments, never
constants (XLA would fold them). All programs of a model take turns, in which the second of two runs counts;
each turn gives one ratio of a quantity's time to the gradient's of the same turn, and the table shows the
median of these paired ratios with its quartiles, beside the fastest time. A star marks a bound that is not
reached. `law` is what a quantity's products take at the least in floating-point operations, and `done` what
the compiled program takes in all, both ÷ the gradient's law.

`--peer` adds BackPACK, curvlinops and laplace-torch for PyTorch and kfac-jax for JAX, as far as they are
installed, with the same weights and data. What they compute is compared with ours before any time is taken:
1e-4 of the largest entry of each parameter, by the conventions that `benchmark_cases/curvature_peers` tells.
What is drawn at random is not compared; the input factors of KFAC are not random. `÷ own` is their time to
the gradient of their own framework, `÷ ours` to our time in the same turn.

The exact Hessian diagonal has two models of its own and is measured against what it replaces: as many
Hessian-vector products as there are parameters, each the jitted `jax.jvp` of `jax.grad`. A run of them is
timed in each turn, and multiplied.

    python experiments/curvature_benchmark.py [--smoke] [--repeats N] [--model NAME] [--only NAME ...]
                                              [--peer]
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import matplotlib as mpl
import numpy as np
from benchmark_cases.curvature import (
    JOINT,
    JOINT_BOUND,
    PARTS,
    PROBLEMS,
    QUANTITIES,
    Layers,
    Problem,
    gradient,
    gradient_law,
)
from benchmark_cases.hessian_diagonal import DIAGONALS, Case
from jax.flatten_util import ravel_pytree
from running import blocking, command_line, interleaved, write

import funcprop as fp
from funcprop.cost.work import of_compiled

mpl.use("Agg")
import matplotlib.pyplot as plt

GRADIENT = "value and gradient"
DIAGONAL = "exact Hessian diagonal"
PRODUCTS = 50  # in a run
AGREEMENT = 1e-4


class Measured(NamedTuple):
    """Fastest seconds, quartiles of the paired ratios to the gradient, temporary bytes, and the bound.

    `law` is what the products of the quantity take at the least, and `done` what the compiled program takes,
    both as shares of the gradient's law.
    """

    seconds: float
    lower_quartile: float
    median: float
    upper_quartile: float
    temporary_bytes: int
    bound: float | None
    law: float | None = None
    done: float | None = None


def measured(
    seconds: np.ndarray, beside: np.ndarray, program: Any, bound: float | None, *shares: float
) -> Measured:
    """What the turns of a compiled program and those of what it is measured against say."""
    lower, median, upper = map(float, np.percentile(seconds / beside, [25, 50, 75]))
    temporary = fp.memory.CompiledGradient.of(program).temp
    return Measured(float(seconds.min()), lower, median, upper, temporary, bound, *shares)


def measure(
    model: str, p: Problem, quantities: list[str], repeats: int
) -> tuple[dict[str, Measured], dict[str, Callable[[], Any]]]:
    """All quantities of one model beside its gradient; and the steps that compute them."""
    programs = {GRADIENT: gradient(p), **{name: QUANTITIES[name].program(p) for name in quantities}}
    compiled = {name: jax.jit(q.function).lower(*q.args).compile() for name, q in programs.items()}
    steps = {name: blocking(compiled[name], q.args) for name, q in programs.items()}
    for step in steps.values():
        step()
    times = interleaved(steps, repeats, twice=True)
    found, layers = {}, Layers.of(p)
    unit = gradient_law(layers)
    for name, seconds in times.items():
        bound = None if name == GRADIENT else QUANTITIES[name].bounds.get(model)
        law = unit if name == GRADIENT else QUANTITIES[name].law(layers)
        shares = law / unit, of_compiled(compiled[name]).flops / unit
        found[name] = measured(seconds, times[GRADIENT], compiled[name], bound, *shares)
    if {JOINT, *PARTS} <= set(times):
        ratio = float(np.median(times[JOINT] / sum(times[part] for part in PARTS)))
        missed = "*" if ratio > JOINT_BOUND else ""
        print(
            f"{model:5} {JOINT} ÷ the sum of four passes: {ratio:.2f} (≤ {JOINT_BOUND}{missed})", flush=True
        )
    return found, steps


def measure_peers(
    model: str, p: Problem, ours: dict[str, Callable[[], Any]], repeats: int
) -> dict[str, dict[str, float | None]]:
    """The libraries' fastest seconds, taken in turn with ours, after a comparison of what they compute."""
    from benchmark_cases import curvature_peers

    steps, differences = {}, {}
    for peer in curvature_peers.peers(model, p, list(ours)):
        expected = curvature_peers.SHOWN[peer.quantity](ours[peer.quantity]())
        difference = curvature_peers.difference(expected, peer.way.value())
        if difference is not None and not difference <= AGREEMENT:  # NaN compares as false
            raise AssertionError(
                f"{model}, {peer.quantity}: {peer.library} differs by {difference:.1e} of a largest entry."
            )
        differences[peer] = difference
        steps[peer.quantity, peer.library] = peer.way.step
        # Ours next to each of theirs: what runs before a program changes its time by some percent.
        steps[peer.quantity, f"ours beside {peer.library}"] = ours[peer.quantity]
    steps[GRADIENT, "ours"] = ours[GRADIENT]
    times = interleaved(steps, repeats, twice=True)
    found = {}
    for peer, difference in differences.items():
        seconds = times[peer.quantity, peer.library]
        row = {
            "seconds": float(seconds.min()),
            "to its gradient": float(np.median(seconds / times[GRADIENT, peer.own])),
            "to ours": float(np.median(seconds / times[peer.quantity, f"ours beside {peer.library}"])),
        }
        found[f"{peer.quantity}, {peer.library}"] = {**row, "difference": difference}
        compared = "random" if difference is None else f"{difference:.0e}"
        print(
            f"{model:5} {peer.quantity:28} {peer.library:14}{row['seconds'] * 1e3:9.1f} ms, ÷ own "
            f"{row['to its gradient']:6.2f}, ÷ ours {row['to ours']:6.2f}, difference {compared}",
            flush=True,
        )
    return found


def measure_diagonal(name: str, case: Case, repeats: int) -> Measured:
    """The exact diagonal, its ratios to P Hessian-vector products, after a comparison with eight of these."""
    flat, unravel = ravel_pytree(case.args[0])

    def product(params: Any, index: Any, *data: Any) -> Any:
        direction = unravel((jax.numpy.arange(flat.size) == index).astype(flat.dtype))
        return jax.jvp(lambda p: jax.grad(case.loss)(p, *data), (params,), (direction,))[1]

    diagonal = jax.jit(fp.curvature.hessian_diagonal(case.loss)).lower(*case.args).compile()
    one = jax.jit(product).lower(case.args[0], 0, *case.args[1:]).compile()
    found = ravel_pytree(diagonal(*case.args))[0]
    for index in np.random.default_rng(0).choice(flat.size, 8):
        expected = ravel_pytree(one(case.args[0], index, *case.args[1:]))[0][index]
        np.testing.assert_allclose(found[index], expected, rtol=1e-3, atol=1e-5 * float(abs(found).max()))

    def products() -> None:
        for index in range(PRODUCTS):
            jax.block_until_ready(one(case.args[0], index, *case.args[1:]))

    times = interleaved({DIAGONAL: blocking(diagonal, case.args), "products": products}, repeats)
    every = times["products"] * (flat.size / PRODUCTS)
    return measured(times[DIAGONAL], every, diagonal, case.bound)


def line(model: str, name: str, m: Measured) -> str:
    """One line of the table."""
    bound = "" if m.bound is None else f"{m.bound:.2f}{'*' if m.median > m.bound else ' '}"
    quartiles = f"{m.lower_quartile:.2f}–{m.upper_quartile:.2f}"
    return (
        f"{model:5} {name:37}{m.seconds * 1e3:9.1f}{m.median:8.2f} {quartiles:>13}{bound:>8}"
        + "".join(f"{'' if share is None else f'{share:.2f}':>8}" for share in (m.law, m.done))
        + f"{m.temporary_bytes / 2**20:10.1f}"
    )


def draw(results: dict[str, dict[str, Measured]], path: Path) -> None:
    """The ratios beside their bounds, one panel a model."""
    figure, panels = plt.subplots(
        1, len(results), figsize=(6 * len(results), 3.5), layout="constrained", squeeze=False
    )
    for axes, (model, found) in zip(panels[0], results.items(), strict=True):
        rows = {name: m for name, m in found.items() if name != GRADIENT}
        places = np.arange(len(rows))
        medians = np.array([m.median for m in rows.values()])
        spread = [
            medians - [m.lower_quartile for m in rows.values()],
            [m.upper_quartile for m in rows.values()] - medians,
        ]
        axes.barh(places, medians, 0.6, xerr=spread, ecolor="grey")
        bounds = [np.nan if m.bound is None else m.bound for m in rows.values()]
        axes.plot(bounds, places, "k|", markersize=16)
        axes.axvline(1, color="grey", linewidth=0.8)
        axes.set_yticks(places, list(rows))
        axes.invert_yaxis()
        axes.set_xlabel("time ÷ jax.value_and_grad (bar: bound)")
        axes.set_title(model)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    """Measure, print, and write `results/curvature_benchmark.json` and `.png`."""
    parser = command_line(__doc__, smoke="the MLP and one diagonal, small batches, one turn")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--model", choices=list(PROBLEMS), help="one model alone")
    parser.add_argument("--only", nargs="*", default=[], help="quantities whose name contains one of these")
    parser.add_argument("--peer", action="store_true", help="the same in other libraries, if installed")
    options = parser.parse_args()
    repeats = 1 if options.smoke else options.repeats
    quantities = [q for q in QUANTITIES if not options.only or any(part in q for part in options.only)]
    print(f"jax {jax.__version__}, {jax.default_backend()}, rules {fp.rules.default.name}")
    print(f"{'':43}{'ms':>9}{'ratio':>8}{'quartiles':>14}{'≤':>8}{'law':>8}{'done':>8}{'temp MB':>10}")
    results: dict[str, dict[str, Measured]] = {}
    peers: dict[str, dict[str, dict[str, float | None]]] = {}
    for model, (full, small) in PROBLEMS.items():
        if options.model not in (None, model) or (options.smoke and results):
            continue
        p = (small if options.smoke else full)()
        left_out = {q: QUANTITIES[q].left_out[model] for q in quantities if model in QUANTITIES[q].left_out}
        results[model], steps = measure(model, p, [q for q in quantities if q not in left_out], repeats)
        for name, m in results[model].items():
            print(line(model, name, m), flush=True)
        for name, why in left_out.items():
            print(f"{model:5} {name:37}{why}", flush=True)
        if options.peer:
            peers[model] = measure_peers(model, p, steps, repeats)
    diagonals: dict[str, Measured] = {}
    if options.model is None and (not options.only or any(part in DIAGONAL for part in options.only)):
        print(f"{DIAGONAL} ÷ P products")
        for name, (whole, part) in list(DIAGONALS.items())[: 1 if options.smoke else None]:
            diagonals[name] = measure_diagonal(name, (part if options.smoke else whole)(), repeats)
            print(line("", name, diagonals[name]), flush=True)
    content: dict[str, Any] = {
        model: {"ours": {name: m._asdict() for name, m in found.items()}, "peers": peers.get(model, {})}
        for model, found in results.items()
    }
    content[DIAGONAL] = {name: m._asdict() for name, m in diagonals.items()}
    write("curvature_benchmark", options.smoke, content, lambda path: draw(results, path))


if __name__ == "__main__":
    main()
