"""What a Gaussian around trained parameters says of the model's outputs, with the model linearised."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from funcprop.curvature.binding import ruled
from funcprop.curvature.example_gradients.entering_parameters import Study
from funcprop.curvature.example_gradients.measurement import entries_of
from funcprop.curvature.example_gradients.per_example import LIMIT
from funcprop.curvature.precision import Precision
from funcprop.operators.parameters import single_at_least
from funcprop.operators.plots import axes_or_new
from funcprop.operators.subset import Point
from funcprop.program.program import Program
from funcprop.rules.rule_set import RuleSet

AT_ONCE = 64  # examples whose Jacobians exist at the same time
_MOST_LABELLED = 10  # outputs that a legend lists


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


@functools.partial(jax.jit, static_argnames=("rules", "joint"))
def linearised(
    model: Program,
    rules: RuleSet | None,
    joint: bool,
    point: Point,
    precision: Precision,
    x: Any,
    scale: Any,
    prior: Any,
) -> Predictive:
    """The outputs' distribution at inputs `x`, under the model linearised at the point."""
    count = jax.tree.leaves(x)[0].shape[0]
    shape = jnp.shape(model.results) or (1,)

    def outputs(chosen: PyTree, x: Any) -> Array:
        found = jnp.ravel(ruled(model, rules)(chosen, point.others, x))
        return found.astype(single_at_least(found.dtype))

    def with_jacobian(x: Any) -> tuple[Array, list[Array]]:
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
    mean, jacobians = jax.lax.map(with_jacobian, x, batch_size=min(AT_ONCE, count))
    covariance = precision.covariance([j.reshape(-1, *j.shape[2:]) for j in jacobians], scale, prior)
    return Predictive(mean.reshape(count, *shape), covariance.reshape(count, *shape, count, *shape))


def drawn(found: Predictive, samples: int, key: PRNGKeyArray) -> Float[Array, "s m ..."]:
    """Draws of the outputs of each example."""
    count, *shape = found.mean.shape
    size = math.prod(shape)
    values, vectors = jnp.linalg.eigh(found.covariance.reshape(count, size, size))
    root = vectors * jnp.sqrt(jnp.maximum(values, 0))[:, None]
    noise = jax.random.normal(key, (samples, count, size), root.dtype)
    return found.mean[None] + jnp.einsum("nij,snj->sni", root, noise).reshape(samples, count, *shape)


def plot_intervals(x: Any, found: Predictive, noise: Any, axes: Any) -> Any:
    """Draw of each output its mean and bands of two standard deviations, without and with the noise."""
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
