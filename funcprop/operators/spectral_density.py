"""The density of all eigenvalues, by stochastic Lanczos quadrature, and what follows from it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from wadler_lindig import pformat

from funcprop.operators.estimate import Estimate
from funcprop.operators.finite import require_finite
from funcprop.operators.lanczos import LanczosState, Tridiagonal, continued, tridiagonal
from funcprop.operators.plots import plot_density
from funcprop.operators.products import flat_map, mapped
from funcprop.operators.stochastic_estimates import require_samples, signs
from funcprop.operators.symmetric_map import SymmetricMap


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class Spectrum:
    """For each random vector a quadrature of the spectrum: `tr f(A) / P ≈ Σ_j w_j f(λ_j)`.

    The error bars are those of the random vectors. That each quadrature has only as many nodes as there were
    products is not in them; it is exact for polynomials `f` up to degree `2 m − 1`, and for any if m = P.

    Attributes:
        nodes: `λ`, one row for each random vector, ascending.
        weights: `w`, non-negative, each row sums to 1.
        size: P, the number of eigenvalues.
    """

    __repr__ = pformat  # shapes instead of entries

    nodes: Float[Array, "n m"]
    weights: Float[Array, "n m"]
    size: int = field(metadata={"static": True})

    def mean(self, function: Callable[[Array], Array]) -> Estimate:
        """`tr f(A) / P`, the mean of an elementwise function over the eigenvalues."""
        return Estimate.of(jnp.sum(self.weights * function(self.nodes), axis=1))

    def count(self, low: float, high: float) -> Estimate:
        """How many eigenvalues are in `[low, high]`."""
        found = self.mean(lambda values: (values >= low) & (values <= high))
        return Estimate(self.size * found.value, self.size * found.error, found.samples)

    def density(self, at: Float[Array | np.ndarray, " g"], width: float | Array | None = None) -> Estimate:
        """The density at the points `at`, smoothed by a Gaussian of standard deviation `width`; its integral
        is 1.

        `width` is a hundredth of the spectrum's range if None; where all eigenvalues are one number, a
        hundredth of its magnitude, or of 1 if it is zero.
        """
        width = self.width if width is None else width
        points, deviation = (jnp.asarray(a, self.nodes.dtype) for a in (at, width))

        def row(nodes: Array, weights: Array) -> Array:
            return weights @ jax.scipy.stats.norm.pdf(points[None], nodes[:, None], deviation)

        return Estimate.of(jax.vmap(row)(self.nodes, self.weights))

    def merged(self, other: Spectrum, share: Any) -> Spectrum:
        """Refused: eigenvalues of a mean are no means of eigenvalues.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "accumulate: the spectra of minibatches have no mean; use fp.curvature.over(batches)(factory)"
            "(params).spectrum(), which is of all data."
        )

    def plot(self, *, points: int = 400, width: float | None = None, axes: Any = None) -> Any:
        """Draw the density with its error band, on a logarithmic scale; returns matplotlib's axes.

        Args:
            points: how many there are on the grid.
            width: of the smoothing, as in `density`.
            axes: those that are drawn on; new ones if None.

        Raises:
            ModuleNotFoundError: matplotlib is not installed (the extra `draw`).
        """
        low, high = (float(end) for end in self.range)
        margin = max(0.05 * (high - low), 5 * float(self.width if width is None else width))
        grid = np.linspace(low - margin, high + margin, points)
        return plot_density(grid, self.density(grid, width), axes)

    @property
    def width(self) -> Array:
        """The standard deviation that `density` smooths by."""
        low, high = self.range
        largest = jnp.maximum(jnp.abs(low), jnp.abs(high))
        # Rounding makes a narrow range of one point, and no width can be drawn.
        rounding = 100 * jnp.finfo(self.nodes.dtype).eps * largest
        alone = jnp.where(largest > 0, largest, 1)
        return jnp.where(high - low > rounding, high - low, alone) / 100

    @property
    def range(self) -> tuple[Array, Array]:
        """The smallest and the largest node."""
        return self.nodes.min(), self.nodes.max()


def spectrum(operator: SymmetricMap, samples: int, products: int, key: Array | None) -> Spectrum:
    """`LinearOperator.spectrum`, where the arguments are explained."""
    key = require_samples(samples, key)
    size = operator.parameters.size
    if not 0 < products <= size:
        raise ValueError(
            f"products={products}, but the operator has {size} rows; take 1 ≤ products ≤ {size}."
        )
    nodes, weights = require_finite(operator, _quadratures(operator, samples, products, key), "spectrum()")
    return Spectrum(nodes, weights, size)


def _quadratures(operator: SymmetricMap, samples: int, products: int, key: Array) -> tuple[Array, Array]:
    if not operator.on_host:
        return _compiled_quadratures(operator, samples, products, key)
    random, restarts = jax.random.split(key)
    starts = LanczosState.at(signs(operator, samples, random), 0)
    found = continued(operator.columns, starts, products, restarts).found
    nodes, vectors = jax.vmap(Tridiagonal.eigh)(found)
    return nodes, vectors[:, 0] ** 2


@functools.partial(jax.jit, static_argnames=("samples", "products"))
def _compiled_quadratures(
    operator: SymmetricMap, samples: int, products: int, key: Array
) -> tuple[Array, Array]:
    apply = flat_map(operator)
    random, restarts = jax.random.split(key)

    def quadrature(start: Array) -> Array:
        nodes, vectors = tridiagonal(apply, start, products, restarts).eigh()
        return jnp.stack([nodes, vectors[0] ** 2])

    found = mapped(quadrature, signs(operator, samples, random), None)
    return found[:, 0], found[:, 1]
