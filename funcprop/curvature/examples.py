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

from funcprop import _jax
from funcprop.curvature.likelihood import likelihood_of
from funcprop.operators.convergence import is_traced
from funcprop.operators.parameters import single_at_least, widened
from funcprop.program.call import name_of, succeeds

Function = Callable[..., Any]


def _alone(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf[None], tree)


def _called_as(fun: Function, changed: Function) -> Function:
    functools.update_wrapper(changed, fun)
    changed.__name__ = name_of(fun)
    return changed


def model_of_one(model: Function, batched: bool) -> Function:
    """`model(params, x)` of one example, from one of a whole batch, which is called with a batch of one."""
    if not batched:
        return _called_as(model, lambda params, x: widened(model(params, x)))

    def of_one(params: Any, x: Any) -> Any:
        outputs = model(params, _alone(x))
        two = jax.tree.map(lambda a: jax.ShapeDtypeStruct((2, *jnp.shape(a)), jnp.result_type(a)), x)
        of_two = jax.eval_shape(lambda x: model(params, x), two)
        for one, both in zip(jax.tree.leaves(outputs), jax.tree.leaves(of_two), strict=True):
            if (jnp.shape(one), both.shape) != ((1, *both.shape[1:]), (2, *both.shape[1:])):
                raise ValueError(
                    f"the examples mix: of one example the model {name_of(model)} returns "
                    f"{list(jnp.shape(one))}, of two {list(both.shape)}; with batched=True the examples "
                    "are the leading axis of its outputs, and no other depends on how many there are."
                )
        return widened(jax.tree.map(lambda leaf: leaf[0], outputs))

    return _called_as(model, of_one)


def loss_of_one(loss: Function, batched: bool, first: int = 0) -> Function:
    """A loss of one example, from one of a whole batch; the leading `first` arguments have no examples.

    Of outputs, which come first otherwise, targets are as wide as these.
    """
    alone = _alone if batched else lambda tree: tree
    wide = widened if first == 0 else lambda tree: tree
    if not batched and first:
        return loss
    return _called_as(loss, lambda *args: loss(*args[:first], *(wide(alone(arg)) for arg in args[first:])))


def model_of_all(model: Function, batched: bool) -> Function:
    """`model(params, x)` of a whole batch, from one of one example."""
    of_all = model if batched else jax.vmap(model, (None, 0))
    return _called_as(model, lambda params, x: widened(of_all(params, x)))


def loss_of_all(loss: Function, batched: bool) -> Function:
    """`loss(outputs, y, weights)` of a whole batch: the weighted mean of a loss of one example."""
    if batched:
        return _called_as(loss, lambda outputs, y, weights: loss(outputs, widened(y)))

    def mean(outputs: Any, y: Any, weights: Any) -> Any:
        values = jax.vmap(loss)(outputs, widened(y))
        if weights is not None and weights.ndim > 1:
            require_loss_of_positions(values.shape[1:], weights.shape[1:])
        return jnp.mean(values) if weights is None else jnp.sum(weights * values) / total_of(weights, 0)

    return _called_as(loss, mean)


def batch_size(x: Any, y: Any, of: str = "per_example") -> int:
    """The common length of the leading axes.

    Raises:
        ValueError: there is none, or the examples' types say how they are laid out over devices.
    """
    sizes = {}
    for name, tree in (("x", x), ("y", y)):
        for path, leaf in jax.tree.leaves_with_path(tree):
            where = name + jax.tree_util.keystr(path)
            if not jnp.ndim(leaf):
                instead = "; make it an array" if isinstance(tree, list | tuple) else ""
                raise ValueError(
                    f"{of}: {where} is a scalar{instead}; the leading axis of x and y is the examples."
                )
            require_free_layout(of, where, leaf)
            sizes[where] = jnp.shape(leaf)[0]
    if len(set(sizes.values())) != 1 or 0 in sizes.values():
        listed = ", ".join(f"{where} has {n}" for where, n in sizes.items())
        raise ValueError(f"{of}: the leading axis of x and y is the examples, but {listed or 'x is empty'}.")
    return next(iter(sizes.values()))


def require_free_layout(of: str, where: str, leaf: Any) -> None:
    """Raise a ValueError for an array of explicit axes, which functions of one example cannot follow."""
    if isinstance(leaf, jax.Array) and _jax.explicitly_sharded(jax.typeof(leaf)):
        raise ValueError(
            f"{of}: {where} is {jax.typeof(leaf)}, laid out over explicit axes of a mesh; make the mesh with "
            "axis_types=(jax.sharding.AxisType.Auto,) for each axis, and XLA lays out what is computed of it."
        )


def require_loss_of_positions(shape: tuple[int, ...], positions: tuple[int, ...]) -> None:
    """Raise a ValueError if the loss of one example has not a value for each of its positions."""
    if shape != positions:
        raise ValueError(
            f"the weights of one example have shape {positions}, one for each position, so its loss has to "
            f"return an array of this shape, but it returns one of shape {shape}."
        )


def of_examples(loss: Any, y: Any, weights: Any, size: int, of: str) -> tuple[Any, Any, Any]:
    """A loss, its labels and the weights of examples, from these or those of positions, `[n, *positions]`.

    An example's loss is the weighted mean of its positions', and it counts as the sum of their weights. The
    loss is a function that returns one value for each position, or the name of a likelihood of one.

    Raises:
        ValueError: there is neither, or no labels; also as `weights_of`.
    """
    weights = weights_of(weights, size, of, positions=True)
    if weights is None or weights.ndim == 1:
        return loss, y, weights
    if isinstance(loss, str) and jax.tree.leaves(y):
        loss = over_positions(likelihood_of(loss).negative_log, weights.ndim - 1)
    if not callable(loss):
        raise ValueError(
            f"{of}: weights of positions are for a loss, or for a likelihood by its name and with labels; "
            "let the loss of one example return one value for each position."
        )
    of_each: Function = loss

    def mean(output: Any, label: tuple[Any, Any]) -> Any:
        values = of_each(output, label[0])
        require_loss_of_positions(jnp.shape(values), label[1].shape)
        return jnp.sum(values * label[1]) / total_of(label[1], 0)

    return _called_as(of_each, mean), (y, weights), weights.sum(tuple(range(1, weights.ndim)))


def over_positions(function: Function, axes: int) -> Function:
    """A function of one position, for arrays with so many axes of positions in front."""
    for _ in range(axes):
        function = jax.vmap(function)
    return function


def weights_of(weights: Any, size: int, of: str, positions: bool = False) -> Any:
    """The weights of examples as an array, or None; with `positions`, maybe of the positions of each.

    Raises:
        ValueError: there is not one number ≥ 0 for each example.
    """
    if weights is None:
        return None
    weights = jnp.asarray(weights)
    if weights.shape[:1] != (size,) or (weights.ndim > 1 and not positions):
        raise ValueError(
            f"{of}: weights have shape {weights.shape}, but there are {size} examples; give one number for "
            "each, 0 for padding."
        )
    weights = weights.astype(single_at_least(jnp.result_type(weights, float)))
    if not is_traced(weights) and not bool((weights >= 0).all()):
        raise ValueError(
            f"{of}: a weight is {weights.min()}, but weights are numbers ≥ 0; give 0 for padding."
        )
    return weights


def total_of(weights: Any, size: int) -> Any:
    """What a sum over examples is divided by; 1 where nothing counts, so that their mean is 0."""
    if weights is None:
        return size
    total = weights.sum()
    return jnp.where(total > 0, total, 1)


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
