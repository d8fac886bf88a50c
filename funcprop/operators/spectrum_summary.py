"""What the spectrum of an operator looks like, at a glance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from wadler_lindig import pformat

from funcprop.graph.graph import aligned
from funcprop.operators.estimate import Estimate
from funcprop.operators.linear_operator import LinearOperator
from funcprop.operators.plots import interval_widths, plot_density, plot_traces
from funcprop.operators.spectral_density import Spectrum

EXACT = 1024  # up to so many parameters, all eigenvalues are computed
_BAR = 40  # characters of the longest bar of the histogram


@dataclass(frozen=True)
class Summary:
    """The ends of the spectrum, its density, and what each parameter adds to the trace.

    Attributes:
        paths, sizes: of the parameters.
        exact: whether all eigenvalues were computed; otherwise there are error bars.
        largest, smallest: eigenvalues, ascending.
        spectrum: nodes and weights; if exact, one row of all eigenvalues.
        traces: of each parameter's own block, and their standard errors (zeros if exact).
        trace: their sum, and its standard error.
        samples: how many random vectors the traces are estimated from; 0 if exact.
        rounding: how far from zero rounding may put an eigenvalue, relative to the largest.
    """

    paths: tuple[str, ...]
    sizes: tuple[int, ...]
    exact: bool
    largest: Float[np.ndarray, " k"]
    smallest: Float[np.ndarray, " k"]
    spectrum: Spectrum
    traces: tuple[Float[np.ndarray, " l"], Float[np.ndarray, " l"]]
    trace: tuple[float, float]
    samples: int
    rounding: float

    __repr__ = pformat  # shapes instead of entries

    def __str__(self) -> str:
        how = "all eigenvalues" if self.exact else "Lanczos, and estimates ± their standard errors"
        parameters = [("parameter", "entries", "trace", "share")]
        for path, size, trace, error, share in zip(
            self.paths, self.sizes, *self.traces, self.shares, strict=True
        ):
            parameters.append((path or "(all)", f"{size}", _with_error(trace, error), f"{100 * share:.1f} %"))
        edges, counts, errors = self.counts()
        longest = max(counts.max(), 1e-300)
        histogram = [("from", "to", "eigenvalues", "")]
        for low, high, count, error in zip(edges[:-1], edges[1:], counts, errors, strict=True):
            block = "█" * round(_BAR * float(count / longest)) or ("▏" if count > 0 else "")
            histogram.append((f"{low:.5g}", f"{high:.5g}", _with_error(count, error), block))
        lines = [
            f"{sum(self.sizes)} parameters, {self.signs}; {how}",
            "",
            f"largest    {'  '.join(f'{value:.5g}' for value in self.largest[::-1])}",
            f"smallest   {'  '.join(f'{value:.5g}' for value in self.smallest)}",
            f"condition  {'-' if self.condition is None else f'{self.condition:.5g}'}",
            f"trace      {_with_error(*self.trace)}",
            "",
            aligned(parameters, {1, 2, 3}),
            "",
            aligned(histogram, {0, 1, 2}),
        ]
        return "\n".join(lines)

    @property
    def shares(self) -> Float[np.ndarray, " l"]:
        """Each parameter's part of the trace; of an indefinite operator some may be negative."""
        return self.traces[0] / (self.trace[0] or 1)

    @property
    def condition(self) -> float | None:
        """`max |λ| / min |λ|`; None if the operator is singular, or if it is indefinite and not exact."""
        if not self.exact and self.signs == "indefinite":
            return None
        values = np.abs(self.spectrum.nodes[0] if self.exact else [*self.smallest, *self.largest])
        return float(values.max() / values.min()) if values.min() > self._rounding else None

    @property
    def signs(self) -> str:
        """Whether eigenvalues are negative, as far as the smallest one tells."""
        smallest = float(self.smallest[0])
        if smallest > self._rounding:
            return "positive definite"
        return "positive semi-definite" if smallest >= -self._rounding else "indefinite"

    @property
    def _rounding(self) -> float:
        largest = max(abs(float(self.smallest[0])), abs(float(self.largest[-1])))
        return self.rounding * largest

    def plot(self, *, axes: Any = None) -> Any:
        """Draw the density of the eigenvalues and the traces by parameter, on two axes that are returned.

        Raises:
            ModuleNotFoundError: matplotlib is not installed (the extra `draw`).
        """
        of_density, of_traces = (None, None) if axes is None else axes
        grid, value, error = self.density()
        samples = self.spectrum.nodes.shape[0]
        density = plot_density(grid, Estimate(value, error, samples), of_density)
        if self.exact:
            return density, plot_traces(self.paths, self.traces[0], None, of_traces)
        half = interval_widths(Estimate(list(self.traces[0]), list(self.traces[1]), self.samples))
        return density, plot_traces(self.paths, self.traces[0], half, of_traces)

    def density(self, points: int = 400) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """A grid over the spectrum, the smoothed density there, and its standard error."""
        low, high = float(self.smallest[0]), float(self.largest[-1])
        margin = 0.05 * (high - low) or 1.0
        grid = jnp.linspace(low - margin, high + margin, points)
        found = self.spectrum.density(grid, margin / 5)
        return np.asarray(grid), np.asarray(found.value), self._errors(found)

    def counts(self, bins: int = 10) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Edges of equal bins over the spectrum, the eigenvalues in each, and their standard errors."""
        low, high = float(self.smallest[0]), float(self.largest[-1])
        edges = np.linspace(low, high, bins + 1) if high > low else np.linspace(low - 1, high + 1, bins + 1)
        nodes = self.spectrum.nodes
        # The outermost nodes belong to the outermost bins, wherever rounding puts them.
        inner = jnp.searchsorted(jnp.asarray(edges[1:-1], nodes.dtype), nodes, side="right")
        found = [self.spectrum.size * jnp.sum(self.spectrum.weights * (inner == i), 1) for i in range(bins)]
        estimate = Estimate.of(jnp.stack(found, 1))
        return edges, np.asarray(estimate.value), self._errors(estimate)

    def _errors(self, estimate: Estimate) -> np.ndarray:
        return np.zeros_like(estimate.error) if self.exact else np.asarray(estimate.error)


def _with_error(value: Any, error: Any) -> str:
    return f"{float(value):.5g}" + (f" ± {float(error):.2g}" if error else "")


def summary(
    operator: LinearOperator,
    *,
    k: int = 5,
    samples: int = 10,
    products: int = 64,
    key: Array | None = None,
    exact: int = EXACT,
) -> Summary:
    """The ends of the spectrum, its density, and each parameter's trace.

    Args:
        operator: a Hessian, a Gauss-Newton or Fisher matrix.
        k: eigenvalues at each end; fewer if there are not as many.
        samples, products: of the stochastic estimates; see `LinearOperator.spectrum`.
        key: of the random vectors; `jax.random.key(0)` if None.
        exact: up to so many parameters nothing is estimated.

    Raises:
        FloatingPointError: the operator is not finite; the message has the parameter's path.

    Example:
        >>> import jax.numpy as jnp, funcprop as fp
        >>> H = fp.hessian(lambda p: jnp.sum(p["a"] ** 2) + 4 * p["b"] ** 2)({"a": jnp.ones(2), "b": 1.0})
        >>> found = fp.curvature.summary(H, k=1)
        >>> print(found.largest, found.smallest, found.condition, found.signs)
        [8.] [2.] 4.0 positive definite
        >>> print(dict(zip(found.paths, found.shares.round(3).tolist())))
        {'a': 0.333, 'b': 0.667}
    """
    names = operator.parameters
    k = min(k, names.size)
    if names.size <= exact:
        matrix = operator.dense()
        values = jnp.linalg.eigvalsh(matrix)
        found = Spectrum(values[None], jnp.full((1, names.size), 1 / names.size, values.dtype), names.size)
        traces = np.array([float(jnp.trace(matrix[part, part])) for part in names.slices])
        zeros = np.zeros_like(traces)
        ends = np.asarray(values[-k:]), np.asarray(values[:k])
        whole = (traces.sum(), 0.0)
        return Summary(
            names.paths, names.sizes, True, *ends, found, (traces, zeros), whole, 0, names.eigenvalue_rounding
        )
    key = jax.random.key(0) if key is None else key
    start, probes, vectors = jax.random.split(key, 3)
    operator = operator.linearize()
    values = np.asarray(operator.eigsh(min(2 * k, names.size), "BE", key=start)[0])
    found = operator.spectrum(samples=samples, products=min(products, names.size), key=vectors)
    each: Any = operator.traces(samples=4 * samples, key=probes)
    total: Any = operator.trace(samples=4 * samples, key=probes)
    value, error = (np.array([float(x) for x in jax.tree.leaves(part)]) for part in (each.value, each.error))
    whole = float(total.value), float(total.error)
    rounding = names.eigenvalue_rounding
    each = value, error
    return Summary(
        names.paths, names.sizes, False, values[-k:], values[:k], found, each, whole, 4 * samples, rounding
    )
