"""A Gaussian around trained parameters: the evidence of a prior, its own draws, and its predictions."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, PyTree, Scalar

from funcprop.curvature.example_gradients.mixed_examples import example_of
from funcprop.curvature.gaussian_prior import GaussianPrior, require_positive, spread
from funcprop.curvature.precision import Full, Precision, Prior
from funcprop.curvature.predictive import Predictive, drawn, linearised, plot_intervals
from funcprop.operators.convergence import is_traced
from funcprop.operators.linear_operator import Dense
from funcprop.operators.parameters import single_at_least
from funcprop.operators.plots import plot_entries
from funcprop.operators.subset import Point
from funcprop.program.program import Program
from funcprop.rules.rule_set import RuleSet


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class Laplace:
    """The Laplace posterior `θ ~ N(θ*, (c H + diag(δ))⁻¹)`.

    `H = Σ_n w_n J_nᵀ F_n J_n` is the Fisher matrix of the likelihood, summed over the examples with their
    weights (1, if there are none); of a categorical, Bernoulli or Gaussian likelihood it is the Gauss-Newton
    matrix of the negative log-likelihood. `c = 1/noise²` for the Gaussian likelihood and 1 for others. `δ` is
    `prior_precision`: a number; a pytree like the (chosen) parameters whose leaves are broadcast to them; or
    what `as_prior` of an earlier posterior returns. All methods can be jitted, and differentiated by
    `prior_precision` and `noise`.
    """

    point: Point
    precision: Precision
    misfit: Scalar
    targets: Any
    log_noise: Any
    model: Program
    likelihood: str | None = field(metadata={"static": True})
    rules: RuleSet | None = field(metadata={"static": True})

    def __repr__(self) -> str:
        names, likelihood = self.point.parameters, repr(self.likelihood) if self.likelihood else "your own"
        title = f"Laplace posterior of {names.size:,} parameters: likelihood {likelihood}, structure "
        title += repr(self.precision.structure)
        if not is_traced(self.misfit):  # Evidence needs a prior; this is what is known without one.
            squared = self.likelihood == "gaussian"
            what = "half the squared error" if squared else "log-likelihood"
            title += f", {what} {float(self.misfit if squared else -self.misfit):.5g}"
        return f"{title}\n{names.listed()}"

    def log_marginal_likelihood(
        self, prior_precision: Any = 1.0, noise: Any = 1.0, *, prior_mean: Any = 0.0
    ) -> Scalar:
        """The logarithm of the evidence: `log p(D|θ*) + log p(θ*) + P/2 log 2π − ½ log det(c H + diag(δ))`.

        With the prior `N(μ, diag(δ)⁻¹)` this is `log p(D|θ*) − ½ Σ δ (θ* − μ)² + ½ Σ log δ − ½ log det(c H +
        diag(δ))`. The Gaussian likelihood has its constant, `−½ log(2π noise²)` for each target. Exact for a
        model that is linear in its parameters with Gaussian noise, at their posterior mean.

        Args:
            prior_precision: see the class.
            noise: one number; with a noise for each output, by which that is multiplied.
            prior_mean: a number, or a pytree like the (chosen) parameters.

        Raises:
            ValueError: a precision or the noise is not positive, the noise is not one number, or there is
                noise but no Gaussian likelihood.
        """
        scale, prior = self._scale(noise), self._prior(prior_precision)
        if isinstance(prior_precision, GaussianPrior):
            prior_mean = prior_precision.mean
        return self._evidence(scale, prior, self._moved(prior_mean))

    @jax.jit
    def _evidence(self, scale: Any, prior: Prior, moved: list[Array]) -> Scalar:
        fit = -scale * self.misfit
        if self.likelihood == "gaussian":
            fit -= self.targets / 2 * jnp.log(2 * math.pi / scale) + self.log_noise
        if isinstance(prior, jax.Array):
            flat = jnp.concatenate([jnp.ravel(m) for m in moved])
            penalty = flat @ prior @ flat - jnp.linalg.slogdet(prior)[1]
        else:
            penalty = sum(jnp.sum(δ * m**2 - jnp.log(δ)) for δ, m in zip(prior, moved, strict=True))
        return fit - (penalty + self.precision.logdet(scale, prior)) / 2

    def predictive(
        self, x: Any, prior_precision: Any = 1.0, noise: Any = 1.0, *, joint: bool = False
    ) -> Predictive:
        """The outputs' distribution under the linearised model: `N(f(x, θ*), J (c H + diag(δ))⁻¹ Jᵀ)`.

        The targets of a Gaussian likelihood vary by `noise²` besides. The model is what it was when it was
        fitted, what it reads besides its arguments included; for inputs of other types it is traced again.

        Args:
            x: m inputs, along the leading axis.
            prior_precision, noise: as in `log_marginal_likelihood`.
            joint: also the covariances between the outputs of different inputs.

        Raises:
            TypeError: the inputs are of other types than those it was fitted to, and the posterior is an
                argument of a jitted function; and as `log_marginal_likelihood`.
        """
        scale, prior = self._scale(noise), self._prior(prior_precision)
        model = self.model.at(self.point.chosen, self.point.others, example_of(x))
        return linearised(model, self.rules, joint, self.point, self.precision, x, scale, prior)

    def probabilities(
        self,
        x: Any,
        prior_precision: Any = 1.0,
        *,
        samples: int | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "m ..."]:
        """Class probabilities with the outputs' variances, `[m, *o]`, the classes along the last axis.

        `softmax(μ / √(1 + π/8 σ²))`, or `sigmoid`; with `samples` and `key`, the mean over that many draws of
        the outputs of each example.

        Raises:
            ValueError: the likelihood has no probabilities, or there are samples but no key.

        Reference: MacKay, "The evidence framework applied to classification networks", Neural Computation
        1992.
        """
        if self.likelihood not in ("categorical", "bernoulli"):
            name = repr(self.likelihood) if self.likelihood else "one of your own"
            raise ValueError(f"probabilities: the likelihood is {name}, which has none; use predictive().")
        link = jax.nn.softmax if self.likelihood == "categorical" else jax.nn.sigmoid
        found = self.predictive(x, prior_precision)
        if samples is None:
            return link(found.mean / jnp.sqrt(1 + math.pi / 8 * found.variance))
        if key is None or samples < 1:
            raise ValueError(
                f"probabilities: samples={samples} and key={key}; give a number of draws, 1 or more, and "
                "key=jax.random.key(…)."
            )
        return jnp.mean(link(drawn(found, samples, key)), 0)

    def sample(self, key: PRNGKeyArray, prior_precision: Any = 1.0, noise: Any = 1.0) -> PyTree:
        """Parameters drawn from the posterior; those that `where=` left out stay as they are."""
        moved = self.precision.sample(key, self._scale(noise), self._prior(prior_precision))
        leaves = jax.tree.leaves(self.point.chosen)
        drawn = [(θ + m.reshape(θ.shape)).astype(θ.dtype) for θ, m in zip(leaves, moved, strict=True)]
        return self.point.whole(self.point.parameters.unflatten(drawn))

    def plot(
        self,
        x: Any = None,
        prior_precision: Any = 1.0,
        noise: Any = 1.0,
        *,
        key: PRNGKeyArray | None = None,
        samples: int = 1000,
        axes: Any = None,
    ) -> Any:
        """Draw predictive intervals at inputs `x`, or without `x` the posterior; returns matplotlib's axes.

        Of each output the mean and two bands of two standard deviations: of the model, and for a Gaussian
        likelihood of the targets; against `x` if that has one number for each example, else against the
        number of the example. Without `x`, for each parameter how the standard deviations of its entries,
        from `samples` draws, are distributed, as shares of the prior's: 1 where the data say nothing.

        Raises:
            ValueError: `prior_precision` is a matrix, and there is no `x`.
            ModuleNotFoundError: matplotlib is not installed (the extra `draw`).
        """
        if x is not None:
            found = self.predictive(x, prior_precision, noise)
            noisy = self.likelihood == "gaussian"
            return plot_intervals(x, found, 1 / self._scale(noise) if noisy else None, axes)
        prior = self._prior(prior_precision)
        if isinstance(prior, jax.Array):
            raise ValueError("plot: the prior is a matrix; give x, or a number as prior_precision.")
        keys = jax.random.split(jax.random.key(0) if key is None else key, samples)
        draws = jax.vmap(lambda key: self.precision.sample(key, self._scale(noise), prior))(keys)
        shares = [jnp.std(d, 0).reshape(δ.shape) * jnp.sqrt(δ) for d, δ in zip(draws, prior, strict=True)]
        paths, what = self.point.parameters.paths, "posterior ÷ prior standard deviation"
        return plot_entries(paths, shares, what, axes)

    def as_prior(self, prior_precision: Any = 1.0, noise: Any = 1.0) -> GaussianPrior:
        """The posterior as the prior of the next data, of structure "full" or "diagonal".

        Raises:
            ValueError: the structure is another.

        Example:
            >>> import jax.numpy as jnp, funcprop as fp
            >>> fitted = fp.curvature.laplace(lambda w, x: w * x, "gaussian")
            >>> prior = fitted(jnp.array(2.0), jnp.ones(3), 2 * jnp.ones(3)).as_prior(1.0)
            >>> print(prior.mean, prior.precision)
            2.0 4.0
            >>> more = fitted(jnp.array(2.0), jnp.ones(4), 2 * jnp.ones(4))  # of the next data
            >>> print(more.predictive(jnp.ones(1), prior).variance)
            [[0.125]]
        """
        names = self.point.parameters
        total = self.precision.total(self._scale(noise), self._prior(prior_precision))
        if isinstance(total, list):
            return GaussianPrior(self.point.chosen, names.unflatten(total))
        return GaussianPrior(self.point.chosen, Dense(total, names))

    def merged(self, other: Laplace, _: Any = None) -> Laplace:
        """The posterior of the data of both: their `H` and log-likelihoods are added.

        Raises:
            ValueError: they are not of the same parameters and structure, or have no sum.
        """
        mine, others = (jax.tree.leaves(p.point.chosen) for p in (self, other))
        alike = type(self.precision) is type(other.precision) and self.likelihood == other.likelihood
        if not alike or self.point.parameters != other.point.parameters:
            raise ValueError(
                "merge: the posteriors are of different parameters, structures or likelihoods; merge what "
                "one fp.curvature.laplace(…) has fitted."
            )
        if not is_traced((mine, others)) and not all(map(np.array_equal, mine, others)):
            raise ValueError("merge: the posteriors are at different values of the parameters.")
        return replace(
            self,
            precision=self.precision.with_more(other.precision),
            misfit=self.misfit + other.misfit,
            targets=self.targets + other.targets,
            log_noise=self.log_noise + other.log_noise,
        )

    def _scale(self, noise: Any) -> Any:
        if jnp.ndim(noise):
            raise ValueError(
                f"laplace: noise has shape {jnp.shape(noise)}, but it is one number; a noise for each output "
                "is given when it is fitted, fp.curvature.laplace(model, 'gaussian', noise=…)."
            )
        require_positive("noise", noise)
        if self.likelihood != "gaussian":
            if not isinstance(noise, float | int) or noise != 1:
                name = repr(self.likelihood) if self.likelihood else "one of your own"
                raise ValueError(f"noise={noise}, but the likelihood is {name}; noise is for 'gaussian'.")
            return 1.0
        return 1 / jnp.asarray(noise, self.misfit.dtype) ** 2

    def _moved(self, mean: Any) -> list[Array]:
        """`θ* − μ`, leaf by leaf."""
        leaves = jax.tree.leaves(self.point.chosen)
        means = spread("prior_mean", mean, self.point.parameters)
        return [θ.astype(single_at_least(θ.dtype)) - μ for θ, μ in zip(leaves, means, strict=True)]

    def _prior(self, precision: Any) -> Prior:
        names = self.point.parameters
        if isinstance(precision, GaussianPrior):
            precision = precision.precision
        if isinstance(precision, Dense):
            if not isinstance(self.precision, Full) or precision.parameters != names:
                raise ValueError(
                    "laplace: prior_precision is a matrix, which is for structure='full' and a prior of the "
                    "same parameters; pass a number, or a pytree like the parameters."
                )
            return precision.matrix
        return spread("prior_precision", precision, names, positive=True)
