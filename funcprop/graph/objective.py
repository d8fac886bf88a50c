"""A function as an objective: traced with its one real scalar result, and what to differentiate it by."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from funcprop.graph.graph import Graph, Variable
from funcprop.graph.tracing import Arguments, Traced, trace_call
from funcprop.program.facts import CALLS, CHECKPOINTS

Argnums: TypeAlias = "int | Sequence[int] | None"


def positions(argnums: Any) -> int | tuple[int, ...]:
    """`argnums` as JAX takes it: one integer or several, of any type that can be an index."""
    try:
        return operator.index(argnums)
    except TypeError:
        return tuple(map(operator.index, argnums))


@dataclass(frozen=True, eq=False)
class Objective:
    """A traced function whose graph has one result, a real scalar that is computed.

    `chosen` are the leaves of the arguments that are differentiated, in their order.
    """

    traced: Traced
    argnums: int | tuple[int, ...] | None
    chosen: tuple[int, ...]

    @classmethod
    def of(cls, traced: Traced, argnums: Argnums) -> Objective:
        """A traced function as an objective.

        Raises:
            TypeError, ValueError: as `trace_objective`.
        """
        at = None if argnums is None else positions(argnums)
        _check_scalar(traced.graph)
        return cls(traced, at, differentiable(traced.signature, traced.arguments, traced.leaves, at))

    @property
    def result(self) -> Variable:
        """The scalar."""
        return self.traced.graph.outputs[0]

    @property
    def inputs(self) -> dict[int, Variable]:
        """The inputs of the graph that are differentiated, by the position of their leaf."""
        inputs = dict(zip(self.traced.arguments, self.traced.graph.inputs, strict=True))
        return {i: inputs[i] for i in self.chosen}

    def gradient(self, by_name: Mapping[str, Any]) -> Any:
        """Cotangents of the inputs in the structure of the arguments at `argnums`, of all if it is None."""
        leaves: list[Any] = [None] * len(self.traced.leaves)
        for i, v in self.inputs.items():
            leaves[i] = by_name[v.name]
        arguments = self.traced.signature.positional(leaves)
        if self.argnums is None:
            return tuple(arguments)
        if isinstance(self.argnums, int):
            return arguments[self.argnums]
        return tuple(arguments[p] for p in self.argnums)


def trace_objective(
    use: Callable[[Objective], tuple[Any, Any]],
    fun: Callable[..., Any],
    argnums: Argnums,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    has_aux: bool = False,
    inline: frozenset[str] = CALLS | CHECKPOINTS,
) -> Any:
    """Trace a scalar function and hand it to `use`, which returns as in `trace_call`.

    With `has_aux` the function returns the scalar and auxiliary data.

    The bodies of jits and checkpoints stand in the place of their calls (`inline`). A result that is not
    computed, but an argument or a constant, is named `J`, by an operator that does nothing.

    Raises:
        TypeError: the result is not one real scalar, or an argument at `argnums` has no derivative.
        ValueError: there is no argument at a position in `argnums`.
    """

    def used(traced: Traced) -> tuple[Any, Any]:
        return use(Objective.of(traced, argnums))

    return trace_call(used, fun, args, kwargs, inline=inline, name_result="J", has_aux=has_aux)


def differentiable(
    signature: Arguments, arrays: Sequence[int], leaves: Sequence[Any], argnums: Argnums
) -> tuple[int, ...]:
    """The leaves to differentiate: parameters of the arguments at `argnums`, each of which must have some.

    `arrays` are the positions of the leaves that are arrays.
    """
    smooth = {
        i
        for i in arrays
        if signature.trainable[i]
        and not isinstance(leaves[i], jax.Ref)
        and jnp.issubdtype(jnp.result_type(leaves[i]), jnp.inexact)
    }
    count = len(signature.positional(leaves))
    held: list[set[int]] = [set() for _ in range(count)]
    for i, (kind, which, *_) in enumerate(signature.paths):
        if kind.idx == 0:
            held[which.idx].add(i)
    if argnums is None:
        return tuple(sorted(smooth & set().union(*held)))
    chosen: set[int] = set()
    for p in (argnums,) if isinstance(argnums, int) else argnums:
        if not -count <= p < count:
            choice = f"choose among {', '.join(map(str, range(count)))}" if count else "pass them by position"
            raise ValueError(
                f"argnums={p}, but the function was called with {count} positional arguments; {choice}."
            )
        if not held[p] & smooth:
            holds = ", ".join(_shown(leaves[i]) for i in sorted(held[p])) or "nothing"
            raise TypeError(
                f"the argument at argnums={p} holds {holds}, which has no derivative; choose arguments with "
                "floating-point arrays, or argnums=None to differentiate what can be differentiated."
            )
        chosen |= held[p] & smooth
    return tuple(sorted(chosen))


def _shown(leaf: Any) -> str:
    """A number or a reference as it is, an array by its type."""
    has_axes = getattr(leaf, "ndim", 0) > 0 and not isinstance(leaf, jax.Ref)
    if has_axes or isinstance(leaf, jax.ShapeDtypeStruct):
        return f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"
    return repr(leaf)


def _check_scalar(graph: Graph) -> None:
    real = [v for v in graph.outputs if v.shape == () and jnp.issubdtype(v.dtype, jnp.floating)]
    if len(graph.outputs) != 1 or not real:
        shapes = ", ".join(v.type for v in graph.outputs)
        raise TypeError(
            f"{graph.name} returns ({shapes}), but gradients are of one real scalar; return a mean or a sum, "
            "and other results beside it as auxiliary data (has_aux)."
        )
