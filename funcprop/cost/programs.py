"""The programs whose costs `fp.second_order_cost` compares: from the value to the dense Hessian."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from funcprop.cost.split import SplitError, function_of, model_outputs
from funcprop.curvature.gauss_newton import gauss_newton_map
from funcprop.graph.objective import Objective
from funcprop.rules.rule_set import RuleSet
from funcprop.rules.running import with_rules

VALUE, GRADIENT, GAUSS_NEWTON, DENSE = "value", "gradient", "Gauss-Newton product", "dense Hessian"
FORWARD, REVERSE = "HVP forward-over-reverse", "HVP reverse-over-reverse"


class TimedProgram(NamedTuple):
    """A function of arrays, and the arrays or their types."""

    name: str
    function: Callable[..., Any]
    operands: tuple[Any, ...]


def programs(
    objective: Objective, output: str | None, rules: RuleSet
) -> tuple[list[TimedProgram], str | None, dict[str, str]]:
    """The programs; the names of the model's outputs; and what is left out, with the reason.

    The direction of every product is an operand of its own, with the values of the parameters.

    Raises:
        ValueError: there is no value of the name `output`.
    """
    traced = objective.traced
    operands = {i: _operand(traced.leaves[i]) for i in traced.arguments}
    params = [operands[i] for i in objective.inputs]
    others = [x for i, x in operands.items() if i not in objective.inputs]
    value = with_rules(function_of(objective), rules)
    gradient = jax.grad(value)

    def forward_over_reverse(params: Any, direction: Any, others: Any) -> Any:
        return jax.jvp(lambda p: gradient(p, others), (params,), (direction,))[1]

    def reverse_over_reverse(params: Any, direction: Any, others: Any) -> Any:
        return jax.vjp(lambda p: gradient(p, others), params)[1](direction)[0]

    def dense(params: Any, others: Any) -> Any:
        flat, unravel = ravel_pytree(params)
        push = jax.linearize(lambda p: ravel_pytree(gradient(unravel(p), others))[0], flat)[1]
        unit = lambda i: jnp.zeros_like(flat).at[i].set(1)  # noqa: E731
        return jax.lax.map(lambda i: push(unit(i)), jnp.arange(flat.size))

    found = [
        TimedProgram(VALUE, value, (params, others)),
        TimedProgram(GRADIENT, gradient, (params, others)),
        TimedProgram(FORWARD, forward_over_reverse, (params, params, others)),
        TimedProgram(REVERSE, reverse_over_reverse, (params, params, others)),
        TimedProgram(DENSE, dense, (params, others)),
    ]
    try:
        split = model_outputs(objective, output)
    except SplitError as error:
        if output is not None:
            raise
        return found, None, {GAUSS_NEWTON: str(error)}
    model = with_rules(function_of(objective, wanted=split), rules)
    loss = with_rules(function_of(objective, replaced=split), rules)

    def product(params: Any, direction: Any, others: Any) -> Any:
        # What reaches the objective past the model's outputs is, with them, the output of a larger model.
        whole = lambda p: (model(p, others), p)  # noqa: E731
        slope = jax.grad(lambda outputs: loss(outputs[1], others, outputs[0]))
        return gauss_newton_map(whole, lambda o: jax.linearize(slope, o)[1], params)(direction)

    found.insert(-1, TimedProgram(GAUSS_NEWTON, product, (params, params, others)))
    return found, ", ".join(v.name for v in split), {}


def _operand(leaf: Any) -> Any:
    return leaf if isinstance(leaf, jax.ShapeDtypeStruct) else jnp.asarray(leaf)
