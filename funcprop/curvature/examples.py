"""The convention of models and losses: functions of ONE example, or with `batched=True` of a whole batch.

The leading axis of inputs and targets is the examples either way, and the curvature is that of the mean loss
over them, unless a loss of a whole batch says otherwise.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from funcprop.program.call import name_of, succeeds

Function = Callable[..., Any]


def _alone(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf[None], tree)


def _called_as(fun: Function, changed: Function) -> Function:
    functools.update_wrapper(changed, fun)
    changed.__name__ = name_of(fun)
    return changed


def model_of_one(model: Function, batched: bool) -> Function:
    """`model(params, x)` of one example, from one of a whole batch, which is called with a batch of one."""
    if not batched:
        return model
    return _called_as(model, lambda params, x: jax.tree.map(lambda leaf: leaf[0], model(params, _alone(x))))


def loss_of_one(loss: Function, batched: bool, first: int = 0) -> Function:
    """A loss of one example, from one of a whole batch; the leading `first` arguments have no examples."""
    if not batched:
        return loss
    return _called_as(loss, lambda *args: loss(*args[:first], *map(_alone, args[first:])))


def model_of_all(model: Function, batched: bool) -> Function:
    """`model(params, x)` of a whole batch, from one of one example."""
    if batched:
        return model
    return _called_as(model, lambda params, x: jax.vmap(model, (None, 0))(params, x))


def loss_of_all(loss: Function, batched: bool) -> Function:
    """`loss(outputs, y)` of a whole batch: the mean of a loss of one example."""
    if batched:
        return loss
    return _called_as(loss, lambda outputs, y: jnp.mean(jax.vmap(loss)(outputs, y)))


@contextlib.contextmanager
def explained(what: str, model: Function, batched: bool, params: Any, x: Any) -> Iterator[None]:
    """Where a model cannot be called with one example: whether it can be with the whole batch.

    Raises:
        ValueError: it can; whatever was raised otherwise.
    """
    try:
        yield
    except (TypeError, ValueError) as error:
        if batched or not succeeds(model, params, x):
            raise
        raise ValueError(
            f"{what}: the model {name_of(model)} takes a batch and fails for ONE example "
            f"({str(error).partition(chr(10))[0]}); pass batched=True, with a loss of the whole batch too."
        ) from error
