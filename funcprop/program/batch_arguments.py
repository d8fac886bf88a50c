"""How a batch is passed: as one argument, or a tuple or list as so many."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from numbers import Number
from typing import Any

import jax

from funcprop.program.call import name_of


def accepts(fun: Callable[..., Any], *args: Any, **kwargs: Any) -> bool:
    """Return whether a function's signature takes these arguments; True if it does not say."""
    try:
        inspect.signature(fun).bind(*args, **kwargs)
    except TypeError:
        return False
    except ValueError:
        return True
    return True


def arguments(batch: Any, fun: Callable[..., Any], *before: Any, **options: Any) -> tuple[Any, ...]:
    """Return the arguments that a batch is to a function, after those before it.

    They are the entries of a plain tuple or list; or the batch itself, also if the function takes one more.
    """
    if type(batch) not in (tuple, list):
        return (batch,)
    is_one = not accepts(fun, *before, *batch, **options) and accepts(fun, *before, batch, **options)
    return (batch,) if is_one else tuple(batch)


def of_batch(function: Callable[..., Any], names: Sequence[str] = ()) -> Callable[..., Any]:
    """A loss of parameters and data as one of parameters and a batch, the tuple of all other arguments.

    The last of these are passed by their `names`.
    """

    def loss(params: Any, batch: Any) -> Any:
        count = len(batch) - len(names)
        return function(params, *batch[:count], **dict(zip(names, batch[count:], strict=True)))

    return loss


def taking_a_batch(loss: Callable[..., Any], params: Any, batch: Any) -> Callable[..., Any]:
    """The loss as one of parameters and batch, also if it takes the entries of a tuple or list as arguments.

    It must return nothing besides.
    """
    is_spread = type(batch) in (tuple, list) and not accepts(loss, params, batch)
    taking = of_batch(loss) if is_spread and accepts(loss, params, *batch) else loss

    def alone(params: Any, batch: Any) -> Any:
        value = taking(params, batch)
        if isinstance(value, tuple | list | Mapping):
            raise TypeError(
                f"{name_of(loss)} returns a {type(value).__name__}; plan the loss alone, such as lambda "
                "params, *batch: loss(params, *batch)[0]. fit(has_aux=True, plan=) trains with the rest."
            )
        return value

    alone.__name__ = name_of(loss)
    return alone


def one_batch(of: str, data: tuple[Any, ...]) -> Any:
    """What follows the parameters, as one batch.

    Raises:
        TypeError: it is nothing, ends in a number (devices are given by keyword), or holds what is no array.
    """
    if not data or isinstance(data[-1], int):
        given = ", ".join(["params", *("…" for _ in data[:-1]), *map(str, data[-1:])])
        raise TypeError(
            f"{of}(loss)({given}): pass the parameters and the batch, and how many devices by keyword: "
            f"{of}(loss)(params, *batch, devices=8)."
        )
    batch = data[0] if len(data) == 1 else data
    for path, leaf in jax.tree.leaves_with_path(batch):
        if not (hasattr(leaf, "dtype") or isinstance(leaf, Number)):
            raise TypeError(
                f"{of}: batch{jax.tree_util.keystr(path)}={leaf!r} is no array; close over it, or leave it "
                "out."
            )
    return batch
