"""The chapter's operator `prod`: the chain rule for tensors of any shape."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Inexact


def prod(
    dz_dy: Inexact[Array, "..."], dy_dx: Inexact[Array, "..."], *, y_ndim: int | None = None
) -> Inexact[Array, "..."]:
    """The chain rule `∂Z/∂X = prod(∂Z/∂Y, ∂Y/∂X)` for tensors of any shape.

    Sums over all entries of `Y`: `(∂Z/∂X)[z, x] = Σ_y (∂Z/∂Y)[z, y] (∂Y/∂X)[y, x]`, where `z`, `y` and `x`
    are multi-indices. No transposing is left to the caller.

    Args:
        dz_dy: shape `Z.shape + Y.shape`.
        dy_dx: shape `Y.shape + X.shape`.
        y_ndim: the number of axes of `Y`. Without it, it is the one number for which the trailing axes of
            `dz_dy` agree with the leading axes of `dy_dx`.

    Returns:
        an array of shape `Z.shape + X.shape`.

    Raises:
        ValueError: no number of axes fits, or `y_ndim` is needed because several do.

    Reference: Zhang et al., *Dive into Deep Learning*, section 5.3.

    Example:
        >>> import jax.numpy as jnp, funcprop as fp
        >>> print(fp.prod(jnp.array([1.0, 2.0]), jnp.array([[1.0, 0.0, 2.0], [0.0, 1.0, 1.0]])))
        [1. 2. 4.]
    """
    dz_dy, dy_dx = jnp.asarray(dz_dy), jnp.asarray(dy_dx)
    z, x = dz_dy.shape, dy_dx.shape
    fitting = [k for k in range(min(len(z), len(x)) + 1) if z[len(z) - k :] == x[:k]]
    if y_ndim is None:
        # A scalar Y fits every pair of shapes; it is meant only where a side has no axes at all.
        candidates = [k for k in fitting if k > 0] if z and x else [0]
        if len(candidates) != 1:
            problem = "no axes agree" if not candidates else f"Y may have {candidates} axes"
            raise ValueError(
                f"prod: dz_dy has shape {z} and dy_dx has shape {x}: {problem}; dz_dy must end with the "
                "axes of Y and dy_dx begin with them. Pass y_ndim=, the number of axes of Y."
            )
        (y_ndim,) = candidates
    elif y_ndim not in fitting:
        raise ValueError(
            f"prod: y_ndim={y_ndim}, but the last {y_ndim} axes of dz_dy {z} are not the first {y_ndim} axes "
            f"of dy_dx {x}; dz_dy must have shape Z.shape + Y.shape and dy_dx Y.shape + X.shape."
        )
    return jax.lax.dot_general(
        dz_dy,
        dy_dx,
        ((tuple(range(len(z) - y_ndim, len(z))), tuple(range(y_ndim))), ((), ())),
    )
