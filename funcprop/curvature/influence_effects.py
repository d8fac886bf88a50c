"""What a trained model and its losses would be, had an example, or a group of them, not been there."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from funcprop.curvature.binding import ruled
from funcprop.curvature.example_gradients.mixed_examples import example_of
from funcprop.curvature.example_gradients.per_example import per_example
from funcprop.curvature.training_examples import Training
from funcprop.operators.estimate import Estimate
from funcprop.operators.linear_operator import LinearOperator
from funcprop.operators.parameters import times
from funcprop.operators.solvers import Solver
from funcprop.operators.stochastic_estimates import require_samples, signs
from funcprop.program.program import Program
from funcprop.rules.rule_set import RuleSet

Loss = Callable[..., Any]


@dataclass(frozen=True, eq=False)
class Influence:
    """The effects of leaving out single training examples, to first order.

    `objective(θ) = 1/N Σ_n loss(θ, x_n, y_n) + regularizer(θ)` has the curvature `H` (with its damping) at
    `params`, which minimise it. Leaving out example n, at the same `1/N`, moves them by `1/N H⁻¹ ∇loss_n`.
    With weights `1/N` is `w_n / Σ w`. To first order, the effect of a group is the sum of its examples'.

    The loss is what it was when this was made, what it reads besides its arguments included; for examples of
    other types than the training data it is traced again.
    """

    loss: Program
    rules: RuleSet | None
    params: PyTree
    training: Training
    curvature: LinearOperator
    damping: float
    solver: Solver | None

    def __repr__(self) -> str:
        names, solver = self.curvature.parameters, "" if self.solver is None else f", {self.solver}"
        title = f"influence of {self.training} on {names.size:,} parameters: damping {self.damping:g}{solver}"
        return f"{title}\n{names.listed()}"

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
        return lambda params: losses_of_all(ruled(loss, self.rules), params, data)

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
        return self._solve(functools.reduce(partial(jax.tree.map, jnp.add), parts))

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


def losses_of_all(loss: Loss, params: PyTree, data: tuple[Any, ...]) -> Array:
    """A loss of one example, of several."""
    return jax.vmap(loss, (None, *[0] * len(data)))(params, *data)
