"""A number that was estimated from random samples, with its error bar."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree
from scipy.special import stdtrit


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class Estimate:
    """The mean of independent samples and its standard error.

    Attributes:
        value: the mean; an array or a pytree of arrays.
        error: its standard error, `s / √n` with the unbiased variance `s²` of the n samples; like `value`.
        samples: n.
    """

    value: PyTree
    error: PyTree
    samples: int = field(metadata={"static": True})

    @classmethod
    def of(cls, samples: PyTree) -> Estimate:
        """The mean over the leading axis; the error of a single sample is not known, and NaN."""
        (n,) = {len(leaf) for leaf in jax.tree.leaves(samples)}
        value = jax.tree.map(lambda leaf: jnp.mean(leaf, 0), samples)
        error = jax.tree.map(lambda leaf: _deviation(leaf) / math.sqrt(n), samples)
        return cls(value, error, n)

    def interval(self, confidence: float = 0.95) -> tuple[PyTree, PyTree]:
        """Lower and upper end of Student's interval, which has that coverage for normal samples.

        Raises:
            ValueError: `confidence` is not between 0 and 1.
        """
        if not 0 < confidence < 1:
            raise ValueError(f"confidence={confidence} is not between 0 and 1; 0.95 is usual.")
        width = float(stdtrit(self.samples - 1, 0.5 + confidence / 2))
        low = jax.tree.map(lambda v, e: v - width * e, self.value, self.error)
        high = jax.tree.map(lambda v, e: v + width * e, self.value, self.error)
        return low, high

    def __repr__(self) -> str:
        if not isinstance(self.value, jax.Array):
            return f"Estimate({self.samples} samples of {jax.tree.structure(self.value)})"
        return f"Estimate({self.value} ± {self.error}, {self.samples} samples)"


def _deviation(samples: Array) -> Array:
    """The root of the unbiased variance."""
    return jnp.std(samples, 0, ddof=1) if len(samples) > 1 else jnp.full_like(samples[0], jnp.nan)
