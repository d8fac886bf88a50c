"""Graphs of derivatives under the names of the function: `transpose(jvp(net))/mul` is `mul` in `net`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from funcprop.drawing.ruled_function import COTANGENT
from funcprop.graph.graph import Operator, Variable
from funcprop.graph.naming import unique_names, without_transformations

_TRANSFORMATIONS = ("vmap", "jvp", "transpose")


def clean_scope(scope: str) -> str:
    """A scope without what differentiation wrote around it."""
    return without_transformations(scope, _TRANSFORMATIONS)


class Relabelling:
    """Variables and operators renamed together, each name unique.

    `given` are names for some variables, by their identity: inputs and results. All others keep their own
    name in their clean scope; cotangents are called after the objective.
    """

    def __init__(
        self,
        operators: Sequence[Operator],
        inputs: Iterable[Variable],
        given: Mapping[int, str],
        objective: str,
    ) -> None:
        variables = [*inputs, *(v for op in operators for v in op.outputs)]
        cotangent = f"∂{objective}/∂"
        names = unique_names(
            [given.get(id(v)) or _clean(v.name, v.scope).replace(COTANGENT, cotangent) for v in variables]
        )
        self._variables = {
            id(v): replace(v, name=name, scope=clean_scope(v.scope), named=v.named or id(v) in given)
            for v, name in zip(variables, names, strict=True)
        }
        labels = unique_names([_clean(op.name, op.scope) for op in operators])
        self._labels = {id(op): label for op, label in zip(operators, labels, strict=True)}

    def variable(self, v: Variable) -> Variable:
        """The renamed variable; a literal stays what it is."""
        return self._variables.get(id(v), v)

    def operator(self, op: Operator) -> Operator:
        """The renamed operator."""
        return replace(
            op,
            name=self._labels[id(op)],
            scope=clean_scope(op.scope),
            inputs=tuple(map(self.variable, op.inputs)),
            outputs=tuple(map(self.variable, op.outputs)),
        )


def objective_name(results: Sequence[Variable]) -> str:
    """Name the objective after which cotangents are called: the one result, or J."""
    if len(results) == 1 and results[0].named:
        return _clean(results[0].name, results[0].scope)
    return "J"


def replaced(op: Operator, by: Mapping[int, Variable]) -> Operator:
    """The operator with other inputs in the place of some, by their identity."""
    return replace(op, inputs=tuple(by.get(id(v), v) for v in op.inputs))


def seed_names(
    operators: Iterable[Operator], given: Mapping[int, str], objective: str
) -> dict[int, Variable]:
    """The seed, for what only gives it its own name once more: a named result has a named cotangent."""
    return {
        id(op.outputs[0]): op.inputs[0]
        for op in operators
        if op.op == "name"
        and op.static["name"] == COTANGENT + objective.rpartition("/")[2]
        and given.get(id(op.inputs[0])) == f"∂{objective}/∂{objective}"
    }


def _clean(name: str, scope: str) -> str:
    own = name.removeprefix(scope + "/") if scope else name
    return "/".join(part for part in (clean_scope(scope), own) if part)
