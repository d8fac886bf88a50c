"""The chapter itself: a forward sweep that stores, a backward sweep that applies the chain rule.

The forward sweep visits the operators in order and keeps every value, and for an operator with a
hand-written rule the residuals that its rule asks for. The backward sweep visits them in reverse order: the
cotangents of an operator's results become contributions to the cotangents of its inputs, by its rule, or by
`jax.vjp` of that one operator where there is none; contributions to the same variable add up.

`fp.grad` computes the same gradients without any of this being visible; each is the other's oracle.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from funcprop import _jax
from funcprop.graph.graph import Graph, Operator, Variable
from funcprop.graph.references import has_references, run, with_new_references
from funcprop.rules.bound_rule import BoundRule
from funcprop.rules.rewrite import Rewriter
from funcprop.rules.rule_set import RuleSet
from funcprop.sweeps.activity import active_variables

Values = dict[str, Any]


@partial(jax.tree_util.register_dataclass, data_fields=["residuals"], meta_fields=["result_tree"])
@dataclass(frozen=True)
class Saved:
    """A hand-written rule's residuals, and the structure of the operator's results."""

    residuals: Any
    result_tree: Any


@partial(
    jax.tree_util.register_dataclass, data_fields=["values", "saved", "bodies", "written"], meta_fields=[]
)
@dataclass(frozen=True)
class Tape:
    """The forward sweep's storage, by name: every value, each rule's residuals, each loop's own tape.

    Everything on a loop's tape has a leading axis for the iterations. Of references among the inputs,
    `values` are what they hold at first, `written` what they hold in the end.
    """

    values: Values = field(default_factory=dict)
    saved: dict[str, Saved] = field(default_factory=dict)
    bodies: dict[str, Tape] = field(default_factory=dict)
    written: Values = field(default_factory=dict)


@partial(jax.tree_util.register_dataclass, data_fields=["values", "bodies"], meta_fields=[])
@dataclass(frozen=True)
class Cotangents:
    """The backward sweep's results, by name: `∂J/∂v` for every variable it reaches, and in each loop."""

    values: Values = field(default_factory=dict)
    bodies: dict[str, Cotangents] = field(default_factory=dict)

    def add(self, variable: Variable, contribution: Any) -> None:
        """Accumulate: a variable that is used more than once sums its contributions."""
        present = self.values.get(variable.name)
        self.values[variable.name] = contribution if present is None else present + contribution


def read(variable: Variable, values: Values) -> Any:
    """The value of a variable or literal."""
    return variable.value if variable.kind == "literal" else values[variable.name]


def cotangent_of(variable: Variable, value: Any, cotangents: Values) -> Any:
    """The accumulated cotangent of a variable, or zeros where nothing has reached it."""
    if variable.name in cotangents and variable.kind != "literal":
        return cotangents[variable.name]
    if not _jax.is_differentiable(variable.aval):
        return _jax.zero_tangent(variable.aval)
    return jnp.zeros_like(value)


# --- the two sweeps ---------------------------------------------------------------------------


def forward_sweep(graph: Graph, values: Values, rules: RuleSet) -> Tape:
    """Compute every operator in order and store what it yields. `values` holds inputs and constants."""
    tape = Tape(dict(values))
    for op in graph.operators:
        results = _operation(op, rules).forward([read(v, tape.values) for v in op.inputs], tape)
        tape.values.update((v.name, y) for v, y in zip(op.outputs, results, strict=True))
    return tape


def backward_sweep(
    graph: Graph,
    tape: Tape,
    seeds: Values,
    active: Collection[str],
    rules: RuleSet,
    stop: Collection[str] = (),
) -> Cotangents:
    """Apply the chain rule to the operators in reverse order, from the cotangents in `seeds`.

    Only `active` variables receive a cotangent. What reaches a variable in `stop` is recorded and goes no
    further.
    """
    cotangents = Cotangents(dict(seeds))
    for op in reversed(graph.operators):
        found = contributions(op, tape, cotangents, active, rules, stop)
        for variable, contribution in zip(op.inputs, found, strict=True):
            if contribution is not None:
                cotangents.add(variable, contribution)
    return cotangents


