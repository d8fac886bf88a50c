"""How a batch is passed: as one argument, or a tuple or list as so many."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any


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
    """The loss; one that takes the entries of a batch that is a tuple or list as arguments, as one of it."""
    is_spread = type(batch) in (tuple, list) and not accepts(loss, params, batch)
    return of_batch(loss) if is_spread and accepts(loss, params, *batch) else loss


def one_batch(of: str, data: tuple[Any, ...]) -> Any:
    """What follows the parameters, as one batch.

    Raises:
        TypeError: it is nothing, or ends in a number: devices are given by keyword.
    """
    if not data or isinstance(data[-1], int):
        given = ", ".join(["params", *("…" for _ in data[:-1]), *map(str, data[-1:])])
        raise TypeError(
            f"{of}(loss)({given}): pass the parameters and the batch, and how many devices by keyword: "
            f"{of}(loss)(params, *batch, devices=8)."
        )
    return data[0] if len(data) == 1 else data
