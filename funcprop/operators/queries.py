"""What an operator can be asked, exactly or by an estimate that was asked for.

What is exact costs as many products as there are parameters. An estimate is made where `samples=` and `key=`
are given, never silently, and comes with its error bar.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree, Scalar

from funcprop.operators import products
from funcprop.operators.convergence import is_traced
from funcprop.operators.eigenpairs import EigenSolver, eigenpairs
from funcprop.operators.estimate import Estimate
from funcprop.operators.finite import require_finite
from funcprop.operators.plots import interval_widths, plot_entries, plot_traces
from funcprop.operators.products import DENSE_BYTES
from funcprop.operators.solvers import DenseSolver, Solver, require_damping, solve
from funcprop.operators.spectral_density import Spectrum, spectrum
from funcprop.operators.stochastic_estimates import estimate, squared_to_norm
from funcprop.operators.symmetric_map import SymmetricMap


class Queries(SymmetricMap):
    """The methods of `LinearOperator` that ask about its matrix."""

    # --- entries ------------------------------------------------------------------------------

    def dense(self, *, at_once: int | None = None, budget: int | str = DENSE_BYTES) -> Float[Array, "P P"]:
        """The matrix, in `ravel_pytree` order.

        Args:
            at_once: how many columns are computed at once; chosen for their bytes if None.
            budget: the most bytes that the matrix may have.

        Raises:
            ValueError: the matrix is larger than `budget`.
            FloatingPointError: it is not finite; the message has the parameter's path.
        """
        return require_finite(self, products.matrix_of(self, budget, at_once), "dense()")

    def block(
        self, rows: Any, columns: Any = None, *, at_once: int | None = None, budget: int | str = DENSE_BYTES
    ) -> Float[Array, "R C"]:
        """The rows of one parameter and the columns of another (the same if None), as a matrix.

        A parameter is given by its path, as `"params/Dense_0/kernel"` or a sequence of keys; a path with
        several parameters below it means all of them. Only these columns are computed.

        Args:
            rows, columns: paths.
            at_once: how many columns are computed at once; chosen for their bytes if None.
            budget: the most bytes that the block may have.

        Raises:
            ValueError: there is no such parameter, or the block is larger than `budget`.
            FloatingPointError: it is not finite.
        """
        names = self.parameters
        r = names.select(rows)
        c = r if columns is None else names.select(columns)
        size = tuple(sum(names.sizes[i] for i in positions) for positions in (r, c))
        products.require_room(self, size, budget, "the block")
        return require_finite(self, products.block(self, r, c, at_once), "block()")

    def diagonal(
        self, *, samples: int | None = None, key: Array | None = None, at_once: int | None = None
    ) -> PyTree | Estimate:
        """The diagonal as a pytree: exactly, by P products or fewer, or an `Estimate` from `samples`.

        The estimate is the mean of `v ⊙ A v` over random signs `v` (Bekas et al. 2007).

        Args:
            samples, key: how many random vectors, and their key; exact without them.
            at_once: how many products are computed at once; chosen for their bytes if None.

        Raises:
            ValueError: `samples` is 1, or there is no key.
            FloatingPointError: the result is not finite; the message has the parameter's path.
        """
        if samples is not None:
            return estimate(self, "diagonal", samples, key)
        return require_finite(self, self.exact_diagonal(at_once), "diagonal()")

    def exact_diagonal(self, at_once: int | None) -> PyTree:
        """The diagonal by P products; subclasses may override it with a cheaper method."""
        return products.diagonal(self, at_once)

    # --- numbers ------------------------------------------------------------------------------

    def trace(self, *, samples: int | None = None, key: Array | None = None) -> Scalar | Estimate:
        """The trace: exactly, by P products, or an `Estimate` from `samples` products.

        The estimate is the mean of `vᵀ A v` over random signs `v` (Hutchinson 1989). Errors as in `diagonal`.

        Example:
            >>> import jax, jax.numpy as jnp, funcprop as fp
            >>> H = fp.hessian(lambda w: jnp.sum(w**2) + w[0] * w[1])(jnp.ones(3))
            >>> print(H.trace())
            6.0
            >>> low, high = H.trace(samples=100, key=jax.random.key(0)).interval(0.99)
            >>> print(low < 6 < high)
            True
        """
        if samples is not None:
            return estimate(self, "trace", samples, key)
        return jnp.sum(self.parameters.ravel(self.diagonal()))

    def traces(self, *, samples: int | None = None, key: Array | None = None) -> PyTree | Estimate:
        """The trace of each parameter's own block, as a pytree of numbers; they add up to the trace.

        Exactly, or an `Estimate`; arguments and errors as in `diagonal`.
        """
        if samples is not None:
            return estimate(self, "traces", samples, key)
        return jax.tree.map(jnp.sum, self.diagonal())

    def frobenius_norm(self, *, samples: int | None = None, key: Array | None = None) -> Scalar | Estimate:
        """`√(Σ_ij A_ij²)`: exactly, by P products, or an `Estimate` from `samples` products.

        The estimate is the root of the mean of `‖A v‖²` over random signs `v`. Errors as in `diagonal`.
        """
        if samples is not None:
            return squared_to_norm(estimate(self, "squared norm", samples, key))
        return require_finite(self, jnp.sqrt(products.squared_norm(self, None)), "frobenius_norm()")

    def logdet(
        self,
        damping: Any = 0.0,
        *,
        samples: int | None = None,
        products: int = 64,
        key: Array | None = None,
        budget: int | str = DENSE_BYTES,
    ) -> Scalar | Estimate:
        """`log det(A + damping I)`: exactly, of the matrix, or an `Estimate` by stochastic Lanczos
        quadrature.

        Args:
            damping: a number ≥ 0.
            samples, key: how many random vectors, and their key; exact without them.
            products: Lanczos steps of each; see `spectrum`.
            budget: the most bytes that the matrix may have.

        Raises:
            ValueError: the operator with its damping is not positive definite: an eigenvalue, or a node of
                the quadrature, is not positive. (Under `jit`, the result is NaN.)
            FloatingPointError: the operator is not finite.

        Reference: Ubaru, Chen and Saad, "Fast estimation of tr(f(A)) via stochastic Lanczos quadrature", SIAM
        Journal on Matrix Analysis and Applications 2017.

        Example:
            >>> import jax.numpy as jnp, funcprop as fp
            >>> print(fp.hessian(lambda w: jnp.sum(w**2))(jnp.ones(3)).logdet())  # 3 log 2
            2.0794415
        """
        require_damping(damping)
        if samples is None:
            values = jnp.linalg.eigvalsh(self.dense(budget=budget)) + damping
            return _positive(values, damping, "logdet") * jnp.sum(jnp.log(values))
        found = spectrum(self, samples, min(products, self.parameters.size), key)
        positive = _positive(found.nodes + damping, damping, "logdet")
        mean = found.mean(lambda nodes: jnp.log(nodes + damping))
        size = self.parameters.size * positive
        return Estimate(size * mean.value, size * mean.error, samples)

    # --- the spectrum -------------------------------------------------------------------------

    def eigsh(
        self,
        k: int = 6,
        which: str = "LA",
        *,
        solver: EigenSolver | DenseSolver | None = None,
        key: Array | None = None,
    ) -> tuple[Float[Array, " k"], PyTree]:
        """k eigenvalues, ascending, and their unit eigenvectors, a pytree with a last axis of k.

        Args:
            k: how many.
            which: "LA" the largest, "SA" the smallest, "BE" half of each end (one more of the largest if k is
                odd), "LM" the largest in magnitude.
            solver: `fp.curvature.Lanczos()` (if None), `Lobpcg()`, which finds all vectors of an eigenvalue
                that occurs several times, or `DenseSolver()`, which makes the matrix.
            key: of the starting vectors; `jax.random.key(0)` if None.

        Raises:
            ValueError: `k` is larger than P, or too large for LOBPCG; `which` is not known.
            TypeError: `solver` is none.
            FloatingPointError: the operator is not finite.

        Warns:
            ConvergenceWarning: a pair's residual is above the tolerance.

        References: Lanczos 1950; Knyazev, "Toward the optimal preconditioned eigensolver", SIAM Journal on
        Scientific Computing 2001.

        Example:
            >>> import jax.numpy as jnp, funcprop as fp
            >>> H = fp.hessian(lambda w: jnp.sum(jnp.arange(5.0) * w**2) / 2)(jnp.ones(5))
            >>> values, vectors = H.eigsh(2)
            >>> print(values.round(4), vectors.shape)
            [3. 4.] (5, 2)
        """
        key = jax.random.key(0) if key is None else key
        pairs = eigenpairs(self, k, which, solver, key)
        return pairs.values, self.parameters.unravel_columns(pairs.vectors)

    def spectrum(
        self, *, samples: int = 10, products: int | None = None, key: Array | None = None
    ) -> Spectrum:
        """The density of all eigenvalues, by stochastic Lanczos quadrature, with error bars.

        Args:
            samples: random vectors; the error bars are over them.
            products: Lanczos steps of each, at most P; where the spectrum is detailed, more show more. 64, or
                P if that is less, if None.
            key: of the vectors; `jax.random.key(0)` if None.

        Returns:
            A `Spectrum`: `.density(at)`, `.count(low, high)`, `.mean(function)`, each an `Estimate`.

        Raises:
            ValueError: `samples` is 1, or `products` is larger than P.
            FloatingPointError: the operator is not finite.

        References: Ubaru, Chen and Saad 2017; Ghorbani, Krishnan and Xiao, "An investigation into neural net
        optimization via Hessian eigenvalue density", ICML 2019.

        Example:
            >>> import jax.numpy as jnp, funcprop as fp
            >>> H = fp.hessian(lambda w: jnp.sum(jnp.arange(5.0) * w**2) / 2)(jnp.ones(5))
            >>> density = H.spectrum()
            >>> print(density.mean(lambda value: value).value.round(4))  # trace / P
            2.0
        """
        products = min(64, self.parameters.size) if products is None else products
        return spectrum(self, samples, products, jax.random.key(0) if key is None else key)

    def plot(
        self,
        what: str = "spectrum",
        *,
        samples: int | None = None,
        key: Array | None = None,
        axes: Any = None,
    ) -> Any:
        """Draw the spectrum, the diagonal or the traces by parameter; returns matplotlib's axes.

        Args:
            what: "spectrum", the density of the eigenvalues with an error band, by `spectrum`; "diagonal",
                how its entries are distributed in each parameter; "traces", a bar for each parameter.
            samples, key: of the estimates, as of these methods; the diagonal and the traces are exact
            without. axes: those that are drawn on; new ones if None.

        Raises:
            ValueError: `what` is not known.
            ModuleNotFoundError: matplotlib is not installed (the extra `draw`).
        """
        names = self.parameters
        if what == "spectrum":
            return self.spectrum(samples=samples or 10, key=key).plot(axes=axes)
        if what == "diagonal":
            found = self.diagonal(samples=samples, key=key)
            leaves = jax.tree.leaves(found.value if isinstance(found, Estimate) else found)
            return plot_entries(names.paths, leaves, "entries of the diagonal", axes)
        if what == "traces":
            found = self.traces(samples=samples, key=key)
            if isinstance(found, Estimate):
                values = np.array([float(x) for x in jax.tree.leaves(found.value)])
                return plot_traces(names.paths, values, interval_widths(found), axes)
            return plot_traces(names.paths, np.array([float(x) for x in jax.tree.leaves(found)]), None, axes)
        raise ValueError(f"plot: what={what!r} is not known; choose 'spectrum', 'diagonal' or 'traces'.")

    # --- its inverse --------------------------------------------------------------------------

    def solve(
        self,
        b: PyTree,
        damping: Any = 0.0,
        *,
        solver: Solver | None = None,
        start: PyTree | None = None,
    ) -> PyTree:
        """`x` with `(A + damping I) x = b`; a pytree or flat, as `b` is.

        Args:
            b: like the parameters, or flat.
            damping: a number ≥ 0.
            solver: `fp.curvature.Minres()` (if None), for operators of any signs;
                `ConjugateGradients()`, for a positive definite operator alone; both have
                `preconditioner=`, `tolerance=` and `products=`. Or `DenseSolver()`, which makes the matrix.
            start: where an iteration starts, such as the solution of a similar system; zero if None.

        Raises:
            ValueError: `damping` is negative or not finite, or `b` is not like the parameters.
            TypeError: `solver` is none.
            FloatingPointError: the operator or `b` is not finite, conjugate gradients broke down on an
                indefinite operator, or the matrix is singular.

        Warns:
            ConvergenceWarning: the residual is above the tolerance.

        References: Paige and Saunders 1975; Hestenes and Stiefel 1952; Fong and Saunders, "CG versus MINRES:
        an empirical comparison", 2012.

        Example:
            >>> import jax.numpy as jnp, funcprop as fp
            >>> H = fp.hessian(lambda w: jnp.sum(w**2))(jnp.ones(2))
            >>> print(H.solve(jnp.array([2.0, 4.0]), damping=2.0).round(4))
            [0.5 1. ]
        """
        names = self.parameters
        at = None if start is None else names.flat(start, "start")
        x = solve(self, names.flat(b, "b"), damping, solver, at)
        return x if names.is_flat(b) else names.unravel(x)

    def to_scipy(self) -> Any:
        """A `scipy.sparse.linalg.LinearOperator`: the operator on flat NumPy vectors, linearised.

        Example:
            >>> import jax.numpy as jnp, funcprop as fp, scipy.sparse.linalg
            >>> H = fp.hessian(lambda w: jnp.sum(jnp.arange(5.0) * w**2) / 2)(jnp.ones(5))
            >>> print(scipy.sparse.linalg.eigsh(H.to_scipy(), 1)[0].round(3))
            [4.]
        """
        from funcprop.operators.scipy_conversion import to_scipy  # SciPy's solvers load slowly.

        return to_scipy(self)


def _positive(values: Array, damping: Any, doing: str) -> Array:
    """1 if all are positive; NaN if not and that is known only at run time."""
    smallest = jnp.min(values)
    if not is_traced(smallest) and not smallest > 0:
        raise ValueError(
            f"{doing}: the operator is not positive definite: with damping={damping}, an eigenvalue is "
            f"{float(smallest):.3e}; add damping."
        )
    return jnp.where(smallest > 0, 1.0, jnp.nan).astype(values.dtype)
