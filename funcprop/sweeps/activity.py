"""Which variables of a graph have a derivative with respect to its inputs."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import jax
from jax.custom_derivatives import SymbolicZero

from funcprop import _jax
from funcprop.graph.graph import Graph, Operator
from funcprop.graph.references import Run, has_references, with_new_references
from funcprop.program.facts import facts_of
from funcprop.rules.rewrite import Rewriter


def active_variables(graph: Graph, inputs: Collection[str], rewriter: Rewriter | None = None) -> set[str]:
    """The differentiable variables whose derivative with respect to the given inputs may not be zero.

    A layer, and what the `rewriter` has a rule for, has the derivative that the rule says.

    Raises:
        TypeError: a value that depends on the inputs is written into a reference among the arguments.
    """
    active = set(inputs)
    for op in graph.operators:
        perturbed = [v.kind != "literal" and v.name in active for v in op.inputs]
        if any(perturbed):
            has_tangent = _perturbed_results(op, perturbed, rewriter)
            pairs = zip(op.outputs, has_tangent, strict=True)
            active.update(v.name for v, has in pairs if has and _jax.is_differentiable(v.aval))
    return active


def _perturbed_results(op: Operator, perturbed: Sequence[bool], rewriter: Rewriter | None) -> Sequence[bool]:
    """Whether each result of an operator has a tangent when some operands have one."""
    everything = [True] * len(op.outputs)
    if rewriter is None:
        has_rule = op.call is not None and op.call.layer.rule is not None
    else:
        has_rule = op.equation is not None and rewriter.find(op.equation) is not None
    is_plain = op.equation is not None and op.call is None and not op.bodies and not has_references(op)
    if has_rule or (is_plain and not facts_of(op.equation).flat):
        return everything
    if is_plain:
        return [False] * len(op.outputs)

    def evaluate(jaxpr: Any, inputs: Sequence[Any]) -> Sequence[Any]:
        return _jax.evaluate(jaxpr, (), inputs) if rewriter is None else rewriter.run(jaxpr, inputs)

    try:
        return _tangents(op, perturbed, evaluate)
    except Exception as error:
        if "non-differentiated array reference" in str(error):
            raise TypeError(
                f"a value that depends on a differentiated argument is written into a mutable reference "
                f"(jax.Ref) at {op.source or op.name}; write its jax.lax.stop_gradient, or return the value."
            ) from error
        # JAX cannot differentiate it; that is for whoever needs the derivative to say.
        return everything


def _tangents(op: Operator, perturbed: Sequence[bool], evaluate: Run) -> list[bool]:
    """Find the active values by tracing JAX's forward mode, in which a tangent that is zero is a symbol."""
    found = [False] * len(op.outputs)
    smooth = [p and _jax.is_differentiable(v.aval) for p, v in zip(perturbed, op.inputs, strict=True)]

    def marked(i: int, result: Any) -> Any:
        def note(primals: Any, tangents: Any) -> Any:
            found[i] = not isinstance(tangents[0], SymbolicZero)
            return primals[0], tangents[0]

        mark = jax.custom_jvp(lambda x: x)
        mark.defjvp(note, symbolic_zeros=True)
        return mark(result)

    def forward_mode(values: Sequence[Any]) -> Any:
        operands = with_new_references(op, values)

        def of_perturbed(*wanted: Any) -> list[Any]:
            given = iter(wanted)
            pairs = zip(operands, smooth, strict=True)
            results = evaluate(op.jaxpr, [next(given) if is_smooth else x for x, is_smooth in pairs])
            is_array = [_jax.is_differentiable(v.aval) for v in op.outputs]
            return [marked(i, y) for i, (y, ok) in enumerate(zip(results, is_array, strict=True)) if ok]

        wanted = [x for x, is_smooth in zip(operands, smooth, strict=True) if is_smooth]
        return jax.jvp(of_perturbed, wanted, wanted)

    types = [_jax.inner_type(v.aval) for v in op.inputs]
    jax.eval_shape(forward_mode, types)
    return found
