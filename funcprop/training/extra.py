"""The extra arguments of optax's `update`: which are needed, and which of them a function takes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from funcprop.operators.parameters import Where
from funcprop.operators.subset import chosen


def chosen_arguments(function: Callable[..., Any], extra: Mapping[str, Any]) -> dict[str, Any]:
    """The extra arguments that are parameters of a function after its first; all if it takes any."""
    _, *parameters = inspect.signature(function).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return dict(extra)
    names = {p.name for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)}
    return {name: value for name, value in extra.items() if name in names}


def require_arguments(optimizer: str, given: Mapping[str, Any], *names: str) -> list[Any]:
    """Require the arguments with these names, and `params`.

    Raises:
        ValueError: one is missing, or None.
    """
    missing = [name for name in ("params", *names) if given.get(name) is None]
    if missing:
        raise ValueError(
            f"{optimizer}: update() lacks {', '.join(missing)}; call "
            f"update({', '.join(['updates', 'state', 'params', *(f'{name}=…' for name in names)])}), or let "
            "fp.training.make_step do it."
        )
    return [given[name] for name in names]


class MovedPart:
    """The part of the parameters that an optimizer moves; the others stay as they are."""

    def __init__(self, params: Any, where: Where | None) -> None:
        self.tree = jax.tree.structure(params)
        self.marks = chosen(params, where)

    def of(self, tree: Any) -> Any:
        """The part of a pytree like the parameters, with None in place of all else."""
        leaves = zip(jax.tree.leaves(tree), self.marks, strict=True)
        return jax.tree.unflatten(self.tree, [leaf if mark else None for leaf, mark in leaves])

    def with_zeros(self, part: Any, like: Any) -> Any:
        """The part in a pytree like the parameters, with zeros in place of all else."""
        given = iter(jax.tree.leaves(part))
        leaves = zip(jax.tree.leaves(like), self.marks, strict=True)
        return jax.tree.unflatten(
            self.tree, [next(given) if mark else jnp.zeros_like(leaf) for leaf, mark in leaves]
        )


def require_whole(optimizer: str, params: Any) -> None:
    """Refuse a part of the parameters, as optax hands it on, where the loss is called with them.

    Raises:
        ValueError: some are masked.
    """
    nodes = jax.tree.leaves(params, is_leaf=lambda node: isinstance(node, optax.MaskedNode))
    if any(isinstance(node, optax.MaskedNode) for node in nodes):
        raise ValueError(
            f"{optimizer}: some of params are masked (optax.masked, multi_transform), but the loss is a "
            "function of all of them; make the step of all and set the updates of the rest to zero after it, "
            "or choose the part by where=."
        )
