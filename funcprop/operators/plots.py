"""Pictures of spectra, diagonals and traces, by matplotlib (the extra `draw`), on axes that may be given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from funcprop.operators.estimate import Estimate

BAND = 0.95  # the confidence of bands and error bars
HEIGHT, WIDTH = 3.6, 5.4  # inches
_SHADE = 0.25


def axes_or_new(axes: Any, rows: int | None = None) -> Any:
    """The axes that are given, or new ones; with so many rows of text, of a height for them.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    if axes is not None:
        return axes
    try:
        from matplotlib import pyplot  # It loads slowly, and few draw.
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "plot() needs matplotlib, which is not installed; pip install 'funcprop[draw]'."
        ) from error
    height = HEIGHT if rows is None else max(HEIGHT, 0.8 + 0.28 * rows)
    return pyplot.subplots(figsize=(WIDTH, height), layout="constrained")[1]


def plot_density(grid: Float[np.ndarray, " g"], density: Estimate, axes: Any) -> Any:
    """A density of eigenvalues on a logarithmic scale, with the band of its error bars."""
    axes = axes_or_new(axes)
    value = np.asarray(density.value)
    floor = max(value.max(), 1e-300) * 1e-6  # what is smaller is a tail of the smoothing
    axes.plot(grid, np.maximum(value, floor), color="C0")
    if np.any(np.asarray(density.error) > 0):
        low, high = (np.asarray(end) for end in density.interval(BAND))
        band = np.maximum(low, floor), np.maximum(high, floor)
        axes.fill_between(grid, *band, color="C0", alpha=_SHADE, linewidth=0, label=f"{BAND:.0%} interval")
        axes.legend(frameon=False)
    axes.set(yscale="log", ylim=(floor, 3 * value.max()), xlabel="eigenvalue", ylabel="density")
    return axes


def plot_traces(
    paths: Sequence[str], traces: Float[np.ndarray, " l"], errors: Float[np.ndarray, " l"] | None, axes: Any
) -> Any:
    """The trace of each parameter's block as a bar, with an error bar if it was estimated."""
    axes = axes_or_new(axes, len(paths))
    at = np.arange(len(paths))
    axes.barh(at, traces, color="C0", xerr=errors, error_kw={"ecolor": "0.2", "capsize": 3})
    axes.set_yticks(at, [path or "params" for path in paths])
    axes.invert_yaxis()
    axes.axvline(0, color="0.5", linewidth=0.8)
    axes.set(xlabel="trace of the block" + ("" if errors is None else f", with {BAND:.0%} intervals"))
    return axes


def plot_entries(paths: Sequence[str], leaves: Sequence[Any], what: str, axes: Any) -> Any:
    """How the entries of each parameter are distributed: a box with median and quartiles, whiskers to the
    ends.

    Where all are positive and span more than a decade the scale is logarithmic.
    """
    axes = axes_or_new(axes, len(paths))
    entries = [np.ravel(np.asarray(leaf, float)) for leaf in leaves]
    axes.boxplot(entries, orientation="horizontal", whis=(0, 100), widths=0.6)
    axes.set_yticks(np.arange(1, len(paths) + 1), [path or "params" for path in paths])
    axes.invert_yaxis()
    least, most = min(e.min() for e in entries), max(e.max() for e in entries)
    if most > 10 * least > 0:
        axes.set_xscale("log")
    axes.set(xlabel=what)
    return axes


def interval_widths(estimate: Estimate) -> np.ndarray:
    """Half of the interval of each number of a pytree of estimated numbers."""
    high = estimate.interval(BAND)[1]
    pairs = zip(jax.tree.leaves(high), jax.tree.leaves(estimate.value), strict=True)
    return np.array([float(end - value) for end, value in pairs])
