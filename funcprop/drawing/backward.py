"""`fp.backward_graph`: both sweeps in one graph, and what is kept between them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax

from funcprop import _jax
from funcprop.drawing.relabelling import Relabelling, objective_name, replaced, seed_names
from funcprop.drawing.request import Shown
from funcprop.drawing.ruled_function import differentiated, marked, shape_of
from funcprop.graph.graph import Graph, Variable, needed
from funcprop.graph.tracing import trace_function
from funcprop.program.call import without_aux
from funcprop.program.facts import CALLS, CHECKPOINTS
from funcprop.rules.rule_set import RuleSet
from funcprop.rules.sets import chosen_rules

FORWARD, BACKWARD = "forward", "backward"


@dataclass(frozen=True, eq=False, repr=False)
class BackwardGraph(Graph):
    """A graph of both sweeps. The inputs are the function's, then the cotangents of its results.

    `residuals` are the values that the forward sweep keeps for the backward sweep, one for every array that
    `jax.vjp`'s pullback holds, in its order; a value that it holds twice is there twice. `sweeps` says of
    every operator, by name, to which sweep it belongs.
    """

    residuals: tuple[Variable, ...] = ()
    sweeps: Mapping[str, str] = field(default_factory=dict)

    @property
    def residual_bytes(self) -> int:
        """The bytes held between the sweeps."""
        return sum(v.nbytes or 0 for v in self.residuals)

    def shown(self) -> Shown:
        """What `fp.draw` draws."""
        seeds = {v.name: BACKWARD for v in self.inputs if v.name.startswith("∂")}
        return Shown(
            self,
            roles=self.sweeps,
            variable_roles={v.name: FORWARD for v in self.inputs} | seeds,
            sections=self.sweeps,
            residuals=self.residuals,
            saved_for=BACKWARD,
            legend=(FORWARD, BACKWARD, "saved"),
        )


def backward_graph(
    fun: Callable[..., Any],
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    *,
    rules: RuleSet | None = None,
) -> Callable[..., BackwardGraph]:
    """Forward propagation and backpropagation as one graph, with what is stored between them.

    `backward_graph(fun, argnums)(*args, **kwargs) -> BackwardGraph`, from the jaxprs of `jax.vjp` of the
    function with its rules. Layers are shown as the operators of their derivative, in a scope of their name.
    Named values keep their names, and their cotangents are called `∂J/∂z`. Arguments may be shapes.

    Args:
        fun: any function; its results need not be scalars.
        argnums: the arguments whose gradients are computed.
        has_aux: `fun` returns its result and auxiliary data, which are left out.
        rules: a rule set; `fp.rules.default` if None.

    Raises:
        TypeError: an argument at `argnums` does not exist, or none of them has a derivative.

    Example:
        >>> import jax.numpy as jnp, funcprop as fp
        >>> graph = fp.backward_graph(lambda w, x: fp.name(jnp.sum(w * x), "L"))(jnp.ones(3), jnp.ones(3))
        >>> [(v.name, v.nbytes) for v in graph.residuals]
        [('x', 12)]
        >>> [(op.op, graph.sweeps[op.name]) for op in graph.operators]
        [('mul', 'forward'), ('reduce_sum', 'forward'), ('broadcast_in_dim', 'backward'), ('mul', 'backward')]
    """

    fun = without_aux(fun) if has_aux else fun

    def built(*args: Any, **kwargs: Any) -> BackwardGraph:
        positions = [i for i, _ in differentiated(fun, argnums, args, kwargs)]
        own = chosen_rules(rules).for_arguments(jax.tree.leaves((args, kwargs)))
        traces: list[tuple[Any, ...]] = []

        @functools.wraps(fun)
        def forward(*args: Any, **kwargs: Any) -> Any:
            function, chosen = marked(fun, positions, args, kwargs, own)
            results, pullback = jax.vjp(function, *chosen)
            saved, tree = jax.tree.flatten(pullback)
            traces.append((tree, list(map(shape_of, saved)), list(map(jax.typeof, results))))
            return results, saved

        inline = CALLS | CHECKPOINTS
        first = trace_function(forward, args, kwargs, inline).graph
        tree, saved_types, types = traces[-1]
        smooth = [_jax.is_differentiable(t) for t in types]

        def backward(saved: list[Any], seeds: list[Any]) -> Any:
            return jax.tree.unflatten(tree, saved)(_jax.with_zero_tangents(seeds, types))

        seeds = [shape_of(t) for t, is_smooth in zip(types, smooth, strict=True) if is_smooth]
        second = trace_function(backward, (saved_types, seeds), {}, inline).graph
        return _join(first, second, smooth, positions)

    return built


def _join(first: Graph, second: Graph, smooth: Sequence[bool], positions: Sequence[int]) -> BackwardGraph:
    """One graph of two: what the first keeps for the second is what the second reads."""
    results, saved = first.outputs[: len(smooth)], first.outputs[len(smooth) :]
    seeds = second.inputs[len(saved) :]
    objective = objective_name(results)
    by = {id(v): kept for v, kept in zip(second.inputs, saved, strict=False)}
    given: dict[int, str] = {id(v): v.name for v in first.inputs}
    if len(results) == 1 and results[0].kind == "intermediate" and not results[0].named:
        given[id(results[0])] = objective
    smooth_results = [v for v, is_smooth in zip(results, smooth, strict=True) if is_smooth]
    for v, seed in zip(smooth_results, seeds, strict=True):
        name = objective if len(results) == 1 else v.name
        given[id(seed)] = f"∂{objective}/∂{name}"
    repeated = seed_names(second.operators, given, objective)
    by |= repeated
    backward = [replaced(op, by) for op in second.operators if id(op.outputs[0]) not in repeated]
    for position, v in zip(positions, second.outputs, strict=True):
        if v.kind == "intermediate" and not v.named and id(v) not in by:
            given.setdefault(id(v), f"∂{objective}/∂{first.inputs[position].name}")
    gradients = [by.get(id(v), v) for v in second.outputs]
    operators = needed([*first.operators, *backward], [*results, *saved, *gradients])
    inputs, constants = (*first.inputs, *seeds), (*first.constants, *second.constants)
    names = Relabelling(operators, [*inputs, *constants], given, objective)
    is_backward = set(map(id, backward))
    renamed = [(names.operator(op), BACKWARD if id(op) in is_backward else FORWARD) for op in operators]
    return BackwardGraph(
        first.name,
        tuple(map(names.variable, inputs)),
        tuple(map(names.variable, constants)),
        tuple(op for op, _ in renamed),
        tuple(map(names.variable, [*results, *gradients])),
        tuple(map(names.variable, saved)),
        {op.name: sweep for op, sweep in renamed},
    )
