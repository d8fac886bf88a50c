"""From a jaxpr to a program: calls inlined, equal steps shared, what nobody reads removed."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Hashable, Sequence
from typing import Any

import jax
import numpy as np

from funcprop import _jax
from funcprop.memory import expansions
from funcprop.memory.steps import Kind, Step, StepProgram, Value
from funcprop.program.facts import CALLS, CHECKPOINTS
from funcprop.program.layer_calls import boundary_p
from funcprop.program.linear_map import linear_body
from funcprop.program.sizes import nbytes

CALLS = (
    CALLS
    | CHECKPOINTS
    | {"custom_jvp_call", "custom_vjp_call", "custom_lin", "custom_vjp_call_jaxpr", "shard_map"}
)
VIEWS = frozenset(
    {"bitcast_convert_type", "copy", "copy_p", "expand_dims", "mesh_cast", "name"}
    | {"optimization_barrier", "pcast", "pvary", "reshape", "sharding_constraint", "squeeze"}
    | {"stop_gradient"}
)
# On a mesh of one device, which is where they are looked at, they return what they are given.
COLLECTIVES = frozenset(
    {"all_gather", "all_gather_invariant", "all_to_all", "pmax", "pmin", "ppermute", "psum"}
    | {"psum_invariant", "reduce_scatter"}
)
MOVES = frozenset(
    {"broadcast_in_dim", "concatenate", "dynamic_slice", "gather", "iota", "pad", "rev", "slice"}
    | {"split", "transpose"}
)
REDUCTIONS = frozenset(
    {"argmax", "argmin", "reduce", "reduce_and", "reduce_max", "reduce_min", "reduce_or"}
    | {"reduce_prod", "reduce_sum", "reduce_xor"}
)
UPDATES = frozenset(
    {"dynamic_update_slice", "scatter", "scatter-add", "scatter_add", "scatter_max", "scatter_min"}
    | {"scatter_mul", "scatter-mul", "scatter-max", "scatter-min", "scatter_sub"}
)
# One pass over each entry, and not worth doing twice.
EXPENSIVE = frozenset(
    {"acos", "acosh", "asin", "asinh", "atan", "atan2", "atanh", "cbrt", "cosh", "digamma", "div"}
    | {"erf", "erf_inv", "erfc", "exp", "exp2", "expm1", "lgamma", "log", "log1p", "logistic", "pow"}
    | {"rem", "rsqrt", "sinh", "sqrt", "tan", "tanh"}
)
CHEAP = frozenset(
    {"abs", "add", "add_any", "and", "ceil", "clamp", "clz", "complex", "conj"}
    | {"convert_element_type", "cos", "eq", "floor", "ge", "gt", "imag", "integer_pow", "is_finite"}
    | {
        "le",
        "lt",
        "max",
        "min",
        "mul",
        "ne",
        "neg",
        "nextafter",
        "not",
        "one_minus_square",
        "or",
        "population_count",
    }
    | {"real", "reduce_precision", "round", "select_n", "shift_left", "shift_right_arithmetic"}
    | {"shift_right_logical", "sign", "sin", "square", "sub", "xor"}
)


class Lowering:
    """Turns a jaxpr into a program. With `barriers`, checkpoints are recomputed though equal steps exist."""

    def __init__(self, barriers: bool = False) -> None:
        self.barriers = barriers
        self.steps: list[Step] = []
        self.constants: list[Value] = []
        self.known: dict[Hashable, list[Value | None]] = {}
        self.salts = 0

    def program(self, closed: Any, names: Sequence[str] = ()) -> StepProgram:
        """The whole program; `names` are those of the arguments."""
        jaxpr, consts = _jax.with_constants_as_inputs(closed)
        jaxpr, _ = _jax.without_unread_inputs(jaxpr, [True] * len(jaxpr.invars))
        values = [self.value(v.aval) for v in jaxpr.invars]
        self.constants, arguments = values[: len(consts)], values[len(consts) :]
        for value in self.constants:
            value.constant, value.name = True, "constant"
        for i, value in enumerate(arguments):
            value.argument, value.name = i, names[i] if i < len(names) else ""
        return self.finish(arguments, self.walk(jaxpr, list(values), "", 0))

    def finish(self, arguments: list[Value], outputs: list[Value | None]) -> StepProgram:
        """The program of the steps so far."""
        program = StepProgram(arguments, self.constants, self.steps, outputs)
        _remove_dead(program)
        return program

    def nested(self) -> Lowering:
        """For the body of a loop or a branch."""
        return Lowering(self.barriers)

    # --- equations ----------------------------------------------------------------------------

    def walk(self, closed: Any, inputs: Sequence[Value | None], prefix: str, salt: int) -> list[Value | None]:
        """Append the steps of a jaxpr in a scope; its results. Steps with another `salt` are never equal."""
        jaxpr = _jax.open_jaxpr(closed)
        env: dict[Any, Value | None] = dict(zip(jaxpr.invars, inputs, strict=True))
        for var in jaxpr.constvars:
            value = self.value(var.aval)
            value.constant, value.name = True, "constant"
            self.constants.append(value)
            env[var] = value
        for eqn in jaxpr.eqns:
            operands = [None if isinstance(a, _jax.Literal) else env[a] for a in eqn.invars]
            results = self._equation(eqn, operands, prefix, salt)
            env.update(zip(eqn.outvars, results, strict=True))
        return [None if isinstance(a, _jax.Literal) else env[a] for a in jaxpr.outvars]

    def _equation(self, eqn: Any, operands: list[Value | None], prefix: str, salt: int) -> list[Value | None]:
        op = eqn.primitive.name
        scope = "/".join(part for part in (prefix, _jax.scope(eqn)) if part)
        if (tangent_map := linear_body(eqn)) is not None:
            return self.walk(tangent_map, operands, scope, salt)
        bodies = list(_jax.sub_jaxprs(eqn))
        if op in CALLS and bodies:
            body = bodies[0][1]
            if op in CHECKPOINTS and self.barriers and eqn.params.get("prevent_cse"):
                self.salts += 1
                return self._behind_barrier(body, operands, scope)
            return self.walk(body, operands[: len(_jax.open_jaxpr(body).invars)], scope, salt)
        key = _key(eqn, operands, salt)
        if key in self.known:
            return self.known[key]
        results = self._lowered(eqn, op, operands, scope)
        if key is not None:
            self.known[key] = results
        return results

    def _behind_barrier(self, body: Any, operands: list[Value | None], scope: str) -> list[Value | None]:
        """A checkpoint that is kept: nothing is shared, and it starts when all that goes in is there."""
        (barrier,) = self.add(
            "optimization_barrier", "kernel", scope, operands, [jax.core.ShapedArray((), bool)]
        )
        assert barrier is not None
        start = len(self.steps)
        results = self.walk(body, operands, scope, self.salts)
        inside = set(map(id, self.steps[start:]))
        for step in self.steps[start:]:
            if not any(id(v.step) in inside for v in step.inputs):
                step.inputs.append(barrier)
        return results

    def _lowered(self, eqn: Any, op: str, operands: list[Value | None], scope: str) -> list[Value | None]:
        if eqn.primitive is boundary_p:
            return operands[eqn.params["call"].tree.num_leaves :]
        if (view := _is_view(eqn, op)) and operands:
            source = operands[0]
            if source is not None and op == "name" and not source.name:
                source.name = eqn.params["name"]
            if view == "each":
                return list(operands)
            return [None if source is None else self.view(source, eqn.outvars[0].aval.shape, scope)]
        if op in ("scan", "while"):
            return expansions.loop(self, eqn, operands, scope)
        if op == "cond":
            return expansions.branch(self, eqn, operands, scope)
        if op in expansions.TABLE:
            return expansions.TABLE[op](self, eqn, operands, scope)
        kind: Kind = "kernel"
        if op in CHEAP or op in EXPENSIVE:
            kind = "elementwise"
        elif op in MOVES:
            kind = "move"
        elif op in REDUCTIONS:
            kind = "reduce"
        elif op in UPDATES:
            kind = "update"
        expensive = op in EXPENSIVE or kind in ("reduce", "kernel", "update") or op == "gather"
        if kind == "elementwise" and len(eqn.outvars) == 1:
            operands = [v if v is None else self.spread(v, eqn.outvars[0].aval, scope) for v in operands]
        if kind == "reduce" and operands:
            operands = [_unfolded(v, eqn.params.get("axes", ())) for v in operands]
        if op == "div" and (operands[1] is None or operands[1].size <= 1 or _is_spread(operands[1])):
            expensive = False  # A division by one number for many becomes a product.
        reuses = op == "gather" or (op == "broadcast_in_dim" and operands[0] is not None)
        avals = [v.aval for v in eqn.outvars]
        return self.add(op, kind, scope, operands, avals, expensive, reuses)

    def view(self, value: Value, shape: Sequence[int], scope: str) -> Value:
        """A value in another shape."""
        if value.step is not None and value.step.kind == "view":
            value = value.step.inputs[0]
        if value.shape == tuple(shape) or value.size <= 1:
            return value
        aval = jax.core.ShapedArray(tuple(shape), value.dtype)
        (seen,) = self.shared("reshape", [value], aval, scope, kind="view")
        assert seen is not None
        return seen

    def spread(self, value: Value, aval: Any, scope: str) -> Value:
        """An operand of an elementwise operator in the shape of the result."""
        if value.size in (1, math.prod(aval.shape)):
            return value
        like = jax.core.ShapedArray(aval.shape, value.dtype)
        (spread,) = self.shared("broadcast_in_dim", [value], like, scope, reuses=True)
        assert spread is not None
        return spread

    # --- building -----------------------------------------------------------------------------

    def add(
        self,
        op: str,
        kind: Kind,
        scope: str,
        operands: Sequence[Value | None],
        avals: Sequence[Any],
        expensive: bool = True,
        reuses: bool = False,
    ) -> list[Value | None]:
        """Append a step and return its results."""
        inputs = [v for v in operands if v is not None]
        step = Step(op, kind, scope, inputs, [], expensive, reuses)
        step.outputs = [self.value(aval, step) for aval in avals]
        if kind == "update" and operands[0] is not None:
            step.in_place.append((operands[0], step.outputs[0]))
        self.steps.append(step)
        return list(step.outputs)

    def shared(
        self, op: str, operands: Sequence[Value], aval: Any, scope: str, detail: Hashable = (), **how: Any
    ) -> list[Value | None]:
        """A step that moves entries; equal ones are one."""
        key = (op, tuple(map(id, operands)), aval.shape, str(aval.dtype), detail)
        if key not in self.known:
            kind = how.pop("kind", "move")
            self.known[key] = self.add(op, kind, scope, operands, [aval], expensive=False, **how)
        return self.known[key]

    def value(self, aval: Any, step: Step | None = None) -> Value:
        """A new value."""
        return Value(tuple(getattr(aval, "shape", ())), getattr(aval, "dtype", None), nbytes(aval), step)


def _is_view(eqn: Any, op: str) -> bool | str:
    """Whether the result is the operand's own buffer (True), or each result that of its operand ("each")."""
    if op in COLLECTIVES:
        same = [a.aval.size == v.aval.size for a, v in zip(eqn.invars, eqn.outvars, strict=True)]
        return False if not all(same) else True if len(same) == 1 else "each"
    if op in VIEWS:
        return True if len(eqn.outvars) == 1 else "each"
    if not eqn.outvars:
        return False
    if len(eqn.invars) == 2 and _is_identity(eqn, op):
        return True
    aval, result = getattr(eqn.invars[0], "aval", None) if eqn.invars else None, eqn.outvars[0].aval
    if aval is None or isinstance(eqn.invars[0], _jax.Literal):
        return False
    if op == "convert_element_type":
        return bool(aval.dtype == result.dtype)
    if op == "broadcast_in_dim":
        return math.prod(aval.shape) == math.prod(result.shape)
    if op == "transpose":
        kept = [d for d in eqn.params["permutation"] if aval.shape[d] > 1]
        return kept == sorted(kept)
    if op in ("slice", "pad", "rev", "dynamic_slice"):
        return bool(aval.shape == result.shape and op != "rev")
    if op in REDUCTIONS and op not in ("argmax", "argmin"):
        return len(eqn.outvars) == 1 and math.prod(aval.shape) == math.prod(result.shape)
    return False


