"""`fp.backprop(fun)(*args)`: run both sweeps and look at everything by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from funcprop.graph import Variable
from funcprop.propagation import Propagation
from funcprop.registry import RuleSet
from funcprop.rules import handwritten
from funcprop.sweeps import (
    Cotangents,
    Tape,
    active_variables,
    backward_sweep,
    cotangent_of,
    forward_sweep,
    read,
)
from funcprop.tracing import CHECKPOINTS, INLINED, Traced, trace_function


def backprop(
    fun: Callable[..., Any], argnums: int | Sequence[int] | None = 0, *, rules: RuleSet | None = None
) -> Callable[..., Propagation]:
    """Forward and backward propagation of a scalar function, with everything they compute by name.

    `backprop(fun, argnums)(*args, **kwargs) -> Propagation`:

    * `.value`: what `fun` returns
    * `.gradient`: what `jax.grad` returns; a tuple over all arguments if `argnums` is None
    * `.values[name]`, `.gradients[name]`: every intermediate, and `∂J/∂` it, of the same shape
    * `.contributions[source, target]`: the part of a gradient that arrives by way of one variable
    * `.first_nonfinite()`: where the first infinity or NaN appears

    Names are those of the arguments, of `fp.name` and of named scopes (Flax modules); a suffix is enough
    where it is unique. It can be jitted.

    Args:
        fun: returns a real scalar.
        argnums: the arguments to differentiate with respect to; None for all that have a derivative.
        rules: a rule set; `fp.rules.handwritten` if None.

    Raises:
        TypeError: `fun` does not return one real scalar, or an argument at `argnums` has no derivative.

    Reference: Zhang et al., *Dive into Deep Learning*, section 5.3.

    Example:
        >>> import jax.numpy as jnp, funcprop as fp
        >>> def loss(w, x):
        ...     z = fp.name(w * x, "z")
        ...     return fp.name(z**2, "L")
        >>> p = fp.backprop(loss)(3.0, 2.0)
        >>> print(float(p.values["z"]), float(p.gradients["z"]), float(p.gradients["w"]))
        6.0 12.0 24.0
    """
    rules = handwritten if rules is None else rules

    def propagate(*args: Any, **kwargs: Any) -> Propagation:
        traced = trace_function(fun, args, kwargs, inline=INLINED | CHECKPOINTS)
        graph, result = traced.graph, scalar_result(traced)
        given = [jnp.asarray(traced.leaves[i]) for i in traced.arguments]
        values = dict(zip([v.name for v in graph.inputs], given, strict=True))
        values.update(zip([v.name for v in graph.constants], traced.constants, strict=True))
        active = frozenset(active_variables(graph, differentiated_inputs(traced, argnums)))
        tape = forward_sweep(graph, values, rules)
        output = read(result, tape.values)
        seeds = {result.name: jnp.ones_like(output)}
        cotangents = backward_sweep(graph, tape, seeds, active, rules)
        value = jax.tree.unflatten(traced.result_tree, [output])
        return Propagation(
            graph, value, _gradient(traced, tape, cotangents, argnums), tape, cotangents, rules, active
        )

    return propagate


def differentiated_leaves(traced: Traced, argnums: int | Sequence[int] | None) -> set[int]:
    """The positions of the leaves to differentiate; each argument in `argnums` must have some."""
    positional = jax.tree.unflatten(traced.tree, range(len(traced.leaves)))[0]
    smooth = {i for i in traced.arguments if jnp.issubdtype(jnp.result_type(traced.leaves[i]), jnp.inexact)}
    if argnums is None:
        return smooth & set(jax.tree.leaves(positional))
    positions = (argnums,) if isinstance(argnums, int) else tuple(argnums)
    count = len(positional)
    for p in positions:
        if not -count <= p < count:
            raise ValueError(f"argnums={p}, but the function was called with {count} positional arguments.")
    chosen: set[int] = set()
    for p in positions:
        leaves = set(jax.tree.leaves(positional[p]))
        if not leaves & smooth:
            held = ", ".join(repr(traced.leaves[i]) for i in sorted(leaves)) or "nothing"
            raise TypeError(
                f"the argument at argnums={p} holds {held}, which has no derivative; choose arguments with "
                "floating-point arrays, or argnums=None to differentiate what can be differentiated."
            )
        chosen |= leaves & smooth
    return chosen


def differentiated_inputs(traced: Traced, argnums: int | Sequence[int] | None) -> set[str]:
    """The names of the graph's inputs to differentiate."""
    chosen = differentiated_leaves(traced, argnums)
    names = zip(traced.arguments, traced.graph.inputs, strict=True)
    return {v.name for i, v in names if i in chosen}


def _gradient(traced: Traced, tape: Tape, cotangents: Cotangents, argnums: Any) -> Any:
    """The gradient in the structure of the differentiated arguments."""
    chosen = differentiated_leaves(traced, argnums)
    leaves: list[Any] = [None] * len(traced.leaves)
    for i, v in zip(traced.arguments, traced.graph.inputs, strict=True):
        if i in chosen:
            leaves[i] = cotangent_of(v, tape.values[v.name], cotangents.values)
    by_argument = jax.tree.unflatten(traced.tree, leaves)[0]
    if argnums is None:
        return by_argument
    return by_argument[argnums] if isinstance(argnums, int) else tuple(by_argument[p] for p in argnums)


def scalar_result(traced: Traced) -> Variable:
    """The one real scalar that the function returns."""
    graph = traced.graph
    real = [v for v in graph.outputs if v.shape == () and jnp.issubdtype(v.dtype, jnp.floating)]
    if len(graph.outputs) != 1 or not real:
        shapes = ", ".join(v.type for v in graph.outputs)
        raise TypeError(
            f"{graph.name} returns ({shapes}), but gradients are of one real scalar; return the loss alone, "
            "for example by `lambda *args: fun(*args)[0]`, or a sum."
        )
    return real[0]
