"""When to stop: functions of the metrics of all epochs, so that a resumed run stops where it would have."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

Stop: TypeAlias = Callable[[Sequence[Mapping[str, float]]], bool]


def early_stop(metric: str, *, patience: int = 5, least: float = 0.0, largest: bool = False) -> Stop:
    """Stop when a metric has not improved for `patience` epochs; for `fit(..., stop=)`.

    Args:
        metric: a name among the metrics, such as `"test_loss"`.
        patience: how many epochs without an improvement are too many, 1 or more.
        least: by how much a value must be better than the best before it, to count.
        largest: whether large values are good, as of an accuracy.

    Raises:
        ValueError: `patience` is less than 1.
        KeyError: when it is asked: there is no metric of that name.

    Example:
        >>> import funcprop as fp
        >>> stop = fp.training.early_stop("test_loss", patience=2)
        >>> [stop([{"test_loss": x} for x in losses]) for losses in ([3, 2, 2.5], [3, 2, 2.5, 2.1])]
        [False, True]
    """
    if patience < 1:
        raise ValueError(f"early_stop: patience={patience}; pass a number of epochs, 1 or more.")

    def stop(history: Sequence[Mapping[str, float]]) -> bool:
        best, since = -math.inf, 0
        for metrics in history:
            if metric not in metrics:
                raise KeyError(f"early_stop: no metric {metric!r}; there are {', '.join(metrics)}.")
            value = metrics[metric] if largest else -metrics[metric]
            # A value that is not a number is no improvement.
            best, since = (value, 0) if value > best + least else (best, since + 1)
        return since >= patience

    return stop
