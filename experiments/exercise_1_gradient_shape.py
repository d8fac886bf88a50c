"""Exercise 1: the gradient of a scalar function of an n × m matrix is n × m; its Hessian has (nm)² entries.

For several functions and sizes: the shape that `fp.trace` predicts for the gradient from types alone, the
shape that `fp.grad` returns, and the shape and bytes of the Hessian, n × m × n × m. Both derivatives are
checked against central differences in double precision.

    python experiments/exercise_1_gradient_shape.py [file.py:function] [--smoke]
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
from running import write
from running.exercises import answered, exercise_line

import funcprop as fp

mpl.use("Agg")
import matplotlib.pyplot as plt

FUNCTIONS: dict[str, Callable[[Any], Any]] = {
    "Σ sin X": lambda x: jnp.sum(jnp.sin(x)),
    "log det (I + Xᵀ X)": lambda x: jnp.linalg.slogdet(jnp.eye(x.shape[1]) + x.T @ x)[1],
    "‖tanh(X Xᵀ)‖²": lambda x: jnp.sum(fp.layers.tanh(x @ x.T) ** 2),
}


def differences(f: Callable[[Any], Any], x: np.ndarray, step: float) -> np.ndarray:
    """Central differences of `f` by every entry of `x`, with the entries' axes last."""
    columns = []
    for index in np.ndindex(x.shape):
        moved = np.zeros_like(x)
        moved[index] = step
        columns.append((np.asarray(f(x + moved)) - np.asarray(f(x - moved))) / (2 * step))
    return np.stack(columns, -1).reshape(*columns[0].shape, *x.shape)


def measure(label: str, rows: int, columns: int) -> dict[str, Any]:
    """Predicted and computed shapes, and the largest deviations from central differences."""
    f = FUNCTIONS[label]
    x = np.random.default_rng(rows + 100 * columns).standard_normal((rows, columns)) / 2
    (predicted,) = fp.trace(fp.grad(f))(jax.ShapeDtypeStruct(x.shape, x.dtype)).outputs
    gradient = jax.jit(fp.grad(f))(x)
    hessian = jax.jit(fp.jacobian(fp.grad(f)))(x)
    assert predicted.shape == gradient.shape == (rows, columns)
    assert hessian.size == (rows * columns) ** 2
    deviations = [
        float(np.max(np.abs(a - b)) / max(np.max(np.abs(b)), 1e-3))
        for a, b in (
            (gradient, differences(jax.jit(f), x, 1e-6)),
            (hessian, differences(jax.jit(jax.grad(f)), x, 1e-6)),
        )
    ]
    assert max(deviations) < 1e-6, deviations
    return {
        "function": label,
        "n": rows,
        "m": columns,
        "gradient_predicted": list(predicted.shape or ()),
        "gradient": list(gradient.shape),
        "gradient_bytes": gradient.nbytes,
        "hessian_entries_predicted": (rows * columns) ** 2,
        "hessian": list(hessian.shape),
        "hessian_entries": math.prod(hessian.shape),
        "hessian_bytes": hessian.nbytes,
        "asymmetry": float(np.max(np.abs(hessian - np.transpose(hessian, (2, 3, 0, 1))))),
        "deviation_of_gradient": deviations[0],
        "deviation_of_hessian": deviations[1],
    }


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """A gradient in the shape of its argument, its Hessian as a matrix, and how both grow."""
    figure, axes = plt.subplots(1, 3, figsize=(12, 4), layout="constrained", width_ratios=[1, 1, 1.4])
    f, x = FUNCTIONS["log det (I + Xᵀ X)"], np.random.default_rng(0).standard_normal((4, 3)) / 2
    hessian = fp.jacobian(fp.grad(f))(x).reshape(12, 12)
    shown = (fp.grad(f)(x), "∂f/∂X of a 4 × 3 matrix: 4 × 3"), (hessian, "its Hessian: (4 · 3)² entries")
    for axis, (values, title) in zip(axes, shown, strict=False):
        largest = float(np.max(np.abs(values)))
        image = axis.imshow(values, cmap="RdBu", vmin=-largest, vmax=largest)
        axis.set_title(title, fontsize=10)
        axis.set(xticks=[], yticks=[])
        figure.colorbar(image, ax=axis, shrink=0.7)
    entries = np.array([r["n"] * r["m"] for r in results])
    line = np.array([entries.min(), entries.max()])
    for key, power, label in (("gradient", 1, "gradient"), ("hessian", 2, "Hessian")):
        axes[2].plot(line, 8 * line**power, color="grey", linewidth=1)
        axes[2].plot(entries, [r[f"{key}_bytes"] for r in results], "o", label=label)
    axes[2].set(xscale="log", yscale="log", xlabel="entries of X, nm", ylabel="bytes in double precision")
    axes[2].set_title("lines: 8 nm and 8 (nm)²", fontsize=10)
    axes[2].legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    """Measure, print, and write `results/exercise_1_gradient_shape.json` and `.png`."""
    parser = exercise_line(__doc__, smoke="two small sizes")
    options = parser.parse_args()
    if answered(1, options):
        return
    sizes = [(2, 3), (3, 1)] if options.smoke else [(1, 1), (2, 3), (3, 2), (5, 4), (8, 8), (16, 10)]
    results = []
    print(f"{'function':22}{'X':>9}{'∂f/∂X':>9}{'Hessian':>20}{'(nm)²':>10}{'entries':>10}{'deviations':>20}")
    with jax.enable_x64(True):
        for label in FUNCTIONS:
            for rows, columns in sizes:
                r = measure(label, rows, columns)
                results.append(r)
                gradient, hessian = (" × ".join(map(str, r[k])) for k in ("gradient", "hessian"))
                print(
                    f"{label:22}{f'{rows} × {columns}':>9}{gradient:>9}{hessian:>20}"
                    f"{r['hessian_entries_predicted']:10,}{r['hessian_entries']:10,}"
                    f"{r['deviation_of_gradient']:10.0e}{r['deviation_of_hessian']:10.0e}"
                )
        write("exercise_1_gradient_shape", options.smoke, results, lambda path: draw(results, path))


if __name__ == "__main__":
    main()
