"""Where a function is a model and where it is a loss: the split that a Gauss-Newton product needs.

With the model's output `o(θ)` and the loss `J = l(o, θ)` of it, the generalised Gauss-Newton matrix is

    G = (∂o/∂θ)ᵀ ∇²ₒl (∂o/∂θ) + ∇²_θ l

without the curvature of the model. What reaches the objective past the output, such as weight decay, is part
of `l` with its exact Hessian.

Reference: Schraudolph, "Fast curvature matrix-vector products for second-order gradient descent", Neural
Computation 2002.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from typing import Any

from funcprop import _jax, layers
from funcprop.graph.graph import Operator, Variable
from funcprop.graph.objective import Objective

# A layer is a loss of its first argument if its backward is that of one of these.
_LOSSES = (layers.softmax_cross_entropy, layers.mean_squared_error, layers.focal_loss, layers.huber_loss)


class SplitError(ValueError):
    """The function cannot be split into model and loss; the message says why, and how it can."""


def model_output(objective: Objective, name: str | None) -> Variable:
    """The value that is the model's output: the one of this name, or what the last loss layer reads.

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
            return computed[name]
        near = difflib.get_close_matches(name, computed, n=3)
        raise SplitError(
            f"output={name!r} is no value that {graph.name} computes from what is differentiated"
            + (f"; did you mean {' or '.join(near)}?" if near else "; fp.trace lists the names.")
        )
    for op in reversed(graph.operators):
        if _is_loss(op) and op.inputs[0].name in computed:
            return op.inputs[0]
    raise SplitError(
        "none of its operators is a loss of fp.layers; name the value that is the model's output (`output=`)"
    )


def _is_loss(op: Operator) -> bool:
    rule = None if op.call is None else op.call.layer.rule
    return rule is not None and any(rule.backward is loss.rule.backward for loss in _LOSSES)


def function_of(
    objective: Objective, replaced: Variable | None = None, wanted: Variable | None = None
) -> Callable[..., Any]:
    """The traced function, `f(chosen, others, value)`, of its differentiated inputs and the other ones.

    `value` stands in the place of the variable `replaced`; the result is the value of `wanted`, the objective
    if it is None.
    """
    traced = objective.traced
    result = wanted or objective.result
    chosen = [v.name for v in objective.inputs.values()]
    others = [v.name for v in traced.graph.inputs if v.name not in chosen]
    constants = dict(zip([v.name for v in traced.graph.constants], traced.constants, strict=True))
    given = set() if replaced is None else {replaced.name}
    operators = _needed(traced.graph.operators, result.name, given)

    def function(of: Sequence[Any], rest: Sequence[Any], value: Any = None) -> Any:
        values = {**constants, **dict(zip([*chosen, *others], [*of, *rest], strict=True))}
        for op in operators:
            values.update(dict.fromkeys(given, value))
            operands = [v.value if v.kind == "literal" else values[v.name] for v in op.inputs]
            results = _jax.evaluate(op.jaxpr, (), operands)
            values.update(zip([v.name for v in op.outputs], results, strict=True))
        return value if result.name in given else values[result.name]

    return function


def _needed(operators: Sequence[Operator], result: str, given: set[str]) -> list[Operator]:
    """The operators on which a result depends, where some values are given."""
    wanted = {result} - given
    kept = []
    for op in reversed(operators):
        if not op.outputs or not wanted.isdisjoint(v.name for v in op.outputs):
            kept.append(op)
            wanted.update(v.name for v in op.inputs if v.kind != "literal" and v.name not in given)
    return kept[::-1]
