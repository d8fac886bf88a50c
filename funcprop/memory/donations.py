"""Arguments that results are written over: which of them a compiler copies first, as XLA on a CPU does."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from funcprop.memory.fusion import Step, Value


def with_rescued(steps: Sequence[Step], donated: Mapping[int, Value]) -> list[Step]:
    """The steps, with copies of the arguments that may be read after a result is written over them.

    A weight's new value needs not what a layer below is sent, so that nothing says which is computed first.
    All then read the copy, and until the result is written others may lie where the argument was.
    """
    behind: dict[int, int] = {}  # of a step: a bit for each that it depends on, and its own
    readers: dict[int, list[int]] = defaultdict(list)
    for i, step in enumerate(steps):
        behind[id(step)] = 1 << i
        for v in step.operands:
            behind[id(step)] |= behind.get(id(v.step), 0)
            readers[id(v)].append(i)
    makers = {id(v): behind[id(step)] for step in steps for v in step.results}
    copies: dict[int, Step] = {}
    for key, argument in donated.items():
        if key in makers and not all(makers[key] >> i & 1 for i in readers[id(argument)]):
            copy = Step("copy", steps[readers[id(argument)][0]].scope, [argument])
            copy.results = [Value(argument.aval, copy)]
            copies[id(argument)] = copy
    for step in steps:
        step.operands = [copies[id(v)].results[0] if id(v) in copies else v for v in step.operands]
    return [*copies.values(), *steps]
