"""What is known of the parameters before the data are seen."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree, Scalar

from funcprop.curvature.likelihood import broadcasts
from funcprop.operators.linear_operator import Dense
from funcprop.operators.parameters import Parameters, shown, single_at_least


class GaussianPrior(NamedTuple):
    """A Gaussian on the parameters: what is known before the next data are seen.

    Attributes:
        mean: a pytree like the (chosen) parameters.
        precision: a pytree like them, of the precisions of the entries; or a `Dense` operator.
    """

    mean: PyTree
    precision: Any

    def negative_log(self, params: PyTree) -> Scalar:
        """`½ (θ − μ)ᵀ P (θ − μ)`, what is added to the next loss; `params` are the chosen parameters."""
        moved = jax.tree.map(jnp.subtract, params, self.mean)
        if isinstance(self.precision, Dense):
            flat = self.precision.parameters.ravel(moved)
            return flat @ self.precision.matrix @ flat / 2
        parts = jax.tree.map(lambda δ, d: jnp.sum(δ * d**2) / 2, self.precision, moved)
        return functools.reduce(jnp.add, jax.tree.leaves(parts))


def spread(name: str, given: Any, names: Parameters, positive: bool = False) -> list[Array]:
    """A number, or a pytree like the parameters, for every entry of every leaf.

    Raises:
        ValueError: it is neither, or not positive where it has to be.
    """
    count, values = len(names.paths), jax.tree.leaves(given)
    structure: Any = jax.tree.structure(given)
    if structure == jax.tree.structure(0):
        values = values * count
    elif structure != names.tree:
        raise ValueError(
            f"{name} is {structure}, but the parameters are {names.tree}; pass one number, or a pytree like "
            "them."
        )
    for path, value, shape in zip(names.paths, values, names.shapes, strict=True):
        if not broadcasts(jnp.shape(value), shape):
            raise ValueError(
                f"laplace: {name} has shape {jnp.shape(value)} for {shown(path)}, which has shape "
                f"{shape}; pass one number, or a pytree like the parameters."
            )
        if positive:
            require_positive(f"{name} of {shown(path)}" if count > 1 else name, value)
    return [
        jnp.broadcast_to(jnp.asarray(value, single_at_least(dtype)), shape)
        for value, shape, dtype in zip(values, names.shapes, names.dtypes, strict=True)
    ]


def require_positive(name: str, value: Any) -> None:
    """Raise a ValueError for a number that is not positive, or several of which one is not."""
    # By NumPy: inside jit, jax.numpy makes a tracer even of a comparison of Python's numbers.
    if not isinstance(value, jax.core.Tracer) and not (np.asarray(value) > 0).all():
        raise ValueError(f"laplace: {name} is {value}; it must be positive.")