# Operators that do nothing with this number on the right.
_NEUTRAL = {"max": -math.inf, "min": math.inf, "add": 0, "mul": 1, "add_any": 0, "sub": 0, "div": 1}


def _is_identity(eqn: Any, op: str) -> bool:
    if op not in _NEUTRAL or not isinstance(eqn.invars[1], _jax.Literal):
        return False
    other = eqn.invars[1].val
    same = eqn.invars[0].aval.shape == eqn.outvars[0].aval.shape
    return same and np.ndim(other) == 0 and bool(other == _NEUTRAL[op])


def _unfolded(value: Value | None, axes: Sequence[int]) -> Value | None:
    """What is summed: a transposition is left out of a sum to a vector or a number.

    So is a reshape that only joins summed axes with each other.
    """
    kept = set() if value is None else set(range(len(value.shape))) - set(axes)
    if value is not None and (step := value.step) is not None and step.order and len(kept) <= 1:
        (value,) = step.inputs
        kept = {step.order[axis] for axis in kept}
    if value is None or value.step is None or value.step.kind != "view":
        return value
    (source,) = value.step.inputs
    if len(source.shape) <= len(value.shape):
        return value
    ends = list(itertools.accumulate(source.shape, operator.mul, initial=1))
    ends_here = list(itertools.accumulate(value.shape, operator.mul, initial=1))
    for axis in kept:
        low, high = ends_here[axis], ends_here[axis + 1]
        if low not in ends or high not in ends or ends.index(high) - ends.index(low) > 1:
            return value
    return source


