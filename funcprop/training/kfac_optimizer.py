"""Steps by the inverse of a Kronecker-factored curvature, and by a Gauss-Newton diagonal, for optax."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, PRNGKeyArray, PyTree

from funcprop.curvature.convexity import REMEDY, require_convex
from funcprop.curvature.example_gradients.per_example import per_example
from funcprop.curvature.kronecker import Kronecker, require_method
from funcprop.curvature.kronecker_factors import kfac as factored
from funcprop.operators.parameters import Where
from funcprop.operators.solvers import require_damping
from funcprop.rules.rule_set import RuleSet
from funcprop.training.diagonal import scale_by_diagonal
from funcprop.training.extra import MovedPart, require_arguments, require_whole


class KFACState(NamedTuple):
    """`updates` counts the updates; `average` are the averaged factors, `inverse` their damped inverse."""

    updates: Int[Array, ""]
    key: PRNGKeyArray
    average: Kronecker
    inverse: Kronecker


def kfac(
    model: Callable[..., Any],
    loss: Callable[..., Any],
    learning_rate: optax.ScalarOrSchedule,
    batch: Any,
    *,
    damping: float = 1e-2,
    decay: float = 0.95,
    every: int = 1,
    kind: str = "mc",
    sharing: str = "expand",
    bias: str = "separate",
    method: str = "pi",
    samples: int = 1,
    where: Where | None = None,
    seed: int = 0,
    rules: RuleSet | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Steps by a moving average of Kronecker factors, `u ↦ −learning_rate (A ⊗ G + damping I)⁻¹ u`.

    The factors are those of `fp.kfac(model, loss)` on the minibatch, averaged with the weight `decay` on the
    past, from the k-th update on at most `1 − 1/k`; so the first minibatch alone is the first average. A
    penalty besides (weight decay) is no part of the factors; `optax.add_decayed_weights` before this adds it.

    `update(u, state, params, *, batch, **extra)` takes the minibatch `(x, y)`, as `fp.training.make_step`
    gives it.

    Args:
        model, loss: of ONE example, `model(params, x)` and `loss(output, y)`, as in `fp.per_example`; or a
            likelihood in place of the loss, for the factors of its Fisher matrix.
        learning_rate: a number, or a schedule.
        batch: a minibatch `(x, y)`, or its shapes: the factors' shapes follow from it.
        damping: a number > 0, or 0 where the factors are not singular.
        decay: between 0 (the last minibatch alone) and 1, exclusive of 1.
        every: after how many updates the factors and their inverse are computed anew.
        kind, sharing, bias, samples: of `fp.kfac`.
        method: how the damping enters, of `Kronecker.inverse`.
        where: the parameters that are moved, as in `fp.hessian`; the updates of the others are zero.
        seed: of the key from which kind="mc" draws.
        rules: a rule set; `fp.rules.default` if None.

    Raises:
        ValueError: an argument is out of range, or `update` lacks `params` or `batch`; also as `fp.kfac`. A
            loss that is not convex in the outputs is named when a step meets it, before its result is there.

    Reference: Martens and Grosse, "Optimizing neural networks with Kronecker-factored approximate curvature",
    ICML 2015.

    Example:
        >>> import jax, jax.numpy as jnp, funcprop as fp
        >>> model = lambda w, x: x @ w
        >>> squared = lambda output, y: jnp.sum((output - y) ** 2) / 2
        >>> batch = jnp.array([[1.0, 0.0], [1.0, 2.0]]), jnp.array([[3.0], [7.0]])
        >>> optimizer = fp.training.kfac(model, squared, 1.0, batch, damping=0.0, kind="exact")
        >>> mean = lambda w, x, y: jnp.mean(jax.vmap(lambda x, y: squared(model(w, x), y))(x, y))
        >>> w, _, _ = fp.training.make_step(mean, optimizer)(w := jnp.zeros((2, 1)), optimizer.init(w), batch)
        >>> print(w.round(2).T)  # one step, for a linear model
        [[3. 2.]]
    """
    require_damping(damping, "kfac")
    require_method(method, "kfac")
    if not 0 <= decay < 1:
        raise ValueError(f"kfac: decay={decay}; pass a number from 0 up to, but not, 1.")
    if every < 1:
        raise ValueError(f"kfac: every={every}; pass a number of updates, 1 or more.")
    curvature = factored(
        model, loss, kind=kind, sharing=sharing, bias=bias, samples=samples, where=where, rules=rules
    )

    def factors(params: PyTree, batch: Any, key: PRNGKeyArray) -> Kronecker:
        x, y = batch
        return curvature(params, x, y, key if kind == "mc" else None)

    def init(params: PyTree) -> KFACState:
        require_whole("kfac", params)
        key = jax.random.key(seed)
        shapes = jax.eval_shape(factors, params, batch, key)
        average, inverse = jax.tree.map(
            lambda s: jnp.zeros(s.shape, s.dtype),
            (shapes, jax.eval_shape(lambda a: a.inverse(damping, method=method), shapes)),
        )
        return KFACState(jnp.zeros((), int), key, average, inverse)

    def update(
        updates: PyTree, state: KFACState, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, KFACState]:
        (given,) = require_arguments("kfac", {"params": params, **extra}, "batch")
        key, drawn = jax.random.split(state.key)

        def renewed(_: Any) -> tuple[Kronecker, Kronecker]:
            past = jnp.minimum(decay, 1 - 1 / (state.updates // every + 1))
            average = state.average.update(factors(params, given, drawn), past)
            kept = jax.tree.map(lambda new, old: new.astype(old.dtype), average, state.average)
            inverse = kept.inverse(damping, method=method)
            return kept, jax.tree.map(lambda new, old: new.astype(old.dtype), inverse, state.inverse)

        due = state.updates % every == 0
        average, inverse = jax.lax.cond(due, renewed, lambda _: (state.average, state.inverse), None)
        part = MovedPart(params, where)
        moved = part.with_zeros(inverse.linear_map()(part.of(updates)), updates)
        return moved, KFACState(state.updates + 1, key, average, inverse)

    step = optax.GradientTransformationExtraArgs(init, update)
    return optax.chain(step, optax.scale_by_learning_rate(learning_rate))


def gauss_newton_diagonal(
    model: Callable[..., Any],
    loss: Callable[..., Any],
    learning_rate: optax.ScalarOrSchedule,
    *,
    kind: str = "exact",
    damping: float = 1e-3,
    decay: float = 0.95,
    every: int = 1,
    samples: int = 1,
    where: Where | None = None,
    seed: int = 0,
    rules: RuleSet | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Steps divided by a moving average of the Gauss-Newton diagonal of the minibatch's mean loss.

    `fp.training.scale_by_diagonal` of `fp.per_example(model, loss)`'s `"diag_ggn"`, which is never negative,
    or with kind="mc" of `"diag_ggn_mc"`, at the price of a gradient. `update(u, state, params, *, batch,
    **extra)` takes the minibatch `(x, y)`, as `fp.training.make_step` gives it.

    Args:
        model, loss: of ONE example, as in `fp.per_example`; or a likelihood in place of the loss, for the
            diagonal of its Fisher matrix.
        learning_rate: a number, or a schedule.
        kind: "exact", or "mc" for random signs, drawn anew for every minibatch, or "empirical" for the second
            moment of the gradients.
        damping, decay, every: of `scale_by_diagonal`.
        samples: how many random columns of each example, with "mc".
        where: the parameters that are moved, as in `fp.hessian`; the updates of the others are zero.
        seed: of the key from which kind="mc" draws.
        rules: a rule set; `fp.rules.default` if None.

    Raises:
        ValueError: `kind` is not known, or as `scale_by_diagonal` and `fp.per_example`. A loss that is not
            convex in the outputs is named when a step meets it, before its result is there.

    Reference: Becker and Le Cun, "Improving the convergence of back-propagation learning with second order
    methods", 1988.

    Example:
        >>> import jax, jax.numpy as jnp, funcprop as fp
        >>> model = lambda w, x: x * w
        >>> squared = lambda output, y: jnp.sum((output - y) ** 2) / 2
        >>> batch = jnp.array([[1.0, 10.0], [1.0, 10.0]]), jnp.array([[3.0, 50.0], [5.0, 50.0]])
        >>> optimizer = fp.training.gauss_newton_diagonal(model, squared, 1.0, damping=0.0)
        >>> mean = lambda w, x, y: jnp.mean(jax.vmap(lambda x, y: squared(model(w, x), y))(x, y))
        >>> w, _, _ = fp.training.make_step(mean, optimizer)(w := jnp.zeros(2), optimizer.init(w), batch)
        >>> print(w.round(2))
        [4. 5.]
    """
    names = {"exact": "diag_ggn", "mc": "diag_ggn_mc", "empirical": "second_moment"}
    if kind not in names:
        raise ValueError(
            f"gauss_newton_diagonal: kind={kind!r}; choose one of {', '.join(map(repr, names))}."
        )
    quantities = per_example(model, loss, where=where, samples=samples, rules=rules)

    def diagonal(params: PyTree, batch: Any, updates_so_far: Any) -> PyTree:
        x, y = batch
        key = jax.random.fold_in(jax.random.key(seed), updates_so_far) if kind == "mc" else None
        found, rootless = quantities.with_rootless(params, x, y, {names[kind]}, key, None)
        require_convex("gauss_newton_diagonal", rootless, REMEDY)
        # Of what does not move nothing is divided.
        return MovedPart(params, where).with_zeros(found[names[kind]], params)

    scaling = scale_by_diagonal(diagonal, damping=damping, decay=decay, every=every)

    def update(updates: PyTree, state: Any, params: PyTree | None = None, **extra: Any) -> tuple[PyTree, Any]:
        require_arguments("gauss_newton_diagonal", {"params": params, **extra}, "batch")
        require_whole("gauss_newton_diagonal", params)
        part = MovedPart(params, where)
        scaled, state = scaling.update(updates, state, params, **extra, updates_so_far=state.updates)
        return part.with_zeros(part.of(scaled), updates), state

    step = optax.GradientTransformationExtraArgs(scaling.init, update)
    return optax.chain(step, optax.scale_by_learning_rate(learning_rate))
