"""Truncated Newton steps with Levenberg-Marquardt damping, as an optax gradient transformation.

Each step solves `(A + λ I) s = −g` by conjugate gradients, `A` the Hessian or another curvature, and adapts
`λ` by how well the quadratic model predicted what the step did.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, PyTree

from funcprop.curvature.hessian_operator import hessian
from funcprop.operators.parameters import Where, single_at_least
from funcprop.operators.solvers import require_damping
from funcprop.training.extra import MovedPart, chosen_arguments, require_arguments, require_whole

# Martens, section 4.1: beyond these ratios the damping changes.
_POOR, _GOOD = 0.25, 0.75


class NewtonCGState(NamedTuple):
    """`damping` is that of the next step; the others tell of the last one.

    `ratio` is the actual over the predicted change of the value, 1 where the quadratic model is exact;
    `steps` the conjugate-gradient iterations, `residual` the norm of `(A + λ I) s + g` over that of `g`, and
    `accepted` whether the step was taken: one that does not lower the value is not.
    """

    damping: Float[Array, ""]
    ratio: Float[Array, ""]
    steps: Int[Array, ""]
    residual: Float[Array, ""]
    accepted: Bool[Array, ""]


def newton_cg(
    *,
    damping: float = 1.0,
    curvature: Callable[..., Any] | None = None,
    products: int = 50,
    tolerance: float = 1e-5,
    factor: float = 1.5,
    where: Where | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Newton steps by conjugate gradients, damped after Levenberg and Marquardt.

    The update is `s ≈ −(A + λ I)⁻¹ u`, for the incoming updates `u` (the gradient, unless the chain changed
    it). Conjugate gradients stop at `‖(A + λ I) s + u‖ ≤ tolerance ‖u‖`, after `products`, or where they
    meet a direction of negative curvature (then what has been found so far is the step; `−u` if that is
    nothing). With

        ρ = (f(θ + s) − f(θ)) / (gᵀ s + ½ sᵀ A s),

    `λ` is multiplied by `factor` if `ρ < ¼` and divided by it if `ρ > ¾`. A step that raises `f` is not
    taken: the update is zero, and `λ` is multiplied by `factor⁴`. No learning rate is needed; what follows it
    in a chain changes a step whose effect has already been judged, so put it last.

    Where the incoming updates, the value or the curvature along the updates are NaN, or the updates infinite,
    the update is NaN and `λ` stays; `optax.apply_if_finite` skips steps whose gradient is not finite.

    `update(u, state, params, *, value, grad, value_fn, **extra)` takes what optax's line searches take: the
    value and gradient at `params`, and the function `value_fn(params, **extra)`. Of the `extra` arguments a
    function gets those that are its parameters.

    Args:
        damping: the first `λ`, 0 or more; 0 stays 0.
        curvature: `curvature(params, **extra)`, a linear operator on the parameters, such as
            `lambda params, batch: fp.ggn(model, loss)(params, *batch)`; the Hessian of `value_fn` if None.
        products: the most products of one update.
        tolerance: of the residual, relative to `u`.
        factor: by which the damping changes, more than 1.
        where: the parameters that are moved, as in `fp.hessian`, on which `curvature` acts; the updates of
            the others are zero.

    Raises:
        ValueError: an argument is out of range, or `update` lacks one of its own.

    Reference: Martens, "Deep learning via Hessian-free optimization", ICML 2010; Nocedal and Wright,
    *Numerical Optimization*, algorithm 7.1.

    Example:
        >>> import jax, jax.numpy as jnp, optax, funcprop as fp
        >>> f = lambda w: jnp.sum(jnp.array([1.0, 100.0]) * (w - 3) ** 2)
        >>> newton, w = fp.training.newton_cg(damping=0.0), jnp.zeros(2)
        >>> value, grad = jax.value_and_grad(f)(w)
        >>> step, state = newton.update(grad, newton.init(w), w, value=value, grad=grad, value_fn=f)
        >>> print(jnp.round(optax.apply_updates(w, step), 4), round(float(state.ratio), 4))
        [3. 3.] 1.0
    """
    require_damping(damping, "newton_cg")
    if products < 1:
        raise ValueError(f"newton_cg: products={products}; pass the most products of a step, 1 or more.")
    if factor <= 1:
        raise ValueError(f"newton_cg: factor={factor}; pass what the damping is multiplied by, more than 1.")

    def init(params: PyTree) -> NewtonCGState:
        require_whole("newton_cg", params)
        dtype = single_at_least(jnp.result_type(*jax.tree.leaves(params)))
        return NewtonCGState(
            jnp.asarray(damping, dtype), jnp.ones((), dtype), jnp.zeros((), int), jnp.zeros((), dtype),
            jnp.asarray(True),
        )  # fmt: skip

    def update(
        updates: PyTree, state: NewtonCGState, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, NewtonCGState]:
        value, grad, value_fn = require_arguments(
            "newton_cg", {"params": params, **extra}, "value", "grad", "value_fn"
        )
        if curvature is None:
            operator = hessian(value_fn, where=where)(params, **chosen_arguments(value_fn, extra))
        else:
            operator = curvature(params, **chosen_arguments(curvature, extra))
        part, like, apply = MovedPart(params, where), updates, operator.linear_map()
        updates, grad = _wide(part.of(updates)), _wide(part.of(grad))
        narrow = part.of(params)

        def product(v: PyTree) -> PyTree:
            return _wide(apply(jax.tree.map(lambda x, p: x.astype(p.dtype), v, narrow)))

        λ = state.damping
        solved = _conjugate_gradients(
            lambda v: optax.tree.add_scale(product(v), λ, v), updates, products, tolerance
        )
        s = solved.step
        # Of (A + λ I) s = −u − r, without another product.
        bent = -optax.tree.vdot(updates, s) - optax.tree.vdot(solved.residual, s) - λ * optax.tree.vdot(s, s)
        predicted = optax.tree.vdot(grad, s) + bent / 2
        step = jax.tree.map(lambda x, u: x.astype(u.dtype), part.with_zeros(s, like), like)
        moved = value_fn(optax.apply_updates(params, step), **chosen_arguments(value_fn, extra))
        undefined = solved.undefined | jnp.isnan(value)
        ratio = jnp.where(predicted == 0, 1, (moved - value) / jnp.where(predicted == 0, 1, predicted))
        accepted = (moved <= value) & ~undefined  # not for NaN
        grown = jnp.where(accepted, jnp.where(ratio < _POOR, factor, 1), factor**4)
        changed = λ * jnp.where(accepted & (ratio > _GOOD), 1 / factor, jnp.where(undefined, 1, grown))
        refused = jnp.where(undefined, jnp.nan, 0)
        taken = jax.tree.map(lambda x: jnp.where(accepted, x, refused.astype(x.dtype)), part.of(step))
        taken = part.with_zeros(taken, like)
        size = optax.tree.norm(updates)
        residual = optax.tree.norm(solved.residual) / jnp.where(size == 0, 1, size)
        kinds = jnp.asarray(state.damping).dtype
        return taken, NewtonCGState(
            changed.astype(kinds), ratio.astype(kinds), solved.steps, residual.astype(kinds), accepted
        )

    return optax.GradientTransformationExtraArgs(init, update)


