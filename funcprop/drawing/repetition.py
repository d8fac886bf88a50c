"""Whether repeated blocks that are drawn once still say which function it is.

In a picture that is folded, block `i + 1` reads what block `i` computes, or all of them read the same; and
what is outside of the blocks reads the last of them, or each of them in the same role. Where that is not so
(the query and the key of an attention are the same computation of the same value, but are read differently),
`begin_anew` says at which blocks a repetition has to end.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple

from funcprop.drawing.folding import Equality, Folding, fold
from funcprop.drawing.request import Shown
from funcprop.drawing.scopes import Scope, scope_path, scope_tree
from funcprop.graph.graph import Operator, Variable

# Operators that do not tell their operands apart, or only in the order in which they come.
_MOVING = frozenset(
    {"broadcast_in_dim", "reshape", "expand_dims", "squeeze", "transpose", "convert_element_type"}
)
_ORDERED = frozenset({"concatenate", "stack"})
_SYMMETRIC = frozenset({"add", "add_any", "mul", "max", "min", "and", "or", "xor", *_ORDERED})


class Read(NamedTuple):
    """A value that an operator reads, and as what: the number of the operand, or a step of a loop."""

    variable: Variable
    operator: Operator
    role: Any


class Origin(NamedTuple):
    """The operator that computes a value, or is first in the loop where it stands; and its number."""

    operator: Operator
    number: Any


class ReadValues:
    """All that is read in a drawing: by operators, and by the values of opened loops."""

    def __init__(self, shown: Shown) -> None:
        self.origins = {
            v.name: Origin(op, i) for op in shown.graph.operators for i, v in enumerate(op.outputs)
        }
        operators = {op.name: op for op in shown.graph.operators}
        place_of = {v.name: place for place, v in shown.places.items()}
        for name, place in place_of.items():
            self.origins.setdefault(name, Origin(operators[place.operator], place[1:]))
        self.made: dict[str, dict[Any, str]] = defaultdict(dict)
        for name, origin in self.origins.items():
            self.made[origin.operator.name][origin.number] = name
        self.of: dict[str, list[Read]] = defaultdict(list)
        for op in shown.graph.operators:
            for i, v in enumerate(op.inputs):
                if v.kind != "literal":
                    self.of[op.name].append(Read(v, op, i))
        for link in shown.links:
            stands = place_of.get(link.target.name)
            if stands is not None and link.source.kind != "literal":
                role = (stands[1:], link.is_next)
                self.of[stands.operator].append(Read(link.source, operators[stands.operator], role))
        self.by: dict[str, list[Read]] = defaultdict(list)
        for reads in self.of.values():
            for read in reads:
                self.by[read.variable.name].append(read)
        self.results = {v.name for v in shown.graph.outputs}


def folded(shown: Shown, runs: bool, types: bool) -> tuple[Scope, Folding]:
    """The scopes of a drawing with repeated blocks folded to the first, where the picture stays true."""
    reads, anew = ReadValues(shown), defaultdict[str, set[int]](set)
    operators = beside(shown, reads)
    while True:
        root = scope_tree(operators, lambda op: shown.sections.get(op.name, ""))
        folding = fold(root, Equality(shown.roles, runs, types, anew))
        found = list(begin_anew(reads, folding))
        if not found:
            return root, folding
        for name, period in found:
            anew[name].add(period)


def begin_anew(reads: ReadValues, folding: Folding) -> Iterator[tuple[str, int]]:
    """Find the operators at which blocks begin that are not to be folded with the ones before.

    Each with the length of the blocks; none if all is well.
    """
    for number, group in enumerate(folding.groups):
        for blocks in _versions(number, folding):
            for i in _Repetition(blocks, reads, folding).faults():
                yield group.blocks[i][0].name, group.period


def _versions(number: int, folding: Folding) -> list[list[list[Operator]]]:
    """The blocks of a group, in every repetition of the groups around it."""
    found = [folding.groups[number].blocks]
    for outer in reversed(folding.groups[:number]):
        place = {op.name: m for m, op in enumerate(outer.blocks[0])}
        if found[0][0][0].name in place:
            found = [
                [[ops[place[op.name]] for op in block] for block in blocks]
                for blocks in found
                for ops in outer.blocks
            ]
    return found


def beside(shown: Shown, reads: ReadValues) -> list[Operator]:
    """The operators, with those that only move one value's entries beside what computes it.

    Results of an unrolled loop that are stacked get their new axis after the loop, each by an operator of its
    own: beside its value, it belongs to the repetition.
    """
    path = {op.name: scope_path(op.scope) for op in shown.graph.operators}
    after: dict[str, list[Operator]] = defaultdict(list)
    moved: set[str] = set()
    for op in shown.graph.operators:
        computed = [v for v in op.inputs if v.kind != "literal"]
        made = reads.origins.get(computed[0].name) if len(computed) == 1 else None
        if op.op in _MOVING and made is not None and isinstance(made.number, int) and op.outputs:
            same = shown.sections.get(op.name) == shown.sections.get(made.operator.name)
            if same and path[op.name] == path[made.operator.name][: len(path[op.name])]:
                after[made.operator.name].append(op)
                moved.add(op.name)
    if not moved:
        return list(shown.graph.operators)
    found: list[Operator] = []
    waiting: list[tuple[tuple[str, ...], Operator]] = []

    def put(op: Operator) -> None:
        found.append(op)
        waiting.extend((path[op.name][: len(path[w.name]) + 1], w) for w in after[op.name])

    def is_outside(op: Operator, scope: tuple[str, ...], w: Operator) -> bool:
        return len(scope) == len(path[w.name]) or path[op.name][: len(scope)] != scope

    for op in (op for op in shown.graph.operators if op.name not in moved):
        # Not into the middle of a scope in which it is not.
        while ready := [w for w in waiting if is_outside(op, *w)]:
            waiting.remove(ready[0])
            put(ready[0][1])
        put(op)
    while waiting:
        put(waiting.pop(0)[1])
    return found


class _Repetition:
    """One group of blocks, and how it is wired to what is around."""

    def __init__(self, blocks: list[list[Operator]], reads: ReadValues, folding: Folding) -> None:
        self.blocks, self.reads, self.folding, self.count = blocks, reads, folding, len(blocks)
        self.where = {op.name: (i, m) for i, ops in enumerate(blocks) for m, op in enumerate(ops)}

    @cached_property
    def is_chain(self) -> bool:
        """Whether each block reads what the one before has computed; results of others are each its own."""
        read = (read.variable for op in self.blocks[1] for read in self.reads.of[op.name])
        return any((found := self.source(1, v)) is not None and found[0] == "before" for v in read)

    def faults(self) -> Iterator[int]:
        """The numbers of the blocks with which the repetition cannot go on."""
        for m in range(len(self.blocks[0])):
            yield from self.entering(m)
            yield from self.leaving(m)

    # --- what comes in -------------------------------------------------------------------------

    def entering(self, m: int) -> Iterator[int]:
        """Check what the operators in this place of all blocks read."""
        slots = [{read.role: read.variable for read in self.reads.of[ops[m].name]} for ops in self.blocks]
        for role in dict.fromkeys(role for found in slots for role in found):
            sources = [found.get(role) for found in slots]
            for i in range(1, self.count):
                if not self.is_read_alike(sources[: i + 1]):
                    yield i
                    break

    def is_read_alike(self, variables: Sequence[Variable | None]) -> bool:
        """Whether one arrow (and one back to the beginning) says from where each block has its operand."""
        sources = [self.source(i, v) for i, v in enumerate(variables)]
        first, second = sources[0], sources[1]
        if any(s is None for s in sources):
            return all(s is None for s in sources)
        if all(s == first for s in sources):
            return first is not None and first[0] in ("own", "outside")
        if second is not None and second[0] == "before" and all(s == second for s in sources[1:]):
            return True
        names = [v.name for v in variables if v is not None]
        if len(set(names)) < len(names):
            return False
        if not self.is_chain and any(
            v.kind == "input" and "/" not in v.name for v in variables if v is not None
        ):
            # Both arguments of a function are seen: two views that one encoder reads.
            return False
        if all(name not in self.reads.origins for name in names):
            return all(self.is_own(i, name) for i, name in enumerate(names))
        return self.is_parallel([(i, self.reads.origins.get(name)) for i, name in enumerate(names)])

    def source(self, i: int, v: Variable | None) -> tuple[Any, ...] | None:
        """Where block `i` has a value from: itself, the block before, another block, or from outside."""
        if v is None:
            return None
        made = self.reads.origins.get(v.name)
        at = None if made is None else self.where.get(made.operator.name)
        if made is None or at is None:
            return "outside", v.name
        index, m = at
        if index == i:
            return "own", m, made.number
        return ("before", m, made.number) if index == i - 1 else ("other", index, m, made.number)

    def is_own(self, i: int, name: str) -> bool:
        """Whether a value that is given (a parameter) is read in block `i` alone."""
        return name not in self.reads.results and all(
            self.where.get(read.operator.name, (-1,))[0] == i for read in self.reads.by[name]
        )

    def is_parallel(self, pairs: Sequence[tuple[int, Origin | None]]) -> bool:
        """Whether block by block the values come from, or go to, those of another repetition."""
        ends = [end for _, end in pairs]
        drawn = [None if end is None else (self.folding.of(end.operator).name, end.number) for end in ends]
        if None in drawn or len(set(drawn)) > 1:
            return False
        places = [self.folding.coordinates(end.operator) for end in ends if end is not None]
        moving = [g for g in places[0] if len({place.get(g) for place in places}) > 1]
        if len(moving) != 1 or len(self.folding.groups[moving[0]].blocks) != self.count:
            return False
        index = [place[moving[0]] for place in places]
        own = [i for i, _ in pairs]
        return index == own or index == [self.count - 1 - i for i in own]

    # --- what goes out -------------------------------------------------------------------------

    def leaving(self, m: int) -> Iterator[int]:
        """Check who reads what the operators in this place of all blocks compute."""
        blocks = [ops[m] for ops in self.blocks]
        names = [self.values(op) for op in blocks]
        for number in names[0]:
            variables = [found.get(number) for found in names]
            yield from self.read_outside([v for v in variables if v is not None])

    def values(self, op: Operator) -> dict[Any, str]:
        """The values that come from an operator, or stand in the loop that it is the first of."""
        return self.reads.made.get(op.name, {})

    def read_outside(self, names: Sequence[str]) -> Iterator[int]:
        """Check the readers of corresponding values of all blocks."""
        readers: dict[Any, list[tuple[int, Read]]] = defaultdict(list)
        for i, name in enumerate(names):
            for read in self.reads.by[name]:
                if read.operator.name not in self.where:
                    role = "any" if read.operator.op in _SYMMETRIC else read.role
                    readers[self.folding.of(read.operator).name, role].append((i, read))
        results = [i for i, name in enumerate(names) if name in self.reads.results]
        if len(results) < self.count or not self.is_chain:
            yield from (i + 1 for i in results if i + 1 < self.count)
        for found in readers.values():
            early = dict.fromkeys(i for i, _ in found if i + 1 < self.count)
            if early and not self.is_read_outside_alike(found):
                yield from (i + 1 for i in early)

    def is_read_outside_alike(self, found: Sequence[tuple[int, Read]]) -> bool:
        """Whether one arrow says who reads the value of each block."""
        if sorted(i for i, _ in found) != list(range(self.count)):
            return False
        operators = {read.operator.name: read.operator for _, read in found}
        if len(operators) == 1:
            (reader,) = operators.values()
            roles = [read.role for _, read in found]
            return (
                reader.op in _SYMMETRIC
                and all(isinstance(role, int) for role in roles)
                and (reader.op not in _ORDERED or roles == sorted(roles))
            )
        return self.is_parallel([(i, Origin(read.operator, read.role)) for i, read in found])
