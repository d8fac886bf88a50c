"""The generalised Gauss-Newton matrix: the loss is expanded to second order, the model to first."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree

from funcprop.curvature.binding import Bound, ruled
from funcprop.curvature.derived import Derived
from funcprop.curvature.diagonal.exact_diagonal import hessian_diagonal
from funcprop.curvature.examples import batch_size, explained, loss_of_all, model_of_all, weights_of
from funcprop.curvature.hessian_operator import require_scalar
from funcprop.operators.parameters import Where
from funcprop.operators.subset import Point
from funcprop.program.call import in_order, name_of, shown_types
from funcprop.program.program import Program
from funcprop.rules.rule_set import RuleSet
from funcprop.rules.running import with_rules

Map = Callable[[PyTree], PyTree]
Curvature = Callable[[PyTree, Any], Map]  # of outputs, from these and arrays


def gauss_newton_map(
    model: Callable[[PyTree], PyTree], curvature: Callable[[PyTree], Map], at: PyTree
) -> Map:
    """`v ↦ Jᵀ B J v`, the model linearised once and transposed; `curvature(outputs)` is the map `u ↦ B u`."""
    outputs, forward = jax.linearize(model, at)
    backward = jax.linear_transpose(forward, at)
    bend = curvature(outputs)
    return lambda v: backward(bend(forward(v)))[0]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False, repr=False)
class GaussNewton(Derived):
    """`Jᵀ B J`: `J` the Jacobian of the model's outputs, `B` a curvature of the outputs.

    `bend` is `(outputs, more, u) ↦ B u`; `arrays` are those of the model, and these `more`.
    """

    bend: Program

    @classmethod
    def of(
        cls,
        model: Bound,
        written: Program,
        curvature: Curvature,
        more: Any,
        point: Point,
        rules: RuleSet | None,
    ) -> GaussNewton:
        """That of a model, traced as it was written, and of a curvature of its outputs and `more` arrays."""
        function = with_rules(model, rules)
        arrays, outputs = (model.arrays, more), written.results
        bend = Program.of(lambda o, more, u: curvature(o, more)(u), outputs, more, outputs)
        whole = None
        if not written.structure.differentiable:
            product = functools.partial(_product, function, bend)
            whole = Program.of(product, point.chosen, arrays, point.chosen, called=model.fun)
        return cls(written, point.chosen, arrays, whole, point.parameters, rules, bend)

    def derived(self, v: PyTree) -> PyTree:
        """The model linearised, and transposed."""
        return _product(ruled(self.written, self.rules), self.bend, self.chosen, self.arrays, v)

    def exact_diagonal(self, at_once: int | None) -> PyTree:
        """By `fp.curvature.hessian_diagonal`: for most parameters a sweep for each output of an example."""
        return _diagonal(self, at_once)


def _product(model: Callable[..., Any], bend: Program, chosen: PyTree, arrays: Any, v: PyTree) -> PyTree:
    of_model, more = arrays
    curvature = lambda outputs: lambda u: bend(outputs, more, u)  # noqa: E731
    return gauss_newton_map(lambda p: model(p, of_model), curvature, chosen)(v)


@functools.partial(jax.jit, static_argnames="at_once")
def _diagonal(operator: GaussNewton, at_once: int | None) -> PyTree:
    # `½ (J t)ᵀ B (J t)` has the Hessian `Jᵀ B J`.
    of_model, more = operator.arrays
    outputs, forward = jax.linearize(lambda p: operator.written(p, of_model), operator.chosen)

    def half_square(t: PyTree) -> Any:
        moved = forward(t)
        return optax.tree.vdot(moved, operator.bend(outputs, more, moved)) / 2

    exact = hessian_diagonal(half_square, rules=operator.rules, at_once=at_once)
    return exact(operator.parameters.zeros())


def ggn(
    model: Callable[..., Any],
    loss: Callable[..., Any],
    *,
    batched: bool = False,
    where: Where | None = None,
    rules: RuleSet | None = None,
) -> Callable[..., GaussNewton]:
    """The generalised Gauss-Newton matrix `G = Jᵀ (∇²_o loss) J` as a linear operator.

    `ggn(model, loss)(params, x, y)`, with functions of ONE example: `outputs = model(params, x)`, a pytree,
    and `loss(outputs, y)`, one real scalar; the leading axis of `x` and `y` is the examples. `G` is that of
    the mean loss, `(1/N) Σ_n J_nᵀ (∇²_o loss_n) J_n`, `J_n` the outputs' Jacobian by the parameters; with
    `ggn(model, loss)(params, x, y, weights=w)` of the weighted mean, `Σ_n w_n … / Σ_n w_n`; weights of
    positions, `[n, *positions]`, are for a loss that returns one value for each of them. With
    `batched=True` both are functions of a whole batch, and the scale is the loss's own. Squared error without
    a factor ½ has `∇²_o loss = 2 I`. `G` is positive semi-definite for a loss that is convex in the outputs,
    and is the Hessian where the model is linear in the parameters.

    Args:
        model: a function of parameters and inputs.
        loss: a function of the model's outputs and of targets.
        batched: model and loss are functions of a whole batch.
        where, rules: as in `fp.hessian`.

    Raises:
        TypeError: the loss is not one real scalar, outputs are not real, or a parameter has no derivative.
        ValueError: `where` chooses nothing, a model of a batch is given without `batched=True`, or weights
            are given with it, or are not one number ≥ 0 for each example.

    Reference: Schraudolph, "Fast curvature matrix-vector products for second-order gradient descent", Neural
    Computation 2002.

    Example:
        >>> import jax.numpy as jnp, funcprop as fp
        >>> model = lambda w, x: x @ w
        >>> squared_error = lambda output, y: 0.5 * (output - y) ** 2
        >>> x, y = jnp.array([[1.0, 2.0], [3.0, 4.0]]), jnp.zeros(2)
        >>> G = fp.ggn(model, squared_error)(jnp.zeros(2), x, y)
        >>> print(G.dense())  # x.T @ x / 2
        [[ 5.  7.]
         [ 7. 10.]]
    """

    def at(params: PyTree, x: Any, y: Any, *, weights: Any = None) -> GaussNewton:
        point = Point.of(params, where)
        model_, loss_ = model_of_all(model, batched), loss_of_all(loss, batched)
        if not batched:
            batch_size(x, y, "ggn")
        if weights is not None:
            if batched:
                raise ValueError(
                    "ggn: weights are given, but with batched=True the loss is of a whole batch; weigh the "
                    "examples in the loss, or give functions of one example."
                )
            weights = weights_of(weights, len(jax.tree.leaves(x)[0]), "ggn", positions=True)
        of_model, of_loss = Bound.of(model_, (x,), {}, point), Bound.of(loss_, (y, weights), {})
        unweighted = lambda outputs, y: loss_(outputs, y, weights)  # noqa: E731
        unweighted.__name__ = name_of(loss)
        with explained("ggn", model, batched, params, x), in_order(model_, unweighted, params, x, y):
            written = traced_model(of_model, point)
            value = jax.eval_shape(of_loss, written.results, of_loss.arrays)
            require_scalar(value, f"loss {getattr(loss, '__name__', loss)}")

        def curvature(outputs: PyTree, arrays: Any) -> Map:
            function = with_rules(of_loss, rules)
            return jax.linearize(jax.grad(lambda o: function(o, arrays)), outputs)[1]

        return GaussNewton.of(of_model, written, curvature, of_loss.arrays, point, rules)

    at.__qualname__ = "ggn(model, loss)"
    return at


def traced_model(model: Bound, point: Point) -> Program:
    """A model as it was written.

    Raises:
        TypeError: its outputs are not all real.
    """
    written = Program.of(model, point.chosen, model.arrays, called=model.fun)
    leaves = jax.tree.leaves(written.results)
    if not leaves or not all(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in leaves):
        raise TypeError(
            f"model {written.name} returns {shown_types(written.results)}, but its outputs have to be real "
            "arrays."
        )
    return written
