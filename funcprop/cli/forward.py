"""`funcprop forward TARGET`: the computational graph, and every value that forward propagation stores."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

import jax.numpy as jnp
import typer

from funcprop.cli.errors import users_code
from funcprop.cli.options import AsJson, TargetName
from funcprop.cli.output import Output, describe, digits, emit, entries, is_numeric, table
from funcprop.cli.target import Target, load
from funcprop.graph.graph import Graph, Variable, shape_text
from funcprop.graph.tracing import trace_function
from funcprop.rules.sets import autodiff
from funcprop.sweeps.sweeps import Tape, forward_sweep


def forward(
    target: TargetName,
    as_json: AsJson = False,
    limit: Annotated[
        int | None,
        typer.Option("--entries", min=0, help="show entries of arrays up to this size (12; all in JSON)"),
    ] = None,
) -> None:
    """The graph of a function as a table, and the value of every variable."""
    emit(lambda: report(load(target), limit), as_json)


def report(target: Target, limit: int | None) -> Output:
    """Trace, run the forward sweep, and describe both. Shapes alone are traced but have no values."""
    with users_code(f"target {target.label!r}: forward propagation failed", None):
        traced = trace_function(target.function, target.args, target.kwargs)
        values = dict(_run(traced)) if target.has_arrays() else None
    graph = traced.graph
    data: dict[str, Any] = {"target": target.label, **_graph_data(graph)}
    text = str(graph)
    if values is None:
        text += "\n\nexample() returns shapes, so there are no values."
        data["values"] = None
    else:
        text += "\n\n" + values_table(values, 12 if limit is None else limit)
        data["values"] = [{"name": name, **describe(value, limit)} for name, value in values.items()]
    return Output(text, data)


def values_table(values: dict[str, Any], limit: int) -> str:
    """Every value with its norm, and with its entries if there are few."""
    rows = [("value", "shape", "norm", "entries")]
    for name, value in values.items():
        size = jnp.size(value) if is_numeric(value) else 0
        norm = describe(value, 0)["norm"]
        shown = entries(value) if size <= limit else "…"
        rows.append((name, shape_text(jnp.shape(value)), digits(norm), shown))
    return table(rows, right=[2])


def _run(traced: Any) -> Iterator[tuple[str, Any]]:
    graph = traced.graph
    inputs = traced.values()
    tape = forward_sweep(graph, inputs, autodiff)
    yield from ((name, value) for name, value in inputs.items())
    yield from _computed(graph, tape, "")


def _computed(graph: Graph, tape: Tape, prefix: str) -> Iterator[tuple[str, Any]]:
    """The operators' results in order; those inside a loop come before the loop's own, with a time axis."""
    for op in graph.operators:
        if op.name in tape.bodies:
            yield from _computed(op.bodies["jaxpr"], tape.bodies[op.name], f"{prefix}{op.name}/")
        yield from ((prefix + v.name, tape.values[v.name]) for v in op.outputs)


def _graph_data(graph: Graph) -> dict[str, Any]:
    """A graph and the graphs inside its control flow, as plain data."""
    return {
        "name": graph.name,
        "flops": graph.flops,
        "inputs": [_variable(v) for v in graph.inputs],
        "constants": [_variable(v) for v in graph.constants],
        "operators": [
            {
                "name": op.name,
                "op": op.op,
                "scope": op.scope,
                "inputs": [v.name for v in op.inputs],
                "outputs": [_variable(v) for v in op.outputs],
                "flops": op.flops,
                "source": op.source,
                "bodies": {key: _graph_data(body) for key, body in op.bodies.items()},
            }
            for op in graph.operators
        ],
        "outputs": [v.name for v in graph.outputs],
    }


def _variable(variable: Variable) -> dict[str, Any]:
    return {
        "name": variable.name,
        "kind": variable.kind,
        "scope": variable.scope,
        "shape": None if variable.shape is None else list(variable.shape),
        "dtype": None if variable.dtype is None else str(variable.dtype),
        "bytes": variable.nbytes,
        "named": variable.named,
    }
