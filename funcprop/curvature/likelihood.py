"""What a model's outputs say about an example's target: the densities that Fisher matrices are of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from funcprop.operators.parameters import widened


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
        TypeError: the outputs are not one array.
    """
    require_array(what, outputs)
    if jnp.shape(y) != expected and not jnp.size(y) == jnp.size(outputs) == 1:
        raise ValueError(
            f"{what}: the target of one example has shape {jnp.shape(y)}, but its outputs have shape "
            f"{jnp.shape(outputs)}; give a target of shape {expected}."
        )
    return widened(jnp.asarray(y))


def require_array(what: str, outputs: Any) -> None:
    """Raise a TypeError if the outputs of one example are not one array."""
    if not hasattr(outputs, "shape"):
        own = "" if what == "laplace" else ", or make an fp.curvature.Likelihood of such outputs"
        raise TypeError(
            f"{what}: the output of one example is a {type(outputs).__name__}, but it has to be one array; "
            f"return that alone{own}."
        )


def broadcasts(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    """Whether an array of this shape broadcasts to exactly another."""
    ends = zip(shape[::-1], to[::-1], strict=False)
    return len(shape) <= len(to) and all(length in (1, wanted) for length, wanted in ends)


def _categorical_log(logits: Array, y: Any) -> Array:
    require_array("categorical", logits)
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


def gaussian(noise: Any) -> Likelihood:
    """A Gaussian density around the outputs with a standard deviation of its own for each of them.

    Args:
        noise: positive numbers, of the shape of the outputs of one example, or one that broadcasts to it.

    Raises:
        ValueError: `noise` is not positive.

    Example:
        >>> import jax.numpy as jnp, funcprop as fp
        >>> likelihood = fp.curvature.gaussian(jnp.array([1.0, 2.0]))
        >>> print(fp.fisher(lambda w, x: w * x, likelihood)(jnp.zeros(2), jnp.ones((3, 2))).dense())
        [[1.   0.  ]
         [0.   0.25]]
    """
    noise = jnp.asarray(noise)
    if not isinstance(noise, jax.core.Tracer) and not bool((noise > 0).all()):
        raise ValueError(f"gaussian: noise is {noise}; it must be positive.")

    def fitting(mean: Array) -> Array:
        """The noise of each output."""
        if not broadcasts(noise.shape, jnp.shape(mean)):
            raise ValueError(
                f"gaussian: noise has shape {noise.shape}, but the outputs of one example have shape "
                f"{mean.shape}; give one number, or one for each output."
            )
        return noise.astype(mean.dtype)

    return Likelihood(
        lambda mean, y: _gaussian_log(mean / fitting(mean), _paired("gaussian", mean, y, mean.shape) / noise),
        lambda key, mean: mean + fitting(mean) * jax.random.normal(key, mean.shape, mean.dtype),
        lambda mean, u: u / fitting(mean) ** 2,
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
