"""The linearised Laplace approximation: the posterior of a trained model, fitted to data."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from funcprop.curvature.convexity import require_convex
from funcprop.curvature.data_operator import mean_operator
from funcprop.curvature.data_set import DataSet
from funcprop.curvature.example_gradients.mixed_examples import example_of
from funcprop.curvature.example_gradients.per_example import per_example
from funcprop.curvature.examples import (
    batch_size,
    model_of_one,
    over_positions,
    total_of,
    weights_of,
)
from funcprop.curvature.fisher_operator import fisher
from funcprop.curvature.kronecker_factors import kfac
from funcprop.curvature.laplace_posterior import Laplace
from funcprop.curvature.likelihood import Likelihood, gaussian, likelihood_of, require_array
from funcprop.curvature.precision import DiagonalPrecision, Full, KroneckerPrecision, LowRank, Precision
from funcprop.operators.convergence import is_traced
from funcprop.operators.finite import require_finite
from funcprop.operators.linear_operator import LinearOperator
from funcprop.operators.parameters import Where, times, widened
from funcprop.operators.subset import Point
from funcprop.program.program import Program
from funcprop.rules.rule_set import RuleSet

RANK = 10  # of "low-rank", unless it is given
STRUCTURES = ("full", "diagonal", "low-rank", "kronecker")


class Fit(NamedTuple):
    """Means over examples: the curvature in its structure, the misfit, how many targets there are, and the
    logarithm of their noise."""

    curvature: Any
    misfit: Any
    targets: Any
    log_noise: Any


@dataclass(frozen=True, eq=False)
class LaplaceApproximation:
    """What `fp.curvature.laplace` returns: `(params, x, y, weights=None) -> Laplace`."""

    model: Callable[..., Any]
    likelihood: Likelihood
    name: str | None
    noise: Any
    structure: str
    rank: int | None
    bias: str
    where: Where | None
    rules: RuleSet | None

    def __call__(self, params: PyTree, x: Any, y: Any, *, weights: Any = None) -> Laplace:
        """The posterior of one batch of data."""
        point, size = self._point(params), batch_size(x, y, "laplace")
        weights = weights_of(weights, size, "laplace", positions=True)
        fit = self._fit(point, x, y, weights)
        count = total_of(weights, size)
        return self._posterior(point, fit, count, x, lambda: self._operator(point, x, weights))

    def over_data(self, data: DataSet, params: PyTree) -> Laplace:
        """The posterior of all data of a data set."""
        point = self._point(params)

        def fit(x: Any, y: Any, weights: Any = None) -> Fit:
            return self._fit(point, x, y, weights)

        def operator(x: Any, y: Any, weights: Any = None) -> LinearOperator:
            return self._operator(point, x, weights)

        total, x = data.mean(fit), data.first.arguments[0]
        return self._posterior(point, total.mean, total.weight, x, lambda: mean_operator(data, operator))

    def _point(self, params: PyTree) -> Point:
        point = Point.of(params, self.where)
        if self.rank is not None and self.rank > point.parameters.size:
            raise ValueError(f"laplace: rank={self.rank}, but there are {point.parameters.size} parameters.")
        return point

    def _of_chosen(self, point: Point) -> Callable[..., Any]:
        """The outputs of one example by the parameters that are uncertain."""
        return lambda chosen, x: self.model(point.whole(chosen), x)

    def _operator(self, point: Point, x: Any, weights: Any) -> LinearOperator:
        """The Fisher matrix, the mean over the examples."""
        of_likelihood = fisher(self._of_chosen(point), self.likelihood, rules=self.rules)
        return of_likelihood(point.chosen, x, weights=weights)

    def _fit(self, point: Point, x: Any, y: Any, weights: Any) -> Fit:
        model = self._of_chosen(point)
        program = Program.of(model, point.chosen, example_of(x))
        outputs = program.results
        require_array("laplace", outputs)
        size = len(jax.tree.leaves(x)[0])
        found = jax.vmap(program, (None, 0))(point.chosen, x)
        axes = 1 if weights is None else weights.ndim
        misfits = over_positions(self.likelihood.negative_log, axes)(found, widened(y))
        misfits = misfits if weights is None else times(weights, misfits)
        noise = jnp.asarray(1.0 if self.noise is None else self.noise, misfits.dtype)
        of_one = outputs.shape[axes - 1 :]
        log_noise = jnp.sum(jnp.log(jnp.broadcast_to(noise, of_one)))
        total = total_of(weights, size)
        return Fit(
            self._curvature(point, x, y, weights),
            jnp.sum(misfits) / jnp.asarray(total, misfits.dtype),
            jnp.asarray(float(math.prod(of_one)), misfits.dtype),
            log_noise,
        )

    def _curvature(self, point: Point, x: Any, y: Any, weights: Any) -> Any:
        """The mean over the examples, in the structure; None of low rank, which is of all data at once."""
        given: Any = self.name if self.name and self.noise is None else self.likelihood
        if self.noise is not None and weights is not None and weights.ndim > 1:
            # Of a Gaussian likelihood the Hessian is the Fisher matrix.
            given = over_positions(self.likelihood.negative_log, weights.ndim - 1)
        if self.structure == "full":
            return self._operator(point, x, weights).dense()
        if self.structure == "diagonal":
            # One pass over the examples; the operator's own diagonal() takes a product for each parameter.
            squares = per_example(self._of_chosen(point), given, rules=self.rules)
            found, rootless = squares.with_rootless(point.chosen, x, y, {"diag_ggn"}, None, weights)
            diagonal = found["diag_ggn"]
            finite = is_traced(diagonal) or all(
                bool(jnp.isfinite(d).all()) for d in jax.tree.leaves(diagonal)
            )
            if not finite:
                require_convex("laplace", rootless, "give a likelihood whose Fisher matrix is not indefinite")
                require_finite(self._operator(point, x, weights), diagonal, "laplace")
            return diagonal
        if self.structure == "kronecker":
            factored = kfac(self._of_chosen(point), given, kind="exact", bias=self.bias, rules=self.rules)
            return factored(point.chosen, x, y, weights=weights)
        return None

    def _posterior(
        self, point: Point, fit: Fit, count: Any, x: Any, operator: Callable[[], LinearOperator]
    ) -> Laplace:
        program = Program.again(
            lambda chosen, others, x: self.model(point.whole(chosen, others), x),
            *(point.chosen, point.others, example_of(x)),
        )
        precision = self._precision(point, fit.curvature, count, operator)
        misfit, targets, log_noise = (times(count, number) for number in fit[1:])
        return Laplace(point, precision, misfit, targets, log_noise, program, self.name, self.rules)

    def _precision(
        self, point: Point, mean: Any, count: Any, operator: Callable[[], LinearOperator]
    ) -> Precision:
        names = point.parameters
        if self.structure == "full":
            return Full(times(count, mean), names)
        if self.structure == "diagonal":
            return DiagonalPrecision(tuple(times(count, leaf) for leaf in jax.tree.leaves(mean)), names)
        if self.structure == "kronecker":
            return KroneckerPrecision.of(mean, count)
        values, vectors = operator().eigsh(min(self.rank or RANK, names.size))
        return LowRank(times(count, values), names.ravel_columns(vectors), names)


def laplace(
    model: Callable[..., Any],
    likelihood: str | Likelihood,
    *,
    structure: str = "diagonal",
    rank: int | None = None,
    bias: str = "separate",
    noise: Any = None,
    batched: bool = False,
    where: Where | None = None,
    rules: RuleSet | None = None,
) -> LaplaceApproximation:
    """The linearised Laplace posterior of a trained model: `laplace(model, likelihood)(params, x, y,
    weights=None)`.

    The precision at the trained parameters `θ*` is `c H + diag(δ)`, with the Gauss-Newton matrix
    `H = Σ_n J_nᵀ (∇²_f −log p(y_n|f)) J_n` of all examples (a sum, not a mean) and the prior's precision `δ`;
    the outputs are those of the model linearised at `θ*`. With `weights`, one number ≥ 0 for each example (0
    for padding), every example counts as that many; with weights of positions, `[n, *positions]`, every
    position does, and the likelihood is of one. Of a data set in minibatches it is
    `fp.curvature.over(batches)(fp.curvature.laplace(…))(params)`.

    Args:
        model: `model(params, x)` of ONE example: one array of outputs, whose shape is kept.
        likelihood: "gaussian" (`H` is that of unit variance), "categorical" (logits on the last axis, integer
            targets), "bernoulli" (logits), or an `fp.curvature.Likelihood`, of which `H` is the Fisher matrix
            and the evidence has no constant.
        noise: with "gaussian", the targets' standard deviation for each output of an example, if they differ;
            the `noise` of the posterior's methods multiplies it.
        structure: of `H`: "full" (P × P), "diagonal", "low-rank" (its `rank` leading eigenpairs), or
            "kronecker" (the factors of `fp.kfac` with kind="exact", for each leaf a block; the prior's
            precision is then one number for each leaf, the mean of what is given).
        rank: of "low-rank"; 10 if None.
        bias: of "kronecker", as in `fp.kfac`: "joint" has one block for a matrix and the bias beside it.
        batched: the model is a function of a whole batch; it is called with batches of one.
        where: which parameters are uncertain, the others being constants; the last layer's path makes a
            last-layer Laplace approximation.
        rules: a rule set; `fp.rules.default` if None.

    Returns:
        A function of parameters and training data (leading axis: the examples), which returns a `Laplace`:
        `.log_marginal_likelihood(prior_precision, noise)`, `.predictive(x, …)`, `.probabilities(x, …)`,
        `.sample(key, …)`, `.as_prior(…)`, `.plot(x, …)`.

    Raises:
        ValueError: `likelihood` or `structure` is not known, `rank` is without a meaning or larger than the
            number of parameters, `noise` or a target has not the shape of the outputs, or `where` chooses
            nothing.
            nothing.
        TypeError: the output is not one array.
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
    density = likelihood_of(likelihood)
    name = likelihood if isinstance(likelihood, str) else None
    if structure not in STRUCTURES:
        raise ValueError(f"laplace: structure={structure!r}; choose one of {', '.join(STRUCTURES)}.")
    if rank is not None and (structure != "low-rank" or rank < 1):
        raise ValueError(f"laplace: rank={rank} with structure={structure!r}; a rank ≥ 1 is for 'low-rank'.")
    if bias != "separate" and structure != "kronecker":
        raise ValueError(
            f"laplace: bias={bias!r} with structure={structure!r}; a block of a matrix and its bias is for "
            "'kronecker'."
        )
    if noise is not None:
        if name != "gaussian":
            raise ValueError(
                f"laplace: noise={noise}, but the likelihood is {likelihood!r}; it is for 'gaussian'."
            )
        density = gaussian(noise)
    one = model_of_one(model, batched)
    return LaplaceApproximation(one, density, name, noise, structure, rank, bias, where, rules)
