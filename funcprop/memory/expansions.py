"""Equations that the compiler turns into several steps, and what these hold.

XLA's CPU backend computes a product only on operands whose batch axes lead and which have one axis besides
the summed one, and a convolution only on `NHWC` and `HWIO`: other operands are copied first. It makes a
`while` of a `scan`: constants are read in place, carries and results are written in place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import numpy as np

from funcprop import _jax
from funcprop.memory.steps import Step, Value

# What the compiler moves out of a loop only together with what reads it.
_LIGHT = frozenset({"broadcast_in_dim", "iota", "reshape", "rev", "slice", "transpose"})


def dot_general(lowering: Any, eqn: Any, operands: list[Value | None], scope: str) -> list[Value | None]:
    """A product, after copies of the operands that are not in order.

    In order are batch axes in front, and then one axis besides the summed one.
    """
    (lhs_sum, rhs_sum), (lhs_batch, rhs_batch) = eqn.params["dimension_numbers"]
    sides = ((lhs_sum, lhs_batch, True), (rhs_sum, rhs_batch, False))
    arranged, free = [], []
    for atom, value, (summed, batch, is_lhs) in zip(eqn.invars, operands, sides, strict=True):
        shape = atom.aval.shape
        if value is not None and value.step is not None and value.step.op == "transpose" and len(shape) == 2:
            value = value.step.inputs[0]  # A transposed matrix is read as it is.
        rest = [d for d in range(len(shape)) if d not in summed and d not in batch]
        order = [*batch, *rest, *summed] if is_lhs else [*batch, *summed, *rest]
        kept = [d for d in order if shape[d] > 1]
        in_order = list(batch) == list(range(len(batch))) and len(summed) == 1 and len(rest) <= 1
        if value is not None and not in_order:
            if kept != sorted(kept) and (batch or len(kept) != 2):
                value = transposed(lowering, value, shape, order, scope)
            sizes = [
                math.prod(shape[d] for d in axes) for axes in ((rest, summed) if is_lhs else (summed, rest))
            ]
            assert value is not None
            value = lowering.view(value, (*(shape[d] for d in batch), *sizes), scope)
        arranged.append(value)
        free.append(math.prod(shape[d] for d in rest))
    result = eqn.outvars[0].aval
    matrices = result.update(shape=(*result.shape[: len(lhs_batch)], *free))
    is_matrix = len(result.shape) <= len(lhs_batch) + 2
    (product,) = lowering.add("dot_general", "kernel", scope, arranged, [result if is_matrix else matrices])
    lowering.steps[-1].late = not lhs_batch and tuple(lhs_sum) == (0,)
    return [product if product is None else lowering.view(product, result.shape, scope)]


def transpose(lowering: Any, eqn: Any, operands: list[Value | None], scope: str) -> list[Value | None]:
    """A transposition; that of a matrix product is the product of the factors in the other order."""
    value, shape = operands[0], eqn.invars[0].aval.shape
    if value is None:
        return lowering.add("transpose", "move", scope, [], [eqn.outvars[0].aval], expensive=False)
    if value.step is not None and value.step.op == "dot_general":
        kept = [d for d in eqn.params["permutation"] if shape[d] > 1]
        if len(kept) == 2:
            return [value]
    return [transposed(lowering, value, shape, eqn.params["permutation"], scope)]


def transposed(lowering: Any, value: Value, shape: Sequence[int], order: Sequence[int], scope: str) -> Value:
    """A copy in another order of axes; of what is such a copy itself, one of its source, or the source."""
    step = value.step
    if step is not None and step.order and value.shape == tuple(shape):
        (value,), order = step.inputs, [step.order[d] for d in order]
        shape = value.shape
    result = tuple(shape[d] for d in order)
    kept = [d for d in order if shape[d] > 1]
    if kept == sorted(kept):
        return lowering.view(value, result, scope)
    aval = jax.core.ShapedArray(result, value.dtype)
    (copy,) = lowering.shared("transpose", [value], aval, scope, tuple(order))
    assert copy is not None
    assert copy.step is not None
    copy.step.order = tuple(order)
    return copy


def convolution(lowering: Any, eqn: Any, operands: list[Value | None], scope: str) -> list[Value | None]:
    """A convolution, after copies of what is not `NHWC` or `HWIO`, and a copy of such a result."""
    lhs, rhs, out = eqn.params["dimension_numbers"]
    orders = ([lhs[0], *lhs[2:], lhs[1]], [*rhs[2:], rhs[1], rhs[0]])
    arranged: list[Value | None] = []
    for atom, value, order in zip(eqn.invars, operands, orders, strict=True):
        kept = [d for d in order if atom.aval.shape[d] > 1]
        if value is not None and kept != sorted(kept):
            value = transposed(lowering, value, atom.aval.shape, order, scope)
        arranged.append(value)
    result = eqn.outvars[0].aval
    order = [out[0], *out[2:], out[1]]
    computed = result.update(shape=[result.shape[d] for d in order])
    (value,) = lowering.add("conv_general_dilated", "kernel", scope, arranged, [computed])
    assert value is not None
    return [transposed(lowering, value, value.shape, [order.index(d) for d in range(len(order))], scope)]


def select_and_scatter_add(
    lowering: Any, eqn: Any, operands: list[Value | None], scope: str
) -> list[Value | None]:
    """The derivative of max-pooling: positions of all entries, the largest in each window, then a scatter."""
    source, operand = (atom.aval for atom in eqn.invars)
    rank = len(operand.shape)
    positions = [
        lowering.add("iota", "move", scope, [], [jax.core.ShapedArray(operand.shape, np.dtype("int32"))])[0]
        for _ in range(rank)
    ]
    index = jax.core.ShapedArray(source.shape, np.dtype("int32"))
    found = lowering.add("reduce_window", "kernel", scope, [operands[1], *positions], [index] * rank)
    places = jax.core.ShapedArray((math.prod(source.shape), rank), np.dtype("int32"))
    (indices,) = lowering.add("concatenate", "move", scope, found, [places], expensive=False)
    (zeros,) = lowering.add("broadcast_in_dim", "move", scope, [], [operand], expensive=False)
    return lowering.add("scatter_add", "update", scope, [zeros, indices, operands[0]], [operand])


def add(lowering: Any, eqn: Any, operands: list[Value | None], scope: str) -> list[Value | None]:
    """A sum; what is scattered into zeros and added to something is scattered into that at once."""
    aval = eqn.outvars[0].aval
    for value, other in zip(operands, operands[::-1], strict=True):
        step = None if value is None else value.step
        if step is not None and step.op in ("scatter-add", "scatter_add") and other is not None:
            zeros = step.inputs[0].step
            if zeros is not None and zeros.op == "broadcast_in_dim" and not zeros.inputs:
                return lowering.add(step.op, "update", scope, [other, *step.inputs[1:]], [aval])
    terms = [None if v is None else lowering.spread(v, aval, scope) for v in operands]
    return lowering.add(eqn.primitive.name, "elementwise", scope, terms, [aval], expensive=False)


def one_minus_square(lowering: Any, eqn: Any, operands: list[Value | None], scope: str) -> list[Value | None]:
    """The derivative of tanh, `(1 + y) (1 − y)`: a product of two arrays, which is not computed twice."""
    avals = [eqn.outvars[0].aval]
    factors = [
        lowering.add(op, "elementwise", scope, operands, avals, expensive=False)[0] for op in ("add", "sub")
    ]
    return lowering.add(eqn.primitive.name, "elementwise", scope, factors, avals, expensive=False)


def twice(lowering: Any, eqn: Any, operands: list[Value | None], scope: str) -> list[Value | None]:
    """A kernel that holds as much again as its results while it runs."""
    avals = [v.aval for v in eqn.outvars]
    results = lowering.add(eqn.primitive.name, "kernel", scope, operands, avals)
    lowering.steps[-1].extra = sum(v.nbytes for v in lowering.steps[-1].outputs)
    return results


def random_bits(lowering: Any, eqn: Any, operands: list[Value | None], scope: str) -> list[Value | None]:
    """Threefry: a loop that carries two words for each number, as `twice`, and then their exclusive or."""
    (aval,) = (v.aval for v in eqn.outvars)
    if "fry" not in str(eqn.invars[0].aval.dtype):
        return twice(lowering, eqn, operands, scope)
    words = aval.update(dtype=np.dtype("uint32"))
    both = lowering.add("random_bits", "kernel", scope, operands, [words, words])
    lowering.steps[-1].extra = sum(v.nbytes for v in lowering.steps[-1].outputs)
    return lowering.add("xor", "elementwise", scope, both, [aval], expensive=False)


Expansion: TypeAlias = "Callable[[Any, Any, list[Value | None], str], list[Value | None]]"
TABLE: dict[str, Expansion] = {
    "add": add,
    "add_any": add,
    "dot_general": dot_general,
    "one_minus_square": one_minus_square,
    "transpose": transpose,
    "conv_general_dilated": convolution,
    "select_and_scatter_add": select_and_scatter_add,
    "random_bits": random_bits,
    "threefry2x32": twice,
    "cumsum": twice,
    "cumprod": twice,
    "cummax": twice,
    "cummin": twice,
    "cumlogsumexp": twice,
}


# --- control flow -----------------------------------------------------------------------------


def loop(lowering: Any, eqn: Any, operands: list[Value | None], scope: str) -> list[Value | None]:
    """A `scan` or `while` as one step with its body."""
    if eqn.primitive.name == "scan":
        return _scan(lowering, eqn, operands, scope)
    skipped, consts = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    body = eqn.params["body_jaxpr"]
    given = operands[skipped:]
    return _while(lowering, eqn, body, given, consts, len(given) - consts, scope)


def _scan(lowering: Any, eqn: Any, operands: list[Value | None], scope: str) -> list[Value | None]:
    consts, carry = _jax.scan_counts(eqn.params)
    return _while(lowering, eqn, eqn.params["jaxpr"], operands, consts, carry, scope)


def _while(
    lowering: Any, eqn: Any, body: Any, operands: list[Value | None], consts: int, carry: int, scope: str
) -> list[Value | None]:
    """The loop: carries, and one array for each stacked result, are written in place."""
    inner = lowering.nested()
    jaxpr, avals = _jax.open_jaxpr(body), [v.aval for v in eqn.outvars]
    state = [inner.value(v.aval) for v in jaxpr.invars[: consts + carry]]
    scanned = [inner.value(atom.aval) for atom in list(eqn.invars)[len(eqn.invars) - len(operands) :]]
    scanned = scanned[consts + carry :]
    slices: list[Value | None] = []
    for value, var in zip(scanned, jaxpr.invars[consts + carry :], strict=True):
        slices += inner.add("dynamic_slice", "move", "", [value], [var.aval], expensive=False)
    results = inner.walk(body, [*state, *slices], "", 0)
    stacked = [inner.value(aval) for aval in avals[carry:]]
    written: list[Value | None] = []
    for array, result, aval in zip(stacked, results[carry:], avals[carry:], strict=True):
        written += inner.add("dynamic_update_slice", "update", "", [array, result], [aval])
    for i, value in enumerate(arguments := [*state, *scanned, *stacked]):
        value.argument = i
    over = [*operands[consts : consts + carry], *(_zeros(lowering, aval, scope) for aval in avals[carry:])]
    hoisted = _hoist(lowering, inner, state[:consts], operands[:consts])
    program = inner.finish(arguments, [*results[:carry], *written])
    program.donated = {consts + i: i for i in range(carry)}
    read = [*operands[:consts], *operands[consts + carry :], *hoisted]
    finals = lowering.add(eqn.primitive.name, "loop", scope, [*read, *over], avals)
    step = lowering.steps[-1]
    step.bodies = (program,)
    step.in_place = [(v, final) for v, final in zip(over, step.outputs, strict=True) if v is not None]
    return finals


def _zeros(lowering: Any, aval: Any, scope: str) -> Value | None:
    """What a loop writes its stacked results over; loops share it."""
    return lowering.shared("broadcast_in_dim", [], aval, scope, "zeros")[0]


def _hoist(lowering: Any, inner: Any, consts: Sequence[Value], given: Sequence[Value | None]) -> list[Value]:
    """Move what depends on the loop's constants only, and is work, out of the loop; the results."""
    outer: dict[int, Value | None] = {id(v): g for v, g in zip(consts, given, strict=True)}
    invariant: list[Step] = []
    known = set(outer)
    for step in inner.steps:
        if step.inputs and not step.bodies and all(id(v) in known for v in step.inputs):
            invariant.append(step)
            known.update(id(v) for v in step.outputs)
    wanted: set[int] = set()
    chosen = set()
    for step in reversed(invariant):
        if step.op not in _LIGHT or any(id(v) in wanted for v in step.outputs):
            chosen.add(id(step))
            wanted.update(id(v) for v in step.inputs)
    for step in invariant:
        if id(step) not in chosen:
            continue
        inputs = [outer.get(id(v), v) for v in step.inputs]
        step.inputs = [v for v in inputs if v is not None]
        lowering.steps.append(step)
    inner.steps[:] = [step for step in inner.steps if id(step) not in chosen]
    return [v for step in invariant if id(step) in chosen for v in step.outputs]


def branch(lowering: Any, eqn: Any, operands: list[Value | None], scope: str) -> list[Value | None]:
    """A conditional: room for the largest branch."""
    programs = tuple(lowering.nested().program(body) for body in eqn.params["branches"])
    results = lowering.add("cond", "branch", scope, operands[1:], [v.aval for v in eqn.outvars])
    lowering.steps[-1].bodies = programs
    return results
