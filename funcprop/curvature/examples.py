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


def model_of_one(model: Function, batched: bool) -> Function:
    """`model(params, x)` of one example, from one of a whole batch, which is called with a batch of one."""
    if not batched:
        return model

    @functools.wraps(model)
    def of_one(params: Any, x: Any) -> Any:
        return jax.tree.map(lambda leaf: leaf[0], model(params, _alone(x)))

    of_one.__name__ = name_of(model)
    return of_one


def loss_of_one(loss: Function, batched: bool, first: int = 0) -> Function:
    """A loss of one example, from one of a whole batch; the leading `first` arguments have no examples."""
    if not batched:
        return loss

    @functools.wraps(loss)
    def of_one(*args: Any) -> Any:
        return loss(*args[:first], *map(_alone, args[first:]))

    of_one.__name__ = name_of(loss)
    return of_one


def model_of_all(model: Function, batched: bool) -> Function:
    """`model(params, x)` of a whole batch, from one of one example."""
    if batched:
        return model

    @functools.wraps(model)
    def of_all(params: Any, x: Any) -> Any:
        return jax.vmap(model, (None, 0))(params, x)

    of_all.__name__ = name_of(model)
    return of_all


def loss_of_all(loss: Function, batched: bool) -> Function:
    """`loss(outputs, y)` of a whole batch: the mean of a loss of one example."""
    if batched:
        return loss

    @functools.wraps(loss)
    def of_all(outputs: Any, y: Any) -> Any:
        return jnp.mean(jax.vmap(loss)(outputs, y))

    of_all.__name__ = name_of(loss)
    return of_all


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
