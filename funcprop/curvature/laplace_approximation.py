"""The linearised Laplace approximation: a Gaussian around trained parameters, and what it says of outputs."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, PyTree, Scalar

from funcprop.curvature.binding import ruled
from funcprop.curvature.example_gradients.mixed_examples import example_of
from funcprop.curvature.example_gradients.per_example import per_example
from funcprop.curvature.examples import model_of_one
from funcprop.curvature.gauss_newton import ggn
from funcprop.curvature.kronecker_factors import kfac
from funcprop.curvature.likelihood import likelihood_of
from funcprop.curvature.precision import DiagonalPrecision, Full, KroneckerPrecision, LowRank, Precision
from funcprop.operators.convergence import is_traced
from funcprop.operators.finite import require_finite
from funcprop.operators.linear_operator import LinearOperator
from funcprop.operators.parameters import Where
from funcprop.operators.subset import Point
from funcprop.program.program import Program
from funcprop.rules.rule_set import RuleSet

AT_ONCE = 64  # examples whose Jacobians exist at the same time


class Predictive(NamedTuple):
    """Means and covariances of the outputs of m examples, without the noise of the targets."""

    mean: Float[Array, "m C"]
    covariance: Float[Array, "m C C"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class Laplace:
    """The Laplace posterior `θ ~ N(θ*, (c H + diag(δ))⁻¹)`.

    `H = Σ_n J_nᵀ Λ_n J_n` is the Gauss-Newton matrix of the negative log-likelihood, summed over the
    examples; `c = 1/noise²` for the Gaussian likelihood and 1 for others. `δ` is `prior_precision`: a number,
    or a pytree like the (chosen) parameters whose leaves are broadcast to them. All methods can be jitted,
    and differentiated by `prior_precision` and `noise`.
    """

    point: Point
    precision: Precision
    misfit: Scalar
    targets: Any
    model: Program
    likelihood: str = field(metadata={"static": True})
    rules: RuleSet | None = field(metadata={"static": True})

    def log_marginal_likelihood(self, prior_precision: Any = 1.0, noise: Any = 1.0) -> Scalar:
        """The logarithm of the evidence: `log p(D|θ*) + log p(θ*) + P/2 log 2π − ½ log det(c H + diag(δ))`.

        With the prior `N(0, diag(δ)⁻¹)` this is `log p(D|θ*) − ½ Σ δ θ*² + ½ Σ log δ − ½ log det(c H +
        diag(δ))`. The Gaussian likelihood has its constant, `−½ log(2π noise²)` for each target. Exact for a
        model that is linear in its parameters with Gaussian noise, at their posterior mean.

        Raises:
            ValueError: a precision or the noise is not positive, or there is noise but no Gaussian
            likelihood.
        """
        scale, prior = self._scale(noise), self._prior(prior_precision)
        fit = -scale * self.misfit
        if self.likelihood == "gaussian":
            fit -= self.targets / 2 * jnp.log(2 * math.pi / scale)
        leaves = jax.tree.leaves(self.point.chosen)
        penalty = sum(jnp.sum(δ * θ**2 - jnp.log(δ)) for δ, θ in zip(prior, leaves, strict=True))
        return fit - (penalty + self.precision.logdet(scale, prior)) / 2

    def predictive(self, x: Any, prior_precision: Any = 1.0, noise: Any = 1.0) -> Predictive:
        """The outputs' distribution under the linearised model: `N(f(x, θ*), J (c H + diag(δ))⁻¹ Jᵀ)`.

        The targets of a Gaussian likelihood vary by `noise²` besides. The model is what it was when it was
        fitted, what it reads besides its arguments included; for inputs of other types it is traced again.

        Raises:
            TypeError: the inputs are of other types than those it was fitted to, and the posterior is an
                argument of a jitted function; and as `log_marginal_likelihood`.
        """
        scale, prior = self._scale(noise), self._prior(prior_precision)
        model = self.model.at(self.point.chosen, self.point.others, example_of(x))
        return _predictive(model, self.rules, self.point, self.precision, x, scale, prior)

    def probabilities(self, x: Any, prior_precision: Any = 1.0) -> Float[Array, "m C"]:
        """Class probabilities with the outputs' variances: `softmax(μ / √(1 + π/8 σ²))`, or `sigmoid`.

        Raises:
            ValueError: the likelihood is Gaussian.

        Reference: MacKay, "The evidence framework applied to classification networks", Neural Computation
        1992.
        """
        if self.likelihood == "gaussian":
            raise ValueError("probabilities: the likelihood is 'gaussian', which has none; use predictive().")
        found = self.predictive(x, prior_precision)
        variance = jnp.diagonal(found.covariance, axis1=1, axis2=2)
        tempered = found.mean / jnp.sqrt(1 + math.pi / 8 * variance)
        return jax.nn.softmax(tempered) if self.likelihood == "categorical" else jax.nn.sigmoid(tempered)

    def sample(self, key: PRNGKeyArray, prior_precision: Any = 1.0, noise: Any = 1.0) -> PyTree:
        """Parameters drawn from the posterior; those that `where=` left out stay as they are."""
        moved = self.precision.sample(key, self._scale(noise), self._prior(prior_precision))
        leaves = jax.tree.leaves(self.point.chosen)
        drawn = [θ + m.reshape(θ.shape) for θ, m in zip(leaves, moved, strict=True)]
        return self.point.whole(self.point.parameters.unflatten(drawn))

    def _scale(self, noise: Any) -> Any:
        _require_positive("noise", noise)
        if self.likelihood != "gaussian":
            if not isinstance(noise, float | int) or noise != 1:
                raise ValueError(
                    f"noise={noise}, but the likelihood is {self.likelihood!r}; noise is for 'gaussian'."
                )
            return 1.0
        return 1 / jnp.asarray(noise) ** 2

    def _prior(self, precision: Any) -> list[Array]:
        leaves = jax.tree.leaves(self.point.chosen)
        given: list[Any] = jax.tree.leaves(precision)
        number, tree, structure = map(_structure, (0, self.point.chosen, precision))
        if structure == number:
            given = given * len(leaves)
        elif structure != tree:
            raise ValueError(
                f"prior_precision is {structure}, but the parameters are {tree}; pass one number, or a "
                "pytree like them."
            )
        for path, δ, θ in zip(self.point.parameters.paths, given, leaves, strict=True):
            if not _broadcasts(jnp.shape(δ), θ.shape):
                raise ValueError(
                    f"laplace: prior_precision has shape {jnp.shape(δ)} for {path!r}, which has shape "
                    f"{θ.shape}; pass one number, or a pytree like the parameters."
                )
            _require_positive(f"prior_precision of {path!r}" if len(given) > 1 else "prior_precision", δ)
        return [
            jnp.broadcast_to(jnp.asarray(δ, θ.dtype), θ.shape) for δ, θ in zip(given, leaves, strict=True)
        ]


@functools.partial(jax.jit, static_argnames="rules")
def _predictive(
    model: Program,
    rules: RuleSet | None,
    point: Point,
    precision: Precision,
    x: Any,
    scale: Any,
    prior: Any,
) -> Predictive:
    def one(x: Any) -> Predictive:
        def outputs(chosen: PyTree) -> Array:
            return jnp.ravel(ruled(model, rules)(chosen, point.others, x))

        jacobian = jax.tree.leaves(jax.jacrev(outputs)(point.chosen))
        return Predictive(outputs(point.chosen), precision.covariance(jacobian, scale, prior))

    count = jax.tree.leaves(x)[0].shape[0]
    return jax.lax.map(one, x, batch_size=min(AT_ONCE, count))


def _broadcasts(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    ends = zip(shape[::-1], to[::-1], strict=False)
    return len(shape) <= len(to) and all(length in (1, wanted) for length, wanted in ends)


def _structure(tree: PyTree) -> Any:
    return jax.tree.structure(tree)


def _require_positive(name: str, value: Any) -> None:
    # By NumPy: inside jit, jax.numpy makes a tracer even of a comparison of Python's numbers.
    if not isinstance(value, jax.core.Tracer) and not (np.asarray(value) > 0).all():
        raise ValueError(f"laplace: {name} is {value}; it must be positive.")


@dataclass(frozen=True, eq=False)
class _Fitted:
    """The ingredients of a structure: a model, the negative log-likelihood of its outputs, and the data."""

    model: Callable[..., Any]
    negative_log: Callable[..., Any]
    point: Point
    x: Any
    y: Any
    rank: int
    rules: RuleSet | None

    def of_chosen(self, chosen: PyTree, x: Any) -> Any:
        """The outputs of one example by the parameters that are uncertain."""
        return self.model(self.point.whole(chosen), x)

    def operator(self) -> LinearOperator:
        """The Gauss-Newton matrix, summed over the examples."""

        def batched(chosen: PyTree, x: Any) -> Any:
            return jax.vmap(self.of_chosen, (None, 0))(chosen, x)

        def summed(outputs: Any, y: Any) -> Any:
            return jnp.sum(jax.vmap(self.negative_log)(outputs, y))

        return ggn(batched, summed, rules=self.rules, batched=True)(self.point.chosen, self.x, self.y)

    @property
    def examples(self) -> int:
        """How many examples there are: what is computed of their mean is of them all times this."""
        return int(jax.tree.leaves(self.x)[0].shape[0])


def _full(fitted: _Fitted) -> Precision:
    return Full(fitted.operator().dense(), fitted.point.parameters)


def _diagonal(fitted: _Fitted) -> Precision:
    # One pass over the examples, where the operator's own diagonal() takes a product for each parameter.
    squares = per_example(fitted.of_chosen, fitted.negative_log, rules=fitted.rules)
    mean = squares(fitted.point.chosen, fitted.x, fitted.y, {"diag_ggn"})["diag_ggn"]
    diagonal = tuple(fitted.examples * leaf for leaf in jax.tree.leaves(mean))
    names = fitted.point.parameters
    if not is_traced(diagonal) and not all(jnp.isfinite(leaf).all() for leaf in diagonal):
        require_finite(fitted.operator(), diagonal, "laplace")
    return DiagonalPrecision(diagonal, names)


def _low_rank(fitted: _Fitted) -> Precision:
    names = fitted.point.parameters
    values, vectors = fitted.operator().eigsh(min(fitted.rank, names.size))
    return LowRank(values, names.ravel_columns(vectors), names)


def _kronecker(fitted: _Fitted) -> Precision:
    factored = kfac(fitted.of_chosen, fitted.negative_log, kind="exact", rules=fitted.rules)
    mean = factored(fitted.point.chosen, fitted.x, fitted.y)
    blocks = [block.eigen().map(lambda values: fitted.examples * values) for block in mean.blocks]
    return KroneckerPrecision(tuple(blocks), mean.parameters)


STRUCTURES = {"full": _full, "diagonal": _diagonal, "low-rank": _low_rank, "kronecker": _kronecker}


def laplace(
    model: Callable[..., Any],
    likelihood: str,
    *,
    structure: str = "diagonal",
    rank: int | None = None,
    batched: bool = False,
    where: Where | None = None,
    rules: RuleSet | None = None,
) -> Callable[..., Laplace]:
    """The linearised Laplace posterior of a trained model: `laplace(model, likelihood)(params, x, y)`.

    The precision at the trained parameters `θ*` is `c H + diag(δ)`, with the Gauss-Newton matrix
    `H = Σ_n J_nᵀ (∇²_f −log p(y_n|f)) J_n` of all examples (a sum, not a mean) and the prior's precision `δ`;
    the outputs are those of the model linearised at `θ*`.

    Args:
        model: `model(params, x)` of ONE example: a scalar, or a vector of outputs.
        likelihood: "gaussian" (`H` is that of unit variance), "categorical" (logits, integer targets) or
            "bernoulli" (logits).
        structure: of `H`: "full" (P × P), "diagonal", "low-rank" (its `rank` leading eigenpairs), or
            "kronecker" (the factors of `fp.kfac` with kind="exact", for each leaf a block; the prior's
            precision is then one number for each leaf, the mean of what is given).
        rank: of "low-rank"; 10 if None.
        batched: the model is a function of a whole batch; it is called with batches of one.
        where: which parameters are uncertain, the others being constants; the last layer's path makes a
            last-layer Laplace approximation.
        rules: a rule set; `fp.rules.default` if None.

    Returns:
        A function of parameters and training data (leading axis: the examples), which returns a `Laplace`:
        `.log_marginal_likelihood(prior_precision, noise)`, `.predictive(x, …)`, `.probabilities(x, …)`,
        `.sample(key, …)`.

    Raises:
        ValueError: `likelihood` or `structure` is not known, `rank` is without a meaning or larger than the
            number of parameters, a target has not the shape of the outputs, or `where` chooses nothing.
        FloatingPointError: the curvature is not finite; the message has the parameter's path.

    Reference: Daxberger et al., "Laplace Redux – effortless Bayesian deep learning", NeurIPS 2021; Immer,
    Korzepa and Bauer, "Improving predictions of Bayesian neural nets via local linearization", AISTATS 2021;
    MacKay, "A practical Bayesian framework for backpropagation networks", Neural Computation 1992.

    Example:
        >>> import jax.numpy as jnp, funcprop as fp
        >>> line = lambda w, x: w[0] + w[1] * x
        >>> x = jnp.array([-1.0, 0.0, 1.0])
        >>> w = jnp.array([0.0, 2.0])
        >>> posterior = fp.curvature.laplace(line, "gaussian", structure="full")(w, x, 2 * x)
        >>> found = posterior.predictive(jnp.array([0.0, 10.0]), prior_precision=1.0)
        >>> print(found.mean[:, 0], (12 * found.covariance[:, 0, 0]).round())  # 1/4, and 1/4 + 100/3
        [ 0. 20.] [  3. 403.]
    """
    chosen = likelihood_of(likelihood)
    if not isinstance(likelihood, str):
        raise ValueError(
            f"laplace: likelihood={likelihood!r}; pass 'gaussian', 'categorical' or 'bernoulli'."
        )
    if structure not in STRUCTURES:
        raise ValueError(f"laplace: structure={structure!r}; choose one of {', '.join(STRUCTURES)}.")
    if rank is not None and (structure != "low-rank" or rank < 1):
        raise ValueError(f"laplace: rank={rank} with structure={structure!r}; a rank ≥ 1 is for 'low-rank'.")

    model = model_of_one(model, batched)

    def at(params: PyTree, x: Any, y: Any) -> Laplace:
        point = Point.of(params, where)
        if rank is not None and rank > point.parameters.size:
            raise ValueError(f"laplace: rank={rank}, but there are {point.parameters.size} parameters.")
        program = Program.again(
            lambda chosen, others, x: model(point.whole(chosen, others), x),
            *(point.chosen, point.others, example_of(x)),
        )
        outputs = jax.vmap(program, (None, None, 0))(point.chosen, point.others, x)
        misfit = jnp.sum(jax.vmap(chosen.negative_log)(outputs, y))
        fitted = _Fitted(model, chosen.negative_log, point, x, y, rank or 10, rules)
        precision = STRUCTURES[structure](fitted)
        return Laplace(point, precision, misfit, jnp.size(outputs), program, likelihood, rules)

    return at
