"""An operator for SciPy."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from scipy.sparse import linalg

from funcprop.operators.products import flat_product, products
from funcprop.operators.symmetric_map import SymmetricMap


def to_scipy(operator: SymmetricMap) -> linalg.LinearOperator:
    """The operator on flat NumPy vectors, linearised, as a `scipy.sparse.linalg.LinearOperator`."""
    linearized = operator.linearize()

    def on_columns(v: np.ndarray) -> Any:
        return np.asarray(products(linearized, jnp.asarray(v, operator.dtype), None))

    def on_vector(v: np.ndarray) -> Any:
        return np.asarray(flat_product(linearized, jnp.asarray(np.ravel(v), operator.dtype)))

    made: Any = linalg.LinearOperator
    return made(
        shape=operator.shape, dtype=np.dtype(operator.dtype), matvec=on_vector, rmatvec=on_vector,
        matmat=on_columns, rmatmat=on_columns,
    )  # fmt: skip
