"""A graph as it is written: what is computed twice once, slices in place of splits, nothing that is empty."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import numpy as np
from jax import lax

from funcprop import _jax
from funcprop.graph.graph import Graph, Operator, Variable
from funcprop.graph.references import has_references
from funcprop.program.equal_equations import function_key


def plain(graph: Graph) -> Graph:
    """The graph without repetitions, splits and what is empty."""
    return _with_slices(_without_known_choices(_without_repetitions(graph)))


def _without_known_choices(graph: Graph) -> Graph:
    """The graph without selections of which the one condition is made of numbers, as in a variance."""
    maker = {v.name: op for op in graph.operators for v in op.outputs}

    def known(v: Variable) -> Any | None:
        if v.kind == "literal":
            return v.value
        op = maker.get(v.name)
        if op is None or op.op not in ("gt", "sub", "convert_element_type") or op.call is not None:
            return None
        operands = [known(w) for w in op.inputs]
        return None if any(x is None for x in operands) else _jax.evaluate(op.jaxpr, (), operands)[0]

    operators = []
    for op in graph.operators:
        is_choice = op.op == "select_n" and op.call is None and op.inputs[0].shape == ()
        condition = known(op.inputs[0]) if is_choice else None
        if condition is not None:
            chosen = op.inputs[1 + int(condition)]
            if chosen.kind != "literal" and chosen.aval.dtype == op.outputs[0].aval.dtype:
                op = _of_one(op, "copy", lax.copy_p.bind, chosen, op.outputs[0])
        operators.append(op)
    return replace(graph, operators=tuple(operators))


def _without_repetitions(graph: Graph) -> Graph:
    """Equal operators of equal operands are one, but those with a name and the one that ends the graph."""
    same: dict[str, Variable] = {}
    seen: dict[Hashable, Operator] = {}
    operators = []
    for op in graph.operators:
        op = replace(op, inputs=tuple(same.get(v.name, v) for v in op.inputs))
        is_kept = any(v.named or v in graph.outputs for v in op.outputs)
        key = None if is_kept or op.call is not None or op.bodies or has_references(op) else _key(op)
        if key is not None and key in seen:
            same |= {v.name: w for v, w in zip(op.outputs, seen[key].outputs, strict=True)}
            continue
        if key is not None:
            seen[key] = op
        operators.append(op)
    return replace(graph, operators=tuple(operators))


def _key(op: Operator) -> Hashable | None:
    """What makes two operators equal; None for one that has effects or cannot be compared."""
    if op.equation is None or op.jaxpr.effects:
        return None
    key = function_key(op.equation)
    operands = tuple((v.type, repr(v.value)) if v.kind == "literal" else v.name for v in op.inputs)
    return None if key is None else (key, operands)


def _with_slices(graph: Graph) -> Graph:
    """The graph with a slice for every result of a split, and without what has no entries."""
    operators: list[Operator] = []
    for op in graph.operators:
        if op.op == "concatenate" and op.call is None and any(0 in (v.shape or ()) for v in op.inputs):
            operators.append(_of_entries(op))
            continue
        if op.op not in ("split", "unstack") or op.call is not None:
            operators.append(op)
            continue
        (x,), axis = op.inputs, op.static["axis"]
        sizes = op.static.get("sizes", [1] * len(op.outputs))
        for v, end, size in zip(op.outputs, map(int, np.cumsum(sizes)), sizes, strict=True):
            cut = partial(lax.slice_in_dim, start_index=end - size, limit_index=end, axis=axis)
            aval = jax.eval_shape(cut, x.aval)
            part = (
                v
                if op.op == "split"
                else replace(v, name=f"{v.name}:", shape=aval.shape, aval=aval, named=False)
            )
            operators.append(_of_one(op, "slice", cut, x, part))
            if part is not v:
                operators.append(_of_one(op, "squeeze", partial(lax.squeeze, dimensions=[axis]), part, v))
    return replace(graph, operators=tuple(operators))


def _of_entries(op: Operator) -> Operator:
    """A concatenation of the operands that have entries."""
    inputs = tuple(v for v in op.inputs if 0 not in (v.shape or ()))
    if not inputs:
        return op
    if len(inputs) == 1:
        return _of_one(op, "copy", lax.copy_p.bind, inputs[0], op.outputs[0])
    joined = partial(lax.concatenate, dimension=op.static["dimension"])
    jaxpr = jax.make_jaxpr(lambda *v: joined(v))(*(v.aval for v in inputs))
    return replace(op, inputs=inputs, jaxpr=_jax.open_jaxpr(jaxpr))


def _of_one(op: Operator, kind: str, function: Callable[..., Any], x: Variable, v: Variable) -> Operator:
    """A function of one variable as an operator, in the place of another."""
    jaxpr = _jax.open_jaxpr(jax.make_jaxpr(function)(x.aval))
    return replace(op, name=f"{v.name} {kind}", op=kind, inputs=(x,), outputs=(v,), jaxpr=jaxpr)
