"""What a program does: operators, matrix products, floating-point operations, and bytes.

The same numbers are counted twice: in the jaxpr, before anything is compiled, and in the program that XLA
made of it. Loops count as often as they run, at any depth; a `while` of unknown length counts once, a `cond`
as its most expensive branch. A matrix product is a `dot_general` or a convolution.

What the jaxpr says of bytes assumes that XLA fuses: a value is in memory only if it is an argument or a
result, or if a product, a loop, or another operator that XLA does not fuse makes or reads it.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from funcprop import _jax
from funcprop._jax.hlo import Instruction, instructions
from funcprop.memory.estimate import peak_bytes
from funcprop.program.facts import LOOPS, PRODUCTS, facts_of
from funcprop.program.flops import flops
from funcprop.program.linear_map import linear_body
from funcprop.program.sizes import nbytes


@dataclass(frozen=True)
class Product:
    """A kind of product: those of equal shapes, axes, strides and paddings, of which `equation` is one.

    `looped` says whether it is in the body of a loop, where XLA compiles it otherwise.
    """

    kind: str
    looped: bool
    flops: int
    equation: Any = field(compare=False, repr=False)

    @classmethod
    def of(cls, eqn: Any, looped: bool) -> Product:
        """The kind of an equation."""
        types = ", ".join(str(v.aval) for v in eqn.invars)
        return cls(f"{eqn.primitive.name}({types}) {sorted(eqn.params.items())}", looped, flops(eqn), eqn)


@dataclass(frozen=True)
class Work:
    """The work of a program, from its arguments to its results.

    `operators` are equations of the jaxpr, or instructions of the compiled program, of which one may be many
    fused operators. `bytes` are those of arguments, results and temporaries at their most, `moved` those that
    operators other than products read and write. `kinds` says how many products there are of each kind.
    """

    operators: int = 0
    products: int = 0
    flops: int = 0
    bytes: int = 0
    moved: int = 0
    kinds: Mapping[Product, int] = field(default_factory=dict)


# --- jaxprs -----------------------------------------------------------------------------------


def of_jaxpr(closed: Any) -> Work:
    """The work of a jaxpr whose results are all wanted; what none of them needs is not counted."""
    jaxpr = _jax.inlined(closed)
    jaxpr, _ = _jax.with_constants_as_inputs(jaxpr)
    jaxpr, _ = _jax.without_unread_inputs(jaxpr, [True] * len(jaxpr.invars))
    operators = products = total = 0
    kinds: Counter[Product] = Counter()
    for eqn, times, looped in _leaves(jaxpr, 1, False):
        operators += times
        total += times * flops(eqn)
        if eqn.primitive.name in PRODUCTS:
            products += times
            kinds[Product.of(eqn, looped)] += times
    return Work(operators, products, total, peak_bytes(closed), _moved(jaxpr), dict(kinds))


def _leaves(jaxpr: Any, times: int, looped: bool) -> Iterator[tuple[Any, int, bool]]:
    """The equations without bodies, at any depth, how often each is run, and whether in a loop."""
    for eqn in _jax.open_jaxpr(jaxpr).eqns:
        bodies = list(_executed(eqn))
        if not bodies:
            yield eqn, times, looped
        for body, repeats in bodies:
            yield from _leaves(body, times * repeats, looped or eqn.primitive.name in LOOPS)


def _executed(eqn: Any) -> Iterator[tuple[Any, int]]:
    """The bodies that an equation runs, and how often."""
    bodies = [] if facts_of(eqn).combines else [_jax.open_jaxpr(body) for _, body in _jax.sub_jaxprs(eqn)]
    if (tangent_map := linear_body(eqn)) is not None:
        body, _ = _jax.with_constants_as_inputs(tangent_map)
        bodies = [_jax.without_unread_inputs(body, [True] * len(body.invars))[0]]
    if eqn.primitive.name == "cond" and bodies:
        yield max(bodies, key=lambda body: sum(map(flops, body.eqns))), 1
    elif eqn.primitive.name == "scan":
        yield bodies[0], eqn.params["length"]
    else:
        yield from ((body, 1) for body in bodies)


def _is_unfused(eqn: Any) -> bool:
    """Whether XLA gives an operator a kernel of its own."""
    return not facts_of(eqn).fuses or next(_executed(eqn), None) is not None


def _in_memory(jaxpr: Any) -> set[Any]:
    """The intermediate values that XLA is expected to write to memory."""
    kept = set(_jax.variables(jaxpr.outvars))
    for eqn in jaxpr.eqns:
        if _is_unfused(eqn):
            kept.update(_jax.variables(eqn.invars))
            kept.update(eqn.outvars)
        elif facts_of(eqn).reduces:
            kept.update(eqn.outvars)
    return kept


def _moved(jaxpr: Any) -> int:
    """Bytes that operators other than products read and write, over all iterations."""
    kept = _in_memory(jaxpr) | set(jaxpr.invars)
    total = 0
    read: set[Any] = set()
    for eqn in jaxpr.eqns:
        bodies = list(_executed(eqn))
        if bodies:
            total += sum(times * _moved(body) for body, times in bodies)
        elif eqn.primitive.name not in PRODUCTS:
            total += sum(nbytes(v) for v in eqn.outvars if v in kept)
            operands = [v for v in _jax.variables(eqn.invars) if v in kept]
            # Fused operators that read the same value read it together.
            new = operands if _is_unfused(eqn) else [v for v in operands if v not in read]
            total += sum(map(nbytes, new))
            read.update(operands)
    return total


# --- compiled programs ------------------------------------------------------------------------

_NOT_RUN = frozenset({"parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all"})
_MOVES = _NOT_RUN | frozenset(
    {"copy", "broadcast", "reshape", "transpose", "slice", "dynamic-slice", "dynamic-update-slice", "pad"}
    | {"concatenate", "gather", "iota", "convert", "bitcast-convert", "reverse", "copy-start", "copy-done"}
    | {"custom-call", "rng-bit-generator", "sort", "partition-id", "opt-barrier", "map", "scatter"}
)
_RUNS = frozenset({"fusion", "call", "while", "conditional", "async-start"})
_LIBRARY = re.compile(r'custom_call_target="[^"]*(matmul|gemm|conv)', re.IGNORECASE)
_CONTRACTED = re.compile(r'lhs_contracting_dim(?:s|ensions"?)[=:]["{\[]+([\d,"]*)')
_SHAPE = re.compile(r"\w+\[([\d,]*)\]")


def of_compiled(compiled: Any) -> Work:
    """The work of a compiled program, from its instructions; bytes as XLA accounts for them."""
    computations, entry = instructions(_jax.program_text(compiled))
    known: dict[str, Work] = {}

    def of(name: str) -> Work:
        if name not in known:
            known[name] = _sum(_of_instruction(i, of) for i in computations[name])
        return known[name]

    found = of(entry)
    return Work(found.operators, found.products, found.flops, _jax.held_bytes(_jax.memory_fields(compiled)))


def _of_instruction(instruction: Instruction, of: Callable[[str], Work]) -> Work:
    opcode = instruction.opcode
    if opcode in _RUNS:
        bodies = [of(name) for name in instruction.calls]
        if opcode == "fusion":
            inside = _sum(bodies)
            return Work(1, inside.products, inside.flops)
        if opcode == "conditional":
            return max(bodies, key=lambda work: work.flops, default=Work())
        times = instruction.trips or 1
        inside = _sum(bodies)
        return Work(times * inside.operators, times * inside.products, times * inside.flops)
    size, operands = _size(instruction.type), [_shape(o) for o in instruction.operands]
    if opcode == "dot" or (opcode == "custom-call" and _LIBRARY.search(instruction.attributes)):
        found = _CONTRACTED.search(instruction.attributes)
        axes = [int(n) for n in re.findall(r"\d+", found[1])] if found else [-1]
        work = 2 * size * math.prod(operands[0][axis] for axis in axes)
        return Work(1, 1, work)
    if opcode == "convolution":
        return Work(1, 1, 2 * size * _taps(instruction.attributes, operands[1]))
    if opcode in _MOVES:
        return Work(int(opcode not in _NOT_RUN))
    return Work(1, 0, math.prod(operands[0]) if opcode.startswith("reduce") and operands else size)


def _taps(attributes: str, kernel: Sequence[int]) -> int:
    """The products that one entry of a convolution's result is the sum of."""
    labels = re.search(r"dim_labels=\w+_(\w+)->", attributes)
    outputs = labels[1].index("o") if labels else len(kernel) - 1
    return math.prod(n for axis, n in enumerate(kernel) if axis != outputs)


def _shape(type_: str) -> list[int]:
    """The dimensions of a type, the first of a tuple's."""
    found = _SHAPE.search(type_)
    return [int(n) for n in found[1].split(",") if n] if found else []


def _size(type_: str) -> int:
    return math.prod(_shape(type_))


def _sum(works: Iterable[Work]) -> Work:
    found = list(works)
    return Work(sum(w.operators for w in found), sum(w.products for w in found), sum(w.flops for w in found))