def contributions(
    op: Operator,
    tape: Tape,
    cotangents: Cotangents,
    active: Collection[str],
    rules: RuleSet,
    stop: Collection[str] = (),
) -> list[Any]:
    """Compute what an operator sends back to each of its inputs; None for nothing.

    A loop also leaves the cotangents inside of it in `cotangents.bodies`.
    """
    reached = any(v.name in cotangents.values and v.name not in stop for v in op.outputs)
    needs = [v.kind != "literal" and v.name in active for v in op.inputs]
    if not reached or not any(needs):
        return [None] * len(needs)
    inputs = [read(v, tape.values) for v in op.inputs]
    incoming = [
        cotangent_of(v, tape.values[v.name], {} if v.name in stop else cotangents.values) for v in op.outputs
    ]
    return _operation(op, rules).backward(inputs, incoming, needs, tape, cotangents)


# --- one operator -----------------------------------------------------------------------------


def _operation(op: Operator, rules: RuleSet) -> _Ruled | Loop | _Differentiated:
    rewriter = Rewriter(rules)
    if op.op == "scan" and not has_references(op):
        # Whatever rule there is for the whole loop: here its inside is to be seen.
        return Loop(op, rules)
    bound = rewriter.find(op.equation) if op.equation is not None else None
    if bound is not None and (op.call is None or not op.call.axes):
        return _Ruled(op, bound)
    return _Differentiated(op, rewriter)


@dataclass(frozen=True)
class _Ruled:
    """An operator with a hand-written rule."""

    op: Operator
    bound: BoundRule

    def forward(self, inputs: Sequence[Any], tape: Tape) -> list[Any]:
        results, result_tree, residuals, residual_tree = self.bound.forward(inputs)
        tape.saved[self.op.name] = Saved(jax.tree.unflatten(residual_tree, residuals), result_tree)
        return results

    def backward(
        self, inputs: Sequence[Any], incoming: Sequence[Any], needs: Sequence[bool], tape: Tape, _: Cotangents
    ) -> list[Any]:
        saved = tape.saved[self.op.name]
        cotangents = jax.tree.unflatten(saved.result_tree, incoming)
        arguments = [jax.typeof(x) for x in inputs]
        wanted = iter(self.bound.backward(saved.residuals, cotangents, needs, arguments))
        return [next(wanted) if need else None for need in needs]


@dataclass(frozen=True)
class _Differentiated:
    """An operator without a rule: `jax.vjp` of it alone, at its stored inputs."""

    op: Operator
    rewriter: Rewriter

    def forward(self, inputs: Sequence[Any], tape: Tape) -> list[Any]:
        results, written = run(self.op, inputs, self.rewriter.run)
        tape.written.update(written)
        return results

    def backward(
        self, inputs: Sequence[Any], incoming: Sequence[Any], needs: Sequence[bool], _: Tape, __: Cotangents
    ) -> list[Any]:
        inputs = with_new_references(self.op, inputs)

        def of_needed(*needed: Any) -> list[Any]:
            given = iter(needed)
            operands = [next(given) if need else x for x, need in zip(inputs, needs, strict=True)]
            return self.rewriter.run(self.op.jaxpr, operands)

        pullback = jax.vjp(of_needed, *(x for x, need in zip(inputs, needs, strict=True) if need))[1]
        wanted = iter(pullback(list(incoming)))
        return [next(wanted) if need else None for need in needs]


