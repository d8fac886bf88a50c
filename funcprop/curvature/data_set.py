"""A data set that is visited in minibatches: means over it, and what each of its examples has.

Only one minibatch is in memory at a time; whatever visits the data again notices if they are no longer the
same.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from funcprop.curvature.accumulation import Accumulated, accumulated
from funcprop.curvature.device_spread import Spread
from funcprop.curvature.minibatches import Loader, Minibatch, applied
from funcprop.program.program import CompiledByTypes

Progress = bool | Callable[[int, Accumulated], None]


class Total(NamedTuple):
    """A mean over all examples, and how many there are, or the sum of their weights."""

    mean: PyTree
    weight: Any


@dataclass(eq=False)
class DataSet:
    """Minibatches, and how they are visited; what `over` hands to a factory that knows what to do with it."""

    loader: Loader
    devices: tuple[Any, ...]
    progress: Progress
    state: Accumulated | None

    @functools.cached_property
    def first(self) -> Minibatch:
        """The first minibatch, whose types say what is made of all."""
        return next(iter(self.loader.visit("the first minibatch")))

    def mean(self, quantity: Callable[..., PyTree], *, key: Any = None) -> Total:
        """The mean of `quantity(*batch)`, by one pass; with `weights=` and `key=` if there are any."""
        tell = self.progress if callable(self.progress) else None
        evaluate = self.evaluated(lambda data, options: applied(quantity, data, **options), key)
        found = accumulated(evaluate, self.loader, self.state, tell)
        self.state = None  # It is of the first pass.
        return Total(found.mean, found.examples)

    def rows(self, quantity: Callable[..., PyTree], *, key: Any = None) -> PyTree:
        """What `quantity(*batch)` has for each example, of all examples, in their order."""
        return self.each(quantity, key=key)()

    def each(self, quantity: Callable[..., PyTree], *names: str, key: Any = None) -> Callable[..., PyTree]:
        """The function `(*more)` of what `quantity(*batch, name=more, …)` has for each example of all."""
        compiled = CompiledByTypes(lambda data, options: applied(quantity, data, **options))

        def of_all(*more: Any) -> PyTree:
            given = dict(zip(names, more, strict=True))
            found = [
                compiled(batch.data, _options(key, batch.number) | given)
                for batch in self.loader.visit("examples of minibatches")
            ]
            return jax.tree.map(lambda *parts: jnp.concatenate(parts), *found)

        return of_all

    def types(self, factory: Callable[..., Any], key: Any) -> Any:
        """The types of what a factory returns for the first minibatch.

        Raises:
            TypeError: there are weights, and it does not take them.
        """
        data = self.first.data
        try:
            return jax.eval_shape(lambda: applied(factory, data, **_options(key, 1)))
        except TypeError as error:
            if "weights" not in data or "unexpected keyword argument 'weights'" not in str(error):
                raise
            raise TypeError(
                "over: with weighted=True the factory is given weights=, and fp.hessian hands them on to "
                f"the loss, which does not take them ({error}); let it take weights=None and return the "
                "weighted mean."
            ) from error

    def evaluated(self, quantity: Callable[..., PyTree], key: Any) -> Callable[..., PyTree]:
        """`quantity(data, options, *more)` of one minibatch, compiled, on all devices."""
        compiled = CompiledByTypes(quantity)
        spread = Spread(quantity, self.devices) if len(self.devices) > 1 else None

        def evaluate(batch: Minibatch, *more: Any) -> PyTree:
            options = _options(key, batch.number)
            if spread is None:
                return compiled(batch.data, options, *more)
            return spread(batch, options, *more)

        return evaluate


def _options(key: Any, number: int) -> dict[str, Any]:
    """A key of its own for every minibatch."""
    return {} if key is None else {"key": jax.random.fold_in(key, number)}