def _is_spread(value: Value) -> bool:
    return value.step is not None and value.step.op == "broadcast_in_dim" and bool(value.step.inputs)


def _key(eqn: Any, operands: Sequence[Value | None], salt: int) -> Hashable | None:
    """What makes two steps equal; None for what is never shared."""
    if eqn.effects or any(True for _ in _jax.sub_jaxprs(eqn)):
        return None
    literals = tuple(
        (str(a.aval), a.val.item() if hasattr(a.val, "item") and np.ndim(a.val) == 0 else a.val)
        if isinstance(a, _jax.Literal)
        else None
        for a in eqn.invars
    )
    types = tuple(str(v.aval) for v in eqn.outvars)
    key = (eqn.primitive.name, tuple(map(id, operands)), literals, types, salt, *sorted(eqn.params.items()))
    try:
        hash(key)
    except TypeError:
        return None
    return key


def _remove_dead(program: StepProgram) -> None:
    """Drop steps whose results nobody reads, and note who reads what."""
    live = {id(v) for v in program.outputs if v is not None}
    kept = []
    for step in reversed(program.steps):
        if any(id(v) in live for v in step.outputs):
            live.update(id(v) for v in step.inputs)
            kept.append(step)
    program.steps[:] = reversed(kept)
    for step in program.steps:
        for value in {id(v): v for v in step.inputs}.values():
            value.users.append(step)
