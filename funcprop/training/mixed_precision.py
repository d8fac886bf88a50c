"""Training in half precision: parameters stay in theirs, the loss is computed in another and scaled.

Reference: Micikevicius et al., "Mixed precision training", ICLR 2018.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

LARGEST_SCALE = 2.0**24


class LossScale(NamedTuple):
    """The factor by which the loss is multiplied, and how many updates it has been good for."""

    factor: Float[Array, ""]
    good: Int[Array, ""]


class MixedPrecision(NamedTuple):
    """In which precision a loss is computed, and how its gradients are kept from vanishing.

    * `compute`: the type to which floating parameters and data are cast; gradients, updates and parameters
      keep the type of the parameters.
    * `scale`: the first factor of the loss; None for no scaling. If a gradient is not finite, the update is
      left out and the factor halved.
    * `growth`: after so many good updates in a row the factor is doubled.

    Example:
        >>> import funcprop as fp
        >>> fp.training.MixedPrecision.of("float16")
        MixedPrecision(compute='float16', scale=32768.0, growth=2000)
    """

    compute: str
    scale: float | None = None
    growth: int = 2000

    @classmethod
    def of(cls, given: MixedPrecision | str | None) -> MixedPrecision | None:
        """Return the precision of that name: `float16` with a dynamic loss scale, others without.

        Raises:
            ValueError: there is no floating type of that name.
        """
        if given is None:
            return None
        wanted = given.compute if isinstance(given, MixedPrecision) else given
        try:
            compute = jnp.dtype(wanted)
        except TypeError:
            compute = jnp.dtype(bool)
        if not jnp.issubdtype(compute, jnp.floating):
            raise ValueError(
                f"fit: precision={wanted!r}; pass 'bfloat16', 'float16', 'float32', or an "
                "fp.training.MixedPrecision."
            )
        if isinstance(given, MixedPrecision):
            return given._replace(compute=compute.name)
        return cls(compute.name, 2.0**15 if compute == jnp.float16 else None)

    def first_scale(self) -> LossScale | None:
        """Return the state of the loss scale before the first step."""
        return None if self.scale is None else LossScale(jnp.float32(self.scale), jnp.int32(0))

    def cast(self, tree: Any) -> Any:
        """Return the tree with its floating leaves in the type of the computation."""

        def leaf(x: Any) -> Any:
            return x.astype(self.compute) if jnp.issubdtype(jnp.result_type(x), jnp.floating) else x

        return jax.tree.map(lambda x: leaf(x) if hasattr(x, "astype") else x, tree)

    def next_scale(self, scale: LossScale, finite: Any) -> LossScale:
        """Return the scale after an update whose gradients were finite, or were not."""
        grown = finite & (scale.good + 1 >= self.growth)
        factor = jnp.where(grown, jnp.minimum(scale.factor * 2, LARGEST_SCALE), scale.factor)
        factor = jnp.where(finite, factor, jnp.maximum(scale.factor / 2, 1))
        return LossScale(factor, jnp.where(finite & ~grown, scale.good + 1, 0))
