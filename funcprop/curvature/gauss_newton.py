"""The generalised Gauss-Newton matrix: the loss is expanded to second order, the model to first."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree

from funcprop.calls import in_order
from funcprop.curvature.binding import Bound
from funcprop.curvature.diagonal import hessian_diagonal
from funcprop.curvature.hessian import require_scalar
from funcprop.curvature.operator import LinearOperator
from funcprop.curvature.parameters import Parameters, Where
from funcprop.curvature.subset import Point
from funcprop.registry import RuleSet
from funcprop.rules import autodiff

Map = Callable[[PyTree], PyTree]


def gauss_newton_map(
    model: Callable[[PyTree], PyTree], curvature: Callable[[PyTree], Map], at: PyTree
) -> Map:
    """`v ↦ Jᵀ B J v`, the model linearised once and transposed; `curvature(outputs)` is the map `u ↦ B u`."""
    outputs, forward = jax.linearize(model, at)
    bend = curvature(outputs)
    backward = jax.linear_transpose(forward, at)
    return lambda v: backward(bend(forward(v)))[0]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False, repr=False)
class GaussNewton(LinearOperator):
    """`Jᵀ B J`: `J` the Jacobian of the model's outputs, `B` a curvature of the outputs.

    `outputs(o)` returns the linear map `u ↦ B u` at the outputs `o`.
    """

    model: Bound
    outputs: Callable[[PyTree], Map]
    point: Point
    parameters: Parameters = field(metadata={"static": True})

    def _model(self, chosen: PyTree) -> PyTree:
        return self.model(self.point.whole(chosen))

    def linear_map(self) -> Map:
        """The model linearised once, and transposed."""
        return gauss_newton_map(self._model, self.outputs, self.point.chosen)

    def product(self, v: PyTree) -> PyTree:
        """The same, with one sweep for the outputs and their tangents."""
        outputs, backward = jax.vjp(self._model, self.point.chosen)
        tangents = jax.jvp(self._model, (self.point.chosen,), (v,))[1]
        return backward(self.outputs(outputs)(tangents))[0]

    def block_map(self, rows: Sequence[int], columns: Sequence[int]) -> Callable[[Sequence[Any]], list[Any]]:
        """Tangents of some leaves forwards, cotangents of others backwards."""
        leaves = jax.tree.leaves(self.point.chosen)

        def by(which: Sequence[int]) -> Callable[[Sequence[Any]], PyTree]:
            def model(parts: Sequence[Any]) -> PyTree:
                moved = list(leaves)
                for i, part in zip(which, parts, strict=True):
                    moved[i] = part
                return self._model(self.parameters.unflatten(moved))

            return model

        outputs, forward = jax.linearize(by(columns), [leaves[i] for i in columns])
        backward = jax.vjp(by(rows), [leaves[i] for i in rows])[1]
        curvature = self.outputs(outputs)
        return lambda parts: backward(curvature(forward(list(parts))))[0]

    def exact_diagonal(self, columns: int | None) -> PyTree:
        """By `fp.curvature.hessian_diagonal`: for most parameters a sweep for each output of an example."""
        return _diagonal(self, columns)


@functools.partial(jax.jit, static_argnames="columns")
def _diagonal(operator: GaussNewton, columns: int | None) -> PyTree:
    # `½ (J t)ᵀ B (J t)` has the Hessian `Jᵀ B J`.
    written = replace(operator.model, rules=autodiff)
    outputs, forward = jax.linearize(lambda p: written(operator.point.whole(p)), operator.point.chosen)
    curvature = operator.outputs(outputs)

    def half_square(t: PyTree) -> Any:
        moved = forward(t)
        return optax.tree.vdot(moved, curvature(moved)) / 2

    exact = hessian_diagonal(half_square, rules=operator.model.rules, block_size=columns)
    return exact(jax.tree.map(jnp.zeros_like, operator.point.chosen))


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class LossHessian:
    """The Hessian of a loss by the model's outputs."""

    loss: Bound

    def __call__(self, outputs: PyTree) -> Map:
        """Linearise the gradient of the loss at the outputs."""
        return jax.linearize(jax.grad(self.loss), outputs)[1]


def ggn(
    model: Callable[..., Any],
    loss: Callable[..., Any],
    *,
    where: Where | None = None,
    rules: RuleSet | None = None,
) -> Callable[..., GaussNewton]:
    """The generalised Gauss-Newton matrix `G = Jᵀ (∇²_o loss) J` as a linear operator.

    `ggn(model, loss)(params, x, y)`, with functions of a whole batch: `outputs = model(params, x)`, a pytree,
    and `loss(outputs, y)`, one real scalar. `J` is the Jacobian of the outputs by the parameters. The scale
    is the loss's own: of a mean over examples, `G = (1/N) Σ_n J_nᵀ (∇²_o loss_n) J_n`; squared error without
    a factor ½ has `∇²_o loss = 2 I`. `G` is positive semi-definite for a loss that is convex in the outputs,
    and is the Hessian where the model is linear in the parameters.

    Args:
        model: a function of parameters and inputs.
        loss: a function of the model's outputs and of targets.
        where, rules: as in `fp.hessian`.

    Raises:
        TypeError: the loss is not one real scalar, outputs are not real, or a parameter has no derivative.
        ValueError: `where` chooses nothing.

    Reference: Schraudolph, "Fast curvature matrix-vector products for second-order gradient descent", Neural
    Computation 2002.

    Example:
        >>> import jax.numpy as jnp, funcprop as fp
        >>> model = lambda w, x: x @ w
        >>> squared_error = lambda outputs, y: 0.5 * jnp.mean((outputs - y) ** 2)
        >>> x, y = jnp.array([[1.0, 2.0], [3.0, 4.0]]), jnp.zeros(2)
        >>> G = fp.ggn(model, squared_error)(jnp.zeros(2), x, y)
        >>> print(G.dense())  # x.T @ x / 2
        [[ 5.  7.]
         [ 7. 10.]]
    """

    def at(params: PyTree, x: Any, y: Any) -> GaussNewton:
        point = Point.of(params, where)
        bound = Bound.of(model, rules, (x,), {})
        of_outputs = Bound.of(loss, rules, (y,), {})
        with in_order(model, loss, params, x, y):
            outputs = require_outputs(bound, point)
            require_scalar(jax.eval_shape(of_outputs, outputs), f"loss {of_outputs.name}")
        return GaussNewton(bound, LossHessian(of_outputs), point, point.parameters)

    return at


def require_outputs(model: Bound, point: Point) -> PyTree:
    """The shapes of a model's outputs.

    Raises:
        TypeError: they are not all real.
    """
    outputs = jax.eval_shape(lambda p: model(point.whole(p)), point.chosen)
    leaves = jax.tree.leaves(outputs)
    if not leaves or not all(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in leaves):
        raise TypeError(f"model {model.name} returns {outputs}, but its outputs have to be real arrays.")
    return outputs
