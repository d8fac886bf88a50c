"""What a model's outputs say about an example's target: the densities that Fisher matrices are of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree


class Likelihood(NamedTuple):
    """A density `p(y | o)` of the target of ONE example, given the model's outputs for it.

    Attributes:
        negative_log: `(o, y) ↦ −log p(y | o)`, up to a constant.
        sample: `(key, o) ↦ y`, drawn from the density.
        fisher: `(o, u) ↦ E_y[∇_o log p (∇_o log p)ᵀ] u`, the Fisher matrix of the outputs times a vector.

    Example:
        >>> import jax, jax.numpy as jnp, funcprop as fp
        >>> poisson = fp.curvature.Likelihood(  # of counts, by the logarithm of their rate
        ...     lambda o, y: jnp.sum(jnp.exp(o) - y * o),
        ...     lambda key, o: jax.random.poisson(key, jnp.exp(o)),
        ...     lambda o, u: jnp.exp(o) * u,
        ... )
        >>> F = fp.fisher(lambda w, x: x @ w, poisson)(jnp.zeros(2), jnp.eye(2))
        >>> print(F.dense())
        [[0.5 0. ]
         [0.  0.5]]
    """

    negative_log: Callable[[PyTree, PyTree], Array]
    sample: Callable[[Array, PyTree], PyTree]
    fisher: Callable[[PyTree, PyTree], PyTree]


def _paired(what: str, outputs: Array, y: Any, expected: tuple[int, ...]) -> Any:
    """`y`, if it has a target for each of the outputs: broadcast, it would be another density's.

    Raises:
        ValueError: it has not.
    """
    if jnp.shape(y) != expected and not jnp.size(y) == jnp.size(outputs) == 1:
        raise ValueError(
            f"{what}: the target of one example has shape {jnp.shape(y)}, but its outputs have shape "
            f"{jnp.shape(outputs)}; give a target of shape {expected}."
        )
    return y


def _categorical_log(logits: Array, y: Any) -> Array:
    if not jnp.ndim(logits):
        raise ValueError("categorical: the output of one example is a scalar, but logits are on a last axis.")
    y = _paired("categorical", logits, y, logits.shape[:-1])
    return jnp.sum(optax.softmax_cross_entropy_with_integer_labels(logits, y))


def _gaussian_log(mean: Array, y: Any) -> Array:
    return 0.5 * jnp.sum((mean - _paired("gaussian", mean, y, jnp.shape(mean))) ** 2)


def _bernoulli_log(logits: Array, y: Any) -> Array:
    return jnp.sum(
        optax.sigmoid_binary_cross_entropy(logits, _paired("bernoulli", logits, y, jnp.shape(logits)))
    )


def _categorical_fisher(logits: Array, u: Array) -> Array:
    p = jax.nn.softmax(logits)
    return p * (u - jnp.sum(p * u, -1, keepdims=True))


# Logits on the last axis; further axes are independent positions, whose logarithms add up.
CATEGORICAL = Likelihood(
    _categorical_log,
    lambda key, logits: jax.random.categorical(key, logits),
    _categorical_fisher,
)

# Of unit variance, around the outputs.
GAUSSIAN = Likelihood(
    _gaussian_log,
    lambda key, mean: mean + jax.random.normal(key, mean.shape, mean.dtype),
    lambda mean, u: u,
)

# Independent, each by its logit.
BERNOULLI = Likelihood(
    _bernoulli_log,
    lambda key, logits: jax.random.bernoulli(key, jax.nn.sigmoid(logits)).astype(logits.dtype),
    lambda logits, u: jax.nn.sigmoid(logits) * jax.nn.sigmoid(-logits) * u,
)

LIKELIHOODS = {"categorical": CATEGORICAL, "gaussian": GAUSSIAN, "bernoulli": BERNOULLI}


def likelihood_of(given: Any) -> Likelihood:
    """A likelihood by its name, or itself.

    Raises:
        ValueError: there is none of this name.
    """
    if isinstance(given, Likelihood):
        return given
    if not isinstance(given, str) or given not in LIKELIHOODS:
        raise ValueError(
            f"likelihood={given!r} is not known; choose one of {', '.join(LIKELIHOODS)}, or make an "
            "fp.curvature.Likelihood."
        )
    return LIKELIHOODS[given]
