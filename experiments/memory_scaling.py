"""Does the memory of training grow in proportion to (number of layers) × (batch size)?

The chapter says so. `L` equal layers of width `w` in a `scan`, batch `B`; compiled bytes of prediction and of
value and gradient, by least squares over a grid of `L` and `B`:

    training    c₀ + c₁ L B      every layer keeps its share of the batch
    inference   c₀ + c₁ B        one layer at a time is held, however many there are

less parameters and gradients, which do not depend on the batch. For inference `c₀ + c₁ L B` does not hold,
and cannot: of the two buffers between which the layers alternate, none is one layer's own, so that doubling
`L` adds no byte for the batch. Nor does it with the parameters counted, `4 L w²` bytes that grow with `L` but
not with `B`: then bytes are a sum `c₀ + c₁ L + c₂ B`, which no multiple of the product `L B` is. Both R² are
printed beside that of the form that holds, so that anybody can see it. For training, with parameters and
gradients counted, `L B` is nearly all there is once the batch is larger than the width.

Plain; with every layer recomputed (`jax.checkpoint` of the body), which keeps a layer's input alone; and with
`fp.memory.rematerialize` under half of the residuals.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from jax import ShapeDtypeStruct
from running import command_line, write

import funcprop as fp


def layer(x: jax.Array, w: jax.Array) -> tuple[jax.Array, None]:
    """Two non-linear steps, of which autodiff keeps the results of both."""
    return jnp.tanh(jnp.sin(x @ w)), None


def plain(w: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.mean(jax.lax.scan(layer, x, w)[0] ** 2)


def recomputed(w: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.mean(jax.lax.scan(jax.checkpoint(layer), x, w)[0] ** 2)


def budgeted(w: jax.Array, x: jax.Array) -> jax.Array:
    """Under half of what the backward sweep would keep."""
    kept = jax.eval_shape(lambda w, x: jax.vjp(plain, w, x)[1], w, x)
    budget = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(kept)) // 2
    return fp.memory.rematerialize(plain, budget)(w, x)


VARIANTS: dict[str, Callable[..., jax.Array]] = {
    "plain": plain,
    "recomputed": recomputed,
    "rematerialize, half": budgeted,
}


def measure(fun: Callable[..., jax.Array], layers: int, batch: int, width: int) -> dict[str, int]:
    """Bytes of both programs, without parameters and gradients (predicted, compiled), and with them."""
    w = ShapeDtypeStruct((layers, width, width), "float32")
    x = ShapeDtypeStruct((batch, width), "float32")
    found = fp.memory.footprint(fun)(w, x)
    fixed = {"inference": 4 * layers * width**2, "training": 8 * layers * width**2}
    bytes_of = {}
    for name, ledger in found.ledgers.items():
        assert ledger.compiled is not None
        bytes_of[name] = ledger.compiled - fixed[name]
        bytes_of[f"{name} predicted"] = ledger.predicted - fixed[name]
        bytes_of[f"{name}, all"] = ledger.compiled
    return bytes_of


def grows_with(program: str, point: dict[str, Any]) -> int:
    """The number that the bytes are proportional to."""
    return point["batch"] * (point["layers"] if program == "training" else 1)


def r_squared(values: np.ndarray, *terms: np.ndarray) -> float:
    """R² of the least-squares fit of a constant and these terms."""
    columns = np.stack([np.ones(len(values)), *terms], 1)
    solution, *_ = np.linalg.lstsq(columns, values, rcond=None)
    return float(1 - (values - columns @ solution).var() / values.var())


def fit(x: np.ndarray, values: np.ndarray) -> tuple[float, float, float]:
    """`c₀`, `c₁` and R² of `c₀ + c₁ x`."""
    c1, c0 = np.polyfit(x, values, 1)
    return float(c0), float(c1), r_squared(values, x)


def other_fits(program: str, points: list[dict[str, Any]]) -> dict[str, float]:
    """R² of `c₀ + c₁ L B`, without and with parameters, and of the sum that holds with them."""
    layers, batch, own, everything = (
        np.array([p[key] for p in points], float) for key in ("layers", "batch", program, f"{program}, all")
    )
    return {
        "L·B": r_squared(own, layers * batch),
        "L·B, parameters counted": r_squared(everything, layers * batch),
        "L, B, L·B, parameters counted": r_squared(everything, layers, batch, layers * batch),
    }


def draw(points: list[dict[str, Any]], fits: dict[str, Any], path: Path) -> None:
    """Bytes against L × B: inference and training of each variant, with the fitted lines."""
    figure = plt.figure(figsize=(10, 4.4), layout="constrained")
    for axes, program in zip(figure.subplots(1, 2), ("inference", "training"), strict=True):
        for variant in dict.fromkeys(p["variant"] for p in points):
            chosen = [p for p in points if p["variant"] == variant]
            x = np.array([grows_with(program, p) for p in chosen])
            c0, c1, r2 = fits[f"{program}, {variant}"]
            (dots,) = axes.plot(x, [p[program] / 1e6 for p in chosen], "o", markersize=4)
            ends = np.array([x.min(), x.max()])
            label = f"{variant}: {c0 / 1e6:.2f} MB + {c1:.0f} bytes · x, R² {r2:.4f}"
            axes.plot(ends, (c0 + c1 * ends) / 1e6, color=dots.get_color(), label=label)
        axes.set_title(program)
        axes.set_xlabel("x = layers × batch" if program == "training" else "x = batch")
        axes.set_ylabel("compiled MB without parameters, gradients")
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=130)


def main() -> None:
    """Measure, print, and write `results/memory_scaling.json` and `.png`."""
    parser = command_line(__doc__, smoke="a small grid")
    parser.add_argument("--width", type=int, default=128)
    options = parser.parse_args()
    depths = [4, 8] if options.smoke else [16, 32, 64, 128]
    batches = [256, 512] if options.smoke else [256, 512, 1024, 2048]
    points: list[dict[str, Any]] = []
    for variant, fun in VARIANTS.items():
        for layers in depths:
            for batch in batches:
                measured = measure(fun, layers, batch, options.width)
                points.append({"variant": variant, "layers": layers, "batch": batch, **measured})
    fits, others = {}, {}
    print(f"{'program':34} {'c₀':>12} {'c₁':>9} {'R²':>8}  {'predicted ÷ compiled':>20}  R² of other forms")
    for program in ("inference", "training"):
        for variant in VARIANTS:
            chosen = [p for p in points if p["variant"] == variant]
            x = np.array([grows_with(program, p) for p in chosen])
            values = np.array([p[program] for p in chosen])
            key = f"{program}, {variant}"
            fits[key] = fit(x, values)
            ratios = [p[f"{program} predicted"] / p[program] for p in chosen]
            c0, c1, r2 = fits[key]
            others[key] = other_fits(program, chosen)
            line = f"{key:34} {c0:12,.0f} {c1:9.1f} {r2:8.5f}  {min(ratios):9.3f} to {max(ratios):.3f}"
            print(line + "".join(f"   {form}: {value:.4f}" for form, value in others[key].items()))
    found = {"points": points, "fits": fits, "r_squared_of_other_forms": others}
    write("memory_scaling", options.smoke, found, lambda path: draw(points, fits, path))


if __name__ == "__main__":
    main()
