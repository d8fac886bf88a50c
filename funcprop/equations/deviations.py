"""How far one array is from another, and whether rounding explains it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from funcprop import _jax

# What two ways of computing the same may differ by, in units in the last place of the largest entry.
_ULPS = 32
# The same in units of how far autodiff's own answer is from itself when its roundings change.
_SPREADS = 8


@dataclass(frozen=True)
class Deviation:
    """The largest deviation, relative to the largest entry or to what cancels in it; and how much is allowed.

    `compared` is the number of entries that are finite in what is expected.
    """

    error: float
    allowed: float
    compared: int

    @property
    def is_allowed(self) -> bool:
        """Whether it is no more than allowed."""
        return self.error <= self.allowed


def deviation(
    value: Any, truth: Any, tolerance: float | None, rounding: Callable[[], np.ndarray]
) -> Deviation:
    """Compare a value with what it should be.

    Infinities must be equal and NaN be in the same places. An entry may deviate by what its dtype resolves of
    it, or by what rounding can make of it: `rounding()` is how far that is, and asked for only where it
    matters. A `tolerance` is relative to the largest entry, or to the terms that cancel in it if these are
    larger.
    """
    aval = jax.typeof(truth)
    if jnp.shape(value) != aval.shape:
        return Deviation(np.inf, 0.0, 0)
    if not _jax.is_differentiable(aval):
        # Integers, booleans, and PRNG keys, which are no arrays of NumPy's.
        return Deviation(float(jnp.any(value != truth)), 0.0, aval.size)
    expected, found = _wide(truth), _wide(_as_type(value, aval.dtype))
    eps = float(jnp.finfo(aval.dtype).eps)
    relative = 1e-10 if eps < 1e-10 else eps**0.5 / 2
    finite = np.isfinite(expected)
    compared = int(finite.sum())
    if not (np.isfinite(found[finite]).all() and _same_nonfinite(found[~finite], expected[~finite])):
        return Deviation(np.inf, relative if tolerance is None else tolerance, compared)
    difference, size = np.abs(found[finite] - expected[finite]), np.abs(expected[finite])
    largest, worst = (float(np.max(x, initial=0)) for x in (size, difference))
    close = min(_ULPS * eps, relative) if tolerance is None else tolerance
    if worst <= close * largest:
        return Deviation(worst / largest if largest else 0.0, close, compared)
    noise = rounding()[finite]
    # In low precision an entry can be the same in all runs.
    noise = np.maximum(noise, eps**0.5 * np.max(noise))
    scale = max(largest, float(np.max(noise)) / eps, float(np.finfo(float).tiny))
    if tolerance is not None:
        return Deviation(worst / scale, tolerance, compared)
    allowed = np.maximum(relative * size, _SPREADS * noise)
    excess = difference - allowed
    at = np.argmax(excess if np.any(excess > 0) else difference)
    return Deviation(float(difference[at]) / scale, float(allowed[at]) / scale, compared)


def _as_type(value: Any, dtype: Any) -> Any:
    """A value in the precision of what it is compared with; a complex one stays complex."""
    return value if jnp.iscomplexobj(value) else jnp.asarray(value).astype(dtype)


def _wide(x: Any) -> np.ndarray:
    """As an array of NumPy's that holds every entry exactly."""
    array = np.asarray(x)
    return array if array.dtype in (np.float64, np.complex64, np.complex128) else array.astype(np.float64)


def _same_nonfinite(value: Any, expected: Any) -> bool:
    """Whether infinities are equal, and NaN are in the same places.

    Which parts of a complex number are NaN depends on how a product is computed; there it is only asked that
    it is not finite in the same places.
    """
    if np.iscomplexobj(expected):
        return not np.isfinite(value).any()
    return np.array_equal(value, expected, equal_nan=True)
