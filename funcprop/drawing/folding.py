"""Which scopes of a graph repeat.

Blocks repeat if they follow each other in one scope and are the same: the same operators, of the same types,
wired in the same way. They are folded to the first, and every operator of the others is represented by the
corresponding one of the first. Where a picture of that would be another function, `repetition.py` says at
which blocks a repetition has to begin anew.

Where nobody named scopes, blocks are found by their operators alone: runs of them, each of which reads what
the one before has computed. Of all places where a block could begin, that one is taken where the fewest
values come in: between two layers, not in the middle of one.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from funcprop.drawing.scopes import Scope
from funcprop.graph.graph import Operator, Variable

# A block of more siblings than this is not looked for, nor one of fewer operators that nobody named.
_LONGEST_PERIOD = 1024
_SHORTEST_RUN = 4


@dataclass
class FoldedBlocks:
    """Repetitions that are drawn once: the operators of each, in the same order, and their box.

    Each is so many children of the scope around (`period`).
    """

    blocks: list[list[Operator]]
    box: Scope
    period: int


@dataclass
class Folding:
    """`representative` of an operator that is folded away; `instance` says in which repetition it is."""

    representative: dict[str, Operator] = field(default_factory=dict)
    instance: dict[str, tuple[tuple[int, int], ...]] = field(default_factory=dict)
    groups: list[FoldedBlocks] = field(default_factory=list)

    def of(self, op: Operator) -> Operator:
        """The operator that is drawn for this one."""
        while (found := self.representative.get(op.name)) is not None:
            op = found
        return op

    def coordinates(self, op: Operator) -> dict[int, int]:
        """The number of the repetition in which an operator is, by group, from the outermost inwards."""
        found: dict[int, int] = {}
        drawn: Operator | None = op
        while drawn is not None:
            for group, index in self.instance.get(drawn.name, ()):
                found.setdefault(group, index)
            drawn = self.representative.get(drawn.name)
        return found

    def apart(self, a: Operator, b: Operator) -> bool:
        """Whether two operators are in different repetitions of one block."""
        first, second = self.coordinates(a), self.coordinates(b)
        return any(group in second and second[group] != index for group, index in first.items())


@dataclass(frozen=True)
class Equality:
    """When blocks are the same: `types` compares their sizes, `runs` also looks for blocks without scopes.

    A repetition does not go on at the operators in `anew`, nor has it several of them in one block, if they
    are as far from each other as is said there.
    """

    role: Mapping[str, str]
    runs: bool
    types: bool = True
    anew: Mapping[str, Collection[int]] = field(default_factory=dict)


def fold(root: Scope, equality: Equality) -> Folding:
    """Fold repeated blocks in place."""
    folding = Folding()
    _fold(root, _Signatures(root, equality), folding)
    return folding


def _fold(scope: Scope, signatures: _Signatures, folding: Folding) -> None:
    siblings = _Siblings(scope.children, signatures)
    kept: list[Scope | Operator] = []
    start = 0
    while start < len(scope.children):
        begin, period, count = siblings.repeats(start)
        kept.extend(scope.children[start:begin])
        block = scope.children[begin : begin + period]
        if count > 1:
            blocks = [scope.children[begin + i * period : begin + (i + 1) * period] for i in range(count)]
            members = [[op for child in b for op in _operators(child)] for b in blocks]
            number = len(folding.groups)
            for i, ops in enumerate(members):
                for first, op in zip(members[0], ops, strict=True):
                    folding.instance[op.name] = (*folding.instance.get(op.name, ()), (number, i))
                    if i:
                        folding.representative[op.name] = first
            box = _counted(block, blocks[-1], count, scope)
            types = [[_type(v) for op in ops for v in op.outputs] for ops in members]
            box.sizes_differ = any(found != types[0] for found in types)
            folding.groups.append(FoldedBlocks(members, box, period))
            block = [box]
        kept.extend(block)
        start = begin + period * count
    scope.children = kept
    for child in kept:
        if isinstance(child, Scope):
            _fold(child, signatures, folding)


def _operators(child: Scope | Operator) -> Iterator[Operator]:
    if isinstance(child, Scope):
        yield from child.operators()
    else:
        yield child


def _counted(block: list[Scope | Operator], last: list[Scope | Operator], count: int, parent: Scope) -> Scope:
    """The first block, with the number of its repetitions; several siblings get a scope of their own."""
    if len(block) == 1 and isinstance(block[0], Scope) and isinstance(last[0], Scope):
        block[0].count, block[0].last = count, last[0].path[-1]
        return block[0]
    group = Scope((), children=block, parent=parent, count=count)
    for child in block:
        if isinstance(child, Scope):
            child.parent = group
    return group


class _Siblings:
    """The children of a scope, in which repetitions are looked for."""

    def __init__(self, children: Sequence[Scope | Operator], signatures: _Signatures) -> None:
        self.children = children
        self.signatures = signatures
        self.equality = signatures.equality
        names = [next(_operators(child)).name for child in children]
        self.anew = {
            i: self.equality.anew[name] for i, name in enumerate(names) if name in self.equality.anew
        }
        # As text, so that blocks are compared at the speed of strings.
        self.kinds = "".join(chr(signatures.of([child])) for child in children)

    def repeats(self, start: int) -> tuple[int, int, int]:
        """Where the repetitions that cover the most begin, from here on, their length and their number.

        `(start, 1, 1)` for none.
        """
        kinds, best = self.kinds, (1, 1)
        for period in range(1, min(_LONGEST_PERIOD, (len(kinds) - start) // 2) + 1):
            if kinds[start] != kinds[start + period]:
                continue
            count = self.same(start, period)
            if count > 1 and period * count > best[0] * best[1]:
                count = self.equal(start, period, count)
                if count > 1 and period * count > best[0] * best[1]:
                    best = (period, count)
        period, count = best
        if count == 1 or period == 1:
            return start, period, count
        full = [b for b in range(start, start + period) if self.same(b, period) >= count]
        begin = min(full, key=lambda b: self.incoming(b, period))
        return (begin if self.equal(begin, period, count) == count else start), period, count

    def incoming(self, begin: int, period: int) -> int:
        """How many computed values come into the block that begins here."""
        return len(self.signatures.incoming(self.children[begin : begin + period]))

    def same(self, start: int, period: int) -> int:
        """How many blocks of this length, from here on, have the same children."""
        block, count = self.kinds[start : start + period], 1
        while self.kinds.startswith(block, at := start + count * period) and at not in self.anew:
            count += 1
        inside = next((i for i in range(count) if self.is_several(start + i * period, period)), count)
        return max(inside, 1)

    def is_several(self, start: int, period: int) -> bool:
        """Whether a block is several that are not to be repetitions of each other."""
        return any(
            start < at < start + period and any((at - start) % n == 0 == period % n for n in periods)
            for at, periods in self.anew.items()
        )

    def equal(self, start: int, period: int, count: int) -> int:
        """How many of these blocks are wired in the same way; 1 if they are not to be called blocks."""
        blocks = [self.children[start + i * period : start + (i + 1) * period] for i in range(count)]
        if not any(isinstance(child, Scope) for child in blocks[0]) and not self.is_run(start, period):
            return 1
        if period == 1:
            return count
        first, equal = self.signatures.of(blocks[0]), 1
        while equal < count and self.signatures.of(blocks[equal]) == first:
            equal += 1
        return equal

    def is_run(self, start: int, period: int) -> bool:
        """Whether operators without a scope are a block: not a few, and each reads what the last computed."""
        block = self.kinds[start : start + period]
        if not self.equality.runs or any(block == block[:n] * (period // n) for n in range(1, _SHORTEST_RUN)):
            return False
        begin = min(range(start + 1, start + period + 1), key=lambda b: self.incoming(b, period))
        if self.same(begin, period) > 1:
            begin += period
        before, own = (self.children[max(b, 0) : b + period] for b in (begin - period, begin))
        computed = self.signatures.computed(before)
        return period >= _SHORTEST_RUN and not computed.isdisjoint(self.signatures.incoming(own))


class _Signatures:
    """Numbers that are equal for subtrees that are the same."""

    def __init__(self, root: Scope, equality: Equality) -> None:
        self.equality = equality
        self.producer = {v.name: (op, i) for op in root.operators() for i, v in enumerate(op.outputs)}
        self._numbers: dict[Any, int] = {}

    def incoming(self, block: Sequence[Scope | Operator]) -> set[str]:
        """The computed values that come into a block."""
        read = {v.name for child in block for op in _operators(child) for v in op.inputs}
        return {name for name in read if name in self.producer} - self.computed(block)

    def computed(self, block: Sequence[Scope | Operator]) -> set[str]:
        """The values that a block computes."""
        return {v.name for child in block for op in _operators(child) for v in op.outputs}

    def of(self, block: Sequence[Scope | Operator]) -> int:
        """The number of a subtree, or of several that follow each other."""
        ops = [op for child in block for op in _operators(child)]
        inside = {op.name: i for i, op in enumerate(ops)}

        def source(op: Operator, v: Variable) -> Any:
            if v.kind == "literal":
                # Blocks draw random numbers by keys of their own.
                return v.name if self.equality.types and op.op != "random_fold_in" else "literal"
            made = self.producer.get(v.name)
            if made is not None and made[0].name in inside:
                return inside[made[0].name], made[1]
            return "outside"

        type_ = _type if self.equality.types else _dtype
        role = self.equality.role
        wiring = tuple(
            (
                op.op,
                role.get(op.name, ""),
                tuple(map(type_, op.outputs)),
                tuple((source(op, v), type_(v)) for v in op.inputs),
            )
            for op in ops
        )
        return self._numbers.setdefault((tuple(map(_shape, block)), wiring), len(self._numbers))


def _type(v: Variable) -> Any:
    """What equal types have in common, without the time that it takes to write them."""
    return v.type if v.shape is None else (v.shape, v.dtype)


def _dtype(v: Variable) -> Any:
    return v.dtype


def _shape(child: Scope | Operator) -> Any:
    """How the scopes are nested; the names inside a block count, the block's own does not."""
    if not isinstance(child, Scope):
        return child.op
    return tuple((c.path[-1] if isinstance(c, Scope) else "", _shape(c)) for c in child.children)
