"""One update as a function of arrays; where something is not finite, it changes nothing.

The buffers of the old parameters are given away before the host hears of a loss that is not finite. So the
step itself keeps them: it and every step after it return what they were given.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from funcprop.program.call import all_finite, update_by
from funcprop.rules.rule_set import RuleSet
from funcprop.rules.running import with_rules
from funcprop.training.position import step_key
from funcprop.training.training_loss import TrainingLoss


class Carried(NamedTuple):
    """Arrays that go from step to step besides the parameters; `intact` until something is not finite."""

    optimizer: Any
    model: Any
    scale: Any
    intact: Any


class Outcome(NamedTuple):
    """What a step says of itself: the loss before the update, auxiliary numbers, and `Carried.intact`."""

    loss: Any
    aux: Any
    intact: Any


def update_step(
    objective: TrainingLoss, optimizer: optax.GradientTransformation, rules: RuleSet | None
) -> Callable[..., tuple[Any, Carried, Outcome]]:
    """Make `step(params, carried, batch, key, number) -> (params, carried, outcome)`, to be jitted."""
    update = update_by(optimizer)
    precision = objective.precision

    def step(params: Any, carried: Carried, batch: Any, key: Any, number: Any) -> Any:
        own = step_key(key, number)
        factor = None if carried.scale is None else carried.scale.factor
        value, gradient, (model, aux) = objective.differentiated(
            rules, params, carried.model, batch, own, factor
        )
        scale, kept = carried.scale, jnp.bool_(True)
        if precision is not None and factor is not None:
            gradient = jax.tree.map(lambda g: g / factor.astype(g.dtype), gradient)
            kept = all_finite(gradient)
            scale = precision.next_scale(carried.scale, kept)

        @partial(with_rules, rules=rules)
        def loss(params: Any, batch: Any) -> Any:
            return objective.value(params, carried.model, batch, own)

        updates, state = update(gradient, carried.optimizer, params, value, loss, batch)
        sound = all_finite(updates)
        if factor is not None:
            # An overflow of scaled gradients leaves out the update, until no smaller factor is left.
            sound = sound | (~kept & (factor > 1))
        finite = jnp.isfinite(value) & sound
        intact = carried.intact & finite
        changed = intact & kept
        params = chosen(changed, optax.apply_updates(params, updates), params)
        state, model = chosen(changed, (state, model), (carried.optimizer, carried.model))
        scale = chosen(intact, scale, carried.scale)
        return params, Carried(state, model, scale, intact), Outcome(value, aux, intact)

    return step


def chosen(condition: Any, new: Any, old: Any) -> Any:
    """Return one of two trees, leaf by leaf, in the types of the new one."""

    def leaf(x: Any, y: Any) -> Any:
        x, y = jnp.asarray(x), jnp.asarray(y)
        return jax.lax.select(condition, x, y if x.dtype == y.dtype else y.astype(x.dtype))

    return jax.tree.map(leaf, new, old)
