"""`where=`: which parameters an operator acts on; the others are constants."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from funcprop.operators.parameters import Parameters, Where, path_name
from funcprop.program.call import name_of, require_values
from funcprop.program.structural_key import SameObject
from funcprop.program.trained import trained_leaves

# What is known of shapes alone, for messages.
SHAPES = "fp.second_order_cost(loss)(…) or fp.curvature.hessian_diagonal(loss).plan(…)"


def chosen(params: PyTree, where: Where | None) -> tuple[bool, ...]:
    """For each leaf of `params` whether it is chosen.

    Args:
        params: a pytree.
        where: None for all that are trained (`trained_leaves`); a path as `params/Dense_1` for the leaves
            there or below, or several; a predicate of path and leaf; or a pytree of bools like `params`.

    Raises:
        TypeError: `where` is none of these.
        ValueError: it chooses nothing, or names a parameter that does not exist.
    """
    found, tree = jax.tree_util.tree_flatten_with_path(params)
    paths = tuple(path_name(path) for path, _ in found)
    marks = trained_leaves(params) if where is None else _marks(found, tree, paths, where)
    if not any(marks):
        raise ValueError(
            f"where={where!r} chooses no parameter; the paths are {', '.join(map(repr, paths))}."
        )
    return marks


def _marks(found: Any, tree: Any, paths: tuple[str, ...], where: Where) -> tuple[bool, ...]:
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


def restricted(
    fun: Callable[..., Any], params: PyTree, where: Where | None
) -> tuple[Callable[..., Any], PyTree]:
    """The function of the chosen parameters, the others being constants, and these parameters.

    The chosen ones are the whole pytree with None in place of the others. Errors are those of `chosen`.
    """
    marks = chosen(params, where)
    if all(marks):
        return fun, params
    leaves, tree = jax.tree.flatten(params)
    # Of a parameter that is a type alone nothing but the type is read.
    others = [np.broadcast_to(np.zeros((), x.dtype), x.shape) if _is_type(x) else x for x in leaves]

    def of_chosen(inside: PyTree, *args: Any, **kwargs: Any) -> Any:
        given = iter(jax.tree.leaves(inside))
        whole = [next(given) if mark else x for mark, x in zip(marks, others, strict=True)]
        return fun(jax.tree.unflatten(tree, whole), *args, **kwargs)

    of_chosen.__name__ = name_of(fun)
    return of_chosen, _inside(tree, leaves, marks)


def _inside(tree: Any, leaves: Sequence[Any], marks: Sequence[bool]) -> PyTree:
    """The whole pytree with None in place of the leaves that are not chosen."""
    return jax.tree.unflatten(tree, [x if mark else None for x, mark in zip(leaves, marks, strict=True)])


def _is_type(leaf: Any) -> bool:
    return isinstance(leaf, jax.ShapeDtypeStruct)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class Point:
    """Where an operator is evaluated: the chosen parameters, and the others, which are constants.

    Attributes:
        chosen: the whole pytree with None in place of all else.
        others: the other leaves that are arrays or numbers.
        kept: all leaves, with None in place of those that are data.
    """

    chosen: PyTree
    others: tuple[Any, ...]
    tree: Any = field(metadata={"static": True})
    marks: tuple[bool, ...] = field(metadata={"static": True})
    kept: tuple[SameObject | None, ...] = field(metadata={"static": True})
    parameters: Parameters = field(metadata={"static": True})

    @classmethod
    def of(cls, params: PyTree, where: Where | None) -> Point:
        """Split `params`; errors are those of `chosen` and of `Parameters.of`."""
        leaves, tree = jax.tree.flatten(params)
        if not leaves:
            raise ValueError(f"params={params!r} has no leaves; there is nothing to differentiate.")
        require_values("curvature", {"params": params}, SHAPES)
        marks = chosen(params, where)
        inside = _inside(tree, leaves, marks)
        outside = [x for x, mark in zip(leaves, marks, strict=True) if not mark]
        parameters = Parameters.of(inside)
        kept = [None if mark or _is_data(x) else SameObject(x) for x, mark in zip(leaves, marks, strict=True)]
        others = tuple(x for x in outside if _is_data(x))
        return cls(jax.tree.map(jnp.asarray, inside), others, tree, marks, tuple(kept), parameters)

    def whole(self, chosen: PyTree, others: Sequence[Any] | None = None) -> PyTree:
        """The whole pytree, with other values for the chosen parameters, or for the others too."""
        of_chosen = iter(jax.tree.leaves(chosen))
        of_others = iter(self.others if others is None else others)
        leaves = [
            next(of_chosen) if mark else next(of_others) if kept is None else kept.value
            for mark, kept in zip(self.marks, self.kept, strict=True)
        ]
        return jax.tree.unflatten(self.tree, leaves)


def _is_data(leaf: Any) -> bool:
    return isinstance(leaf, bool | int | float | complex) or hasattr(leaf, "dtype")
