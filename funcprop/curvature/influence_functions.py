"""Influence functions: what a trained model would be, had an example not been there."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PRNGKeyArray, PyTree
from wadler_lindig import pformat

from funcprop.curvature.binding import ruled
from funcprop.curvature.data_operator import mean_operator
from funcprop.curvature.data_set import DataSet
from funcprop.curvature.example_gradients.mixed_examples import example_of
from funcprop.curvature.example_gradients.per_example import per_example
from funcprop.curvature.examples import loss_of_one, total_of, weights_of
from funcprop.curvature.hessian_operator import hessian
from funcprop.operators.estimate import Estimate
from funcprop.operators.linear_operator import LinearOperator
from funcprop.operators.parameters import Parameters, Where, times
from funcprop.operators.solvers import Solver, require_damping, require_solver
from funcprop.operators.stochastic_estimates import require_samples, signs
from funcprop.operators.subset import SHAPES, restricted
from funcprop.program.call import name_of, require_values, succeeds
from funcprop.program.program import Program
from funcprop.rules.rule_set import RuleSet
from funcprop.rules.running import with_rules

Loss = Callable[..., Any]


class Training(Protocol):
    """The training examples of a model: their shares of the mean loss, and their gradients."""

    def shares(self) -> Float[Array, " N"]:
        """What each example has of the mean: `1/N`, or its part of the weights."""

    def example(self, n: int) -> tuple[Any, ...]:
        """The arrays of example n."""

    def slopes(self, direction: PyTree) -> Float[Array, " N"]:
        """`∇loss_nᵀ s` for all n: one tangent, not N gradients."""

    def rows(self, quantity: Callable[..., Array]) -> Float[Array, " N"]:
        """What `quantity(*arrays)` has for each example, of all."""


@dataclass(frozen=True, eq=False)
class TrainingBatch:
    """Training examples that are one batch; `program` is `(params, data, s) ↦ ∇loss_nᵀ s`."""

    __repr__ = pformat  # shapes instead of entries

    program: Program
    params: PyTree
    data: tuple[Any, ...]
    weights: Any

    def shares(self) -> Float[Array, " N"]:
        """Of a mean over the batch."""
        size = len(jax.tree.leaves(self.data)[0])
        return jnp.full(size, 1 / size) if self.weights is None else self.weights / total_of(self.weights, 0)

    def example(self, n: int) -> tuple[Any, ...]:
        """Its row of every array."""
        row: tuple[Any, ...] = jax.tree.map(lambda leaf: leaf[n], self.data)
        return row

    def slopes(self, direction: PyTree) -> Float[Array, " N"]:
        """By one compiled sweep."""
        found: Array = self.program.compiled(self.params, self.data, direction)
        return found

    def rows(self, quantity: Callable[..., Array]) -> Float[Array, " N"]:
        """Of the batch."""
        return quantity(*self.data)


@dataclass(frozen=True, eq=False)
class TrainingMinibatches:
    """Training examples of a data set; every answer is a pass over it."""

    __repr__ = pformat  # shapes instead of entries

    data: DataSet
    along: Callable[..., Any]

    def shares(self) -> Float[Array, " N"]:
        """Of a mean over the data."""
        counts = [
            np.ones(batch.size) if batch.weights is None else batch.weights
            for batch in self.data.loader.visit("the examples' weights")
        ]
        weights = jnp.asarray(np.concatenate(counts))
        return weights / total_of(weights, 0)

    def example(self, n: int) -> tuple[Any, ...]:
        """Its row of the minibatch that it is in."""
        before = 0
        for batch in self.data.loader.visit("one example"):
            if n < before + batch.size:
                at = n - before
                row: tuple[Any, ...] = jax.tree.map(lambda a, at=at: jnp.asarray(a[at]), batch.arguments)
                return row
            before += batch.size
        raise IndexError(f"example={n}, but there are {before} training examples.")

    def slopes(self, direction: PyTree) -> Float[Array, " N"]:
        """By one pass."""
        found: Array = self.along(direction)
        return found

    def rows(self, quantity: Callable[..., Array]) -> Float[Array, " N"]:
        """By one pass."""
        found: Array = self.data.rows(lambda *arguments, weights=None: quantity(*arguments))
        return found


@dataclass(frozen=True, eq=False)
class Influence:
    """The effects of leaving out single training examples, to first order.

    `objective(θ) = 1/N Σ_n loss(θ, x_n, y_n) + regularizer(θ)` has the curvature `H` (with its damping) at
    `params`, which minimise it. Leaving out example n, at the same `1/N`, moves them by `1/N H⁻¹ ∇loss_n`.
    With weights `1/N` is `w_n / Σ w`. To first order, the effect of a group is the sum of its examples'.

    The loss is what it was when this was made, what it reads besides its arguments included; for examples of
    other types than the training data it is traced again.
    """

    __repr__ = pformat  # shapes instead of entries

    loss: Program
    rules: RuleSet | None
    params: PyTree
    training: Training
    curvature: LinearOperator
    damping: float
    solver: Solver | None

    @functools.cached_property
    def _shares(self) -> Float[Array, " N"]:
        return self.training.shares()

    @property
    def examples(self) -> int:
        """N."""
        return len(self._shares)

    def _losses_of(self, data: tuple[Any, ...]) -> Callable[[PyTree], Array]:
        """The losses of examples, as a function of the parameters."""
        loss = self.loss.at(self.params, *map(example_of, data))
        return lambda params: _losses(ruled(loss, self.rules), params, data)

    def _solve(self, b: PyTree) -> PyTree:
        return self.curvature.solve(b, self.damping, solver=self.solver)

    def _gradient(self, n: int) -> PyTree:
        return jax.grad(ruled(self.loss, self.rules))(self.params, *self.training.example(n))

    def on_parameters(self, example: int | Sequence[int]) -> PyTree:
        """`1/N H⁻¹ ∇loss_n`: how far the parameters move if training example n is left out.

        Several examples are a group, which is left out together.

        Raises:
            IndexError: there is no such example.
        """
        group = [int(n) for n in np.atleast_1d(np.asarray(example))]
        for n in group:
            if not -self.examples <= n < self.examples:
                raise IndexError(f"example={n}, but there are {self.examples} training examples.")
        parts = [
            jax.tree.map(
                lambda g, n=n: self._shares[n].astype(g.dtype) * g, self._gradient(n % self.examples)
            )
            for n in group
        ]
        return self._solve(functools.reduce(functools.partial(jax.tree.map, jnp.add), parts))

    def on_losses(
        self,
        *data: Any,
        groups: Any = None,
        samples: int | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "m N"] | Estimate:
        """How far the loss at each of m examples rises if each of the N training examples is left out.

        Entry (j, n) is `1/N ∇loss(θ, x_j, y_j)ᵀ H⁻¹ ∇loss_n`: positive where example n helps. One solution of
        a linear system for each j, and one sweep for all n.

        Args:
            data: the m examples, as the training data.
            groups: for each training example the number of its group; a column is then a group's.
            samples, key: an `Estimate` by so many random projections `z`, the mean of `(∇loss_jᵀ z) (∇loss_nᵀ
                H⁻¹ z)`, at the price of `samples` linear systems, whatever m is.

        Raises:
            ValueError: `groups` is not one number for each training example, or there are samples but no key.
        """
        if samples is None:
            return self._grouped(self._of_function(self._losses_of(data)), groups)
        key = require_samples(samples, key)
        losses, rows = self._losses_of(data), []
        for z, solved in self._projections(samples, key):
            left = jax.jvp(losses, (self.params,), (z,))[1]
            rows.append(self._grouped(left[:, None] * self._effects(solved)[None], groups))
        return Estimate.of(jnp.stack(rows))

    def on_mean_loss(self, *data: Any, groups: Any = None) -> Float[Array, " N"]:
        """The mean of `on_losses` over the m examples, at the price of one of them."""
        losses = self._losses_of(data)
        found = self._of_function(lambda params: jnp.mean(losses(params))[None])
        return self._grouped(found, groups)[0]

    def on_itself(
        self, *, samples: int | None = None, key: PRNGKeyArray | None = None
    ) -> Float[Array, " N"] | Estimate:
        """How far the loss at each training example rises if it is left out: `1/N ∇loss_nᵀ H⁻¹ ∇loss_n`.

        Large where an example is learned by heart. Exactly, by one linear system for each; or an `Estimate`
        from `samples` random projections `z`, by so many linear systems and two sweeps for each.

        A sample is `(gᵀz) (gᵀH⁻¹z) − β ((gᵀz)² − ‖g‖²)`, `g = ∇loss_n`, whose subtrahend has the mean 0. With
        `β` about `gᵀH⁻¹g / ‖g‖²`, here the mean of all examples in the other samples, it is nearly symmetric
        about its mean, which error bars rely on, and has a third of the variance.

        Raises:
            ValueError: there are samples but no key.
        """
        if samples is None:
            own = []
            for n in range(self.examples):
                gradient = self._gradient(n)
                own.append(times(self._shares[n], optax.tree.vdot(gradient, self._solve(gradient))))
            return jnp.stack(own)
        key = require_samples(samples, key)
        slopes = self.training.slopes
        pairs = [(slopes(z), slopes(solved)) for z, solved in self._projections(samples, key)]
        left, right = (jnp.stack(each) for each in zip(*pairs, strict=True))
        products, squares = left * right, left * left
        norms = self.training.rows(self._squared_norms)[None].astype(squares.dtype)
        # Examples count alike here, whatever the lengths of their gradients are.
        alike = [jnp.sum(each / jnp.where(norms > 0, norms, 1), 1) for each in (products, squares)]
        above, below = (jnp.sum(each) - each for each in alike)
        share = jnp.where(below > 0, above / below, 0)[:, None]
        return Estimate.of(times(self._shares[None], products - share * (squares - norms)))

    def _squared_norms(self, *data: Any) -> Float[Array, " n"]:
        """`‖∇loss_n‖²` of some examples."""
        loss = ruled(self.loss, self.rules)
        quantities = per_example(lambda params, example: loss(params, *example), lambda value, _: value)
        size = len(jax.tree.leaves(data)[0])
        norms = quantities(self.params, data, jnp.zeros(size), {"norm"})["norm"]
        return functools.reduce(jnp.add, [leaf**2 for leaf in jax.tree.leaves(norms)])

    def _projections(self, samples: int, key: PRNGKeyArray) -> Iterator[tuple[PyTree, PyTree]]:
        """Random signs `z`, and `H⁻¹ z`."""
        names = self.curvature.parameters
        for z in signs(self.curvature, samples, key):
            tree = names.unravel(z)
            yield tree, self._solve(tree)

    def _effects(self, solved: PyTree) -> Float[Array, " N"]:
        """`1/N ∇loss_nᵀ s` for all n."""
        return times(self._shares, self.training.slopes(solved))

    def _of_function(self, function: Callable[[PyTree], Array]) -> Array:
        values, pullback = jax.vjp(function, self.params)
        rows = []
        for j in range(values.shape[0]):
            (gradient,) = pullback(jnp.zeros_like(values).at[j].set(1))
            rows.append(self._effects(self._solve(gradient)))
        return jnp.stack(rows)

    def _grouped(self, effects: Float[Array, "m N"], groups: Any) -> Float[Array, "m G"]:
        if groups is None:
            return effects
        numbers = np.asarray(groups)
        if numbers.shape != (self.examples,) or numbers.dtype.kind not in "iu" or numbers.min() < 0:
            raise ValueError(
                f"influence: groups have shape {numbers.shape} and type {numbers.dtype}; give the number "
                f"of its group, 0 or more, for each of the {self.examples} training examples."
            )
        return jnp.zeros((len(effects), numbers.max() + 1), effects.dtype).at[:, numbers].add(effects)


def _losses(loss: Loss, params: PyTree, data: tuple[Any, ...]) -> Array:
    return jax.vmap(loss, (None, *[0] * len(data)))(params, *data)


@dataclass(frozen=True, eq=False)
class InfluenceOf:
    """What `fp.curvature.influence` returns: `(params, x, y, weights=None) -> Influence`."""

    __repr__ = pformat  # shapes instead of entries

    loss: Loss
    regularizer: Loss | None
    curvature: LinearOperator | None
    damping: float
    where: Where | None
    rules: RuleSet | None
    solver: Solver | None

    def __call__(self, params: PyTree, *data: Any, weights: Any = None) -> Influence:
        """The influence of the examples of one batch."""
        require_values("influence", {"params": params, "data": data}, SHAPES)
        lengths = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(data)}
        if len(lengths) != 1 or () in lengths:
            shapes = ", ".join(str(jnp.shape(leaf)) for leaf in jax.tree.leaves(data))
            raise ValueError(
                f"influence: the data have the shapes {shapes}, but the leading axis is the examples; give "
                "arrays of the same length."
            )
        arrays: tuple[Any, ...] = jax.tree.map(jnp.asarray, data)
        weights = weights_of(weights, lengths.pop()[0], "influence")
        of_data = partial(self.loss, params)
        if not succeeds(of_data, *map(example_of, arrays)) and succeeds(of_data, *arrays):
            raise ValueError(
                f"influence: the loss {name_of(self.loss)} takes a batch and fails for ONE example; write it "
                "for one example, or pass batched=True."
            )
        loss, penalty, chosen = self._of_chosen(params)
        program = Program.of(self._along(loss), chosen, arrays, chosen, called=self.loss)
        training = TrainingBatch(program, chosen, arrays, weights)
        operator = self.curvature
        if operator is None:
            operator = self._hessian(loss, penalty, chosen)(*arrays, weights=weights)
        return self._found(loss, chosen, arrays, training, operator)

    def over_data(self, data: DataSet, params: PyTree) -> Influence:
        """The influence of all examples of a data set."""
        loss, penalty, chosen = self._of_chosen(params)
        along = self._along(loss)

        def slopes(*arguments: Any, direction: PyTree, weights: Any = None) -> Array:
            return along(chosen, arguments, direction)

        training = TrainingMinibatches(data, data.each(slopes, "direction"))
        operator = self.curvature
        if operator is None:
            operator = mean_operator(data, self._hessian(loss, penalty, chosen))
        return self._found(loss, chosen, data.first.arguments, training, operator)

    def _of_chosen(self, params: PyTree) -> tuple[Loss, Loss | None, PyTree]:
        """Loss and regularizer as functions of the chosen parameters, and these."""
        loss, chosen = restricted(self.loss, params, self.where)
        Parameters.of(chosen)
        penalty = self.regularizer
        return loss, penalty and restricted(penalty, params, self.where)[0], chosen

    def _hessian(self, loss: Loss, penalty: Loss | None, params: PyTree) -> Callable[..., LinearOperator]:
        def objective(params: PyTree, data: tuple[Any, ...], weights: Any) -> Any:
            losses = _losses(loss, params, data)
            total = total_of(weights, len(losses))
            mean = jnp.sum(losses if weights is None else weights * losses) / total
            return mean if penalty is None else mean + penalty(params)

        return lambda *data, weights=None: hessian(objective, rules=self.rules)(params, data, weights)

    def _along(self, loss: Loss) -> Callable[..., Array]:
        function = with_rules(loss, self.rules)

        def along(params: PyTree, data: tuple[Any, ...], direction: PyTree) -> Array:
            return jax.jvp(lambda p: _losses(function, p, data), (params,), (direction,))[1]

        return along

    def _found(
        self, loss: Loss, params: PyTree, data: Any, training: Training, operator: LinearOperator
    ) -> Influence:
        names = Parameters.of(params)
        if operator.parameters != names:
            raise ValueError(
                f"influence: curvature acts on {operator.parameters}, but the loss on {names}; make both "
                "of the same parameters, by the same where=."
            )
        program = Program.again(loss, params, *map(example_of, data))
        return Influence(
            program, self.rules, params, training, operator.linearize(), self.damping, self.solver
        )


def influence(
    loss: Loss,
    *,
    regularizer: Callable[[PyTree], Any] | None = None,
    curvature: LinearOperator | None = None,
    damping: float = 0.0,
    solver: Solver | None = None,
    batched: bool = False,
    where: Where | None = None,
    rules: RuleSet | None = None,
) -> InfluenceOf:
    """The influence of training examples on parameters and losses: `influence(loss)(params, x, y,
    weights=None)`.

    To first order in the weight 1/N of an example, minimising the mean loss without it changes the parameters
    by `1/N H⁻¹ ∇loss_n`, and a loss elsewhere by `1/N ∇lossᵀ H⁻¹ ∇loss_n`, with `H` the Hessian of
    `1/N Σ_n loss(θ, x_n, y_n) + regularizer(θ)` at its minimum. For a quadratic objective the exact change is
    that divided by `1 − h_n`, `h_n = 1/N tr(H⁻¹ ∇²loss_n)`, for a loss of rank one in the parameters.

    Args:
        loss: `loss(params, x, y)` of ONE example; a real scalar.
        regularizer: what is added to the mean loss; 0 if None.
        curvature: a linear operator to be inverted instead of the Hessian, such as `fp.ggn(…)(…)` of the
            objective. Away from a minimum the Hessian can be indefinite: use this, or `damping`.
        damping: a number ≥ 0; `H + damping I` is inverted.
        solver: of the linear systems, as in `LinearOperator.solve`.
        batched: the loss is a function of a whole batch, a mean; it is called with batches of one.
        where: a subset of the parameters, as in `fp.hessian`; the others are constants, None in the result.
        rules: a rule set; `fp.rules.default` if None.

    Returns:
        A function of the parameters and the training data (leading axis: the examples), which returns an
        `Influence`: `.on_parameters(n)`, `.on_losses(x, y)`, `.on_mean_loss(x, y)`, `.on_itself()`. That of
        a data set in minibatches is `fp.curvature.over(batches)(fp.curvature.influence(loss))(params)`.

    Raises:
        ValueError: `damping` is negative or not finite, the data have no common leading axis, or `curvature`
            is of other parameters.
        TypeError: `solver` is none.
        FloatingPointError: the curvature is not finite; the message has the parameter's path.

    Warns:
        ConvergenceWarning: a linear system was not solved to the tolerance.

    Reference: Koh and Liang, "Understanding black-box predictions via influence functions", ICML 2017;
    Cook and Weisberg, *Residuals and Influence in Regression*, 1982.

    Example:
        >>> import jax.numpy as jnp, funcprop as fp
        >>> y = jnp.array([0.0, 1.0, 5.0])  # their mean, 2, minimises the squared error
        >>> squared = lambda w, y: (w - y) ** 2 / 2
        >>> found = fp.curvature.influence(squared)(jnp.array(2.0), y)
        >>> print(found.on_parameters(2))  # −1 to first order; without it, the mean is 0.5
        -1.0
    """
    require_damping(damping, "influence")
    require_solver(solver, "influence")
    one = loss_of_one(loss, batched, first=1)
    return InfluenceOf(one, regularizer, curvature, damping, where, rules, solver)
