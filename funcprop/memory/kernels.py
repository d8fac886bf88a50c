"""Which steps the compiler runs as one kernel: what is inside of a kernel never reaches memory.

The rules are those of XLA's fusion pass for the CPU. A step is made part of the kernels that read it if it is
one pass over entries, as often as there are such kernels; it is kept in memory if one of its readers is a call
of a library (a product, a convolution), if it is expensive and would be computed twice, or if computing it
twice would read more than it writes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from funcprop.memory.program import Program, Step, Value

_FUSED = ("elementwise", "move")


@dataclass
class Member:
    """A step inside of a kernel: whether its entries are computed repeatedly, and in the root's own order."""

    step: Step
    reused: bool
    aligned: bool


@dataclass(eq=False)
class Kernel:
    """A step that is kept in memory, with what is computed inside of it.

    `reads` are values from memory; those in `aligned` are read once, entry by entry, so that the result may be
    written over them. `in_place` are pairs of what is written over and the result.
    """

    root: Step
    members: dict[int, Member] = field(default_factory=dict)
    reads: list[Value] = field(default_factory=list)
    aligned: set[int] = field(default_factory=set)
    in_place: list[tuple[Value, Value]] = field(default_factory=list)

    @property
    def outputs(self) -> list[Value]:
        """What it keeps in memory."""
        return self.root.outputs


def kernels(program: Program, library: bool = True) -> list[Kernel]:
    """The kernels of a program, in its order. With `library`, sums are computed by a library too."""
    kept = {id(v) for v in program.outputs if v is not None}
    within: dict[int, list[Kernel]] = {}
    made: list[Kernel] = []
    for step in reversed(program.steps):
        readers: dict[int, tuple[Kernel, list[bool], list[bool]]] = {}
        for user in {id(u): u for v in step.outputs for u in v.users}.values():
            for kernel in within.get(id(user), ()):
                member = kernel.members[id(user)]
                entry = readers.setdefault(id(kernel), (kernel, [], []))
                entry[1].append(member.reused or user.reuses)
                entry[2].append(member.aligned and user.kind == "elementwise")
        is_output = any(id(v) in kept for v in step.outputs)
        accepted = []
        for kernel, reused, aligned in readers.values():
            again = any(reused) or (len(reused) > 1 and not all(aligned))
            alone = len(readers) == 1 and not is_output
            if _accepts(kernel.root, step, library and not alone) and (
                not step.expensive or (alone and not again)
            ):
                accepted.append((kernel, Member(step, again, all(aligned))))
        if (is_output or len(accepted) < len(readers)) and _reads_more_than_it_writes(step):
            accepted = []
        for kernel, member in accepted:
            kernel.members[id(step)] = member
        within[id(step)] = [kernel for kernel, _ in accepted]
        if is_output or len(accepted) < len(readers):
            kernel = Kernel(step, {id(step): Member(step, False, True)})
            within[id(step)].append(kernel)
            made.append(kernel)
    for kernel in made:
        _connect(kernel)
    return made[::-1]


def _accepts(root: Step, step: Step, by_library: bool) -> bool:
    """Whether the kernel of a root can compute a step inside."""
    if step.kind not in _FUSED or _is_long_concatenation(step) or _is_long_concatenation(root):
        return False
    if root.kind == "reduce":
        return not by_library
    return root.kind in _FUSED or root.op == "dynamic_update_slice"


def _is_long_concatenation(step: Step) -> bool:
    """A concatenation that is a kernel by itself: of many arrays, or of rows side by side."""
    if step.op != "concatenate":
        return False
    result = step.outputs[0]
    if len(step.inputs) > 8:
        return True
    itemsize = result.nbytes // max(result.size, 1)
    along_rows = all(v.shape[:-1] == result.shape[:-1] for v in step.inputs)
    wide = result.shape[-1] * itemsize >= 64 and result.nbytes >= 2048
    return len(result.shape) > 1 and along_rows and wide


def _reads_more_than_it_writes(step: Step) -> bool:
    written = step.outputs[0].size
    full = [v for v in step.inputs if _rank(v.shape) >= _rank(step.outputs[0].shape)]
    full = [v for v in full if v.step is None or v.step.op not in ("broadcast_in_dim", "iota")]
    return len(full) > 1 and sum(v.size for v in {id(v): v for v in step.inputs}.values()) > written


def _rank(shape: Sequence[int]) -> int:
    return sum(d > 1 for d in shape)


def _connect(kernel: Kernel) -> None:
    """What a kernel reads from memory."""
    aligned: dict[int, bool] = {}
    for member in reversed(kernel.members.values()):
        step = member.step
        for value in step.inputs:
            if value.step is not None and id(value.step) in kernel.members:
                continue
            if id(value) not in aligned:
                kernel.reads.append(value)
            entrywise = member.aligned and not member.reused and step.kind == "elementwise"
            entrywise = entrywise and value.nbytes == kernel.outputs[0].nbytes
            entrywise = entrywise or any(value is over for over, _ in step.in_place)
            aligned[id(value)] = aligned.get(id(value), True) and entrywise
    kernel.aligned = {key for key, entrywise in aligned.items() if entrywise}
    kernel.in_place = list(kernel.root.in_place)


def is_source(kernel: Kernel) -> bool:
    """Whether a kernel reads nothing: it may run at any time."""
    return not kernel.reads


def size_of(values: Sequence[Value]) -> int:
    """Bytes of some values together."""
    return math.fsum(v.nbytes for v in values).__int__()
