"""Steps of a program in the forms in which a compiler has them: equal ones once, quotients as products."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import Any

import jax.numpy as jnp

from funcprop.memory.fusion import Step, Value
from funcprop.program.facts import PRODUCTS
from funcprop.program.sizes import nbytes

# Their results are their operands, under another name or, on one device, at all.
_RENAMED = frozenset(
    {"stop_gradient", "copy", "copy_p", "name", "pvary", "pcast", "reshard"}
    | {"sharding_constraint", "bitcast_convert_type", "mesh_cast", "psum", "psum_invariant", "pmax", "pmin"}
    | {"slice", "broadcast_in_dim", "reduce_sum", "reduce_max", "reduce_min", "all_gather", "ppermute"}
)
RESHAPES = frozenset({"reshape", "squeeze", "expand_dims"})


class Steps:
    """Steps in their order, and the constants and numbers that they read."""

    def __init__(self, barriers: bool, platform: str) -> None:
        self.barriers, self.platform = barriers, platform
        self.steps: list[Step] = []
        self.constants: list[Value] = []
        self.known: dict[Hashable, list[Value]] = {}
        self.numbers: dict[tuple[str, str], Value] = {}

    def add(
        self, op: str, scope: str, operands: Sequence[Value | None], avals: Sequence[Any], **how: Any
    ) -> list[Value]:
        """Append a step; its results."""
        step = Step(op, scope, [v for v in operands if v is not None], **how)
        if self.platform == "tpu":
            step.expensive, step.reduces = False, int(step.reduces > 0 or op in PRODUCTS)
        step.results = [Value(aval, step) for aval in avals]
        self.steps.append(step)
        return step.results

    def moved(self, op: str, scope: str, value: Value, aval: Any, detail: Hashable = ()) -> Value:
        """A value in another order or type, computed where it is read; equal ones are one."""
        key = (op, id(value), detail, _sizes(aval), str(aval.dtype))
        if key not in self.known:
            self.known[key] = self.add(
                *(op, scope, [value], [aval]),
                fuses=True,
                expensive=is_rounded(value.aval, aval),
            )
        return self.known[key][0]

    def reshaped(self, value: Value, aval: Any, scope: str) -> Value:
        """The same bytes in another shape."""
        while value.step is not None and value.step.op == "reshape":
            (value,) = value.step.operands
        return value if value.aval.shape == aval.shape else self.moved("reshape", scope, value, aval)

    def spread(
        self, atom: Any, value: Value | None, axes: Sequence[int], shape: Sequence[int], scope: str
    ) -> Value:
        """What is read, repeated to a shape; its own axes are these of the result."""
        if value is None:
            value = self.numbers.setdefault(
                (str(getattr(atom, "val", atom)), str(atom.aval.dtype)), Value(atom.aval)
            )
        kept = tuple(
            sum(n > 1 for n in shape[:d]) for d, n in zip(axes, atom.aval.shape, strict=True) if n > 1
        )
        sizes = _sizes(atom.aval)
        while value.step is not None and value.step.op == "reshape":
            (source,) = value.step.operands
            if _sizes(source.aval) != sizes:
                break
            value = source
        return self.moved("broadcast_in_dim", scope, value, atom.aval.update(shape=tuple(shape)), kept)

    def _entrywise(self, op: str, scope: str, operands: list[Value]) -> Value:
        """One value of the same shape as the operands; equal ones are one."""
        key = (op, *map(id, operands))
        if key not in self.known:
            how = {"fuses": True, "entrywise": True, "expensive": op in ("exp", "div")}
            self.known[key] = self.add(op, scope, operands, [operands[-1].aval], **how)
        return self.known[key][0]

    def _ones(self, aval: Any, scope: str) -> Value:
        """An array of ones, which all share that need it."""
        number = self.numbers.setdefault(("1.0", str(aval.dtype)), Value(aval.update(shape=())))
        return self.moved("broadcast_in_dim", scope, number, aval, ())

    def is_lowest(self, value: Value | None) -> bool:
        """Whether it is −∞ everywhere, of which a maximum is the other operand."""
        if value is None or not value.is_spread or value.step is None:
            return False
        numbers = (v for (text, _), v in self.numbers.items() if text == "-inf")
        return any(v is u for v in numbers for u in value.step.operands)

    def logistic(self, value: Value, scope: str) -> Value:
        """1 / (1 + exp(−x))."""
        ones = self._ones(value.aval, scope)
        grown = self._entrywise("exp", scope, [self._entrywise("neg", scope, [value])])
        return self._entrywise("div", scope, [ones, self._entrywise("add", scope, [ones, grown])])

    def divided(self, value: Value, by: Value, scope: str) -> Value:
        """A quotient by what is spread out, which is a product with the reciprocals, spread out."""
        (source,) = by.step.operands if by.step is not None else (by,)
        inverse = self._entrywise("div", scope, [self._ones(source.aval, scope), source])
        spread = self.moved("broadcast_in_dim", scope, inverse, by.aval, ("reciprocals", id(by)))
        return self._entrywise("mul", scope, [value, spread])

    def stacked(self, values: list[Value], aval: Any, scope: str) -> Value:
        """What an unrolled loop stacks; of one step it is the value itself."""
        if len(values) == 1:
            return values[0]
        return self.add("stack", scope, values, [aval], fuses=True, expensive=True)[0]

    def sliced(self, value: Value, aval: Any, i: int, scope: str) -> Value:
        """The values of one step of a loop; of what an unrolled loop has stacked, as that made them."""
        if value.nbytes == nbytes(aval):
            return value
        if value.step is not None and value.step.op == "stack":
            return value.step.operands[i]
        return self.moved("slice", scope, value, aval, i)


def _sizes(aval: Any) -> tuple[int, ...]:
    """The lengths of the axes along which there are several entries."""
    return tuple(n for n in aval.shape if n > 1)


def is_rounded(source: Any, aval: Any) -> bool:
    """Whether entries are rounded to bfloat16, for which a CPU needs several instructions."""
    return bool(aval.dtype == jnp.bfloat16 and source.dtype == jnp.float32)


def is_renamed(eqn: Any, operands: Sequence[Value | None]) -> bool:
    """Whether the results are operands themselves, perhaps in another shape."""
    name, (value, *_) = eqn.primitive.name, (*operands, None)
    if not 0 < len(eqn.outvars) <= len(operands) or value is None:
        return False
    if any(nbytes(o) != nbytes(i) for o, i in zip(eqn.outvars, eqn.invars, strict=False)):
        return False
    if name == "transpose":
        step, shape = value.step, eqn.invars[0].aval.shape
        kept = [d for d in eqn.params["permutation"] if shape[d] > 1]
        # The transpose of a product is the product of its factors in the other order.
        swapped = len(kept) == 2 and step is not None and step.op == "dot_general"
        return swapped or kept == sorted(kept)
    if name in RESHAPES:
        return value.step is None or not value.step.fuses
    if name == "pad":
        return not any(n for d in eqn.params["padding_config"] for n in d)
    if name == "convert_element_type":
        return bool(eqn.outvars[0].aval.dtype == value.aval.dtype)
    return name in _RENAMED


def summed(value: Value | None, eqn: Any) -> tuple[Value | None, int]:
    """What is summed, before a reshape that leaves the other axes alone, and its longest summed axis."""
    axes, shape = eqn.params["axes"], eqn.invars[0].aval.shape
    longest = max((shape[d] for d in axes), default=0)
    kept = [d for d in range(len(shape)) if d not in axes]
    if value is None or value.step is None or value.step.op != "reshape" or value.aval.shape != shape:
        return value, longest
    (source,) = value.step.operands
    last = shape[len(shape) - len(kept) :]
    first = source.aval.shape[: len(source.aval.shape) - len(kept)]
    if not kept or kept[0] != len(axes) or source.aval.shape[len(first) :] != last:
        return value, longest
    return source, max(first, default=0)


def is_copied(eqn: Any) -> bool:
    """Whether arrays are joined by plain copies: many, or long rows."""
    if eqn.primitive.name != "concatenate":
        return False
    shape = eqn.outvars[0].aval.shape
    return len(eqn.invars) > 8 or (1 < len(shape) == eqn.params["dimension"] + 1 and shape[-1] >= 128)


def is_one_of_a_row(eqn: Any) -> bool:
    """Whether it writes one entry of each row, which a comparison with its place does as well."""
    if not eqn.primitive.name.startswith("scatter"):
        return False
    operand, _, updates = (v.aval for v in eqn.invars)
    rows = [operand.shape[d] for d in eqn.params["dimension_numbers"].operand_batching_dims]
    return bool(rows) and updates.size == math.prod(rows)
