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
    return _without_identities(_with_slices(_without_known_choices(_without_repetitions(graph))))


def _without_identities(graph: Graph) -> Graph:
    """The graph without products with 1, maxima with −∞ and sums over no axis."""
    operators: list[Operator] = []
    numbers: dict[str, Any] = {}
    for op in graph.operators:
        if op.op in ("broadcast_in_dim", "convert_element_type") and op.inputs[0].kind == "literal":
            numbers[op.outputs[0].name] = op.inputs[0].value
        operators += _entrywise(op)
        op = operators[-1]
        if op.call is None and op.op.startswith("reduce_") and op.static.get("axes") == ():
            operators[-1] = of_one(op, "copy", lax.copy_p.bind, op.inputs[0], op.outputs[0])
            continue
        given = [v.value if v.kind == "literal" else numbers.get(v.name) for v in op.inputs]
        one = _IDENTITY.get(op.op)
        others = [v for v, x in zip(op.inputs, given, strict=True) if x is None or not np.all(x == one)]
        if one is None or op.call is not None or len(others) != 1:
            continue
        if others[0].type == op.outputs[0].type:
            operators[-1] = of_one(op, "copy", lax.copy_p.bind, others[0], op.outputs[0])
    return replace(graph, operators=tuple(operators))


_IDENTITY = {"mul": 1.0, "max": -np.inf, "min": np.inf}


def _entrywise(op: Operator) -> list[Operator]:
    """A product over no axis with one number, as the product of each entry with it."""
    if op.op != "dot_general" or op.call is not None:
        return [op]
    (v,), numbers = op.outputs, [v for v in op.inputs if v.shape == ()]
    if not numbers or any(w.dtype != v.dtype for w in op.inputs):
        return [op]
    number, shape = numbers[0], v.shape or ()
    array = next((w for w in op.inputs if w.shape != ()), numbers[-1])
    if number.kind == "literal" and number.value == 1:
        return [of_one(op, "copy", lax.copy_p.bind, array, v)]
    full = replace(number, name=f"{v.name}:", kind="intermediate", shape=shape, aval=v.aval, named=False)
    spread = of_one(op, "broadcast_in_dim", partial(lax.broadcast, sizes=shape), number, full)
    return [spread, of_some(op, "mul", lax.mul, (full, array), v)]


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
                op = of_one(op, "copy", lax.copy_p.bind, chosen, op.outputs[0])
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
            operators.append(of_one(op, "slice", cut, x, part))
            if part is not v:
                operators.append(of_one(op, "squeeze", partial(lax.squeeze, dimensions=[axis]), part, v))
    return replace(graph, operators=tuple(operators))


def _of_entries(op: Operator) -> Operator:
    """A concatenation of the operands that have entries."""
    inputs = tuple(v for v in op.inputs if 0 not in (v.shape or ()))
    if not inputs:
        return op
    if len(inputs) == 1:
        return of_one(op, "copy", lax.copy_p.bind, inputs[0], op.outputs[0])
    joined = partial(lax.concatenate, dimension=op.static["dimension"])
    jaxpr = jax.make_jaxpr(lambda *v: joined(v))(*(v.aval for v in inputs))
    return replace(op, inputs=inputs, jaxpr=_jax.open_jaxpr(jaxpr))


def of_one(op: Operator, kind: str, function: Callable[..., Any], x: Variable, v: Variable) -> Operator:
    """A function of one variable as an operator, in the place of another."""
    return of_some(op, kind, function, (x,), v)


def of_some(
    op: Operator, kind: str, function: Callable[..., Any], inputs: tuple[Variable, ...], v: Variable
) -> Operator:
    """A function of some variables as an operator, in the place of another."""
    jaxpr = _jax.open_jaxpr(jax.make_jaxpr(function)(*(x.aval for x in inputs)))
    return replace(
        op, name=f"{v.name} {kind}", op=kind, inputs=inputs, outputs=(v,), jaxpr=jaxpr, bodies={}, call=None
    )
