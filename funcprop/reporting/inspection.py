"""What the page knows of every value and operator: both sweeps as plain data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from funcprop.equations.derivation import Derivation
from funcprop.graph.graph import Graph
from funcprop.reporting.loop_contents import Opened
from funcprop.reporting.statistics import BINS, Statistics, statistics
from funcprop.sweeps.activity import active_variables
from funcprop.sweeps.propagation import Propagation

# Entries of a larger array are not shown, even if it is asked for.
MOST_ENTRIES = 4096


@dataclass(frozen=True)
class InspectedValue:
    """A value of the graph, or inside of a loop in it (`kind` is then "inside").

    Inside of a loop that is drawn open, shape and bytes are those of one step.

    `is_parameter` says that it was differentiated by. `entries` is the array as text, where data are shown.
    """

    name: str
    kind: str
    scope: str
    shape: tuple[int, ...] | None
    dtype: str
    nbytes: int | None
    is_parameter: bool = False
    value: Statistics | None = None
    gradient: Statistics | None = None
    entries: str | None = None


@dataclass(frozen=True)
class BackwardStep:
    """An operator in the backward sweep: whose cotangents it adds to, and which of them are complete then."""

    operator: str
    adds: tuple[str, ...]
    completes: tuple[str, ...]


@dataclass(frozen=True)
class Inspection:
    """Quantities by name, the steps of the backward sweep, and the quantities inside of each loop."""

    quantities: dict[str, InspectedValue]
    backward: tuple[BackwardStep, ...]
    inside: dict[str, tuple[str, ...]]


def inspect(
    derivation: Derivation, propagation: Propagation | None, opened: Opened, examples: bool
) -> Inspection:
    """Describe a function by its equations and, if it was run, what the sweeps computed.

    A value inside of a loop has the type of one step, and statistics over all steps if the sweeps kept it.
    Of values that are not differentiated by (data, constants) there are no histograms, and entries, unless
    `examples`.
    """
    graph = derivation.traced.graph
    reached = cotangent_names(derivation)
    described = _Described(propagation, examples)
    quantities = {}
    for v in graph.variables:
        is_given = v.kind != "intermediate"
        quantities[v.name] = InspectedValue(
            v.name,
            v.kind,
            v.scope,
            v.shape,
            str(v.dtype),
            v.nbytes,
            is_given and v.name in reached,
            *described.of(v.name, is_data=is_given and v.name not in reached),
        )
    inside: dict[str, tuple[str, ...]] = {}
    for operator, variables in opened.variables.items():
        for v in variables:
            value, gradient, _ = described.of(opened.stored.get(v.name, ""), is_data=False)
            given = quantities.get(opened.slices.get(v.name, ""))
            value = given.value if given is not None else value
            quantities[v.name] = InspectedValue(
                v.name, "inside", v.scope, v.shape, str(v.dtype), v.nbytes, False, value, gradient
            )
        inside[operator] = tuple(v.name for v in variables if v.named)
    for name, operator in _inside_loops(graph, propagation, opened):
        value = described.values[name]
        quantities[name] = InspectedValue(
            name, "inside", operator, value.shape, str(value.dtype), None, False, *described.of(name, False)
        )
        inside[operator] = (*inside.get(operator, ()), name)
    return Inspection(quantities, tuple(_backward(graph, reached)), inside)


def cotangent_names(derivation: Derivation) -> set[str]:
    """The variables whose cotangent the backward sweep computes, without the result.

    Those that depend on what is differentiated by, and on which the result depends.
    """
    graph = derivation.traced.graph
    result = graph.outputs[0].name
    prefix = f"∂{result}/∂"
    asked = {line.key.removeprefix(prefix) for line in derivation.backward if line.key.startswith(prefix)}
    given = {v.name for v in graph.inputs} & asked
    active = active_variables(graph, given)
    wanted, reached = {result}, set[str]()
    for op in reversed(graph.operators):
        if any(v.name in wanted for v in op.outputs):
            found = {v.name for v in op.inputs if v.kind != "literal" and v.name in active}
            wanted |= found
            reached |= found
    return (reached | given) - {result}


def _backward(graph: Graph, reached: set[str]) -> Iterator[BackwardStep]:
    """The operators that send cotangents back, last first; others use a value without adding to its own."""
    result = graph.outputs[0].name
    senders = [
        (op, adds)
        for op in reversed(graph.operators)
        if any(v.name in reached or v.name == result for v in op.outputs)
        and (adds := dict.fromkeys(v.name for v in op.inputs if v.kind != "literal" and v.name in reached))
    ]
    last_adding = {name: op for op, adds in senders for name in adds}
    for op, adds in senders:
        yield BackwardStep(op.name, tuple(adds), tuple(n for n in adds if last_adding[n] is op))


def _inside_loops(graph: Graph, propagation: Propagation | None, opened: Opened) -> Iterator[tuple[str, str]]:
    """Names of what closed loops store in their iterations, with the operator that the loop is."""
    known = {v.name for v in graph.variables}
    loops = [op for op in graph.operators if op.op == "scan" and op.name not in opened.operators]
    for name in () if propagation is None or not loops else propagation.values:
        around = [op.name for op in loops if name.startswith(op.name + "/")]
        if name not in known and around:
            yield name, max(around, key=len)


class _Described:
    """Statistics of values and gradients, by name."""

    def __init__(self, propagation: Propagation | None, examples: bool) -> None:
        self.values: Mapping[str, Any] = {}
        self.gradients: Mapping[str, Any] = {}
        self.examples = examples
        if propagation is not None:
            self.values = {**propagation.values, **propagation.tape.values}
            self.gradients = dict(propagation.gradients)

    def of(self, name: str, is_data: bool) -> tuple[Statistics | None, Statistics | None, str | None]:
        """The value, the gradient, and the entries if data are shown."""
        hidden = is_data and not self.examples
        value = self._statistics(self.values, name, 0 if hidden else BINS)
        entries = _entries(self.values[name]) if is_data and value is not None and self.examples else None
        return value, self._statistics(self.gradients, name, BINS), entries

    def _statistics(self, arrays: Mapping[str, Any], name: str, bins: int) -> Statistics | None:
        return statistics(arrays[name], bins) if name in arrays else None


def _entries(value: Any) -> str | None:
    array = np.asarray(value)
    if array.size > MOST_ENTRIES:
        return None
    written: Callable[..., str] = np.array2string
    return written(array, precision=4, separator=", ", max_line_width=100, threshold=MOST_ENTRIES + 1)


def first_nonfinite(propagation: Propagation | None) -> str | None:
    """Where the first number that is not finite appears, as text."""
    found = None if propagation is None else propagation.first_nonfinite()
    return None if found is None else str(found)
