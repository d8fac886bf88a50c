"""`where=`: which parameters an operator acts on; the others are constants."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from funcprop.calls import require_values
from funcprop.curvature.binding import SHAPES
from funcprop.curvature.parameters import Parameters, Where, path_name


def chosen(params: PyTree, where: Where | None) -> tuple[bool, ...]:
    """For each leaf of `params` whether it is chosen.

    Args:
        params: a pytree.
        where: None for all; a path as `params/Dense_1` for the leaves there or below, or several; a predicate
            of path and leaf; or a pytree of bools like `params`.

    Raises:
        TypeError: `where` is none of these.
        ValueError: it chooses nothing, or names a parameter that does not exist.
    """
    found, tree = jax.tree_util.tree_flatten_with_path(params)
    paths = tuple(path_name(path) for path, _ in found)
    marks = _marks(found, tree, paths, where)
    if not any(marks):
        raise ValueError(
            f"where={where!r} chooses no parameter; the paths are {', '.join(map(repr, paths))}."
        )
    return marks


def _marks(found: Any, tree: Any, paths: tuple[str, ...], where: Where | None) -> tuple[bool, ...]:
    if where is None:
        return (True,) * len(paths)
    if callable(where):
        return tuple(bool(where(path, leaf)) for path, (_, leaf) in zip(paths, found, strict=True))
    several = [where] if isinstance(where, str) else where
    if isinstance(several, list | tuple | set | frozenset) and all(isinstance(p, str) for p in several):
        names = Parameters(tree, ((),) * len(paths), (), paths)
        selected = {i for path in several for i in names.select(path)}
        return tuple(i in selected for i in range(len(paths)))
    leaves, given = jax.tree.flatten(where)
    if given != tree or not all(isinstance(leaf, bool) for leaf in leaves):
        raise TypeError(
            f"where={where!r} is not a path, several paths, a predicate of path and leaf, or a pytree of "
            "bools like the parameters."
        )
    return tuple(leaves)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class Point:
    """Where an operator is evaluated: the chosen parameters, and the others, which are constants.

    Both are the whole pytree with None in place of what is in the other.
    """

    chosen: PyTree
    others: PyTree
    tree: Any = field(metadata={"static": True})
    marks: tuple[bool, ...] = field(metadata={"static": True})
    parameters: Parameters = field(metadata={"static": True})

    @classmethod
    def of(cls, params: PyTree, where: Where | None) -> Point:
        """Split `params`; errors are those of `chosen` and of `Parameters.of`."""
        leaves, tree = jax.tree.flatten(params)
        if not leaves:
            raise ValueError(f"params={params!r} has no leaves; there is nothing to differentiate.")
        require_values("curvature", {"params": params}, SHAPES)
        marks = chosen(params, where)
        inside, outside = _split(leaves, tree, marks)
        parameters = Parameters.of(inside)
        return cls(jax.tree.map(jnp.asarray, inside), outside, tree, marks, parameters)

    def whole(self, chosen: PyTree) -> PyTree:
        """The whole pytree, with other values for the chosen parameters."""
        kept, others = iter(jax.tree.leaves(chosen)), iter(jax.tree.leaves(self.others))
        return jax.tree.unflatten(self.tree, [next(kept if mark else others) for mark in self.marks])


def _split(leaves: Sequence[Any], tree: Any, marks: tuple[bool, ...]) -> tuple[PyTree, PyTree]:
    pairs = list(zip(leaves, marks, strict=True))
    inside = [leaf if mark else None for leaf, mark in pairs]
    outside = [None if mark else leaf for leaf, mark in pairs]
    return jax.tree.unflatten(tree, inside), jax.tree.unflatten(tree, outside)
