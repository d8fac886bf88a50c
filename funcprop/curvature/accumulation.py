"""Curvature of a data set that is visited in minibatches: the weighted mean of what each one gives.

What has been accumulated is a pytree of arrays, so it can be saved like any other, continued, and merged with
that of another part of the data.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Generator, Iterable, Sized
from contextlib import closing
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse.linalg
from jax.flatten_util import ravel_pytree
from jaxtyping import PyTree

from funcprop.program.program import CompiledByTypes
from funcprop.progress import bar

Batches = Callable[[], Iterable[Any]] | Iterable[Any]


class Accumulated(NamedTuple):
    """The mean over `examples` examples in `batches` minibatches; a pytree of arrays.

    `checksum` is that of the minibatches in their order, by which a continued pass knows that it skips the
    same.
    """

    mean: PyTree
    examples: Any
    batches: Any
    checksum: Any


class LoaderError(ValueError):
    """The minibatches are not the same when they are asked for again."""


def accumulate(
    quantity: Callable[..., PyTree],
    batches: Batches,
    *,
    state: Accumulated | None = None,
    progress: bool | Callable[[int, Accumulated], None] = False,
) -> Accumulated:
    """The mean of a quantity over a data set: `Σ_b n_b q_b / Σ_b n_b`, with `q_b = quantity(*batch)`.

    For a quantity that is a mean over the `n_b` examples of its minibatch (a Gauss-Newton diagonal, a
    Hessian-vector product of a mean loss, Kronecker factors), this is the quantity of the whole data set,
    whatever the sizes of the minibatches. `n_b` is the length of the first axis of the batch's arrays.

    Args:
        quantity: `quantity(*batch)`, a pytree of arrays, for a batch that is a plain tuple or list;
            `quantity(batch)` for any other. It is traced once for minibatches of the same shapes, and
            compiled.
        batches: the minibatches, or a function of no arguments that returns them.
        state: what has been accumulated before: as many minibatches are skipped, and the pass continues.
        progress: True for a progress bar on stderr (needs rich), if that is a terminal; or what is called as
            `progress(number, state)` after every minibatch; saving `state` there makes the pass resumable.

    Raises:
        LoaderError: the skipped minibatches are not those that had been accumulated; it names the first that
            is not there, or the number that differ.
        FloatingPointError: a quantity is not finite; it names the minibatch and the path in the quantity.
        ValueError: there are no minibatches, or one whose arrays have no common first axis.

    Example:
        >>> import jax.numpy as jnp, funcprop as fp
        >>> batches = [(jnp.array([1.0, 2.0]),), (jnp.array([6.0]),)]
        >>> total = fp.curvature.accumulate(lambda x: {"mean": jnp.mean(x)}, batches)
        >>> print(total.mean, total.examples)
        {'mean': Array(3., dtype=float32)} 3
    """
    compiled = CompiledByTypes(lambda batch: _applied(quantity, batch))
    skipped = 0 if state is None else int(state.batches)
    checksum, number = 0, 0
    with closing(_visited(batches, progress is True, "curvature of minibatches")) as visited:
        for number, batch in visited:
            checksum = _checksum(batch, checksum)
            if number <= skipped:
                if number == skipped and state is not None and checksum != int(state.checksum):
                    raise LoaderError(
                        f"accumulate: the first {skipped} minibatches are not those that were accumulated "
                        "before; continue with the same data in the same order, or start anew without state=."
                    )
                continue
            found = compiled(batch)
            _require_finite(found, number)
            size = _examples(batch, number)
            one = Accumulated(found, np.int64(size), np.int64(1), np.uint32(checksum))
            state = one if state is None else merge(state, one)._replace(checksum=np.uint32(checksum))
            if callable(progress):
                progress(number, state)
    if number < skipped:
        raise LoaderError(
            f"accumulate: there are {number} minibatches, but {skipped} were accumulated before; continue "
            "with the same data."
        )
    if state is None:
        raise ValueError(
            f"accumulate: batches={batches!r} yielded nothing; an iterator is used up after one pass, so "
            "pass a list or a function that returns a new one."
        )
    return state


def merge(a: Accumulated, b: Accumulated) -> Accumulated:
    """Merge what was accumulated over two parts of the data, in any order.

    A pass can only be continued from what one pass has accumulated, not from what was merged.

    Raises:
        ValueError: the means have different structures or shapes.

    Example:
        >>> import jax.numpy as jnp, funcprop as fp
        >>> parts = [fp.curvature.accumulate(jnp.mean, [(x,)]) for x in (jnp.ones(3), jnp.full(1, 5.0))]
        >>> print(fp.curvature.merge(*parts).mean)
        2.0
    """
    for described in (jax.tree.structure, lambda mean: jax.tree.map(jnp.shape, mean)):
        ours, others = described(a.mean), described(b.mean)
        if ours != others:
            raise ValueError(
                f"merge: the means are {ours} and {others}; merge what was accumulated of the same quantity."
            )
    examples = a.examples + b.examples
    share = b.examples / examples
    mean = jax.tree.map(lambda x, y: x + (y - x) * jnp.asarray(share, jnp.result_type(x)), a.mean, b.mean)
    order = np.asarray([a.checksum, b.checksum], np.uint32).tobytes()
    return Accumulated(mean, examples, a.batches + b.batches, np.uint32(zlib.crc32(order)))


def check_deterministic(batches: Callable[[], Iterable[Any]]) -> int:
    """Go through the minibatches twice and compare them bit for bit; returns how many there are.

    Whatever visits the data more than once (a solver, eigenvalues, a resumed pass) is meaningless if a loader
    shuffles or augments anew every time.

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


