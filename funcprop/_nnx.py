"""Flax nnx models as arguments: what a function changes in them survives the rewrite.

An nnx model is a mutable object: batch statistics and counters of random streams change in the forward pass.
A traced function sees copies of its arguments, so the changes would be lost. Here the model's state becomes
an argument of the function and its new state a result, which is put back into the caller's model. It is
nnx's own protocol for its transformations, `nnx.update_context`. Flax is never imported from here.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import jax


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
    arguments = [*args, *kwargs.values()]
    others = [None if has_models(argument) else argument for argument in arguments]
    holders = [argument if has_models(argument) else None for argument in arguments]
    leaves, tree = _leaves_and_models(nnx, holders)
    places = [i for i, leaf in enumerate(leaves) if _is_model(nnx, leaf)]
    context = object()

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
        unchanged = _same(jax.tree.flatten(state), jax.tree.flatten(new_state))
        return result, None if unchanged else (new_graph, new_state)

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


def _is_model(nnx: Any, value: Any) -> bool:
    return isinstance(value, nnx.Pytree | nnx.Variable)


def _leaves_and_models(nnx: Any, tree: Any) -> tuple[list[Any], Any]:
    return jax.tree.flatten(tree, is_leaf=lambda x: _is_model(nnx, x))


def _same(old: tuple[list[Any], Any], new: tuple[list[Any], Any]) -> bool:
    return old[1] == new[1] and all(a is b for a, b in zip(old[0], new[0], strict=True))
