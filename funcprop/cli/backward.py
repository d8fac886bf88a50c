"""`funcprop backward TARGET`: the list of gradients in the order of the backward sweep."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, Any, Literal, NamedTuple

import jax.numpy as jnp
import typer

from funcprop.cli.errors import users_code
from funcprop.cli.options import ArgnumsOrAll, AsJson, HasAux, TargetName, parse_argnums
from funcprop.cli.output import Output, describe, digits, emit, nonfinite_data, number, table
from funcprop.cli.target import Target, load
from funcprop.equations.derivation import Derivation, derive
from funcprop.equations.verification import Line
from funcprop.graph.graph import shape_text
from funcprop.sweeps.backprop import propagation_of
from funcprop.sweeps.propagation import Propagation


def backward(
    target: TargetName,
    argnums: ArgnumsOrAll = "0",
    has_aux: HasAux = False,
    operators: Annotated[bool, typer.Option("--operators", help="a line for every operator")] = False,
    as_json: AsJson = False,
    limit: Annotated[
        int | None, typer.Option("--entries", min=0, help="in JSON, leave out the entries of larger arrays")
    ] = None,
) -> None:
    """The gradients in the order of the backward sweep, with their contributions."""
    emit(lambda: report(load(target, has_aux), parse_argnums(argnums), limit, operators), as_json)


class Gradient(NamedTuple):
    """One line of the chapter's list: `∂J/∂W1` or a partial derivative `∂s/∂W1`.

    `text` is the equation (the left side alone where there is none, inside loops). `terms` are the
    contributions to the gradient of a variable, by their source and as `prod(∂J/∂z, ∂z/∂W1)`; none where
    a source has no line.
    """

    name: str
    text: str
    value: Any
    terms: tuple[Term, ...] = ()


class Term(NamedTuple):
    """The contribution to a variable's cotangent that comes from `source`."""

    source: str
    text: str
    value: Any


def report(
    target: Target, argnums: Sequence[int] | None, limit: int | None, operators: bool = False
) -> Output:
    """Both sweeps, written out as the chapter's list."""
    target.require_arrays("backpropagation", "`funcprop forward` and `funcprop derive` take shapes")
    with users_code(f"target {target.label!r}: backpropagation failed", None):
        propagation = propagation_of(target.function, argnums)(*target.args, **target.kwargs)
        detail: Literal["layers", "operators"] = "operators" if operators else "layers"
        derivation = derive(target.function, argnums, detail=detail)(*target.args, **target.kwargs)
        found = gradients(propagation, derivation, operators)
    first = propagation.first_nonfinite()
    objective, value = objective_name(propagation, derivation), number(propagation.value)
    parts = [f"{target.label}: {objective} = {digits(value)}", gradients_table(found)]
    if where := derivation.where():
        parts.append("\n".join(["where", *(f"  {row}" for row in where)]))
    parts.append("Value and gradients are finite." if first is None else f"First non-finite: {first}")
    data = {
        "target": target.label,
        "objective": objective,
        "value": value,
        "gradients": [_data(gradient, limit) for gradient in found],
        "first_nonfinite": nonfinite_data(first),
    }
    return Output("\n\n".join(parts), data)


def gradients(propagation: Propagation, derivation: Derivation, every: bool = False) -> list[Gradient]:
    """The gradients in the order of the backward sweep; partial derivatives stand before the first sum.

    They are those that the derivation has a line for, or `every` one.
    """
    prefix = f"∂{propagation.graph.outputs[0].name}/∂"
    objective = objective_name(propagation, derivation)
    values = propagation.gradients
    environment = {**propagation.tape.values, **{prefix + name: v for name, v in values.items()}}
    lines: dict[str, Line] = {}
    partials: dict[str, list[Line]] = {}
    before: list[Line] = []
    for line in derivation.backward:
        if line.key.startswith(prefix):
            name = line.key.removeprefix(prefix)
            lines[name], partials[name], before = line, before, []
        else:
            before.append(line)
    sources: dict[str, list[str]] = {}
    contributions = propagation.contributions
    for source, of in contributions:
        sources.setdefault(of, []).append(source)
    seen = {line.key for line in derivation.forward}
    for line in (*derivation.forward, *derivation.backward):
        if line.key not in environment:  # A part of an array, which the sweeps have no variable for.
            environment[line.key] = line.forms[-1].evaluate(environment)
    found = []
    for name in values if every else _with_bodies(propagation, lines):
        value = environment[prefix + name]
        found += [
            Gradient(line.left, line.text(), line.forms[-1].evaluate(environment))
            for line in partials.get(name, [])
        ]
        left = f"∂{objective}/∂{name}"
        # The contribution of the first operator that uses the variable comes first, as in the equation.
        terms = tuple(
            Term(source, f"prod(∂{objective}/∂{source}, ∂{source}/∂{name})", contributions[source, name])
            for source in reversed(sources.get(name, []))
            if every or seen.issuperset(sources[name])
        )
        found.append(Gradient(left, lines[name].text() if name in lines else left, value, terms))
    return found


def _with_bodies(propagation: Propagation, names: Iterable[str]) -> Iterator[str]:
    """The names, and what is inside of loops where the sweep comes to it."""
    loops = tuple(f"{op.name}/" for op in propagation.graph.operators if op.bodies)
    inside = [name for name in propagation.gradients if name.startswith(loops)]
    rank = {name: i for i, name in enumerate(propagation.gradients)}
    for name in names:
        while inside and rank[inside[0]] < rank.get(name, 0):
            yield inside.pop(0)
        yield name
    yield from inside


def objective_name(propagation: Propagation, derivation: Derivation) -> str:
    """The result's name as the equations write it: `J` if the user gave it none."""
    name = propagation.graph.outputs[0].name
    written = (line.left for line in derivation.backward if line.key.startswith(f"∂{name}/∂"))
    return next((left.removeprefix("∂").split("/∂")[0] for left in written), name)


def values_table(propagation: Propagation, derivation: Derivation) -> str:
    """Equation, shape and norm of what the forward sweep computes."""
    values = dict(propagation.tape.values)
    rows = [("value", "shape", "norm")]
    for line in derivation.forward:
        if line.key not in values:
            values[line.key] = line.forms[-1].evaluate(values)
        rows.append((line.text(), *_size(values[line.key])))
    return table(rows, right=[2])


def gradients_table(found: Sequence[Gradient]) -> str:
    """Equation, shape and norm of every gradient; a sum is followed by its terms."""
    rows = [("gradient", "shape", "norm")]
    for gradient in found:
        rows.append((gradient.text, *_size(gradient.value)))
        if len(gradient.terms) > 1:
            rows += [("  " + term.text, *_size(term.value)) for term in gradient.terms]
    return table(rows, right=[2])


def _size(value: Any) -> tuple[str, str]:
    return shape_text(jnp.shape(value)), digits(describe(value, 0)["norm"])


def _data(gradient: Gradient, limit: int | None) -> dict[str, Any]:
    return {
        "name": gradient.name,
        "equation": gradient.text,
        **describe(gradient.value, limit),
        "contributions": [
            {"source": term.source, "text": term.text, **describe(term.value, limit)}
            for term in gradient.terms
        ],
    }
