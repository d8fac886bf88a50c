"""Means over a data set that is visited in minibatches, which can be saved, continued and merged.

What has been accumulated is a pytree of arrays, so it can be saved like any other, continued, and merged with
that of another part of the data.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from funcprop.curvature.minibatches import Batches, Loader, LoaderError, Minibatch, applied
from funcprop.operators.linear_operator import LinearOperator
from funcprop.operators.parameters import path_name
from funcprop.program.program import CompiledByTypes

Tell = Callable[[int, "Accumulated"], None]


class Accumulated(NamedTuple):
    """The mean over `examples` examples in `batches` minibatches; a pytree of arrays.

    With weights `examples` is their sum. `checksum` is that of the minibatches in their order, by which a
    continued pass knows that it skips the same.
    """

    mean: PyTree
    examples: Any
    batches: Any
    checksum: Any


def accumulate(
    quantity: Callable[..., PyTree],
    batches: Batches,
    *,
    weighted: bool = False,
    state: Accumulated | None = None,
    progress: bool | Tell = False,
) -> Accumulated:
    """The mean of a quantity over a data set: `Σ_b n_b q_b / Σ_b n_b`, with `q_b = quantity(*batch)`.

    For a quantity that is a mean over the `n_b` examples of its minibatch (a Gauss-Newton diagonal, a
    Hessian-vector product of a mean loss, Kronecker factors), this is the quantity of the whole data set,
    whatever the sizes of the minibatches. `n_b` is the length of the first axis of the batch's arrays, or the
    sum of the weights. `fp.curvature.over` does the same for operators, and for what takes several passes.

    A Laplace posterior is a sum: what is accumulated is the posterior of all data. The error bars of an
    `Estimate` are averaged as its value is, which is never too narrow, however the minibatches' samples
    depend on each other.

    Args:
        quantity: `quantity(*batch)`, a pytree of arrays, for a batch that is a plain tuple or list;
            `quantity(batch)` for any other. It is traced once for minibatches of the same shapes, and
            compiled.
        batches: the minibatches, or a function of no arguments that returns them.
        weighted: the last item of every minibatch is its examples' weights (0 for padding), which `quantity`
            is given as `weights=`; it then returns a weighted mean.
        state: what has been accumulated before: as many minibatches are skipped, and the pass continues.
        progress: True for a progress bar on stderr (needs rich), if that is a terminal; or what is called as
            `progress(number, state)` after every minibatch; saving `state` there makes the pass resumable.

    Raises:
        LoaderError: the skipped minibatches are not those that had been accumulated; it names the first that
            is not there, or the number that differ.
        FloatingPointError: a quantity is not finite; it names the minibatch and the path in the quantity.
        ValueError: there are no minibatches, or one whose arrays have no common first axis; or the quantity
            has no mean (an operator, a spectrum): the message says what does.

    Example:
        >>> import jax.numpy as jnp, funcprop as fp
        >>> batches = [(jnp.array([1.0, 2.0]),), (jnp.array([6.0]),)]
        >>> total = fp.curvature.accumulate(lambda x: {"mean": jnp.mean(x)}, batches)
        >>> print(total.mean, total.examples)
        {'mean': Array(3., dtype=float32)} 3
    """
    compiled = CompiledByTypes(lambda data: require_arrays(applied(quantity, data), "accumulate"))
    loader = Loader("accumulate", batches, weighted, progress is True)
    tell = progress if callable(progress) else None
    return accumulated(lambda batch: compiled(batch.data), loader, state, tell)


def accumulated(
    evaluate: Callable[[Minibatch], PyTree],
    loader: Loader,
    state: Accumulated | None,
    tell: Tell | None,
) -> Accumulated:
    """The mean of what is evaluated for each minibatch; errors are those of `accumulate`."""
    doing = loader.of
    skipped = 0 if state is None else int(state.batches)
    checksum, number = 0, 0
    for batch in loader.visit("curvature of minibatches"):
        number, checksum = batch.number, batch.checksum(checksum)
        if number <= skipped:
            if number == skipped and state is not None and checksum != int(state.checksum):
                raise LoaderError(
                    f"{doing}: the first {skipped} minibatches are not those that were accumulated "
                    "before; continue with the same data in the same order, or start anew without state=."
                )
            continue
        found = evaluate(batch)
        if state is None:
            require_mergeable(found, doing)
        _require_finite(found, number, doing)
        one = Accumulated(found, batch.total, np.int64(1), np.uint32(checksum))
        state = one if state is None else merge(state, one)._replace(checksum=np.uint32(checksum))
        if tell is not None:
            tell(number, state)
    if number < skipped:
        raise LoaderError(
            f"{doing}: there are {number} minibatches, but {skipped} were accumulated before; continue "
            "with the same data."
        )
    assert state is not None
    return state


def merge(a: Accumulated, b: Accumulated) -> Accumulated:
    """Merge what was accumulated over two parts of the data, in any order.

    A pass can only be continued from what one pass has accumulated, not from what was merged.

    Raises:
        ValueError: the means have different structures or shapes, or what they are has no mean.

    Example:
        >>> import jax.numpy as jnp, funcprop as fp
        >>> parts = [fp.curvature.accumulate(jnp.mean, [(x,)]) for x in (jnp.ones(3), jnp.full(1, 5.0))]
        >>> print(fp.curvature.merge(*parts).mean)
        2.0
    """
    nodes = [jax.tree.leaves(mean, is_leaf=_merges_itself) for mean in (a.mean, b.mean)]
    shapes = [[jnp.shape(node) for node in each if not _merges_itself(node)] for each in nodes]
    structures: list[Any] = [jax.tree.structure(mean) for mean in (a.mean, b.mean)]
    if shapes[0] != shapes[1] or structures[0] != structures[1]:
        first, second = (_described(mean) for mean in (a.mean, b.mean))
        raise ValueError(
            f"merge: the means are {first} and {second}; merge what was accumulated of the same quantity."
        )
    examples = a.examples + b.examples
    share = b.examples / examples if examples else 0.0
    mean = jax.tree.map(lambda x, y: _mean(x, y, share), a.mean, b.mean, is_leaf=_merges_itself)
    order = np.asarray([a.checksum, b.checksum], np.uint32).tobytes()
    return Accumulated(mean, examples, a.batches + b.batches, np.uint32(zlib.crc32(order)))


def _mean(x: Any, y: Any, share: Any) -> Any:
    if _merges_itself(x):
        return x.merged(y, share)
    # What counts for nothing may be NaN.
    return x + jnp.where(share > 0, (y - x) * jnp.asarray(share, jnp.result_type(x)), 0) if share < 1 else y


def _merges_itself(node: Any) -> bool:
    return hasattr(type(node), "merged")


def _described(mean: PyTree) -> str:
    if hasattr(mean, "shape") and not isinstance(mean, LinearOperator):
        return str(jnp.shape(mean))
    shapes = [(path_name(path), jnp.shape(leaf)) for path, leaf in jax.tree.leaves_with_path(mean)]
    text = ", ".join(f"{path}: {shape}" for path, shape in shapes[:_SHOWN])
    return f"{type(mean).__name__}({text}{', …' if len(shapes) > _SHOWN else ''})"


_SHOWN = 6  # leaves that a message lists


def require_mergeable(found: PyTree, doing: str) -> None:
    """Raise for what has no mean.

    Raises:
        ValueError: it is such an operator or spectrum.
    """
    for node in jax.tree.leaves(found, is_leaf=_merges_itself):
        if _merges_itself(node):
            node.merged(node, 0.5)


def require_arrays(found: PyTree, doing: str) -> PyTree:
    """Return a pytree of arrays or numbers.

    Raises:
        TypeError: it is none.
    """
    for node in jax.tree.leaves(found):
        if not hasattr(node, "dtype") and not isinstance(node, int | float):
            raise TypeError(
                f"{doing}: the quantity has a {type(node).__name__}, which is no array; return arrays, or "
                "use fp.curvature.over(batches)(…), which knows fp.curvature.influence and others."
            )
    return found


def _require_finite(found: PyTree, number: int, doing: str) -> None:
    for path, leaf in jax.tree.leaves_with_path(found):
        if not bool(jnp.isfinite(leaf).all()):
            at = path_name(path)
            raise FloatingPointError(
                f"{doing}: the quantity of minibatch {number} is not finite{f' at {at!r}' if at else ''}; "
                "what was accumulated before it is not affected."
            )
