"""Run both sweeps of a function and look at everything by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from funcprop.graph.objective import Argnums, Objective, trace_objective
from funcprop.program.call import require_values
from funcprop.rules.rewrite import Rewriter
from funcprop.rules.rule_set import RuleSet
from funcprop.rules.sets import chosen_rules, handwritten
from funcprop.sweeps.activity import active_variables
from funcprop.sweeps.propagation import Propagation
from funcprop.sweeps.sweeps import backward_sweep, forward_sweep


def propagation_of(
    fun: Callable[..., Any], argnums: Argnums = 0, has_aux: bool = False, *, rules: RuleSet | None = None
) -> Callable[..., Propagation]:
    """`fp.backprop`, of which `Propagation.table` is not yet the equations."""
    rules = chosen_rules(rules, handwritten)

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
