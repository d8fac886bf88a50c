"""What is wrong with an argument of `fit`, said before anything is computed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from numbers import Integral
from typing import Any

from funcprop.program.call import require_optimizer
from funcprop.training.training_state import TrainingState

_COUNTS = {"epochs": ("epochs", 0), "accumulate": ("parts of a batch", 1)}
_FUNCTIONS = {
    "evaluate": "a function of the parameters that returns numbers by name",
    "stop": "a function of the metrics of all epochs, such as fp.training.early_stop('loss')",
    "weight": "a function of a part of a batch that says how much it counts",
}


def check(optimizer: Any, **given: Any) -> None:
    """Check the arguments of `fit`, by their names.

    Raises:
        TypeError, ValueError: one is not what `fit` takes; with what to pass.
    """
    require_optimizer("fit(loss, params, batches, optimizer): ", optimizer)
    for name, (what, least) in _COUNTS.items():
        value = given[name]
        if not isinstance(value, Integral) or int(value) < least:
            raise ValueError(f"fit: {name}={value!r}; pass the number of {what}, {least} or more.")
    batches, key, plan, state = (given[name] for name in ("batches", "key", "plan", "state"))
    is_many = isinstance(batches, Iterable) and not isinstance(batches, Mapping | str)
    if not callable(batches) and not is_many:
        raise TypeError(
            f"fit: batches is of type {type(batches).__name__}; pass the minibatches of an epoch, such as "
            "[(x, y), …], or a function of a PRNG key that returns them."
        )
    for name, what in _FUNCTIONS.items():
        if given[name] is not None and not callable(given[name]):
            raise TypeError(f"fit: {name}={given[name]!r}; pass {what}.")
    if key is not None and not hasattr(key, "dtype"):
        raise TypeError(f"fit: key={key!r}; pass a PRNG key, such as jax.random.key(0).")
    if plan is not None and not (hasattr(plan, "place") and hasattr(plan, "step")):
        raise TypeError(f"fit: plan={plan!r}; pass one of fp.partition.plan(loss)(params, batch).")
    if given["weight"] is not None and given["accumulate"] == 1:
        raise ValueError("fit: weight= says how much a part of a batch counts; pass accumulate= as well.")
    if state is not None and not isinstance(state, TrainingState):
        raise TypeError(
            f"fit: state is of type {type(state).__name__}; pass the `state` of an epoch, or "
            "fp.training.TrainingState(optimizer_state) to begin with a state of the optimizer."
        )
    if state is not None and state.model is not None and given["model_state"] is not None:
        raise ValueError("fit: state has a model state, and model_state is given as well; leave one out.")