def _wide(tree: PyTree) -> PyTree:
    """In at least float32."""
    return jax.tree.map(lambda x: x.astype(single_at_least(x.dtype)), tree)


class _Solved(NamedTuple):
    """Conjugate gradients at work: `residual = −u − B step`, `direction` the next to go.

    `undefined` says that `u` is not finite, or that `B u` is NaN.
    """

    step: PyTree
    residual: PyTree
    direction: PyTree
    squared: Any
    steps: Any
    stopped: Any
    undefined: Any


def _conjugate_gradients(
    product: Callable[[PyTree], PyTree], updates: PyTree, products: int, tolerance: float
) -> _Solved:
    """`B s = −u` until the residual is small or the curvature along a direction is not positive."""
    right = optax.tree.scale(-1, updates)
    squared = optax.tree.vdot(right, right)
    enough = tolerance**2 * squared

    def goes_on(at: _Solved) -> Any:
        return (at.squared > enough) & (at.steps < products) & ~at.stopped

    def advance(at: _Solved) -> _Solved:
        turned = product(at.direction)
        bent = optax.tree.vdot(at.direction, turned)
        negative = ~(bent > 0)
        # Along negative curvature nothing is gained by the quadratic model; only a first step is taken.
        length = jnp.where(
            negative, jnp.where(at.steps == 0, 1, 0), at.squared / jnp.where(negative, 1, bent)
        )
        step = _added(at.step, length, at.direction)
        residual = _added(at.residual, -length, turned)
        following = optax.tree.vdot(residual, residual)
        direction = _added(residual, following / at.squared, at.direction)
        undefined = at.undefined | ((at.steps == 0) & jnp.isnan(bent))
        return _Solved(step, residual, direction, following, at.steps + 1, negative, undefined)

    nothing = optax.tree.zeros_like(updates)
    start = _Solved(
        nothing, right, right, squared, jnp.zeros((), int), jnp.asarray(False), ~jnp.isfinite(squared)
    )
    return jax.lax.while_loop(goes_on, advance, start)


def _added(to: PyTree, scale: Any, tree: PyTree) -> PyTree:
    """`to + scale · tree`, each leaf with its own precision, which may differ from that of the scale."""
    return jax.tree.map(lambda a, b: (a + scale * b).astype(a.dtype), to, tree)
