"""How a TPU writes products: after what follows them entry by entry, and rounded if nobody reads more.

A gradient that only an optimizer reads, entry by entry, is not written at all.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from funcprop.memory.fusion import Step, Value
from funcprop.program.facts import PRODUCTS

_MOVED = frozenset({"convert_element_type", "transpose", "reshape"})


def write_late(steps: Sequence[Step], results: Iterable[Value | None]) -> None:
    """Let each product be written when what alone reads it is computed, in the type in which that is read."""
    returned = {id(v) for v in results if v is not None}
    users: dict[int, list[tuple[int, Step]]] = defaultdict(list)
    for t, step in enumerate(steps):
        for v in step.operands:
            users[id(v)].append((t, step))
    for step in reversed(steps):
        if step.op in PRODUCTS:
            if _only_updates(step, users, returned):
                step.fuses, step.reduces = True, 0
                continue
            behind = _epilogue(step, users, returned)
            (end,) = behind[-1].results
            # It is written, and takes in what it reads, as a sum does.
            behind[-1].fuses, behind[-1].reduces = False, 1
            wanted = _types(end, users)
            if len(wanted) == 1 and id(end) not in returned:
                for made in behind:
                    made.results[0].aval = made.results[0].aval.update(dtype=next(iter(wanted)))


def _epilogue(
    product: Step, users: Mapping[int, Sequence[tuple[int, Step]]], returned: set[int]
) -> list[Step]:
    """The steps from a product to the last of which all that it is read for goes through."""
    taken, last = [product], 1
    waiting = {id(product.results[0])}
    while not waiting & returned:
        readers = dict(user for key in waiting for user in users[key])
        if not all(step.entrywise or step.op in _MOVED for step in readers.values()):
            break
        done = set(map(id, taken))
        left = [t for t, step in readers.items() if id(step) not in done]
        if not left:
            break
        taken.append(readers[min(left)])
        done.add(id(taken[-1]))
        waiting.add(id(taken[-1].results[0]))
        waiting = {key for key in waiting if not all(id(step) in done for _, step in users[key])}
        if waiting <= {id(taken[-1].results[0])}:
            last = len(taken)
    return taken[:last]


def _only_updates(product: Step, users: Mapping[int, Sequence[tuple[int, Step]]], returned: set[int]) -> bool:
    """Whether it is read for results alone, entry by entry, such as a gradient by an optimizer."""
    waiting, seen = [id(product.results[0])], set(map(id, product.results))
    while waiting:
        key = waiting.pop()
        readers = [step for _, step in users[key]]
        if not all(s.entrywise or s.op in _MOVED for s in readers) or not (readers or key in returned):
            return False
        new = {id(s.results[0]) for s in readers} - seen
        seen |= new
        waiting += new
    return True


def _types(value: Value, users: Mapping[int, Sequence[tuple[int, Step]]]) -> set[Any]:
    """The types to which a value is rounded before it is used; sums of it are computed beside it."""
    readers = [step for _, step in users[id(value)]]
    readers = [s for s in readers if s.entrywise or not s.reduces or s.op in PRODUCTS] or readers
    found: set[Any] = set()
    for step in readers:
        found |= _types(step.results[0], users) if step.op in _MOVED else {value.aval.dtype}
    return found or {value.aval.dtype}
