"""The inside of a `scan` as equations: one step, with `t` for its number.

    z[t] = xs[t] Wx + h[t−1] Wh + b          h[t] = tanh(z[t])
    ∂J/∂z[t] = ∂J/∂h[t] ⊙ tanh′(z[t])        ∂J/∂Wh += h[t−1]ᵀ ∂J/∂z[t]

A step is derived like any function, as the inner product of its results with their cotangents. What is read
by every step collects its gradient (`+=`), and so does a result that is read in the step itself: what the
steps after it and the rest of the function contribute is there before.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from funcprop import _jax
from funcprop.equations.condense import Condensed, condense
from funcprop.equations.flow import Flow, run
from funcprop.equations.line_names import short_names
from funcprop.equations.line_writer import LineWriter
from funcprop.equations.verification import Line
from funcprop.graph.graph import Operator, Variable
from funcprop.graph.objective import Objective, trace_objective
from funcprop.graph.tracing import Traced
from funcprop.rules.expressions import Expression

# What carried values are called: those of an LSTM are `h` and `c`.
_CARRIED = "hcsvmq"
# What operands are called that have no name around the loop.
_OPERANDS = "xyαβ"


@jax.custom_vjp
def _inner_product(results: Sequence[Any], cotangents: Sequence[Any]) -> Any:
    return sum(jnp.vdot(g, y).astype(float) for y, g in zip(results, cotangents, strict=True))


def _inner_product_forward(results: Any, cotangents: Any) -> tuple[Any, Any]:
    return _inner_product(results, cotangents), (results, cotangents)


def _inner_product_backward(saved: Any, g: Any) -> tuple[Any, Any]:
    results, cotangents = saved
    scaled = [(g * c).astype(c.dtype) for c in cotangents]
    return scaled, [jnp.zeros_like(y) for y in results]


_inner_product.defvjp(_inner_product_forward, _inner_product_backward)


@dataclass(frozen=True, eq=False)
class ScanLines:
    """A `scan`, and the lines of its step under a title for each sweep.

    `step` is the step as it was traced, from types alone. `inputs` gives the values of the operator's
    operands from those of the inputs of the graph that it is in.
    """

    title: str
    back: str
    forward: tuple[Line, ...]
    backward: tuple[Line, ...]
    step: Traced
    operator: Operator
    inputs: Callable[[Mapping[str, Any]], list[Any]]

    def at_a_step(self, values: Mapping[str, Any]) -> Traced:
        """The step with the values that it has in the second round, and some cotangents."""
        closed, (consts, carries) = _closed(self.operator), _jax.scan_counts(self.operator.static)
        operands = self.inputs(values)
        count = self.operator.static["length"]
        order = list(range(count))[:: -1 if self.operator.static["reverse"] else 1]
        given, carry = operands[:consts], operands[consts : consts + carries]
        for i in order[:2]:
            leaves = [*given, *carry, *(x[i] for x in operands[consts + carries :])]
            carry = _jax.evaluate(closed, _jax.constants(closed), leaves)[:carries]
        random = np.random.default_rng(0)
        types = self.step.leaves[len(leaves) :]
        cotangents = [jnp.asarray(random.normal(size=t.shape), t.dtype) for t in types]
        return replace(self.step, leaves=(*leaves, *cotangents))


class LoopsInside:
    """The loops of a graph on which the result depends by `active` inputs, each with its step condensed."""

    def __init__(self, traced: Traced, result: Variable, inputs: Sequence[str]) -> None:
        self.flow = Flow(traced.graph, result, inputs)
        self.steps = {op: step for op in self.flow.operators if (step := self._step(op)) is not None}

    def _step(self, op: Operator) -> _Step | None:
        active = [v.name in self.flow.active for v in op.inputs]
        if op.op != "scan" or not op.static["length"] or not any(active) or op.jaxpr.effects:
            return None
        if not any(v.name in self.flow.active for v in op.outputs):
            return None
        if any(jnp.issubdtype(v.dtype, jnp.complexfloating) for v in (*op.inputs, *op.outputs)):
            return None
        return _Step(op, active)

    def add_roles(self, condensed: Condensed) -> Condensed:
        """The roles of parameters that are read in loops alone, beside those of others."""
        roles, functions = dict(condensed.roles), dict(condensed.functions)
        for op, step in self.steps.items():
            functions |= step.condensed.functions
            for v, inner in zip(op.inputs, step.inputs, strict=True):
                role = step.condensed.roles.get(inner.name)
                if role is not None and v.kind != "literal":
                    roles.setdefault(self.flow.source(v).name, (role[0], op.outputs[0].name))
        return replace(condensed, roles=roles, functions=functions)

    def written(self, names: Mapping[str, str], read: Condensed) -> tuple[ScanLines, ...]:
        """The loops, in the names of the lines around them; results that are not `read` are not told."""
        graph = self.flow.graph
        given = [*graph.inputs, *graph.constants]
        users = {v.name for op in read.graph.operators for v in op.inputs} | {self.flow.result.name}
        found = []
        for op, step in self.steps.items():
            outer = [None if v.kind == "literal" else names.get(self.flow.source(v).name) for v in op.inputs]
            results = [names.get(v.name) if v.name in users else None for v in op.outputs]
            title, back, forward, backward = step.lines(outer, results)
            compute = run(self.flow.between(op.inputs), given, op.inputs)

            def inputs(values: Mapping[str, Any], compute: Any = compute, op: Operator = op) -> list[Any]:
                return compute(*(values[v.name] for v in given))

            found.append(ScanLines(title, back, forward, backward, step.traced, op, inputs))
        return tuple(found)


def _closed(op: Operator) -> Any:
    assert op.equation is not None
    return op.equation.params["jaxpr"]


class _Step:
    """One step of a scan as a function of its own."""

    def __init__(self, op: Operator, active: Sequence[bool]) -> None:
        self.op = op
        closed = _closed(op)
        self.consts, self.carries = _jax.scan_counts(op.static)
        jaxpr = _jax.open_jaxpr(closed)
        types = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in jaxpr.invars]
        results = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in jaxpr.outvars]
        # One value that is carried and stacked is one result.
        self.same = [jaxpr.outvars.index(v) for v in jaxpr.outvars]
        smooth = [
            i for i, t in enumerate(results) if self.same[i] == i and jnp.issubdtype(t.dtype, jnp.floating)
        ]

        def step(inputs: Sequence[Any], cotangents: Sequence[Any]) -> Any:
            outputs = _jax.evaluate(closed, _jax.constants(closed), inputs)
            return _inner_product([checkpoint_name(outputs[i], f"out{i}") for i in smooth], list(cotangents))

        def use(objective: Objective) -> tuple[Objective, None]:
            return objective, None

        arguments = (types, [results[i] for i in smooth])
        objective = trace_objective(use, step, 0, arguments, {})
        self.traced, self.result = objective.traced, objective.result
        self.inputs = self.traced.graph.inputs[: len(types)]
        carried = range(self.consts, self.consts + self.carries)
        self.active = [
            v.name for i, v in enumerate(self.inputs) if i in objective.inputs and (active[i] or i in carried)
        ]
        maker = {v.name: op for op in self.traced.graph.operators for v in op.outputs}
        # The variables that are the smooth results, by their number.
        self.outputs = dict(zip(smooth, maker[self.result.name].inputs, strict=False))
        self.condensed = condense(self.traced.graph, self.result, self.active)

    def lines(
        self, outer: Sequence[str | None], results: Sequence[str | None]
    ) -> tuple[str, str, tuple[Line, ...], tuple[Line, ...]]:
        """Titles and lines, with what operands and results are called around the loop."""
        n, is_back = self.op.static["length"], self.op.static["reverse"]
        names, _ = short_names(self.condensed, self.result, self.active)
        taken = {text for text in (*names.values(), *outer, *results) if text is not None}
        bases = self._bases(results, taken)
        names = {name: f"{text}[t]" for name, text in names.items()} | {self.result.name: "J"}
        unnamed = iter(x for x in _OPERANDS if x not in taken)
        carried = range(self.consts, self.consts + self.carries)
        for i, v in enumerate(self.inputs):
            if i in carried:
                names[v.name] = bases[i - self.consts] + ("[t+1]" if is_back else "[t−1]")
            else:
                names[v.name] = (outer[i] or next(unnamed, f"a{i}")) + ("[t]" if i > carried.stop - 1 else "")
        own = {v.name for v in self.inputs}
        names |= {v.name: f"{bases[i]}[t]" for i, v in self.outputs.items() if v.name not in own}
        first, last = (n, 1) if is_back else (1, n)
        start, end = (n + 1, 1) if is_back else (0, n)
        begins = zip(bases[: self.carries], outer[self.consts :], strict=False)
        told, told_back = [f"{base}[{start}] = {operand or '0'}" for base, operand in begins], []
        for base, result in zip(bases, results[: self.carries], strict=False):
            if result:
                told.append(f"{result} = {base}[{end}]")
                told_back.append(f"∂J/∂{base}[{end}] = ∂J/∂{result}")
        for base, result in zip(bases[self.carries :], results[self.carries :], strict=True):
            if result and result != base:
                told.append(f"{result}[t] = {base}[t]")
                told_back.append(f"∂J/∂{base}[t] += ∂J/∂{result}[t]")
        title = ", ".join([f"Scan for t = {first} … {last}", *told])
        title_back = ", ".join([f"Back for t = {last} … {first}", *told_back])
        graph = self.condensed.graph
        inputs = [v for v in self.inputs if v.name in self.active]
        writer = _StepWriter(graph, self.result, inputs, names, writers=self.condensed.writers)
        writer.collected = {v.name for v in self.inputs[: self.consts]}
        cotangents = self.traced.graph.inputs[len(self.inputs) :]
        writer.given = {v.name: g for v, g in zip(self.outputs.values(), cotangents, strict=True)}
        forward = tuple(line for line in writer.forward() if line.key != self.result.name)
        return title, title_back, forward, tuple(writer.backward())

    def _bases(self, results: Sequence[str | None], taken: Collection[str]) -> list[str]:
        """What results are called in the step, none as what is `taken`; one value has one name."""
        bases: list[str] = []
        for i, k in enumerate(self.same):
            result = results[i]
            if k < i:
                bases.append(bases[k])
            elif i >= self.carries and result:
                bases.append(result)
            else:
                is_free = (x for x in _CARRIED if x not in taken and x not in bases)
                bases.append(next(is_free, f"s{i}"))
        return bases


class _StepWriter(LineWriter):
    """Lines of a step: `+=` for what is `collected` over steps and results, whose cotangents are `given`."""

    collected: set[str]
    given: Mapping[str, Variable]

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
                line = replace(
                    line, forms=tuple(_with(form, self.symbols[known.name]) for form in line.forms)
                )
        return line if line is None or not is_collected else replace(line, sign="+=")


def _with(form: Expression, others: Expression) -> Expression:
    """A sum of which the first term alone is written."""
    return Expression(jnp.add, (form, others), "{0}", "{0}", form.binding, form.binding)
