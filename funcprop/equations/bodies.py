"""The inside of an operator as equations: its body is a function, which is derived like any other.

A body is traced as the inner product of its results with their cotangents. What it shares with the lines
around it collects its gradient (`+=`): other contributions are there before.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from funcprop import _jax
from funcprop.equations.condense import condense
from funcprop.equations.familiar_operators import familiar
from funcprop.equations.line_names import short_names
from funcprop.equations.line_writer import LineWriter
from funcprop.equations.plain_graph import plain
from funcprop.equations.verification import Line, Progress, Verification, verify
from funcprop.graph.graph import Operator, Variable
from funcprop.graph.objective import Objective, trace_objective
from funcprop.graph.tracing import Traced
from funcprop.rules.expressions import Expression, number

# What operands are called that have no name around the body.
_OPERANDS = "xyαβ"


@jax.custom_vjp
def _inner_product(results: Sequence[Any], cotangents: Sequence[Any], others: Sequence[Any]) -> Any:
    """The inner product; `others` have no derivative and are results all the same."""
    del others
    return sum(
        (jnp.vdot(g, y).astype(float) for y, g in zip(results, cotangents, strict=True)), jnp.zeros(())
    )


def _inner_product_forward(results: Any, cotangents: Any, others: Any) -> tuple[Any, Any]:
    return _inner_product(results, cotangents, others), (results, cotangents)


def _inner_product_backward(saved: Any, g: Any) -> tuple[Any, Any, None]:
    results, cotangents = saved
    scaled = [(g * c).astype(c.dtype) for c in cotangents]
    return scaled, [jnp.zeros_like(y) for y in results], None


_inner_product.defvjp(_inner_product_forward, _inner_product_backward)


@dataclass(frozen=True, eq=False)
class InsideLines:
    """The lines of a body under a title for each sweep, and those of the bodies in it.

    `traced` is the body as it was traced, from types alone; `leaves` gives the values of its inputs from
    those of the inputs of the graph around it. A body that `is_optional` is not always run; the results of
    one that `is_result` are the result of the whole graph.
    """

    title: str
    back: str
    forward: tuple[Line, ...]
    backward: tuple[Line, ...]
    traced: Traced
    leaves: Callable[[Mapping[str, Any]], Sequence[Any]]
    insides: tuple[InsideLines, ...] = ()
    is_optional: bool = False
    is_result: bool = field(default=False, kw_only=True)

    def own_sections(self) -> Iterator[tuple[str, tuple[Line, ...]]]:
        """The titles with their lines."""
        yield self.title, self.forward
        if self.backward:
            yield self.back, self.backward

    def sections(self) -> Iterator[tuple[str, tuple[Line, ...]]]:
        """The titles with their lines, those of inner bodies after them."""
        yield from self.own_sections()
        for inner in self.insides:
            yield from inner.sections()

    def verify(
        self, values: Mapping[str, Any], tolerance: float | None, progress: Progress
    ) -> Iterator[Verification]:
        """Check the lines at the values that the body has within a graph with these inputs."""
        leaves = list(self.leaves(values))
        random = np.random.default_rng(0)
        types = self.traced.leaves[len(leaves) :]
        make = np.ones if self.is_result else lambda shape: random.normal(size=shape)
        cotangents = [jnp.asarray(make(t.shape), t.dtype) for t in types]
        at_values = replace(self.traced, leaves=(*leaves, *cotangents))
        lines = [*self.forward, *self.backward]
        yield verify(lines, at_values, tolerance, progress, is_optional=self.is_optional)
        for inner in self.insides:
            yield from inner.verify(at_values.values(), tolerance, progress)


@dataclass(frozen=True)
class Around:
    """What a body is told of the lines around it: the names that are `taken` there, how many loops it is in.

    `shared` are the numbers of the operands that are read elsewhere too; `ends` is that of the result that is
    the result of the whole graph.
    """

    taken: frozenset[str]
    shared: frozenset[int]
    depth: int = 0
    ends: int | None = None


class Body:
    """A function inside of an operator, of which some results (`told`) are written.

    `active` are the positions of its inputs that have a gradient. A result that is the same as one before it
    is that one.
    """

    def __init__(
        self, function: Any, types: Sequence[Any], active: Collection[int], told: Sequence[int]
    ) -> None:
        results = jax.eval_shape(function, *types)
        told = [i for i in told if not jnp.issubdtype(results[i].dtype, jax.dtypes.prng_key)]
        is_smooth = {i: jnp.issubdtype(results[i].dtype, jnp.floating) for i in told}
        self.smooth = [i for i in told if is_smooth[i]]
        others = [i for i in told if not is_smooth[i]]

        def body(inputs: Sequence[Any], cotangents: Sequence[Any]) -> Any:
            outputs = function(*inputs)
            named = {i: checkpoint_name(outputs[i], f"out{i}") for i in told}
            return _inner_product(
                [named[i] for i in self.smooth], list(cotangents), [named[i] for i in others]
            )

        def use(objective: Objective) -> tuple[Objective, None]:
            return objective, None

        arguments = (list(types), [results[i] for i in self.smooth])
        objective = trace_objective(use, body, None, arguments, {})
        self.traced, self.result = objective.traced, objective.result
        self.inputs = self.traced.graph.inputs[: len(types)]
        self.cotangents = self.traced.graph.inputs[len(types) :]
        self.active = [v.name for i, v in enumerate(self.inputs) if i in objective.inputs and i in active]
        maker = {v.name: op for op in self.traced.graph.operators for v in op.outputs}
        given = maker[self.result.name].inputs
        # The variables that are the results, by their number.
        count = len(self.smooth)
        self.outputs = dict(zip(self.smooth, given, strict=False)) | dict(
            zip(others, given[2 * count :], strict=True)
        )
        self.graph = familiar(plain(self.traced.graph))
        self.condensed = condense(self.graph, self.result, self.active)
        self.traced = replace(self.traced, graph=self.condensed.graph)

    def own_names(self, taken: Collection[str] = ()) -> dict[str, str]:
        """Short names of the lines of the body, none as what is `taken`."""
        names, _ = short_names(self.condensed, self.result, self.active, taken)
        return names

    def writer(self, names: Mapping[str, str], collected: Collection[str], ends: bool = False) -> BodyWriter:
        """Writes the lines in these names; the results are those of the whole graph, if it `ends` here."""
        inputs = [v for v in self.inputs if v.name in self.active]
        names = {**names, self.result.name: "J"}
        condensed = self.condensed
        writer = BodyWriter(
            condensed.graph, self.result, inputs, names, writers=condensed.writers, smooth=condensed.smooth
        )
        writer.collected, writer.unwritten = set(collected), {self.result.name}
        given = zip((self.outputs[i] for i in self.smooth), self.cotangents, strict=True)
        writer.given = {v.name: g for v, g in given if v.kind != "literal"}
        if ends:
            writer.known |= {name: number(1, g.dtype) for name, g in writer.given.items()}
            writer.ends |= set(writer.given)
        return writer


class BodyWriter(LineWriter):
    """Lines of a body: `+=` for what is `collected`, and for results that have a cotangent `given` before."""

    collected: set[str]
    given: Mapping[str, Variable]
    unwritten: set[str]

    def lines(self) -> tuple[tuple[Line, ...], tuple[Line, ...]]:
        """Both sweeps."""
        forward = tuple(line for line in self.forward() if line.key not in self.unwritten)
        reached = {self.cotangents[name].key for name in self.reaching}
        shared = {self.cotangents[name].key for name in self.collected} - reached
        backward = tuple(line for line in self.backward() if line.key not in shared) if self.inputs else ()
        return forward, backward

    def _cotangent_line(self, name: str, uses: Sequence[Operator]) -> Line | None:
        known = self.given.get(name)
        inside = [op for op in uses if self.result not in op.outputs]
        if known is None or not inside:
            line = super()._cotangent_line(name, uses) if known is None else None
            is_collected = name in self.collected
        else:
            line = super()._cotangent_line(name, inside)
            is_collected = True
            if line is not None:
                others = self.symbols[known.name]
                line = replace(line, forms=tuple(_with(form, others) for form in line.forms))
        return line if line is None or not is_collected else replace(line, sign="+=")


def _with(form: Expression, others: Expression) -> Expression:
    """A sum of which the first term alone is written."""
    return Expression(jnp.add, (form, others), "{0}", "{0}", form.binding, form.binding)


def dependence(jaxpr: Any) -> list[set[int]]:
    """The positions of the inputs that each result of a jaxpr is computed from."""
    read: dict[Any, set[int]] = {v: {i} for i, v in enumerate(jaxpr.invars)}

    def of(atoms: Sequence[Any]) -> set[int]:
        return set().union(*(read.get(a, set()) for a in atoms if not isinstance(a, _jax.Literal)))

    for eqn in jaxpr.eqns:
        read.update(dict.fromkeys(eqn.outvars, of(eqn.invars)))
    return [of([v]) for v in jaxpr.outvars]


def operand_names(operands: Sequence[Expression], taken: Collection[str]) -> tuple[list[str], list[str]]:
    """What the operands of a body are called in it, and the words for those that get a name: `x = z / 2`."""
    free = (x for x in (*_OPERANDS, *(f"a{i}" for i in range(len(operands)))) if x not in taken)
    names, told = [], []
    for operand in operands:
        text = operand.text()
        is_name = not operand.operands and operand.constant is None
        names.append(text if is_name else next(free))
        if not is_name:
            told.append(f"{names[-1]} = {text}")
    return names, told