@dataclass(frozen=True)
class Loop:
    """A `scan`: the same two sweeps inside a loop forwards and a loop backwards."""

    op: Operator
    rules: RuleSet

    @property
    def body(self) -> Graph:
        """One iteration."""
        return self.op.bodies["jaxpr"]

    def split(self, items: Sequence[Any]) -> tuple[list[Any], list[Any], list[Any]]:
        """Something for each input of the body, by what it is: a constant, carried, or scanned."""
        consts, carry = _jax.scan_counts(self.op.static)
        return list(items[:consts]), list(items[consts : consts + carry]), list(items[consts + carry :])

    def scan(self, step: Callable[..., Any], init: Any, xs: Any, reverse: bool) -> Any:
        """A loop over as many iterations, in the loop's own order or against it."""
        params = self.op.static
        return jax.lax.scan(step, init, xs, length=params["length"], reverse=params["reverse"] ^ reverse)

    def values(self, consts: Sequence[Any], carry: Sequence[Any], xs: Sequence[Any]) -> Values:
        """Collect the values that an iteration starts from."""
        names = [v.name for v in self.body.inputs]
        return dict(zip(names, [*consts, *carry, *xs], strict=True)) | constants_of(self.body, self.op)

    def iteration(self, consts: Sequence[Any], xs: Sequence[Any], stored: Tape) -> Tape:
        """The whole tape of one iteration, from its slice of the loop's tape and of `xs`."""
        carry = [stored.values[v.name] for v in self.split(self.body.inputs)[1]]
        return Tape(self.values(consts, carry, xs) | stored.values, stored.saved, stored.bodies)

    def sought(self, needs: Sequence[bool]) -> set[str]:
        """The inputs of the body that receive a cotangent: those needed outside, and all that is carried."""
        carried = self.split(self.body.inputs)[1]
        needed = {v.name for v, need in zip(self.body.inputs, needs, strict=True) if need}
        return needed | {v.name for v in carried if _jax.is_differentiable(v.aval)}

    def forward(self, inputs: Sequence[Any], tape: Tape) -> list[Any]:
        """The loop's results; what its iterations store is stacked on a tape of its own."""
        consts, init, xs = self.split(inputs)
        loop_inputs = {v.name for v in self.body.inputs} - {v.name for v in self.split(self.body.inputs)[1]}
        loop_inputs |= {v.name for v in self.body.constants}

        def step(carry: list[Any], x: list[Any]) -> Any:
            inner = forward_sweep(self.body, self.values(consts, carry, x), self.rules)
            results = [read(v, inner.values) for v in self.body.outputs]
            stored = {k: v for k, v in inner.values.items() if k not in loop_inputs}
            return results[: len(init)], (results[len(init) :], Tape(stored, inner.saved, inner.bodies))

        final, (stacked, tape.bodies[self.op.name]) = self.scan(step, init, xs, reverse=False)
        return [*final, *stacked]

    def backward(
        self,
        inputs: Sequence[Any],
        incoming: Sequence[Any],
        needs: Sequence[bool],
        tape: Tape,
        cotangents: Cotangents,
    ) -> list[Any]:
        """The iterations against their order; each starts from the cotangents of what it passed on."""
        consts, init, xs = self.split(inputs)
        sought = self.sought(needs)
        active = active_variables(self.body, sought, Rewriter(self.rules))

        def step(state: Any, slices: Any) -> Any:
            carry_cts, const_sums = state
            x, stored, y_cts = slices
            now = self.iteration(consts, x, stored)
            seeds = Cotangents()
            for v, ct in zip(self.body.outputs, [*carry_cts, *y_cts], strict=True):
                if ct is not None and v.kind != "literal" and v.name in active:
                    seeds.add(v, ct)
            found = backward_sweep(self.body, now, seeds.values, active, self.rules)
            const_cts, carry_cts, x_cts = self.split(
                [
                    cotangent_of(v, now.values[v.name], found.values) if v.name in sought else None
                    for v in self.body.inputs
                ]
            )
            # A constant is used in every iteration, so its cotangents add up; None is an empty pytree.
            return (carry_cts, jax.tree.map(jnp.add, const_sums, const_cts)), (x_cts, found)

        # Only what has a derivative has a cotangent that a loop can carry.
        smooth = [
            ct if _jax.is_differentiable(v.aval) else None
            for v, ct in zip(self.body.outputs, incoming, strict=True)
        ]
        last_cts, y_cts = smooth[: len(init)], smooth[len(init) :]
        zeros = [
            jnp.zeros_like(c) if v.name in sought else None
            for v, c in zip(self.body.inputs, consts, strict=False)
        ]
        slices = (xs, tape.bodies[self.op.name], y_cts)
        (init_cts, const_cts), (x_cts, found) = self.scan(step, (last_cts, zeros), slices, reverse=True)
        cotangents.bodies[self.op.name] = found
        found_cts = [*const_cts, *init_cts, *x_cts]
        return [ct if need else None for ct, need in zip(found_cts, needs, strict=True)]


def constants_of(body: Graph, op: Operator) -> Values:
    """The constants that a loop's body carries itself."""
    values = _jax.array_constants(op.static["jaxpr"])
    return dict(zip([v.name for v in body.constants], values, strict=True))
