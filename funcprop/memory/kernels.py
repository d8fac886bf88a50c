"""Which steps the compiler runs as one kernel: what is inside of a kernel never reaches memory.

The rules are those of XLA's fusion pass for the CPU. A step is made part of the kernels that read it if it
is one pass over entries, as often as there are such kernels; it is kept in memory if one of its readers is a
call of a library (a product, a convolution), if it is expensive and would be computed twice, or if computing
it twice would read more than it writes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from funcprop.memory.steps import Step, StepProgram, Value

_FUSED = ("view", "elementwise", "move")
# What the library (YNNPACK) computes together with a sum or a maximum, from this many entries on.
_LIBRARY = frozenset(
    {"abs", "add", "add_any", "broadcast_in_dim", "ceil", "convert_element_type", "cos", "div", "erf"}
    | {"exp", "expm1", "floor", "integer_pow", "iota", "log", "log1p", "logistic", "max", "min", "mul"}
    | {
        "neg",
        "one_minus_square",
        "pad",
        "pow",
        "reshape",
        "round",
        "rsqrt",
        "sign",
        "sin",
        "sqrt",
        "square",
        "sub",
        "tan",
    }
    | {"tanh", "transpose"}
)
_LIBRARY_REDUCTIONS = frozenset({"reduce_sum", "reduce_max", "reduce_min"})
_LIBRARY_ENTRIES = 4096
_WINDOW = 32  # of sums that the library does not compute


@dataclass
class Member:
    """A step inside of a kernel: whether its entries are computed repeatedly, and in the root's own order."""

    step: Step
    reused: bool
    aligned: bool


@dataclass(eq=False)
class Kernel:
    """A step that is kept in memory, with what is computed inside of it.

    A kernel of the library takes in what only it reads. `reads` are values from memory; those in `aligned`
    are read once, entry by entry, so that the result may be written over them. `in_place` are pairs of what
    is written over and the result.
    """

    root: Step
    library: bool = False
    members: dict[int, Member] = field(default_factory=dict)
    reads: list[Value] = field(default_factory=list)
    aligned: set[int] = field(default_factory=set)
    in_place: list[tuple[Value, Value]] = field(default_factory=list)

    @property
    def outputs(self) -> list[Value]:
        """What it keeps in memory."""
        return self.root.outputs


def kernels(program: StepProgram, library: bool = True) -> tuple[list[Kernel], dict[int, Value]]:
    """The kernels of a program, in its order, and what values are the same memory as another, by identity.

    With `library`, sums are computed by a library too.
    """
    kept = {id(v) for v in program.outputs if v is not None}
    grown = _grown(program, kept) if library else {}
    single = _Unshared(program, kept, grown).find()
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
        alone = len(readers) == 1 and not is_output
        accepted = []
        for kernel, reused, aligned in readers.values():
            again = any(reused) or (len(reused) > 1 and not all(aligned))
            if kernel.library:
                joins = alone and (_in_library(step) or step.op in _LIBRARY_REDUCTIONS)
                joins = joins and id(step) not in grown
            else:
                joins = _accepts(kernel.root, step) and (not step.expensive or (alone and not again))
            if joins:
                accepted.append((kernel, Member(step, again, all(aligned))))
        if id(step) in grown or (id(step) in single and not alone):
            accepted = []
        for kernel, member in accepted:
            kernel.members[id(step)] = member
        within[id(step)] = [kernel for kernel, _ in accepted]
        if is_output or len(accepted) < len(readers):
            kernel = Kernel(step, id(step) in grown, {id(step): Member(step, False, True)})
            within[id(step)].append(kernel)
            made.append(kernel)
    for kernel in made:
        _connect(kernel)
    return _without_views(made[::-1])


def _without_views(made: Sequence[Kernel]) -> tuple[list[Kernel], dict[int, Value]]:
    """The kernels that compute something, and for the result of each other the value that it is."""
    same: dict[int, Value] = {}
    real = []
    for kernel in made:
        kernel.reads = list({id(v): v for v in (same.get(id(v), v) for v in kernel.reads)}.values())
        kernel.aligned = {id(same[key]) if key in same else key for key in kernel.aligned}
        kernel.in_place = [(same.get(id(v), v), result) for v, result in kernel.in_place]
        if all(member.step.kind == "view" for member in kernel.members.values()):
            same[id(kernel.outputs[0])] = kernel.reads[0]
        else:
            real.append(kernel)
    return real, same


def _accepts(root: Step, step: Step) -> bool:
    """Whether the kernel of a root can compute a step inside."""
    if step.kind not in _FUSED or _is_long_concatenation(step) or _is_long_concatenation(root):
        return False
    if root.kind == "reduce":
        # A longer one is done window by window, and such a kernel computes nothing inside.
        return max(v.size for v in root.inputs) <= _WINDOW * root.outputs[0].size
    return root.kind in _FUSED or root.op == "dynamic_update_slice"


