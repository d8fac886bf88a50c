"""A curvature with NaN or infinite entries is an error that names the parameter."""

from __future__ import annotations

from typing import TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array

from funcprop.operators.parameters import shown
from funcprop.operators.products import flat_product
from funcprop.operators.symmetric_map import SymmetricMap

T = TypeVar("T")


def require_finite(operator: SymmetricMap, result: T, doing: str) -> T:
    """Return `result` if all of it is finite, or if it is traced and cannot be looked at.

    Raises:
        FloatingPointError: it is not; the message names the parameters whose rows of the operator are not.
    """
    leaves = jax.tree.leaves(result)
    if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
        return result
    if all(map(_is_finite, leaves)):
        return result
    broken = nonfinite_rows(operator)
    if not broken:
        raise FloatingPointError(
            f"{doing} is not finite, though the operator's products are; its numbers leave the range of "
            f"{' and '.join(sorted({str(d) for d in operator.parameters.dtypes}))}."
        )
    raise FloatingPointError(
        f"{doing}: the curvature is not finite in the rows of {shown(*broken)}; "
        "fp.backprop(loss)(...).first_nonfinite() says where that begins, and where= leaves parameters out."
    )


@jax.jit
def _is_finite(leaf: Array) -> Array:
    return jnp.isfinite(leaf).all()


def nonfinite_rows(operator: SymmetricMap) -> list[str]:
    """The paths of the parameters whose rows have entries that are not finite.

    NaN and infinity times zero are NaN: one product with zeros finds them, wherever they are in a row.
    """
    zeros = jnp.zeros(operator.parameters.size, operator.dtype)
    rows = jax.tree.leaves(operator.parameters.unravel(flat_product(operator, zeros)))
    ones = jax.tree.leaves(operator.parameters.unravel(flat_product(operator, zeros + 1)))
    return [
        path
        for path, *found in zip(operator.parameters.paths, rows, ones, strict=True)
        if not all(bool(jnp.isfinite(leaf).all()) for leaf in found)
    ]
