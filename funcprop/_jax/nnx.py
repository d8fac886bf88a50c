"""Flax nnx models as arguments: what a function changes in them survives a reader that traces it.

An nnx model is a mutable object: batch statistics and counters of random streams change in the forward pass.
A traced function sees copies of its arguments, so the changes would be lost. Here the model's state becomes
an argument of the function and its new state a result, which is put back into the caller's model. It is
nnx's own protocol for its transformations, `nnx.update_context`. Flax is never imported from here.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.tree_util import DictKey, SequenceKey

from funcprop._jax.array_types import is_differentiable


def has_models(tree: Any) -> bool:
    """Whether a pytree contains an nnx model or variable."""
    nnx = sys.modules.get("flax.nnx")
    return nnx is not None and any(_is_model(nnx, x) for x in _leaves_and_models(nnx, tree)[0])


def call(run: Callable[..., Any], fun: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """`run(fun, args, kwargs)` for a function that may change the models among its arguments.

    Raises:
        TypeError: the function changes a container that holds a model; others it may change.
    """
    nnx = sys.modules["flax.nnx"]
    holders, others = _separated(args, kwargs)
    leaves, tree = _leaves_and_models(nnx, holders)
    places = [i for i, leaf in enumerate(leaves) if _is_model(nnx, leaf)]
    context = object()

    @functools.wraps(fun, updated=())
    def pure(state: Any, arrays: list[Any], others: list[Any]) -> tuple[Any, Any]:
        with nnx.merge_context(context, inner=True) as merging:
            models = merging.merge(graph, state)
        leaves = list(arrays)
        for i, model in zip(places, models, strict=True):
            leaves[i] = model
        holders = jax.tree.unflatten(tree, leaves)
        given = [b if a is None else a for a, b in zip(holders, others, strict=True)]
        result = fun(*given[: len(args)], **dict(zip(kwargs, given[len(args) :], strict=True)))
        if not _same((leaves, tree), _leaves_and_models(nnx, holders)):
            raise TypeError(
                "the function changes a container that holds an nnx model; funcprop traces it with a copy, "
                "so the change would be lost. Pass the model as an argument of its own."
            )
        with nnx.split_context(context) as splitting:
            new_graph, new_state = splitting.split(models)
        same_state = _same(jax.tree.flatten(state), jax.tree.flatten(new_state))
        unchanged = same_state and nnx.graphdef(models) == attributes
        return result, None if unchanged else (new_graph, new_state)

    # What the models hold besides variables: sizes, flags, counters that are plain numbers.
    attributes = nnx.graphdef(tuple(leaves[i] for i in places))
    with nnx.update_context(context):
        with nnx.split_context(context) as splitting:
            graph, state = splitting.split(tuple(leaves[i] for i in places))
        arrays = [None if i in places else leaf for i, leaf in enumerate(leaves)]
        result, changed = run(pure, (state, arrays, others), {})
        # A model that did not change is left alone: it may belong to an outer transformation.
        if changed is not None:
            with nnx.merge_context(context, inner=False) as merging:
                merging.merge(*changed)
    return result


def parted(tree: Any) -> tuple[Any, Any, Callable[[Any, Any], Any]]:
    """Take models apart: what is trained, all other variables, and the function that joins both again.

    Trained are variables of type `nnx.Param`, and real arrays beside the models.
    """
    nnx = sys.modules["flax.nnx"]
    graph, trained, others = nnx.split(tree, lambda _, value: _is_trained(nnx, value), ...)
    return trained, others, lambda trained, others: nnx.merge(graph, trained, others, copy=True)


def variables(tree: Any) -> list[Any]:
    """The variables in models or their state, and the leaves beside them."""
    nnx = sys.modules["flax.nnx"]
    return jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, nnx.Variable))


def trained_leaves(tree: Any) -> tuple[bool, ...]:
    """For each leaf whether it belongs to an `nnx.Param`, or is a real array beside the models."""
    nnx = sys.modules["flax.nnx"]
    found: list[bool] = []
    for value in variables(tree):
        found += [_is_trained(nnx, value)] * len(jax.tree.leaves(value))
    return tuple(found)


def _is_trained(nnx: Any, value: Any) -> bool:
    if isinstance(value, nnx.Variable):
        return isinstance(value, nnx.Param)
    return is_differentiable(value)


def state_like(state: Any, tree: Any) -> Any:
    """All variables of models but those that are trained, in the structure of such a state.

    Raises:
        TypeError: the models have other variables now.
    """
    found = parted(tree)[1]
    old: Any = jax.tree.structure(state)
    new: Any = jax.tree.structure(found)
    if old != new:
        raise TypeError(
            f"the loss changes which variables its nnx model has, from {old} to {new}; let the model have "
            "them from the start, and pop what it sows (nnx.pop)."
        )
    return found


def describe(
    args: Any, kwargs: Any, arguments: tuple[Any, ...]
) -> tuple[list[Any], list[bool], Callable[[Sequence[Any]], list[Any]]]:
    """Describe the leaves of `arguments`, which the pure function in `call` takes, in the models' own terms.

    For each leaf its path from `(args, kwargs)`, where a variable of a model ends the path, and whether it is
    a parameter; and the function that puts leaves together as positional arguments, in which a model is the
    state of its parameters, as `nnx.grad` returns it.
    """
    nnx = sys.modules["flax.nnx"]
    state, _, others = arguments
    holders, _ = _separated(args, kwargs)
    heads = [(SequenceKey(0), SequenceKey(i)) for i in range(len(args))]
    heads += [(SequenceKey(1), DictKey(name)) for name in kwargs]
    held, tree = jax.tree.flatten_with_path(holders, is_leaf=lambda x: _is_model(nnx, x))
    held = [((*heads[path[0].idx], *path[1:]), leaf) for path, leaf in held]
    models = [path for path, leaf in held if _is_model(nnx, leaf)]
    paths: list[Any] = []
    trainable: list[bool] = []
    for (which, *inside), variable in jax.tree.leaves_with_path(
        state, is_leaf=lambda x: isinstance(x, nnx.Variable)
    ):
        is_variable = isinstance(variable, nnx.Variable)
        for inner in (path[is_variable:] for path, _ in jax.tree.leaves_with_path(variable)):
            paths.append((*models[which.key], *inside, *inner))
            trainable.append(isinstance(variable, nnx.Param))
    paths += [path for path, leaf in held if not _is_model(nnx, leaf)]
    for head, argument in zip(heads, others, strict=True):
        paths += [(*head, *path) for path, _ in jax.tree.leaves_with_path(argument)]
    trainable += [True] * (len(paths) - len(trainable))
    structure = jax.tree.structure((arguments, {}))

    def positional(leaves: Sequence[Any]) -> list[Any]:
        (state, arrays, others), _ = jax.tree.unflatten(structure, leaves)
        numbers = iter(range(len(models)))
        put_back = [
            _parameters(nnx, state, next(numbers)) if _is_model(nnx, leaf) else array
            for (_, leaf), array in zip(held, arrays, strict=True)
        ]
        given = zip(jax.tree.unflatten(tree, put_back), others, strict=True)
        return [other if holder is None else holder for holder, other in given][: len(args)]

    return paths, trainable, positional


def _parameters(nnx: Any, state: Any, i: int) -> Any:
    """The parameters of the model at position `i`, or the variable that it is."""
    if i not in state:
        return nnx.State({})
    return state[i] if isinstance(state[i], nnx.Variable) else nnx.filter_state(state[i], nnx.Param)


def _separated(args: Any, kwargs: Any) -> tuple[list[Any], list[Any]]:
    """The arguments that hold models, and the others, with None for those of the other kind."""
    arguments = [*args, *kwargs.values()]
    is_holder = [has_models(argument) for argument in arguments]
    return (
        [argument if holds else None for argument, holds in zip(arguments, is_holder, strict=True)],
        [None if holds else argument for argument, holds in zip(arguments, is_holder, strict=True)],
    )


def _is_model(nnx: Any, value: Any) -> bool:
    return isinstance(value, nnx.Pytree | nnx.Variable)


def _leaves_and_models(nnx: Any, tree: Any) -> tuple[list[Any], Any]:
    return jax.tree.flatten(tree, is_leaf=lambda x: _is_model(nnx, x))


def _same(old: tuple[list[Any], Any], new: tuple[list[Any], Any]) -> bool:
    return old[1] == new[1] and all(a is b for a, b in zip(old[0], new[0], strict=True))
