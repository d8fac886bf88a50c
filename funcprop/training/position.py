"""Where a run is in its data: a function of the seed and the step alone, whatever the devices."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

Batches: TypeAlias = "Iterable[Any] | Callable[[Any], Iterable[Any]]"


class Position(NamedTuple):
    """`step` steps are done; `epoch` epochs are over, and `batch` minibatches of the next one are used."""

    step: int = 0
    epoch: int = 0
    batch: int = 0

    def after_step(self) -> Position:
        """Return the position after one more minibatch."""
        return self._replace(step=self.step + 1, batch=self.batch + 1)

    def after_epoch(self) -> Position:
        """Return the position at the beginning of the next epoch."""
        return self._replace(epoch=self.epoch + 1, batch=0)


def epoch_key(key: Any, epoch: int) -> Any:
    """Return the key of an epoch's shuffle; epochs count from 1."""
    return jax.random.fold_in(key, epoch)


def step_key(key: Any, step: Any) -> Any:
    """Return the key of a step, such as of its dropout; no epoch has the number 0."""
    return jax.random.fold_in(jax.random.fold_in(key, 0), step)


def with_last(items: Iterable[Any]) -> Iterator[tuple[Any, bool]]:
    """Yield each item, and whether it is the last one."""
    iterator = iter(items)
    for item in iterator:
        for following in iterator:
            yield item, False
            item = following
        yield item, True


def remaining_batches(batches: Batches, key: Any, position: Position) -> Iterator[Any]:
    """Yield the minibatches of the epoch at `position` that are not used yet.

    Those that are used are skipped without being made, if the minibatches are a sequence.
    """
    found = batches(epoch_key(key, position.epoch + 1)) if callable(batches) else batches
    if isinstance(found, Sequence):
        return (found[i] for i in range(position.batch, len(found)))
    return itertools.islice(iter(found), position.batch, None)


def key_numbers(key: Any) -> list[int]:
    """Return the numbers of a PRNG key, whether it is typed or not."""
    typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    return [int(x) for x in np.ravel(jax.random.key_data(key) if typed else key)]
