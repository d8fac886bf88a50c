"""Minibatches of a data set: visiting them, what each counts, and whether they are the same again."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Generator, Iterable, Iterator, Sized
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from funcprop.progress import bar

Batches = Callable[[], Iterable[Any]] | Iterable[Any]


class LoaderError(ValueError):
    """The minibatches are not the same when they are asked for again."""


def visited(batches: Batches, progress: bool, doing: str) -> Generator[tuple[int, Any], None, None]:
    """The minibatches with their numbers, from 1, and a bar that counts those that are done.

    To be closed: an error in what is done with a minibatch would keep the bar alive as long as its traceback.
    """
    given = batches() if callable(batches) else batches
    if not progress:
        yield from enumerate(given, start=1)
        return
    with bar(doing, len(given) if isinstance(given, Sized) else None) as update:
        for number, batch in enumerate(given, start=1):
            yield number, batch
            update(completed=number)


@dataclass(eq=False)
class Minibatch:
    """One minibatch: the arguments that it stands for, and the weights of its examples, if they have any."""

    arguments: tuple[Any, ...]
    weights: Any
    number: int
    sum: int = 0  # the checksum of all of its bytes

    @classmethod
    def of(cls, batch: Any, number: int, weighted: bool, doing: str) -> Minibatch:
        """A plain tuple or list is several arguments; if `weighted`, the last are the examples' weights.

        Raises:
            ValueError: the arrays have no common first axis, or the weights are not one number ≥ 0 for each
                example.
        """
        arguments = tuple(batch) if type(batch) in (tuple, list) else (batch,)
        weights = None
        if weighted:
            if len(arguments) < 2:
                raise ValueError(
                    f"{doing}: minibatch {number} has no weights; with weighted=True it is a tuple whose "
                    "last item is the weights of its examples."
                )
            *given, weights = arguments
            arguments, weights = tuple(given), np.asarray(weights)
        found = cls(arguments, weights, number)
        size = found._size(doing)
        if weights is not None and (weights.shape[:1] != (size,) or not bool((weights >= 0).all())):
            raise ValueError(
                f"{doing}: the weights of minibatch {number} have shape {weights.shape}, and it has {size} "
                "examples; give one number ≥ 0 for each, 0 for padding."
            )
        return found

    def _size(self, doing: str) -> int:
        leaves = jax.tree.leaves(self.arguments)
        lengths = {jnp.shape(leaf)[0] if jnp.ndim(leaf) else None for leaf in leaves}
        if len(lengths) != 1 or None in lengths:
            shapes = ", ".join(str(jnp.shape(leaf)) for leaf in leaves)
            raise ValueError(
                f"{doing}: minibatch {self.number} has arrays of shapes {shapes}; the examples are their "
                "common first axis."
            )
        return int(lengths.pop() or 0)

    @property
    def size(self) -> int:
        """How many examples there are, padding included."""
        return self._size("minibatch")

    @property
    def total(self) -> Any:
        """What it counts: its examples, or the sum of their weights."""
        return np.int64(self.size) if self.weights is None else np.float64(self.weights.sum())

    @property
    def data(self) -> dict[str, Any]:
        """Its arrays, as one pytree."""
        return {"arguments": self.arguments} | ({} if self.weights is None else {"weights": self.weights})

    def sum_up(self) -> None:
        """Compute the checksum."""
        for leaf in jax.tree.leaves(self.data):
            self.sum = zlib.crc32(np.ascontiguousarray(leaf).tobytes(), self.sum)

    def checksum(self, before: int) -> int:
        """Continue the checksum of the minibatches before."""
        return zlib.crc32(self.sum.to_bytes(4, "little"), before)


def applied(function: Callable[..., Any], data: dict[str, Any], *more: Any, **options: Any) -> Any:
    """`function(*arguments, *more, weights=…, **options)` for the arrays of a minibatch."""
    if "weights" in data:
        options["weights"] = data["weights"]
    return function(*data["arguments"], *more, **options)


@dataclass(eq=False)
class Loader:
    """Minibatches that may be visited more than once; those of a later pass have to be the same.

    `of` is the function that they were given to, for messages.
    """

    of: str
    batches: Batches
    weighted: bool
    progress: bool
    sums: list[int] = field(default_factory=list)
    complete: bool = False

    def visit(self, shown: str) -> Iterator[Minibatch]:
        """The minibatches; `shown` is what a bar says.

        Raises:
            LoaderError: they are not those of the first pass, or there are none.
        """
        number, doing = 0, self.of
        with closing(visited(self.batches, self.progress, shown)) as given:
            for number, batch in given:
                found = Minibatch.of(batch, number, self.weighted, doing)
                self._require_same(found, doing)
                yield found
        if not number:
            raise LoaderError(
                f"{doing}: there are no minibatches, the loader yielded nothing; an iterator is used up "
                "after one pass, so pass a list or a function that returns a new one."
            )
        if self.complete and number < len(self.sums):
            raise LoaderError(
                f"{doing}: there are {number} minibatches, but {len(self.sums)} in the first pass; return "
                "the same whenever they are asked for."
            )
        self.complete = True

    def _require_same(self, found: Minibatch, doing: str) -> None:
        found.sum_up()
        checksum, at = found.sum, found.number - 1
        if at < len(self.sums):
            if checksum != self.sums[at]:
                raise LoaderError(
                    f"{doing}: minibatch {found.number} differs from that of the first pass; fix the order "
                    "and the random keys of the loader, or turn augmentation off."
                )
        elif self.complete:
            raise LoaderError(
                f"{doing}: there are more minibatches than the {len(self.sums)} of the first pass; return "
                "the same whenever they are asked for."
            )
        else:
            self.sums.append(checksum)


def check_deterministic(batches: Callable[[], Iterable[Any]]) -> int:
    """Go through the minibatches twice and compare them bit for bit; returns how many there are.

    Whatever visits the data more than once (a solver, eigenvalues, a resumed pass) is meaningless if a loader
    shuffles or augments anew every time. `fp.curvature.over` notices that by itself.

    Raises:
        LoaderError: a minibatch differs between the passes; it names the minibatch and the array, or one pass
            is longer.

    Example:
        >>> import jax.numpy as jnp, funcprop as fp
        >>> fp.curvature.check_deterministic(lambda: iter([jnp.ones(2), jnp.zeros(2)]))
        2
    """
    first, second = iter(batches()), iter(batches())
    end = object()
    number = 0
    while True:
        a, b = next(first, end), next(second, end)
        if a is end and b is end:
            return number
        number += 1
        if a is end or b is end:
            which = "first" if a is end else "second"
            raise LoaderError(
                f"check_deterministic: the {which} pass ends before minibatch {number}, the other does not; "
                "an iterator that is used up can be passed only once, so return a new one."
            )
        difference = _difference(a, b)
        if difference is not None:
            raise LoaderError(
                f"check_deterministic: minibatch {number} differs between two passes, in {difference}; fix "
                "the order and the random keys of the loader, or turn augmentation off."
            )


def _difference(a: Any, b: Any) -> str | None:
    structures: list[Any] = [jax.tree.structure(batch) for batch in (a, b)]
    if structures[0] != structures[1]:
        return "its structure"
    for (path, x), y in zip(jax.tree.leaves_with_path(a), jax.tree.leaves(b), strict=True):
        where = f"array {jax.tree_util.keystr(path)}"
        if jnp.shape(x) != jnp.shape(y):
            return f"{where}: shapes {jnp.shape(x)} and {jnp.shape(y)}"
        if np.ascontiguousarray(x).tobytes() != np.ascontiguousarray(y).tobytes():
            return where
    return None