def _grown(program: StepProgram, kept: set[int]) -> dict[int, Step]:
    """The steps whose results leave a kernel of the library: a reduction, or what follows if only it is read.

    Reference: `LibraryRewriter` and `YnnMatcher` of XLA.
    """
    found: dict[int, Step] = {}
    for step in reversed(program.steps):
        if step.op not in _LIBRARY_REDUCTIONS or max(v.size for v in step.inputs) < _LIBRARY_ENTRIES:
            continue
        root = step
        while not any(id(v) in kept for v in root.outputs):
            users = {id(u): u for v in root.outputs for u in v.users}
            (user,) = users.values() if len(users) == 1 else (None,)
            if user is None or not _in_library(user):
                break
            root = user
        found[id(root)] = root
    return found


def _in_library(step: Step) -> bool:
    values = [*step.inputs, *step.outputs]
    light = step.op in ("broadcast_in_dim", "transpose", "pad", "iota", "reshape")
    return step.op in _LIBRARY and (light or max(v.size for v in values) >= _LIBRARY_ENTRIES)


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


class _Unshared:
    """Finds the steps that are not computed twice: those that read more than they write.

    Unless each path from such a step to each of its readers can be inside of one kernel.

    Reference: `InstructionFusion::ComputeGloballyUnfusible` of XLA.
    """

    def __init__(self, program: StepProgram, kept: set[int], grown: Mapping[int, Step]) -> None:
        self.program, self.kept, self.grown = program, kept, grown
        self.after: dict[int, int] = {}  # of a step: a bit for each step from which it can be reached
        self.bit: dict[int, int] = {}
        for i, step in enumerate(program.steps):
            self.bit[id(step)] = 1 << i
            mask = 1 << i
            for value in step.inputs:
                mask |= self.after.get(id(value.step), 0)
            self.after[id(step)] = mask
        self.found: set[int] = set()

    def find(self) -> set[int]:
        """The identities of these steps."""
        for step in reversed(self.program.steps):
            if step.kind not in _FUSED or not _reads_more_than_it_writes(step):
                continue
            known: dict[int, bool] = {}
            users = {id(u): u for v in step.outputs for u in v.users}.values()
            returned = any(id(v) in self.kept for v in step.outputs)
            if returned or not all(self._inside(step, user, known) for user in users):
                self.found.add(id(step))
        return self.found

    def _inside(self, step: Step, reader: Step, known: dict[int, bool]) -> bool:
        """Whether every path from a step to a reader can be inside of the reader's kernel."""
        if step is reader:
            return True
        if id(reader) in known:
            return known[id(reader)]
        known[id(reader)] = all(
            self._joins(value.step, reader) and self._inside(step, value.step, known)
            for value in reader.inputs
            if value.step is not None and self.after.get(id(value.step), 0) & self.bit[id(step)]
        )
        return known[id(reader)]

    def _joins(self, step: Step, reader: Step) -> bool:
        users = {id(u) for v in step.outputs for u in v.users}
        alone = len(users) == 1 and not any(id(v) in self.kept for v in step.outputs)
        return (
            id(step) not in self.found
            and id(reader) not in self.grown
            and _accepts(reader, step)
            and (not step.expensive or (alone and not reader.reuses))
        )


def _reads_more_than_it_writes(step: Step) -> bool:
    written = step.outputs[0]
    full = [v for v in step.inputs if _rank(v.shape) >= _rank(written.shape)]
    full = [v for v in full if v.step is None or v.step.op not in ("broadcast_in_dim", "iota")]
    return len(full) > 1 and sum(v.size for v in {id(v): v for v in step.inputs}.values()) > written.size


def _rank(shape: Sequence[int]) -> int:
    return sum(d > 1 for d in shape)


def _connect(kernel: Kernel) -> None:
    """What a kernel reads from memory."""
    aligned: dict[int, bool] = {}
    result = kernel.outputs[0]
    for member in reversed(kernel.members.values()):
        step = member.step
        for value in step.inputs:
            if value.step is not None and id(value.step) in kernel.members:
                continue
            if id(value) not in aligned:
                kernel.reads.append(value)
            entrywise = member.aligned and not member.reused and step.kind == "elementwise"
            entrywise = entrywise and not kernel.library and value.nbytes == result.nbytes
            entrywise = entrywise or any(value is over for over, _ in step.in_place)
            aligned[id(value)] = aligned.get(id(value), True) and entrywise
    kernel.aligned = {key for key, entrywise in aligned.items() if entrywise}
    kernel.in_place = list(kernel.root.in_place)