def over_batches(
    operator: Callable[..., Any],
    params: PyTree,
    batches: Callable[[], Iterable[Any]],
    *,
    check: bool = True,
    progress: bool = False,
) -> scipy.sparse.linalg.LinearOperator:
    """The mean of an operator over a data set, for SciPy's solvers: every product is one pass over the data.

    `operator(params, *batch)` is a linear operator on the parameters, such as `fp.ggn(model, loss)`, whose
    scale is a mean over the examples. Vectors are flat, in `ravel_pytree` order. The operator is traced at
    its first product with minibatches of some shapes: what it reads besides its arguments, it has since.

    Args:
        operator: a function of parameters and a minibatch.
        params: a pytree of arrays.
        batches: a function of no arguments that returns the minibatches of one pass.
        check: whether `check_deterministic` is run first.
        progress: whether every product shows a progress bar on stderr (needs rich), if that is a terminal.

    Raises:
        LoaderError: as in `check_deterministic`, or there are no minibatches.

    Example:
        >>> import jax.numpy as jnp, funcprop as fp, scipy.sparse.linalg
        >>> hessian = fp.hessian(lambda w, x: jnp.mean((x @ w) ** 2))
        >>> data = [(jnp.array([[1.0, 0.0]]),), (jnp.array([[0.0, 2.0], [0.0, 2.0]]),)]
        >>> A = fp.curvature.over_batches(hessian, jnp.zeros(2), lambda: data)
        >>> print(scipy.sparse.linalg.cg(A, [2.0, 16.0])[0].round(3))
        [3. 3.]
    """
    if check:
        check_deterministic(batches)
    flat, unravel = ravel_pytree(params)

    def on_batch(batch: Any, v: Any) -> Any:
        return ravel_pytree(_applied(lambda *b: operator(params, *b), batch) @ unravel(v))[0]

    product = CompiledByTypes(on_batch)

    def matvec(v: np.ndarray) -> np.ndarray:
        column = jnp.asarray(v, flat.dtype).ravel()
        total, count = np.zeros(flat.size, flat.dtype), 0
        with closing(_visited(batches, progress, "a product over minibatches")) as visited:
            for number, batch in visited:
                size = _examples(batch, number)
                total += size * np.asarray(product(batch, column))
                count += size
        if not count:
            raise LoaderError(
                "over_batches: there are no minibatches; return new ones whenever it is called."
            )
        return total / count

    return scipy.sparse.linalg.LinearOperator(
        (flat.size, flat.size), matvec, rmatvec=matvec, dtype=flat.dtype
    )


def _visited(batches: Batches, progress: bool, doing: str) -> Generator[tuple[int, Any], None, None]:
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


def _applied(function: Callable[..., Any], batch: Any) -> Any:
    return function(*batch) if type(batch) in (tuple, list) else function(batch)


def _examples(batch: Any, number: int) -> int:
    lengths = {jnp.shape(leaf)[0] if jnp.ndim(leaf) else None for leaf in jax.tree.leaves(batch)}
    if len(lengths) != 1 or None in lengths:
        shapes = ", ".join(str(jnp.shape(leaf)) for leaf in jax.tree.leaves(batch))
        raise ValueError(
            f"accumulate: minibatch {number} has arrays of shapes {shapes}; the examples are their common "
            "first axis."
        )
    return int(lengths.pop() or 0)


def _checksum(batch: Any, before: int) -> int:
    for leaf in jax.tree.leaves(batch):
        before = zlib.crc32(np.ascontiguousarray(leaf).tobytes(), before)
    return before


def _require_finite(found: PyTree, number: int) -> None:
    for path, leaf in jax.tree.leaves_with_path(found):
        if not bool(jnp.isfinite(leaf).all()):
            where = jax.tree_util.keystr(path, simple=True, separator="/")
            raise FloatingPointError(
                f"accumulate: the quantity of minibatch {number} is not finite at {where!r}; what was "
                "accumulated before it is not affected."
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
