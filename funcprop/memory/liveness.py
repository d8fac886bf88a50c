"""How long every buffer of a program is needed, and how many bytes that takes.

Kernels run in the order in which their operands become ready (breadth first). A result is written over an
operand that is read entry by entry for the last time; a donated argument is written over, too, and copied
before if another kernel may still have to read it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from funcprop.memory.heap import Buffer, heap_size, peak_time
from funcprop.memory.kernels import Kernel, kernels
from funcprop.memory.steps import Step, StepProgram, Value


@dataclass(eq=False)
class Timeline:
    """A program as it runs: kernels in order, buffers, and the bytes of all its temporary ones.

    `temporary` is the size of the arena that holds what is neither argument nor result. `at` is the time of
    its peak, `live` the buffers needed then. `inside` are the timelines of loop bodies, by their step.
    """

    order: list[Kernel]
    temporary: int
    at: int
    live: list[Buffer]
    inside: dict[int, Timeline] = field(default_factory=dict)


def timeline(program: StepProgram, library: bool = True) -> Timeline:
    """Run a program on paper; `library` as in `kernels`."""
    made, same = kernels(program, library)
    outputs = [None if v is None else same.get(id(v), v) for v in program.outputs]
    over: list[tuple[Value, Value]] = []
    for i, j in program.donated.items():
        result = outputs[j]
        if result is not None and result.step is not None:
            over.append((program.arguments[i], result))
    made = _with_copies(made, over)
    order = _breadth_first(program, made)
    return _Simulation(outputs, order, over, library).run()


# --- copies -----------------------------------------------------------------------------------


def _with_copies(made: list[Kernel], donated: Sequence[tuple[Value, Value]]) -> list[Kernel]:
    """Add copies of what is written over while others may still read it."""
    position = {id(v): i for i, kernel in enumerate(made) for v in kernel.outputs}
    before: list[int] = []
    for i, kernel in enumerate(made):
        mask = 1 << i
        for value in kernel.reads:
            if id(value) in position:
                mask |= before[position[id(value)]]
        before.append(mask)
    readers: dict[int, list[int]] = {}
    for i, kernel in enumerate(made):
        for value in kernel.reads:
            readers.setdefault(id(value), []).append(i)
    added: list[Kernel] = []

    def copy_of(value: Value) -> Value:
        step = Step("copy", "kernel", _scope(value), [value], [])
        copied = Value(value.shape, value.dtype, value.nbytes, step, name=value.name)
        step.outputs.append(copied)
        added.append(Kernel(step, reads=[value]))
        return copied

    for argument, result in donated:
        writer = position.get(id(result))
        if writer is None:
            continue
        others = [i for i in readers.get(id(argument), ()) if i != writer]
        aligned = id(argument) in made[writer].aligned or id(argument) not in map(id, made[writer].reads)
        if not aligned or any(not before[writer] >> i & 1 for i in others):
            copied = copy_of(argument)
            for i in readers[id(argument)]:
                _replace(made[i], argument, copied)
    for i, kernel in enumerate(made):
        pairs: list[tuple[Value, Value]] = []
        for value, result in kernel.in_place:
            others = [j for j in readers.get(id(value), ()) if j != i]
            # Of results that begin as one value, the first is written over it, the others over copies.
            owned = value.step is not None and id(value) in position
            owned = owned and not any(v is value for v, _ in pairs)
            body_owned = value.step is None and kernel.root.op == "dynamic_update_slice" and not others
            if (owned and all(before[i] >> j & 1 for j in others)) or body_owned:
                pairs.append((value, result))
            elif kernel.root.kind == "loop":
                copied = copy_of(value)
                pairs.append((copied, result))
                kernel.reads.append(copied)
        read_besides = {id(v) for v in kernel.root.inputs[: len(kernel.root.inputs) - len(kernel.in_place)]}
        replaced = {id(v) for v, _ in kernel.in_place} - {id(v) for v, _ in pairs}
        if kernel.root.kind == "loop":
            kernel.reads = [v for v in kernel.reads if id(v) not in replaced or id(v) in read_besides]
        kernel.in_place = pairs
    return [*added, *made]


def _replace(kernel: Kernel, value: Value, by: Value) -> None:
    kernel.reads = [by if v is value else v for v in kernel.reads]
    if id(value) in kernel.aligned:
        kernel.aligned.add(id(by))
    kernel.in_place = [(by if v is value else v, result) for v, result in kernel.in_place]


def _scope(value: Value) -> str:
    if value.step is not None:
        return value.step.scope
    return value.users[0].scope if value.users else ""


# --- order ------------------------------------------------------------------------------------


def _breadth_first(program: StepProgram, made: Sequence[Kernel]) -> list[Kernel]:
    """Kernels in the order in which they become ready: first those of the arguments.

    Reference: `BFScheduler` of XLA.
    """
    sources = {id(v): kernel for kernel in made for v in kernel.outputs}
    waiting: dict[int, int] = {}
    readers: dict[int, list[Kernel]] = {}
    given = {id(v): v for v in [*program.arguments, *program.constants]}
    for kernel in made:
        needs = {id(sources[id(v)]) if id(v) in sources else id(v) for v in kernel.reads}
        # What is read from outside of a loop body is there from the start.
        needs = {key for key in needs if key in given or key in map(id, sources.values())}
        waiting[id(kernel)] = len(needs)
        for key in needs:
            readers.setdefault(key, []).append(kernel)
    ready: deque[Value | Kernel] = deque(given.values())
    ready.extend(kernel for kernel in made if waiting[id(kernel)] == 0)
    order = []
    while ready:
        item = ready.popleft()
        if isinstance(item, Kernel):
            order.append(item)
        following = readers.get(id(item), [])
        if isinstance(item, Kernel) and len(item.members) > 1:
            following = sorted(following, key=lambda kernel: kernel.root.late)
        for kernel in following:
            waiting[id(kernel)] -= 1
            if waiting[id(kernel)] == 0:
                ready.append(kernel)
    return order


# --- lifetimes --------------------------------------------------------------------------------


class _Simulation:
    """Buffers of kernels in a given order."""

    def __init__(
        self,
        outputs: Sequence[Value | None],
        order: list[Kernel],
        donated: Sequence[tuple[Value, Value]],
        library: bool,
    ) -> None:
        self.order, self.library = order, library
        self.end = len(order)
        self.last: dict[int, int] = {}
        for time, kernel in enumerate(order):
            for value in kernel.reads:
                self.last[id(value)] = time
        self.results = {id(v) for v in outputs if v is not None}
        for key in self.results:
            self.last[key] = self.end
        self.donated = {id(result): argument for argument, result in donated}

    def run(self) -> Timeline:
        buffers: list[Buffer] = []
        of: dict[int, Buffer] = {}
        inside: dict[int, Timeline] = {}
        scratch: list[Buffer] = []
        fixed: dict[int, list[Buffer]] = {id(a): [] for a in self.donated.values()}
        successors: dict[int, Buffer] = {}
        for argument in self.donated.values():
            fixed[id(argument)].append(
                Buffer(argument.nbytes, -1, self.last.get(id(argument), -1), [argument])
            )
        for time, kernel in enumerate(self.order):
            taken: set[int] = set()
            pairs = {id(result): value for value, result in kernel.in_place}
            for value in kernel.outputs:
                end = self.last.get(id(value), time)
                dying = self._overwritten(kernel, value, time, taken, of)
                over = pairs.get(id(value)) or next(iter(dying), None)
                if id(value) in self.donated:
                    buffer = Buffer(value.nbytes, time, end, [value])
                    fixed[id(self.donated[id(value)])].append(buffer)
                    successors.update({id(of[id(v)]): buffer for v in dying})
                elif over is not None and id(over) in of:
                    buffer = of[id(over)]
                    buffer.end = max(buffer.end, end)
                    buffer.values.append(value)
                    of[id(value)] = buffer
                    taken.add(id(over))
                elif over is not None and over.step is None and kernel.root.kind == "update":
                    continue  # The array of a loop: it is counted where the loop is.
                else:
                    of[id(value)] = Buffer(value.nbytes, time, end, [value])
                    buffers.append(of[id(value)])
            extra = kernel.root.extra + self._inside(kernel, inside)
            if extra:
                scratch.append(Buffer(extra, time, time, [kernel.root]))
        arena = self._outside_of_arguments_and_results([*buffers, *scratch], fixed, successors)
        at = peak_time(arena)
        live = [b for b in arena if b.start <= at <= b.end]
        return Timeline(self.order, heap_size(arena), at, live, inside)

    def _overwritten(
        self, kernel: Kernel, value: Value, time: int, taken: set[int], of: Mapping[int, Buffer]
    ) -> list[Value]:
        """The operands that are read for the last time, entry by entry, and are as large."""
        return [
            operand
            for operand in kernel.reads
            if id(operand) in kernel.aligned
            and id(operand) in of
            and id(operand) not in taken
            and operand.nbytes == value.nbytes
            and of[id(operand)].end == time
        ]

    def _inside(self, kernel: Kernel, inside: dict[int, Timeline]) -> int:
        """What the bodies of a loop, or the largest branch, hold besides what goes in and out."""
        found = [timeline(body, self.library) for body in kernel.root.bodies]
        largest = max(found, key=lambda t: t.temporary, default=None)
        if largest is None:
            return 0
        inside[id(kernel.root)] = largest
        return largest.temporary

    def _outside_of_arguments_and_results(
        self, buffers: Sequence[Buffer], fixed: Mapping[int, list[Buffer]], successors: Mapping[int, Buffer]
    ) -> list[Buffer]:
        """The buffers of the arena: without results, and without what fits into the memory of one.

        Temporary values go into the memory of a result before it is written, and into that of a donated
        argument between its last reading and the writing of its successor. `successors` are results that are
        written over a buffer entry by entry, so that both may share memory.
        """
        rooms: list[tuple[int, list[Buffer]]] = [
            (used[0].nbytes, list(used)) for used in fixed.values() if used
        ]
        arena = []
        at = peak_time(buffers)

        def is_result(buffer: Buffer) -> bool:
            return any(id(v) in self.results for v in buffer.values)

        # Of equal ones results come first, as in `BufferAssigner` of XLA, then those needed at the peak.
        for buffer in sorted(
            buffers, key=lambda b: (-b.nbytes, not is_result(b), not b.start <= at <= b.end)
        ):
            if is_result(buffer):
                rooms.append((buffer.nbytes, [buffer]))
                continue
            for size, used in reversed(rooms):
                after = successors.get(id(buffer))
                if size >= buffer.nbytes and not any(b.meets(buffer) for b in used if b is not after):
                    used.append(buffer)
                    break
            else:
                arena.append(buffer)
        return arena
