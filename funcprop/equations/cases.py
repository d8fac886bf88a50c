"""The branches of a `cond` as equations, each under its condition."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax

from funcprop import _jax
from funcprop.equations.bodies import Around, Body, BodyWriter, operand_names
from funcprop.equations.flow import Flow
from funcprop.graph.graph import Operator, Variable
from funcprop.rules.expressions import Expression


class Case:
    """One branch of a `cond`, of which the results that are `read` around it are told."""

    def __init__(self, op: Operator, number: int, active: Sequence[bool], read: Collection[int]) -> None:
        assert op.equation is not None
        self.number, self.condition, closed = number, "", op.equation.params["branches"][number]
        jaxpr = _jax.open_jaxpr(closed)
        types = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in jaxpr.invars]
        smooth = [i - 1 for i, is_active in enumerate(active) if is_active and i]

        def branch(*values: Any) -> list[Any]:
            return _jax.evaluate(closed, _jax.constants(closed), values)

        self.body = Body(branch, types, smooth, sorted(read))

    def leaves(self, operands: Sequence[Any]) -> Sequence[Any]:
        """What the branch reads."""
        return operands[1:]

    def lines(
        self, operands: Sequence[Expression], results: Sequence[str | None], given: Around
    ) -> tuple[str, str, BodyWriter]:
        """Titles and the writer of the lines, with what operands and results are called around the branch."""
        body = self.body
        names = body.own_names(given.taken)
        called, told = operand_names(operands[1:], {*names.values(), *given.taken})
        names |= {v.name: text for v, text in zip(body.inputs, called, strict=True)}
        own_inputs, told_back = {v.name for v in body.inputs}, []
        for i, v in body.outputs.items():
            if v.name not in own_inputs and v.kind != "literal":
                names[v.name] = str(results[i])
                continue
            told.append(f"{results[i]} = {names.get(v.name, v.name)}")
            if v.name in body.active:
                g = "1" if i == given.ends else f"∂J/∂{results[i]}"
                told_back.append(f"∂J/∂{names[v.name]} += {g}")
        shared = [v.name for i, v in enumerate(body.inputs, 1) if i in given.shared]
        writer = body.writer(names, shared, given.ends is not None)
        title, back = (", ".join(words) for words in ([self.condition, *told], [self.condition, *told_back]))
        return title, f"Back, {back[0].lower()}{back[1:]}", writer


def conditions(op: Operator, flow: Flow, written: Callable[[Variable], Expression]) -> list[str]:
    """When each branch is taken: by a boolean, or by its number; the first and last are for all beyond."""
    assert op.equation is not None
    last = len(op.equation.params["branches"]) - 1
    index = flow.source(op.inputs[0])
    if index.dtype == bool:
        return ["Otherwise", f"If {written(index).text()}"]
    clamped = flow.maker.get(index.name)
    if clamped is None or clamped.op != "clamp":
        return [f"If {written(index).text()} = {i}" for i in range(last + 1)]
    text = written(flow.source(clamped.inputs[1])).text()
    return [f"If {text} {'≤' if i == 0 else '≥' if i == last else '='} {i}" for i in range(last + 1)]
