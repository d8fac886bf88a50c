"""A Gaussian around trained parameters, and what it says of the model's outputs."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, PyTree, Scalar
from wadler_lindig import pformat

from funcprop.curvature.binding import ruled
from funcprop.curvature.example_gradients.entering_parameters import Study
from funcprop.curvature.example_gradients.measurement import entries_of
from funcprop.curvature.example_gradients.mixed_examples import example_of
from funcprop.curvature.example_gradients.per_example import LIMIT
from funcprop.curvature.likelihood import broadcasts
from funcprop.curvature.precision import Full, Precision, Prior
from funcprop.operators.convergence import is_traced
from funcprop.operators.linear_operator import Dense
from funcprop.operators.parameters import shown, single_at_least
from funcprop.operators.plots import axes_or_new, plot_entries
from funcprop.operators.subset import Point
from funcprop.program.program import Program
from funcprop.rules.rule_set import RuleSet

AT_ONCE = 64  # examples whose Jacobians exist at the same time


class Predictive(NamedTuple):
    """Means and covariances of the outputs of m examples, without the noise of the targets.

    The outputs `o` of one example have the model's shape; a scalar is a vector of length 1. `covariance` is
    `[m, *o, *o]`, or with `joint=True` that of all outputs of all examples, `[m, *o, m, *o]`.
    """

    mean: Float[Array, "m ..."]
    covariance: Float[Array, "m ..."]

    @property
    def variance(self) -> Float[Array, "m ..."]:
        """The variance of every output, `[m, *o]`."""
        size, rest = math.prod(self.mean.shape), math.prod(self.mean.shape[1:])
        if self.covariance.ndim == 2 * self.mean.ndim:
            return jnp.diagonal(self.covariance.reshape(size, size)).reshape(self.mean.shape)
        blocks = self.covariance.reshape(-1, rest, rest)
        return jnp.diagonal(blocks, axis1=1, axis2=2).reshape(self.mean.shape)


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

    __repr__ = pformat  # shapes instead of entries

    point: Point
    precision: Precision
    misfit: Scalar
    targets: Any
    log_noise: Any
    model: Program
    likelihood: str | None = field(metadata={"static": True})
    rules: RuleSet | None = field(metadata={"static": True})

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
        fit = -scale * self.misfit
        if self.likelihood == "gaussian":
            fit -= self.targets / 2 * jnp.log(2 * math.pi / scale) + self.log_noise
        if isinstance(prior_precision, GaussianPrior):
            prior_mean = prior_precision.mean
        moved = self._moved(prior_mean)
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
        return _predictive(model, self.rules, joint, self.point, self.precision, x, scale, prior)

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
        return jnp.mean(link(_drawn(found, samples, key)), 0)

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
            return _plot_intervals(x, found, 1 / self._scale(noise) if noisy else None, axes)
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
        _require_positive("noise", noise)
        if self.likelihood != "gaussian":
            if not isinstance(noise, float | int) or noise != 1:
                name = repr(self.likelihood) if self.likelihood else "one of your own"
                raise ValueError(f"noise={noise}, but the likelihood is {name}; noise is for 'gaussian'.")
            return 1.0
        return 1 / jnp.asarray(noise, self.misfit.dtype) ** 2

    def _moved(self, mean: Any) -> list[Array]:
        """`θ* − μ`, leaf by leaf."""
        leaves = jax.tree.leaves(self.point.chosen)
        means = self._spread("prior_mean", mean)
        return [θ.astype(single_at_least(θ.dtype)) - μ for θ, μ in zip(leaves, means, strict=True)]

    def _prior(self, precision: Any) -> Prior:
        if isinstance(precision, GaussianPrior):
            precision = precision.precision
        if isinstance(precision, Dense):
            if not isinstance(self.precision, Full) or precision.parameters != self.point.parameters:
                raise ValueError(
                    "laplace: prior_precision is a matrix, which is for structure='full' and a prior of the "
                    "same parameters; pass a number, or a pytree like the parameters."
                )
            return precision.matrix
        return self._spread("prior_precision", precision, positive=True)

    def _spread(self, name: str, given: Any, positive: bool = False) -> list[Array]:
        """A number, or a pytree like the parameters, for every entry of every leaf."""
        leaves = jax.tree.leaves(self.point.chosen)
        values: list[Any] = jax.tree.leaves(given)
        number, tree, structure = map(_structure, (0, self.point.chosen, given))
        if structure == number:
            values = values * len(leaves)
        elif structure != tree:
            raise ValueError(
                f"{name} is {structure}, but the parameters are {tree}; pass one number, or a pytree like "
                "them."
            )
        for path, value, θ in zip(self.point.parameters.paths, values, leaves, strict=True):
            if not broadcasts(jnp.shape(value), θ.shape):
                raise ValueError(
                    f"laplace: {name} has shape {jnp.shape(value)} for {shown(path)}, which has shape "
                    f"{θ.shape}; pass one number, or a pytree like the parameters."
                )
            if positive:
                _require_positive(f"{name} of {shown(path)}" if len(values) > 1 else name, value)
        return [
            jnp.broadcast_to(jnp.asarray(value, single_at_least(θ.dtype)), θ.shape)
            for value, θ in zip(values, leaves, strict=True)
        ]


@functools.partial(jax.jit, static_argnames=("rules", "joint"))
def _predictive(
    model: Program,
    rules: RuleSet | None,
    joint: bool,
    point: Point,
    precision: Precision,
    x: Any,
    scale: Any,
    prior: Any,
) -> Predictive:
    count = jax.tree.leaves(x)[0].shape[0]
    shape = jnp.shape(model.results) or (1,)

    def outputs(chosen: PyTree, x: Any) -> Array:
        found = jnp.ravel(ruled(model, rules)(chosen, point.others, x))
        return found.astype(single_at_least(found.dtype))

    def linearised(x: Any) -> tuple[Array, list[Array]]:
        return outputs(point.chosen, x), jax.tree.leaves(jax.jacrev(outputs)(point.chosen, x))

    study = Study.of(model, point.chosen, rules)

    def one(x: Any) -> Predictive:
        batch = jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], (point.others, x))
        output, pull, met = study.forward(jax.tree.leaves(point.chosen), batch, 1)
        (cotangents,) = jax.vmap(pull)(entries_of(output, math.prod(shape)))
        forms = study.forms(met, cotangents, 1, LIMIT)
        covariance = precision.covariance_of_forms(study, forms, scale, prior)
        mean = output.astype(single_at_least(output.dtype)).reshape(shape)
        return Predictive(mean, covariance.reshape(*shape, *shape))

    if not joint:
        return jax.lax.map(one, x, batch_size=min(AT_ONCE, count))
    mean, jacobians = jax.lax.map(linearised, x, batch_size=min(AT_ONCE, count))
    covariance = precision.covariance([j.reshape(-1, *j.shape[2:]) for j in jacobians], scale, prior)
    return Predictive(mean.reshape(count, *shape), covariance.reshape(count, *shape, count, *shape))


def _drawn(found: Predictive, samples: int, key: PRNGKeyArray) -> Float[Array, "s m ..."]:
    """Draws of the outputs of each example."""
    count, *shape = found.mean.shape
    size = math.prod(shape)
    values, vectors = jnp.linalg.eigh(found.covariance.reshape(count, size, size))
    root = vectors * jnp.sqrt(jnp.maximum(values, 0))[:, None]
    noise = jax.random.normal(key, (samples, count, size), root.dtype)
    return found.mean[None] + jnp.einsum("nij,snj->sni", root, noise).reshape(samples, count, *shape)


def _plot_intervals(x: Any, found: Predictive, noise: Any, axes: Any) -> Any:
    axes = axes_or_new(axes)
    inputs = [np.asarray(leaf) for leaf in jax.tree.leaves(x)]
    count = len(inputs[0])
    one = len(inputs) == 1 and inputs[0].size == count
    at = inputs[0].reshape(-1) if one else np.arange(count)
    order = np.argsort(at)
    means = np.asarray(found.mean).reshape(count, -1)[order]
    variances = np.asarray(found.variance).reshape(count, -1)[order]
    for i, (mean, variance) in enumerate(zip(means.T, variances.T, strict=True)):
        color, half = f"C{i % 10}", 2 * np.sqrt(variance)
        axes.plot(at[order], mean, color=color, label=f"output {i}" if means.shape[1] > 1 else "mean")
        axes.fill_between(at[order], mean - half, mean + half, color=color, alpha=0.3, linewidth=0)
        if noise is not None:
            wide = 2 * np.sqrt(variance + float(noise))
            axes.fill_between(at[order], mean - wide, mean + wide, color=color, alpha=0.12, linewidth=0)
    bands = "± 2 standard deviations: of the model" + ("" if noise is None else ", of the targets")
    axes.set(xlabel="input" if one else "example", ylabel="output")
    axes.set_title(bands, fontsize="medium")
    if means.shape[1] <= _MOST_LABELLED:
        axes.legend(frameon=False)
    return axes


_MOST_LABELLED = 10  # outputs that a legend lists


def _structure(tree: PyTree) -> Any:
    return jax.tree.structure(tree)


def _require_positive(name: str, value: Any) -> None:
    # By NumPy: inside jit, jax.numpy makes a tracer even of a comparison of Python's numbers.
    if not isinstance(value, jax.core.Tracer) and not (np.asarray(value) > 0).all():
        raise ValueError(f"laplace: {name} is {value}; it must be positive.")
