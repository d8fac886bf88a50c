"""Mutable references (`jax.Ref`) among a function's arguments, evaluated as what they contain.

In a graph all operations on references are one operator. It is run on new references with the same contents,
as often as the sweeps need it, and the user's own are changed once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from funcprop import _jax
from funcprop.graph.graph import Operator
from funcprop.graph.naming import argument_names

Run = Callable[[Any, Sequence[Any]], Sequence[Any]]


def has_references(op: Operator) -> bool:
    """Whether an operator reads or writes references that are given to it."""
    return any(_jax.is_reference(v.aval) for v in op.inputs)


def contents(value: Any) -> Any:
    """The array that a reference holds; any other value as an array."""
    return value[...] if _jax.is_reference(jax.typeof(value)) else jnp.asarray(value)


def with_new_references(op: Operator, values: Sequence[Any]) -> list[Any]:
    """The operator's operands, with a new reference for the contents of each one."""
    pairs = zip(op.inputs, values, strict=True)
    return [jax.new_ref(x) if _jax.is_reference(v.aval) else x for v, x in pairs]


def run(op: Operator, values: Sequence[Any], evaluate: Run) -> tuple[list[Any], dict[str, Any]]:
    """An operator's results, and what its references hold afterwards, by name.

    `evaluate` runs the operator's jaxpr.
    """
    if not has_references(op):
        return list(evaluate(op.jaxpr, values)), {}
    operands = with_new_references(op, values)
    results = list(evaluate(op.jaxpr, operands))
    pairs = zip(op.inputs, operands, strict=True)
    return results, {v.name: x[...] for v, x in pairs if _jax.is_reference(v.aval)}


def require_no_references(what: str, fun: Callable[..., Any], args: Any, kwargs: Mapping[str, Any]) -> None:
    """Raise if an argument of `fun` is a mutable reference, for `what` can only do with arrays.

    Raises:
        TypeError: with the name of the first reference.
    """
    for path, leaf in jax.tree.leaves_with_path((args, kwargs)):
        if isinstance(leaf, jax.Ref):
            (name,) = argument_names(fun, [path])
            raise TypeError(
                f"{what}: {name} is a mutable reference ({jax.typeof(leaf)}), but {what} takes arrays only; "
                "pass the array that it holds and make the reference inside the function: "
                "lambda x, array: fun(x, jax.new_ref(array))."
            )
