"""What an array is like: range, mean, spread, norm, zeros, what is not finite, a histogram."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

BINS = 24


@dataclass(frozen=True)
class Histogram:
    """How many finite entries fall into each of equal intervals from `low` to `high`."""

    low: float
    high: float
    counts: tuple[int, ...]


@dataclass(frozen=True)
class Statistics:
    """Of the finite entries of an array: least, largest, mean, standard deviation, norm.

    `zeros` is the share of entries that are exactly zero, `nonfinite` how many are infinite or NaN. Complex
    numbers are described by their moduli.
    """

    minimum: float | None
    maximum: float | None
    mean: float | None
    std: float | None
    norm: float
    zeros: float
    nonfinite: int
    size: int
    histogram: Histogram | None


def statistics(value: Any, bins: int = BINS) -> Statistics | None:
    """The statistics of an array; None for what has no numbers, such as a PRNG key. `bins=0`: no histogram.

    Example:
        >>> import jax.numpy as jnp
        >>> from funcprop.reporting.statistics import statistics
        >>> found = statistics(jnp.array([3.0, 0.0, -4.0, jnp.inf]), bins=2)
        >>> found.minimum, found.norm, found.zeros, found.nonfinite, found.histogram.counts
        (-4.0, 5.0, 0.25, 1, (1, 2))
    """
    if jnp.issubdtype(jax.typeof(value).dtype, jax.dtypes.extended):
        return None
    array = np.asarray(value)
    if jnp.issubdtype(array.dtype, jnp.complexfloating):
        array = np.abs(array)
    entries = array.ravel().astype(np.float64)
    finite = entries[np.isfinite(entries)]
    lost = entries.size - finite.size
    zeros = float(np.mean(entries == 0)) if entries.size else 0.0
    if not finite.size:
        return Statistics(None, None, None, None, 0.0, zeros, lost, entries.size, None)
    low, high = float(finite.min()), float(finite.max())
    # Scaled, so that squares neither overflow nor vanish.
    scale = max(abs(low), abs(high)) or 1.0
    scaled = finite / scale
    return Statistics(
        low,
        high,
        float(scaled.mean()) * scale,
        float(scaled.std()) * scale,
        min(float(np.linalg.norm(scaled)) * scale, float(np.finfo(np.float64).max)),
        zeros,
        lost,
        entries.size,
        _histogram(scaled, scale, bins) if bins and finite.size > 1 else None,
    )


def _histogram(scaled: np.ndarray, scale: float, bins: int) -> Histogram:
    low, high = float(scaled.min()), float(scaled.max())
    # Intervals must be wider than the distance of two neighbouring numbers.
    if high - low <= 4 * bins * np.finfo(np.float64).eps:
        return Histogram(low * scale, high * scale, (scaled.size,))
    counts, _ = np.histogram(scaled, bins, (low, high))
    return Histogram(low * scale, high * scale, tuple(map(int, counts)))
