"""The buffers of a compiled program, as XLA itself assigns them: size, place, maker, readers.

XLA hands its assignment over as serialized protocol buffers: `BufferAssignmentProto` says which values lie
where, `HloModuleProto` which instruction makes a value and under which `op_name`. Of both only a dozen fields
are read, so they are read here by hand.
"""

from __future__ import annotations

import functools
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax

Kind = Literal["argument", "result", "constant", "temporary"]

# `xla.PrimitiveType`; other types are called after their number.
_DTYPES = dict(
    enumerate(
        (
            *("", "bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
            *("float16", "float32", "float64", "tuple", "opaque", "complex64", "bfloat16", "token"),
            *("complex128", "float8_e5m2", "float8_e4m3fn", "int4", "uint4"),
        )
    )
)
# Instructions through which a value passes on to others without being read.
_PASSES = frozenset({"tuple", "get-tuple-element", "bitcast", "while", "opt-barrier", "optimization-barrier"})

# What a library computes inside of a fused kernel and keeps in memory of its own.
_COMPUTED = frozenset({"dot", "convolution", "reduce-window"})


class NoBuffersError(NotImplementedError):
    """The compiler of a platform does not say which buffers a program has."""


@dataclass(frozen=True)
class HeapInstruction:
    """One instruction of a compiled program; `parameter` is set for those of the entry computation."""

    name: str
    opcode: str
    op_name: str
    operands: tuple[int, ...]
    position: int
    shape: bytes
    parameter: int | None


@dataclass(frozen=True)
class Buffer:
    """Bytes of memory that a compiled program has while it holds most.

    `argument` is the position of an argument among those that the program reads, `results` are the positions
    of the results that are written there: a donated argument has both. `readers` are the `op_name`s of the
    instructions that read the value, `sources` the arguments that its maker reads.
    """

    kind: Kind
    nbytes: int
    offset: int
    allocation: int
    instruction: str
    opcode: str
    op_name: str
    shape: tuple[int, ...]
    dtype: str
    argument: int | None = None
    results: tuple[int, ...] = ()
    readers: tuple[str, ...] = ()
    source: int | None = None


@dataclass(frozen=True)
class Assignment:
    """The buffers that exist when a program holds most, and the bytes that lie unused between them.

    Numbers that are written in the program are left out. `hides` says that a kernel computes several products
    or windows one from the other: what a library holds for that is no buffer of XLA's.
    """

    buffers: tuple[Buffer, ...]
    unused: int
    hides: bool

    @property
    def nbytes(self) -> int:
        """All bytes that the program allocates."""
        return sum(b.nbytes for b in self.buffers) + self.unused


def buffers(compiled: Any) -> Assignment:
    """Read the buffer assignment of a compiled program.

    Raises:
        NoBuffersError: its compiler hands over none, as those of TPU and CUDA do without a device.
    """
    proto = getattr(compiled.memory_analysis(), "serialized_buffer_assignment_proto", b"")
    at_peak = {_one(peak, 1): set(_numbers(peak, 2)) for peak in _many(proto, 5)}
    if not proto or not at_peak:
        placed = jax.tree.leaves((compiled.input_shardings, compiled.output_shardings))
        platform = next((next(iter(s.device_set)).platform for s in placed), "?")
        raise NoBuffersError(
            f"the compiler for {platform!r} does not say which buffers a program has; its totals are known."
        )
    program = _Module.of(compiled.runtime_executable().hlo_modules())
    logical = {_one(value, 1): _one(value, 3, b"") for value in _many(proto, 1)}
    found, unused = [], 0
    for allocation in _many(proto, 3):
        index, size = _one(allocation, 1), _one(allocation, 2)
        if _one(allocation, 3):  # Of one thread's own stack, no part of any total.
            continue
        values = [(_one(v, 1), _one(v, 2), _one(v, 3)) for v in _many(allocation, 9)]
        is_argument = bool(_one(allocation, 5))
        kind: Kind = (
            "argument"
            if is_argument
            else "constant"
            if _one(allocation, 12)
            else "result"
            if _one(allocation, 7)
            else "temporary"
        )
        if kind == "temporary":
            live = [v for v in values if v[0] in at_peak.get(index, ())]
            unused += size - sum(n for _, _, n in live)
        else:
            live = [(values[-1][0], 0, size)] if values else []
            unused += 0 if values else size
            if is_argument:
                live = [(_parameter_value(values, logical, program), 0, size)]
        for number, offset, nbytes in live:
            every = [logical[v] for v, *_ in values]
            buffer = program.buffer(kind, nbytes, offset, index, logical[number], every)
            if kind != "constant" or buffer.shape:
                found.append(buffer)
    return Assignment((*found, *program.embedded), unused, program.hides)


def _parameter_value(values: Sequence[tuple[int, int, int]], logical: Any, program: _Module) -> int:
    """Which of the values in an argument's place is the argument."""
    for number, *_ in values:
        made = program.instructions.get(_one(logical[number], 4))
        if made is not None and made.parameter is not None:
            return number
    return values[0][0]


@dataclass(frozen=True, eq=False)
class _Module:
    """The instructions of a module by number, who reads each, and the entry computation's root."""

    instructions: dict[int, HeapInstruction]
    users: dict[int, list[int]]
    root: int
    hides: bool
    embedded: tuple[Buffer, ...]

    @classmethod
    def of(cls, modules: Sequence[Any]) -> _Module:
        instructions: dict[int, HeapInstruction] = {}
        root, hides, embedded = 0, False, []
        for module in modules:
            proto = module.as_serialized_hlo_module_proto()
            entry = _one(proto, 6)
            for computation in _many(proto, 3):
                is_entry = _one(computation, 5) == entry
                root = _one(computation, 6) if is_entry else root
                if _one(computation, 7):  # The computation of a fused kernel.
                    inside = _many(computation, 2)
                    hides = hides or sum(_text(i, 2) in _COMPUTED for i in inside) > 1
                    embedded += [_constant(i) for i in inside if _text(i, 2) == "constant"]
                for i in _many(computation, 2):
                    opcode = _text(i, 2)
                    parameter = _one(i, 9) if is_entry and opcode == "parameter" else None
                    instructions[_one(i, 35)] = HeapInstruction(
                        _text(i, 1),
                        opcode,
                        _text(_one(i, 7, b""), 2),
                        tuple(_numbers(i, 36)),
                        _one(i, 13),
                        _one(i, 3, b""),
                        parameter,
                    )
        users: dict[int, list[int]] = defaultdict(list)
        for number, instruction in instructions.items():
            for operand in instruction.operands:
                users[operand].append(number)
        return cls(instructions, users, root, hides, tuple(b for b in embedded if b.shape))

    def buffer(
        self, kind: Kind, nbytes: int, offset: int, allocation: int, value: bytes, others: Sequence[bytes]
    ) -> Buffer:
        """One buffer, described by the instruction that makes its value."""
        number, path = _one(value, 4), tuple(_numbers(value, 3))
        made = self.instructions.get(number)
        if made is None:
            return Buffer(kind, nbytes, offset, allocation, "", "", "", (), "")
        shape, dtype = _type(made.shape, path)
        values = ((_one(other, 4), tuple(_numbers(other, 3))) for other in others)
        results = {j for value in values for j in self.results.get(value, ())}
        name = made.op_name or self._named(number, path)
        readers = dict.fromkeys(self.instructions[n].op_name for n in self._readers(number, path, set()))
        return Buffer(
            *(kind, nbytes, offset, allocation, made.name, made.opcode, name, shape, dtype, made.parameter),
            results=tuple(sorted(results)) if kind in ("argument", "result") else (),
            readers=tuple(readers),
            source=self._source(number),
        )

    def _readers(self, number: int, path: tuple[int, ...], seen: set[Any]) -> Iterator[int]:
        """The instructions that read a part of an instruction's result, behind those that hand it on."""
        if (number, path) in seen:
            return
        seen.add((number, path))
        for user in self.users[number]:
            of = self.instructions[user]
            if of.opcode not in _PASSES or of.opcode == "while":
                yield user  # A loop reads its operand, and hands it on.
            if of.opcode not in _PASSES:
                continue
            if of.opcode == "tuple":
                for k, operand in enumerate(of.operands):
                    if operand == number:
                        yield from self._readers(user, (k, *path), seen)
            elif of.opcode == "get-tuple-element":
                if path and path[0] == of.position:
                    yield from self._readers(user, path[1:], seen)
            else:
                yield from self._readers(user, path, seen)

    def _named(self, number: int, path: tuple[int, ...]) -> str:
        """The name of a value whose maker has none: that of what reads it, or of what it is made from."""
        readers = (self.instructions[n].op_name for n in self._readers(number, path, set()))
        operands = (self.instructions[n].op_name for n in self.instructions[number].operands)
        return next((name for names in (readers, operands) for name in names if name), "")

    @functools.cached_property
    def results(self) -> dict[tuple[int, tuple[int, ...]], list[int]]:
        """The positions of the program's results, by the value that each is."""
        root = self.instructions[self.root]
        if root.opcode != "tuple":
            return {(self.root, ()): [0]}
        found: dict[tuple[int, tuple[int, ...]], list[int]] = defaultdict(list)
        for k, operand in enumerate(root.operands):
            found[self._origin(operand, ())].append(k)
        return found

    def _origin(self, number: int, path: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
        """The instruction and the part of its result that a value is, before it was handed on."""
        made = self.instructions[number]
        if made.opcode == "get-tuple-element":
            return self._origin(made.operands[0], (made.position, *path))
        if made.opcode == "tuple" and path:
            return self._origin(made.operands[path[0]], path[1:])
        if made.opcode == "bitcast":
            return self._origin(made.operands[0], path)
        return number, path

    def _source(self, number: int) -> int | None:
        """The argument of the program that an instruction reads last, itself or by its largest operand."""
        seen = set()
        while number not in seen:
            seen.add(number)
            origins = [self._origin(o, ())[0] for o in self.instructions[number].operands]
            given = [p for o in origins if (p := self.instructions[o].parameter) is not None]
            if given:
                return given[-1]
            if not origins:
                return None
            number = max(origins, key=lambda o: math.prod(_type(self.instructions[o].shape, ())[0] or (1,)))
        return None


def _constant(instruction: bytes) -> Buffer:
    """An array that is written inside of a fused kernel: it is part of the program."""
    shape, dtype = _type(_one(instruction, 3, b""), ())
    bits = re.sub(r"_.*|\D", "", dtype)
    size = math.prod(shape) * max(int(bits or 8) // 8, 1)
    return Buffer("constant", size, 0, -1, _text(instruction, 1), "constant", "", shape, dtype)


def _type(shape: bytes, path: Sequence[int]) -> tuple[tuple[int, ...], str]:
    """The dimensions and the type of the part of a shape at a path."""
    for index in path:
        parts = _many(shape, 4)
        if index >= len(parts):
            return (), ""
        shape = parts[index]
    number = _one(shape, 2)
    return tuple(_numbers(shape, 3)), _DTYPES.get(number, f"type {number}")


# --- the wire format of protocol buffers ------------------------------------------------------


def _varint(data: bytes, i: int) -> tuple[int, int]:
    shift = value = 0
    while True:
        byte = data[i]
        i += 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value, i


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    i = 0
    while i < len(data):
        key, i = _varint(data, i)
        wire = key & 7
        if wire == 0:
            value, i = _varint(data, i)
            yield key >> 3, value
            continue
        size = 8 if wire == 1 else 4
        if wire == 2:
            size, i = _varint(data, i)
        yield key >> 3, data[i : i + size]
        i += size


def _many(data: bytes, field: int) -> list[Any]:
    return [value for number, value in _fields(data) if number == field]


def _one(data: bytes, field: int, default: Any = 0) -> Any:
    return next((value for number, value in _fields(data) if number == field), default)


def _text(data: bytes, field: int) -> str:
    return str(_one(data, field, b"").decode())


def _numbers(data: bytes, field: int) -> list[int]:
    """Repeated numbers, packed or not."""
    found: list[int] = []
    for value in _many(data, field):
        if isinstance(value, int):
            found.append(value)
            continue
        i = 0
        while i < len(value):
            number, i = _varint(value, i)
            found.append(number)
    return found
