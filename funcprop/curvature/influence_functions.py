"""Influence functions: how much each training example matters to a trained model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree
from wadler_lindig import pformat

from funcprop.curvature.data_operator import mean_operator
from funcprop.curvature.data_set import DataSet
from funcprop.curvature.example_gradients.mixed_examples import example_of, statistics_of_one
from funcprop.curvature.examples import loss_of_one, total_of, weights_of
from funcprop.curvature.hessian_operator import hessian
from funcprop.curvature.influence_effects import Influence, Loss, losses_of_all
from funcprop.curvature.training_examples import Training, TrainingBatch, TrainingMinibatches
from funcprop.operators.linear_operator import LinearOperator
from funcprop.operators.parameters import Parameters, Where
from funcprop.operators.solvers import Solver, require_damping, require_solver
from funcprop.operators.subset import SHAPES, restricted
from funcprop.program.call import name_of, require_values, succeeds
from funcprop.program.program import Program
from funcprop.rules.rule_set import RuleSet
from funcprop.rules.running import with_rules


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
            losses = losses_of_all(loss, params, data)
            total = total_of(weights, len(losses))
            mean = jnp.sum(losses if weights is None else weights * losses) / total
            return mean if penalty is None else mean + penalty(params)

        return lambda *data, weights=None: hessian(objective, rules=self.rules)(params, data, weights)

    def _along(self, loss: Loss) -> Callable[..., Array]:
        function = with_rules(loss, self.rules)

        def along(params: PyTree, data: tuple[Any, ...], direction: PyTree) -> Array:
            return jax.jvp(lambda p: losses_of_all(function, p, data), (params,), (direction,))[1]

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
        statistics_of_one(program.jaxpr, "influence")
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
        ValueError: `damping` is negative or not finite, the data have no common leading axis, the examples
            mix (batch norm in training mode), or `curvature` is of other parameters.
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
