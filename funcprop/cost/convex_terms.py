"""The outputs of a model, found by what a loss is: a term of the objective that is convex in a value.

The objective is a sum of terms: from its result back, operators are passed that are linear in what depends on
the parameters. In each term, on the way back and before any parameter is met, the first of all values in
which the objective is convex, and not linear, is an output. Of `−log softmax(z)[y]` in any spelling that is
the logits `z`, of `(tanh(z) − y)²` the value of `tanh`. Affine maps of an output give the same Gauss-Newton
matrix, and so do piecewise linear ones.

Whether a function is convex is asked at random points, in random directions; labels that are known as shapes
alone are random classes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from funcprop.graph.graph import Operator, Variable, needed
from funcprop.graph.objective import Objective
from funcprop.program.facts import is_linear
from funcprop.sweeps.activity import active_variables
from funcprop.sweeps.evaluation import drawn, evaluated

# In one term so many values are tried, each by a program of its own, and none if they are larger.
_MOST_TRIED, _LARGEST = 8, 2**26
# Scales of the random points, and directions of each sort at each.
_SCALES, _DIRECTIONS = (0.5, 4.0), 16


def convex_outputs(objective: Objective) -> tuple[Variable, ...]:
    """The values in which terms of the objective are convex, in the order in which they are computed."""
    graph = objective.traced.graph
    parameters = {v.name for v in objective.inputs.values()}
    active = active_variables(graph, parameters)
    passed, terms = _terms(graph.operators, objective.result, active)
    verdicts: dict[str, bool] = {}
    found = set()
    for term in terms:
        for v in _candidates(graph.operators, term, active, parameters)[::-1][:_MOST_TRIED]:
            if v.name not in verdicts:
                verdicts[v.name] = _is_convex(_of_value(objective, v, active, passed), v)
            if verdicts[v.name]:
                found.add(v.name)
                break
    return tuple(v for v in graph.variables if v.name in found)


def _moving(op: Operator, active: Collection[str]) -> dict[str, Variable]:
    """The operands of an operator that depend on the parameters."""
    return {v.name: v for v in op.inputs if v.kind != "literal" and v.name in active}


def _passes(op: Operator, moving: Collection[str]) -> bool:
    """Whether an operator is linear in some operands together."""
    positions = [i for i, v in enumerate(op.inputs) if v.kind != "literal" and v.name in moving]
    return op.equation is not None and op.call is None and bool(moving) and is_linear(op.equation, positions)


def _terms(
    operators: Sequence[Operator], result: Variable, active: Collection[str]
) -> tuple[set[str], list[Operator]]:
    """What is computed linearly on the way from the result back, and the operators at which that ends."""
    linear, passed, terms = {result.name}, set[str](), []
    for op in reversed(operators):
        names = {v.name for v in op.outputs}
        if linear.isdisjoint(names):
            continue
        moving = _moving(op, active)
        if _passes(op, moving):
            linear |= moving.keys()
            passed |= names
        else:
            terms.append(op)
    return passed, terms


def _candidates(
    operators: Sequence[Operator], term: Operator, active: Collection[str], parameters: set[str]
) -> list[Variable]:
    """The values by which alone a term depends on the parameters, the nearest first.

    Of values that are affine in each other it is the one that is computed first.
    """
    before = reversed(operators[: operators.index(term)])
    frontier, found, is_affine = _moving(term, active), list[Variable](), False
    while parameters.isdisjoint(frontier):
        if len(frontier) == 1:
            found[len(found) - is_affine :] = frontier.values()
        op = next((op for op in before if any(v.name in frontier for v in op.outputs)), None)
        if op is None:
            break
        moving = _moving(op, active)
        is_affine = len(frontier) == 1 and _passes(op, moving)
        made = {v.name for v in op.outputs}
        frontier = {name: v for name, v in frontier.items() if name not in made} | moving
    return found


def _of_value(
    objective: Objective, variable: Variable, active: Collection[str], passed: Collection[str]
) -> Callable[[Any], Any]:
    """The objective as a function of one value; what depends on parameters besides is some other number.

    Terms that depend on a value and on parameters are left out with that.
    """
    traced = objective.traced
    graph, own = traced.graph, {variable.name}
    for op in graph:
        moving = _moving(op, active).keys()
        if moving and moving <= own:
            own |= {v.name for v in op.outputs}
    other = set(active) - own - set(passed)
    given = [v for v in graph.variables if v.name in other or v.name == variable.name]
    operators = [op for op in needed(graph.operators, [objective.result], given) if op.outputs]
    made = {v.name for op in operators for v in op.outputs} | {variable.name}
    read = {v.name: v for op in operators for v in op.inputs if v.kind != "literal" and v.name not in made}
    arrays = (*(traced.leaves[i] for i in traced.arguments), *traced.constants)
    given_arrays = zip((*graph.inputs, *graph.constants), arrays, strict=True)
    known = {v.name: x for v, x in given_arrays if not isinstance(x, jax.ShapeDtypeStruct)}
    random = np.random.default_rng(0)
    classes = (variable.shape or (2,))[-1]
    values = {
        n: known[n] if n in known else drawn(random, v, classes, v.shape or ()) for n, v in read.items()
    }
    return lambda x: evaluated(operators, {**values, variable.name: x})[objective.result.name]


def _is_convex(function: Callable[[Any], Any], variable: Variable) -> bool:
    """Whether a function is convex, and not linear, as far as random points and directions say."""
    shape = variable.shape or ()
    if not jnp.issubdtype(variable.dtype, jnp.floating) or not 0 < np.prod(shape) <= _LARGEST:
        return False
    width = shape[-1] if shape else 1
    places = jnp.arange(np.prod(shape)).reshape(shape)

    def curvature(turn: Any) -> Any:
        """Along single entries, along rows, and along everything."""
        key, scale, kind = turn
        keys = jax.random.split(key, 3)
        point, direction = (jax.random.normal(k, shape, variable.dtype) for k in keys[:2])
        place = jax.random.randint(keys[2], (), 0, places.size)
        chosen = jnp.stack([places == place, places // width == place // width, places >= 0])[kind]
        direction = jnp.where(chosen, direction, 0)
        slope, bend = jax.jvp(jax.grad(function), (point * scale.astype(point.dtype),), (direction,))
        return jnp.vdot(direction, bend), jnp.max(jnp.abs(slope))

    scales, kinds = np.meshgrid(np.repeat(_SCALES, _DIRECTIONS), range(3))
    turns = jax.random.split(jax.random.key(0), kinds.size), scales.ravel(), kinds.ravel()
    found = jax.jit(lambda turns: jax.lax.map(curvature, turns))(jax.tree.map(jnp.asarray, turns))
    bends, slopes = (np.asarray(x, np.float64) for x in found)
    tolerance = float(jnp.finfo(variable.dtype).eps) ** 0.5
    by_kind = bends.reshape(3, -1)
    if not bends.max() > tolerance * slopes.max():
        return False
    return bool((by_kind.min(1) >= -tolerance * by_kind.max(1)).all())
