"""Influence functions: what a trained model would be, had an example not been there."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from funcprop.curvature.binding import ruled
from funcprop.curvature.example_gradients.mixed_examples import example_of
from funcprop.curvature.examples import loss_of_one
from funcprop.curvature.hessian_operator import hessian
from funcprop.operators.linear_operator import LinearOperator
from funcprop.operators.parameters import Where
from funcprop.operators.solvers import require_damping, require_solver
from funcprop.operators.subset import SHAPES, restricted
from funcprop.program.call import require_values
from funcprop.program.program import Program
from funcprop.rules.rule_set import RuleSet
from funcprop.rules.running import with_rules

Loss = Callable[..., Any]


@dataclass(frozen=True, eq=False)
class Influence:
    """The effects of leaving out single training examples, to first order.

    `objective(θ) = 1/N Σ_n loss(θ, x_n, y_n) + regularizer(θ)` has the curvature `H` (with its damping) at
    `params`, which minimise it. Leaving out example n, at the same `1/N`, moves them by `1/N H⁻¹ ∇loss_n`.

    The loss is what it was when this was made, what it reads besides its arguments included; for examples of
    other types than the training data it is traced again. `slopes` are `∇loss_nᵀ s` for all n, of
    `(params, training, s)`: one tangent, not N gradients.
    """

    loss: Program
    slopes: Program
    rules: RuleSet | None
    params: PyTree
    training: tuple[Any, ...]
    curvature: LinearOperator
    damping: float
    options: dict[str, Any]

    @property
    def examples(self) -> int:
        """N."""
        return int(jax.tree.leaves(self.training)[0].shape[0])

    def _losses_of(self, data: tuple[Any, ...]) -> Callable[[PyTree], Array]:
        """The losses of examples, as a function of the parameters."""
        loss = self.loss.at(self.params, *map(example_of, data))
        return lambda params: _losses(ruled(loss, self.rules), params, data)

    def _solve(self, b: PyTree) -> PyTree:
        return self.curvature.solve(b, self.damping, **self.options)

    def on_parameters(self, example: int) -> PyTree:
        """`1/N H⁻¹ ∇loss_n`: how far the parameters move if training example n is left out.

        Raises:
            IndexError: there is no such example.
        """
        if not -self.examples <= example < self.examples:
            raise IndexError(f"example={example}, but there are {self.examples} training examples.")
        one = jax.tree.map(lambda leaf: leaf[example], self.training)
        gradient = jax.grad(ruled(self.loss, self.rules))(self.params, *one)
        return jax.tree.map(lambda leaf: leaf / self.examples, self._solve(gradient))

    def on_losses(self, *data: Any) -> Float[Array, "m N"]:
        """How far the loss at each of m examples rises if each of the N training examples is left out.

        Entry (j, n) is `1/N ∇loss(θ, x_j, y_j)ᵀ H⁻¹ ∇loss_n`: positive where example n helps. One solution of
        a linear system for each j, and one sweep for all n.
        """
        return self._of_function(self._losses_of(data))

    def on_mean_loss(self, *data: Any) -> Float[Array, " N"]:
        """The mean of `on_losses` over the m examples, at the price of one of them."""
        losses = self._losses_of(data)
        return self._of_function(lambda params: jnp.mean(losses(params))[None])[0]

    def _of_function(self, function: Callable[[PyTree], Array]) -> Array:
        values, pullback = jax.vjp(function, self.params)
        rows = []
        for j in range(values.shape[0]):
            (gradient,) = pullback(jnp.zeros_like(values).at[j].set(1))
            rows.append(self.slopes.compiled(self.params, self.training, self._solve(gradient)))
        return jnp.stack(rows) / self.examples


def _losses(loss: Loss, params: PyTree, data: tuple[Any, ...]) -> Array:
    return jax.vmap(loss, (None, *[0] * len(data)))(params, *data)


def influence(
    loss: Loss,
    *,
    regularizer: Callable[[PyTree], Any] | None = None,
    curvature: LinearOperator | None = None,
    damping: float = 0.0,
    batched: bool = False,
    where: Where | None = None,
    rules: RuleSet | None = None,
    **options: Any,
) -> Callable[..., Influence]:
    """The influence of training examples on parameters and losses: `influence(loss)(params, x, y)`.

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
        batched: the loss is a function of a whole batch, a mean; it is called with batches of one.
        where: a subset of the parameters, as in `fp.hessian`; the others are constants, None in the result.
        rules: a rule set; `fp.rules.default` if None.
        options: of `LinearOperator.solve`: `method`, `preconditioner`, `tolerance`, `products`.

    Returns:
        A function of the parameters and the training data (leading axis: the examples), which returns an
        `Influence`: `.on_parameters(n)`, `.on_losses(x, y)`, `.on_mean_loss(x, y)`.

    Raises:
        ValueError: `damping` is negative or not finite, `method` is not known, or the data have no common
            leading axis.
        TypeError: `solve` has no such option.
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
    _require_options(options)
    loss = loss_of_one(loss, batched, first=1)

    def at(params: PyTree, *data: Any) -> Influence:
        require_values("influence", {"params": params, "data": data}, SHAPES)
        lengths = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(data)}
        if len(lengths) != 1 or () in lengths:
            shapes = ", ".join(str(jnp.shape(leaf)) for leaf in jax.tree.leaves(data))
            raise ValueError(
                f"influence: the data have the shapes {shapes}, but the leading axis is the examples; give "
                "arrays of the same length."
            )
        arrays = jax.tree.map(jnp.asarray, data)
        of_chosen, chosen = restricted(loss, params, where)
        penalty = None if regularizer is None else restricted(regularizer, params, where)[0]
        params = chosen
        program = Program.again(of_chosen, params, *map(example_of, arrays))

        def objective(params: PyTree, *data: Any) -> Any:
            mean = jnp.mean(_losses(of_chosen, params, data))
            return mean if penalty is None else mean + penalty(params)

        def along(params: PyTree, data: tuple[Any, ...], direction: PyTree) -> Array:
            function = with_rules(of_chosen, rules)
            return jax.jvp(lambda p: _losses(function, p, data), (params,), (direction,))[1]

        slopes = Program.of(along, params, arrays, params, called=loss)

        operator = hessian(objective, rules=rules)(params, *arrays) if curvature is None else curvature
        return Influence(program, slopes, rules, params, arrays, operator.linearize(), damping, options)

    return at


def _require_options(options: dict[str, Any]) -> None:
    """Raise a TypeError or ValueError for what `solve` would refuse, before there is anything to solve."""
    known = [
        n for n in inspect.signature(LinearOperator.solve).parameters if n not in ("self", "b", "damping")
    ]
    for name in options:
        if name not in known:
            raise TypeError(
                f"influence: {name}={options[name]!r} is no option; there are {', '.join(known)}."
            )
    require_solver(options.get("method"), "influence")
