"""`fp.backprop(fun)(*args)`: run both sweeps and look at everything by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from funcprop.graph.objective import Argnums, Objective, trace_objective
from funcprop.program.call import require_values
from funcprop.rules.rewrite import Rewriter
from funcprop.rules.rule_set import RuleSet
from funcprop.rules.sets import handwritten
from funcprop.sweeps.activity import active_variables
from funcprop.sweeps.propagation import Propagation
from funcprop.sweeps.sweeps import backward_sweep, forward_sweep


def backprop(
    fun: Callable[..., Any], argnums: Argnums = 0, has_aux: bool = False, *, rules: RuleSet | None = None
) -> Callable[..., Propagation]:
    """Forward and backward propagation of a scalar function, with everything they compute by name.

    `backprop(fun, argnums, has_aux)(*args, **kwargs) -> Propagation`:

    * `.value`: what `fun` returns
    * `.gradient`: what `jax.grad` returns; a tuple over all arguments if `argnums` is None
    * `.values[name]`, `.gradients[name]`: every intermediate, and `∂J/∂` it, of the same shape
    * `.contributions[source, target]`: the part of a gradient that arrives by way of one variable
    * `.first_nonfinite()`: where the first infinity or NaN appears

    Names are those of the arguments, of `fp.name` and of named scopes (Flax modules); a suffix is enough
    where it is unique. It can be jitted.

    An nnx model among the arguments is differentiated by its `nnx.Param`s, `.gradient` is their state as
    `nnx.grad` returns it, and what the function changes in the model (batch statistics, random streams) is
    changed.

    Args:
        fun: returns a real scalar; with `has_aux`, a pair of it and auxiliary data.
        argnums: the arguments to differentiate with respect to, as in `jax.grad`; None for all that have a
            derivative.
        has_aux: as in `jax.grad`; the auxiliary data are `.aux`.
        rules: a rule set; `fp.rules.handwritten` if None.

    Raises:
        TypeError: `fun` does not return one real scalar, an argument at `argnums` has no derivative, or an
            argument is a shape.
        ValueError: there is no argument at a position in `argnums`.

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

    def propagate(objective: Objective) -> tuple[Propagation, Any]:
        traced, graph, result = objective.traced, objective.traced.graph, objective.result
        own = rules.for_arguments(traced.leaves)
        given = {v.name: traced.leaves[i] for v, i in zip(graph.inputs, traced.arguments, strict=True)}
        require_values("backprop", given, "fp.trace, fp.backward_graph or fp.derive")
        inputs = objective.inputs.values()
        active = frozenset(active_variables(graph, {v.name for v in inputs}, Rewriter(own)))
        tape = forward_sweep(graph, traced.values(), own)
        traced.write(tape.written)
        output = tape.values[result.name]
        cotangents = backward_sweep(graph, tape, {result.name: jnp.ones_like(output)}, active, own)
        for v in inputs:
            # The gradient of an argument that the result does not depend on is zero.
            cotangents.values.setdefault(v.name, jnp.zeros_like(tape.values[v.name]))
        value = jax.tree.unflatten(traced.result_tree, [output])
        gradient = objective.gradient(cotangents.values)
        aux, state = traced.extras(tape.values)
        return Propagation(graph, value, gradient, tape, cotangents, own, active, aux), state

    return lambda *args, **kwargs: trace_objective(propagate, fun, argnums, args, kwargs, has_aux)
