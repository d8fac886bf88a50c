"""Data sets in memory, and minibatches of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Int, PRNGKeyArray


class Dataset(NamedTuple):
    """Images as rows with entries between 0 and 1, and their classes."""

    images: Float[np.ndarray, "examples pixels"]
    labels: Int[np.ndarray, " examples"]


class Split(NamedTuple):
    """A training set, and a test set that training never sees."""

    train: Dataset
    test: Dataset


def digits(*, test_fraction: float = 0.2, seed: int = 0) -> Split:
    """The 1797 handwritten digits of 8 × 8 pixels that come with scikit-learn, shuffled and split.

    Args:
        test_fraction: the share of the test set, between 0 and 1.
        seed: of the shuffle; the same seed gives the same split.

    Raises:
        ModuleNotFoundError: scikit-learn is not installed; the message names the extra that brings it.
        ValueError: `test_fraction` leaves one of the sets empty.

    Reference: Alpaydin and Kaynak, "Optical recognition of handwritten digits", UCI repository, 1998.

    Example:
        >>> import funcprop as fp
        >>> train, test = fp.training.digits()
        >>> train.images.shape, test.images.shape
        ((1438, 64), (359, 64))
    """
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"digits: the data comes with scikit-learn, but {error.name!r} is not installed; "
            "pip install 'funcprop[experiments]'",
            name=error.name,
        ) from error
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(labels))
    count = round(len(labels) * (1 - test_fraction))
    if not 0 < count < len(labels):
        raise ValueError(
            f"digits: test_fraction={test_fraction} leaves {count} of {len(labels)} digits for training; "
            "choose a fraction between 0 and 1, such as 0.2."
        )
    images, labels = (images[order] / 16).astype(np.float32), labels[order].astype(np.int32)
    return Split(Dataset(images[:count], labels[:count]), Dataset(images[count:], labels[count:]))


class Minibatches(Sequence[tuple[Any, ...]]):
    """Minibatches that are made when they are asked for, each by its number."""

    def __init__(self, arrays: Sequence[Any], size: int, order: Int[np.ndarray, " examples"]) -> None:
        self._arrays, self._size, self._order = arrays, size, order

    def __len__(self) -> int:
        return len(self._order) // self._size

    def __getitem__(self, index: Any) -> Any:
        """Return one minibatch, or a list of several."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        start = range(len(self))[index] * self._size
        rows = self._order[start : start + self._size]
        return tuple(array[rows] for array in self._arrays)


def minibatches(arrays: Sequence[Any], size: int, key: PRNGKeyArray | None = None) -> Minibatches:
    """Return the minibatches of `size` examples: a sequence of tuples with a slice of every array.

    The examples are shuffled by `key`, or come in their order if it is None. All minibatches have the same
    size, so that a jitted step is compiled once: with a remainder, the last few examples (others for every
    key) are left out.

    Args:
        arrays: arrays with the examples along their first axis, such as a `Dataset`.
        size: examples in a minibatch.
        key: a PRNG key; use another one in every epoch.

    Raises:
        ValueError: the arrays have different numbers of examples, or fewer than `size`.

    Example:
        >>> import jax, numpy as np, funcprop as fp
        >>> x, y = np.arange(5), np.arange(5) * 10
        >>> [(x.tolist(), y.tolist()) for x, y in fp.training.minibatches((x, y), 2)]
        [([0, 1], [0, 10]), ([2, 3], [20, 30])]
    """
    counts = {len(array) for array in arrays}
    if len(counts) != 1:
        raise ValueError(
            f"minibatches: the arrays have {[len(array) for array in arrays]} examples; they must have the "
            "same number along their first axis."
        )
    (count,) = counts
    if not 0 < size <= count:
        raise ValueError(f"minibatches: size={size}; choose one between 1 and the {count} examples.")
    order = np.arange(count) if key is None else np.asarray(jax.random.permutation(key, count))
    return Minibatches(arrays, size, order)
