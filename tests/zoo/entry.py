"""What an entry of the zoo is, and how a family of entries is written down."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@dataclass(frozen=True)
class Entry:
    """One function of the zoo."""

    name: str
    make: Callable[[], tuple[Callable[..., Any], tuple[Any, ...]]]
    tolerance: float = 1e-12
    twice: bool = True

    def build(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """The function and its arguments, built once."""
        return _build(self)


@functools.cache
def _build(entry: Entry) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    return entry.make()


@dataclass
class Family:
    """Entries by decoration: the decorated function returns `(fun, args)`, its name is the entry's."""

    entries: list[Entry] = field(default_factory=list)

    def __call__(self, *, tolerance: float = 1e-12, twice: bool = True) -> Callable[..., Any]:
        """`tolerance` is relative; `twice` says that the function has second derivatives in JAX."""

        def add(make: Callable[[], Any]) -> Callable[[], Any]:
            self.entries.append(Entry(make.__name__, make, tolerance, twice))
            return make

        return add


def normal(seed: int, *shape: int, scale: float = 1.0) -> jax.Array:
    """Standard normal numbers in float64."""
    return jax.device_put(scale * np.random.default_rng(seed).standard_normal(shape))


def uniform(seed: int, *shape: int, low: float = 0.5, high: float = 1.5) -> jax.Array:
    """Uniform numbers in float64, positive by default."""
    return jax.device_put(np.random.default_rng(seed).uniform(low, high, shape))


def integers(seed: int, high: int, *shape: int) -> jax.Array:
    """Integers in `[0, high)`."""
    return jax.device_put(np.random.default_rng(seed).integers(0, high, shape))


def random_key(seed: int) -> jax.Array:
    """A key of the generator that is quickest to compile."""
    return jax.random.key(seed, impl="rbg")


def filled(shapes: Any, dtype: Any = float) -> Any:
    """Random numbers of type `dtype` for the shapes that a framework's initialiser makes.

    Nothing is compiled, and no leaf is zero, so that no term of a gradient vanishes at the start.
    """

    def fill(leaf: Any) -> Any:
        if not isinstance(leaf, jax.ShapeDtypeStruct):
            return leaf
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return random_key(0)
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return jnp.zeros(leaf.shape, leaf.dtype)
        return normal(sum(leaf.shape), *leaf.shape, scale=0.5).astype(dtype)

    return jax.tree.map(fill, shapes)
