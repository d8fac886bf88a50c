"""`fp.second_order_graph`: what happens to the graph when it is differentiated twice."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from funcprop.drawing.classes import CLASSES, Class, classify
from funcprop.drawing.relabelling import Relabelling, objective_name, replaced, seed_names
from funcprop.drawing.request import Shown
from funcprop.drawing.ruled_function import differentiated, marked, shape_of
from funcprop.graph.graph import Graph, Variable, needed
from funcprop.graph.tracing import trace_function
from funcprop.program.call import without_aux
from funcprop.program.facts import CALLS, CHECKPOINTS
from funcprop.rules.rule_set import RuleSet
from funcprop.rules.sets import chosen_rules

Order = Literal["forward-over-reverse", "reverse-over-reverse"]


@dataclass(frozen=True, eq=False, repr=False)
class SecondOrderGraph(Graph):
    """The graph of a Hessian-vector product.

    Inputs are the function's, then the direction `v` (one for every differentiated array), then the seed
    `∂J/∂J`. Outputs are `∇²J v`. `classes` says what every operator computes, by name; also those inside of
    loops and other operators with bodies, which are called `scan[body]/mul`.
    """

    order: Order = "forward-over-reverse"
    classes: Mapping[str, Class] = field(default_factory=dict)
    input_classes: Mapping[str, Class] = field(default_factory=dict)

    def count(self) -> dict[Class, int]:
        """How many operators are of each class, with those inside of loops."""
        return {c: sum(found == c for found in self.classes.values()) for c in CLASSES}

    def shown(self) -> Shown:
        """What `fp.draw` draws."""
        return Shown(self, roles=self.classes, variable_roles=self.input_classes, legend=CLASSES)


def second_order_graph(
    fun: Callable[..., Any],
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    *,
    order: Order = "forward-over-reverse",
    rules: RuleSet | None = None,
) -> Callable[..., SecondOrderGraph]:
    """The graph of the Hessian-vector product of a scalar function.

    `second_order_graph(fun, argnums)(*args, **kwargs) -> SecondOrderGraph`.

    With the direction `v` and the seed `∂J/∂J` as inputs, an operator is

    * *primal* if it depends on neither: the function and its local derivatives,
    * *cotangent* if it depends on the seed: the gradient,
    * *tangent* if it depends on `v`: the derivative along `v`,
    * *tangent of cotangent* if it depends on both: the derivative of the gradient along `v`.

    This is also what reverse over reverse consists of: transposed twice, a cotangent of a cotangent is the
    tangent. A constant that depends on nothing belongs to what reads it. A loop that carries several of these
    is of the class of all of them together, the operators in its body each of their own.

    Args:
        fun: returns a real scalar.
        argnums: the arguments with respect to which it is differentiated, twice.
        order: "forward-over-reverse" or "reverse-over-reverse".
        has_aux: `fun` returns its result and auxiliary data, which are left out.
        rules: a rule set; `fp.rules.default` if None.

    Raises:
        TypeError: `fun` does not return one real scalar, or there is nothing to differentiate.
        ValueError: `order` is neither "forward-over-reverse" nor "reverse-over-reverse".

    Reference: Pearlmutter, "Fast exact multiplication by the Hessian", Neural Computation 1994.

    Example:
        >>> import jax.numpy as jnp, funcprop as fp
        >>> graph = fp.second_order_graph(lambda w: jnp.sin(w))(1.0)
        >>> [(op.op, graph.classes[op.name]) for op in graph.operators]
        [('sin', 'primal'), ('mul', 'tangent'), ('neg', 'tangent'), ('mul', 'tangent of cotangent')]
    """

    fun = without_aux(fun) if has_aux else fun

    if order not in get_args(Order):
        raise ValueError(f"order={order!r} is not known; choose one of {', '.join(get_args(Order))}.")

    def built(*args: Any, **kwargs: Any) -> SecondOrderGraph:
        rule_set = chosen_rules(rules).for_arguments(jax.tree.leaves((args, kwargs)))
        primal = trace_function(fun, args, kwargs).graph
        (result,) = _scalar(primal)
        chosen = differentiated(fun, argnums, args, kwargs)
        positions = [i for i, _ in chosen]

        def both(args: Any, kwargs: Any, directions: Any, seed: Any) -> Any:
            function, values = marked(fun, positions, args, kwargs, rule_set)

            def gradient(*values: Any) -> tuple[Any, ...]:
                return tuple(jax.vjp(function, *values)[1]([seed]))

            if order == "forward-over-reverse":
                return jax.jvp(gradient, values, tuple(directions))[1]
            return jax.vjp(gradient, *values)[1](tuple(directions))

        directions = [shape_of(x) for _, x in chosen]
        given = (args, kwargs, directions, shape_of(result.aval))
        graph = trace_function(both, given, {}, CALLS | CHECKPOINTS).graph
        return _classified(graph, primal, positions, order)

    return built


def _scalar(graph: Graph) -> tuple[Variable, ...]:
    types = [v.aval for v in graph.outputs]
    if len(types) == 1 and types[0].shape == () and jnp.issubdtype(types[0].dtype, jnp.floating):
        return graph.outputs
    returned = ", ".join(v.type for v in graph.outputs)
    raise TypeError(f"{graph.name} returns ({returned}); second derivatives need one real scalar.")


def _classified(graph: Graph, primal: Graph, positions: Sequence[int], order: Order) -> SecondOrderGraph:
    """The graph under the function's own names, with the class of every operator."""
    count = len(primal.inputs)
    own, directions, seed = graph.inputs[:count], graph.inputs[count:-1], graph.inputs[-1]
    objective = objective_name(primal.outputs)
    chosen = [primal.inputs[i].name for i in positions]
    endings = [""] if len(chosen) == 1 else [f"/{name}" for name in chosen]
    given: dict[int, str] = {id(v): p.name for v, p in zip(own, primal.inputs, strict=True)}
    given |= {id(v): f"v{ending}" for v, ending in zip(directions, endings, strict=True)}
    given[id(seed)] = f"∂{objective}/∂{objective}"
    repeated = seed_names(graph.operators, given, objective)
    operators = [replaced(op, repeated) for op in graph.operators if id(op.outputs[0]) not in repeated]
    names = [f"∇²{objective} v{ending}" for ending in endings]
    outputs = [repeated.get(id(v), v) for v in graph.outputs]
    computed = {id(v) for op in operators for v in op.outputs if not v.named}
    for v, name in zip(outputs, names, strict=True):
        if id(v) in computed:
            given.setdefault(id(v), name)
    operators = needed(operators, outputs)
    inputs = {id(v): CLASSES[mark] for vs, mark in ((own, 0), (directions, 1), ((seed,), 2)) for v in vs}
    marks = {id(v): i for i, vs in enumerate((directions, (seed,)), 1) for v in vs}
    names_ = Relabelling(operators, [*graph.inputs, *graph.constants], given, objective)
    renamed = [names_.operator(op) for op in operators]
    classes = classify(operators, [op.name for op in renamed], marks)
    return SecondOrderGraph(
        primal.name,
        tuple(map(names_.variable, graph.inputs)),
        tuple(map(names_.variable, graph.constants)),
        tuple(renamed),
        tuple(map(names_.variable, outputs)),
        order,
        classes,
        {names_.variable(v).name: inputs[id(v)] for v in graph.inputs},
    )
