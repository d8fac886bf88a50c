"""Where a function is a model and where it is a loss: the split that a Gauss-Newton product needs.

With the model's outputs `o(θ)` and the loss `J = l(o, θ)` of them, the generalised Gauss-Newton matrix is

    G = (∂o/∂θ)ᵀ ∇²ₒl (∂o/∂θ) + ∇²_θ l

without the curvature of the model. What reaches the objective past the outputs, such as weight decay, is part
of `l` with its exact Hessian.

Reference: Schraudolph, "Fast curvature matrix-vector products for second-order gradient descent", Neural
Computation 2002.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from typing import Any

from funcprop import _jax, layers
from funcprop.cost.convex_terms import convex_outputs
from funcprop.graph.graph import Operator, Variable, needed
from funcprop.graph.objective import Objective
from funcprop.sweeps.evaluation import evaluated

# A layer is a loss of its first argument if its backward is that of one of these.
_LOSSES = (layers.softmax_cross_entropy, layers.mean_squared_error, layers.focal_loss, layers.huber_loss)


class SplitError(ValueError):
    """The function cannot be split into model and loss; the message says why, and how it can."""


def model_outputs(objective: Objective, name: str | None) -> tuple[Variable, ...]:
    """The values that are the model's outputs: the one of this name, or what losses are of.

    A loss is what the last of `fp.layers`' losses computes, or a term of the objective that is convex in a
    value, past which it depends on no parameter.

    Raises:
        SplitError: there is no such value.
    """
    graph = objective.traced.graph
    reached = {v.name for v in objective.inputs.values()}
    computed: dict[str, Variable] = {}
    for op in graph:
        if any(v.name in reached for v in op.inputs):
            smooth = [v for v in op.outputs if _jax.is_differentiable(v.aval)]
            reached.update(v.name for v in smooth)
            computed.update((v.name, v) for v in smooth)
    if name is not None:
        if name in computed:
            return (computed[name],)
        near = difflib.get_close_matches(name, computed, n=3)
        raise SplitError(
            f"output={name!r} is no value that {graph.name} computes from what is differentiated"
            + (f"; did you mean {' or '.join(near)}?" if near else "; fp.trace lists the names.")
        )
    for op in reversed(graph.operators):
        if _is_loss(op) and op.inputs[0].name in computed:
            return (op.inputs[0],)
    found = convex_outputs(objective)
    if not found:
        raise SplitError(
            "it is no loss of fp.layers, and past its last parameter convex in no value; name the value that "
            "is the model's output (`output=`)"
        )
    return found


def _is_loss(op: Operator) -> bool:
    rule = None if op.call is None else op.call.layer.rule
    return rule is not None and any(rule.backward is loss.rule.backward for loss in _LOSSES)


def function_of(
    objective: Objective, replaced: Sequence[Variable] = (), wanted: Sequence[Variable] | None = None
) -> Callable[..., Any]:
    """The traced function, `f(chosen, others, values)`, of its differentiated inputs and the other ones.

    `values` stand in the places of the variables `replaced`; the results are the values of `wanted`, or the
    objective alone if it is None.
    """
    traced = objective.traced
    results = [objective.result] if wanted is None else wanted
    chosen = [v.name for v in objective.inputs.values()]
    others = [v.name for v in traced.graph.inputs if v.name not in chosen]
    constants = dict(zip([v.name for v in traced.graph.constants], traced.constants, strict=True))
    operators = needed(traced.graph.operators, results, replaced)

    def function(of: Sequence[Any], rest: Sequence[Any], values: Sequence[Any] = ()) -> Any:
        known = {**constants, **dict(zip([*chosen, *others], [*of, *rest], strict=True))}
        known |= zip([v.name for v in replaced], values, strict=True)
        found = evaluated(operators, known)
        return found[objective.result.name] if wanted is None else [found[v.name] for v in wanted]

    return function
