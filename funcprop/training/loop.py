"""One step of training: forward propagation, backpropagation, update; and what a run is given and yields.

Forward needs the parameters that the last update made, and backward the intermediates that forward stored;
one jitted step is all three. The step gives its parameters and optimizer state to XLA (buffer donation), so
that the update happens in place and only one copy of them is held.

Reference: Zhang et al., *Dive into Deep Learning*, section 5.3.4.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, TypeAlias

import jax
import optax

from funcprop.program.batch_arguments import arguments
from funcprop.program.call import update_by, without_aux
from funcprop.rules.rule_set import RuleSet
from funcprop.rules.running import with_rules
from funcprop.rules.transforms import value_and_grad
from funcprop.training.position import Batches
from funcprop.training.training_state import TrainingState

Loss: TypeAlias = Callable[..., Any]
Evaluate: TypeAlias = Callable[..., Mapping[str, Any]]


class Setup(NamedTuple):
    """All that a training run needs; what `module:setup()` returns for `funcprop train`.

    * `loss(params, *batch)`: a real scalar. A batch that is a plain tuple or list is spread over the
      arguments, unless the loss takes one; any other (an array, a dict, a NamedTuple) is one argument.
    * `params`: a pytree of arrays.
    * `batches`: the minibatches of one epoch, as an iterable that can be iterated again in every epoch, or as
      a function of a PRNG key, called with another key in every epoch.
    * `optimizer`: an optax gradient transformation.
    * `epochs`: how many.
    * `evaluate(params) -> {name: number}`: metrics after every epoch, such as the accuracy on a test set.
      With a `model_state` it is called as `evaluate(params, model_state)`.
    * `options`: further keyword arguments of `fit`, such as `{"model_state": …, "precision": "bfloat16"}`.

    Example:
        >>> import jax.numpy as jnp, optax, funcprop as fp
        >>> def setup():
        ...     x = jnp.array([[1.0], [2.0]])
        ...     loss = lambda w, x, y: jnp.mean((x @ w - y) ** 2)
        ...     return fp.training.Setup(loss, jnp.zeros(1), [(x, 3 * x[:, 0])], optax.sgd(0.2), epochs=20)
        >>> *_, last = fp.training.fit(*setup()[:4], epochs=setup().epochs)
        >>> print(last.params)
        [3.]
    """

    loss: Loss
    params: Any
    batches: Batches
    optimizer: optax.GradientTransformation
    epochs: int = 10
    evaluate: Evaluate | None = None
    options: Mapping[str, Any] = MappingProxyType({})


class Epoch(NamedTuple):
    """The result of one epoch, which `fit` yields.

    `metrics["loss"]` is the mean over the minibatches, each at the parameters before its update; the other
    metrics are the means of auxiliary numbers, and those of `evaluate`. `params` and `state` stay valid:
    `fit(loss, epoch.params, …, state=epoch.state)` goes on after this epoch.
    """

    number: int
    params: Any
    state: TrainingState
    metrics: dict[str, float]


def first_minibatch(setup: Setup, key: Any = None) -> tuple[Any, ...]:
    """What the loss of a training run is first called with in an epoch, besides parameters, state and key."""
    key = jax.random.key(0) if key is None else key
    batches = setup.batches(key) if callable(setup.batches) else setup.batches
    first = (setup.params, None) if setup.options.get("model_state") is not None else (setup.params,)
    options = {"key": key} if setup.options.get("keyed") else {}
    return arguments(next(iter(batches)), setup.loss, *first, **options)


def apply_loss(loss: Loss, params: Any, batch: Any) -> Any:
    """`loss(params, *batch)` for a plain tuple or list, `loss(params, batch)` for another batch or loss.

    Example:
        >>> import funcprop as fp
        >>> fp.training.apply_loss(lambda w, x, y: w * x - y, 2.0, (3.0, 1.0))
        5.0
    """
    return loss(params, *arguments(batch, loss, params))


def make_step(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    *,
    has_aux: bool = False,
    rules: RuleSet | None = None,
) -> Callable[..., tuple[Any, ...]]:
    """One jitted step of gradient descent: `step(params, state, batch) -> (params, state, loss)`.

    With `has_aux=True` the loss returns the scalar and auxiliary data, and `step(params, state, batch) ->
    (params, state, loss, aux)`. A model with a state of its own, such as the running averages of batch norm,
    is stepped by `step(params, state, batch, carried) -> (params, state, loss, carried)`: the loss is then
    `loss(params, carried, *batch)`, and returns the scalar and the new state.

    With `g = ∂J/∂θ` on the minibatch and the optimizer's update `u(g)`: `θ ← θ + u(g)`. The buffers of
    `params` and `state` are donated: do not use those arrays again, but the ones that are returned. As under
    any `jit`, what the loss reads besides its arguments it has since the first call.

    Args:
        loss: `loss(params, *batch)`, a real scalar; see `Setup` for how a batch is passed.
        optimizer: an optax gradient transformation. One with extra arguments is given `value`, `grad`,
            `value_fn` (the loss as a function of the parameters, and of this `batch` if none is given) and
            `batch`.
        has_aux: the loss returns the scalar and auxiliary data.
        rules: a rule set; `fp.rules.default` if None.

    Raises:
        TypeError: `loss` does not return a scalar, or with `has_aux` no pair; or a state is carried without
            `has_aux`.

    Example:
        >>> import jax.numpy as jnp, optax, funcprop as fp
        >>> sgd = optax.sgd(0.25)
        >>> step = fp.training.make_step(lambda w, x: jnp.sum((w - x) ** 2), sgd)
        >>> w = jnp.zeros(2)
        >>> w, state, loss = step(w, sgd.init(w), (jnp.ones(2),))
        >>> print(w, loss)
        [0.5 0.5] 2.0
    """
    update = update_by(optimizer)

    def step(params: Any, state: Any, batch: Any, *carried: Any) -> tuple[Any, ...]:
        if len(carried) > 1 or (carried and not has_aux):
            raise TypeError(
                f"make_step: step() takes params, state, batch and, with has_aux=True, one carried state; "
                f"has_aux={has_aux}, and {len(carried)} are given."
            )

        def of_params(params: Any, batch: Any = batch) -> Any:
            return loss(params, *carried, *arguments(batch, loss, params, *carried))

        of_params.__name__ = getattr(loss, "__name__", type(loss).__name__)
        found, gradient = value_and_grad(of_params, has_aux=has_aux, rules=rules)(params)
        value, *aux = found if has_aux else (found,)
        alone = with_rules(without_aux(of_params) if has_aux else of_params, rules)
        updates, state = update(gradient, state, params, value, alone, batch)
        return optax.apply_updates(params, updates), state, value, *aux

    return jax.jit(step, donate_argnums=(0, 1))
