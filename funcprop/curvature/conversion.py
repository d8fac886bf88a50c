"""An operator for SciPy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.sparse import linalg

if TYPE_CHECKING:
    from funcprop.curvature.operator import LinearOperator


def to_scipy(operator: LinearOperator) -> linalg.LinearOperator:
    """The operator on flat NumPy vectors, linearised, as a `scipy.sparse.linalg.LinearOperator`."""
    linearized = operator.linearize()

    def apply(v: np.ndarray) -> Any:
        return np.asarray(linearized @ v)

    def on_vector(v: np.ndarray) -> Any:
        return apply(np.ravel(v))

    made: Any = linalg.LinearOperator
    return made(
        shape=operator.shape, dtype=np.dtype(operator.dtype), matvec=on_vector, rmatvec=on_vector,
        matmat=apply, rmatmat=apply,
    )  # fmt: skip
