"""The logical axes of a model: which axes of which arrays are one, and which of them can be split.

They are the classes of equal axes of the program of loss and gradient (`axis_program.py`), by the names of
parameters and batch.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from funcprop.graph.graph import aligned
from funcprop.partition.axis_program import AxisProgram, flat_program
from funcprop.partition.links import Place, shape
from funcprop.program.batch_arguments import one_batch, taking_a_batch
from funcprop.program.trained import Trained
from funcprop.rules.rule_set import RuleSet
from funcprop.rules.transforms import value_and_grad


@dataclass(frozen=True)
class Axis:
    """One axis of the model.

    Attributes:
        size: its length in the first of its members; where it is merged with others, they are longer.
        members: the axes of parameters and batch that it is, as `"params/Dense_0/kernel[1]"`.
        why: why it cannot be split; None if it can.
        flops: operations of the matrix products that it takes part in.
        key: its representative among the places of the program.
    """

    size: int
    members: tuple[str, ...]
    why: str | None
    flops: int
    key: Place


@dataclass(frozen=True, eq=False)
class Axes:
    """The axes of a model, those of most operations first. `print(axes)` is a table, `.json()` the same."""

    axes: tuple[Axis, ...]
    program: AxisProgram

    def __iter__(self) -> Iterator[Axis]:
        return iter(self.axes)

    def __len__(self) -> int:
        return len(self.axes)

    def __getitem__(self, member: str) -> Axis:
        """The axis that a member such as `"params/Dense_0/kernel[1]"` belongs to."""
        for axis in self.axes:
            if member in axis.members:
                return axis
        raise KeyError(f"{member!r} is no axis of a parameter or of the batch; print(axes) lists them.")

    def __str__(self) -> str:
        rows = [("size", "FLOPs", "members", "cannot be split because")]
        for axis in self.axes:
            shown = ", ".join(axis.members[:4]) + (
                f", … {len(axis.members)} in all" if axis.members[4:] else ""
            )
            rows.append((f"{axis.size}", f"{axis.flops:,}", shown, axis.why or ""))
        return aligned(rows, right={0, 1}, widest=100)

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        names = "size", "members", "why", "flops"
        return {"axes": [{name: getattr(axis, name) for name in names} for axis in self.axes]}

    def json(self) -> str:
        """The table as JSON."""
        return json.dumps(self.as_dict())


def axes(fun: Callable[..., Any], *, rules: RuleSet | None = None) -> Callable[..., Axes]:
    """Find the logical axes of a loss and its gradient: `axes(loss)(params, *batch) -> Axes`.

    Arguments may be shapes. Two axes of arrays are one axis of the model where some operator needs them to be
    equal; the axis can be split over devices if no operator needs it whole on one.

    Args:
        fun: the loss, of parameters and batch, both pytrees; or `loss(params, *batch)`.
        rules: the rules of the gradient; `fp.rules.default` if None.

    Example:
        >>> import jax, jax.numpy as jnp, funcprop as fp
        >>> shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, "float32")
        >>> loss = lambda w, x: jnp.mean(jnp.tanh(x @ w[0]) @ w[1])
        >>> found = fp.partition.axes(loss)([shape(4, 16), shape(16, 2)], shape(32, 4))
        >>> for axis in found:
        ...     print(axis.size, *axis.members)
        16 params/0[1] params/1[0]
        32 batch[0]
        4 params/0[0] batch[1]
        2 params/1[1]
    """

    def found(params: Any, *data: Any) -> Axes:
        batch = one_batch("axes", data)
        model = Trained.stateless(params)
        loss, params = model.function(taking_a_batch(fun, params, batch)), model.arrays
        program = flat_program(value_and_grad(loss, rules=rules), params, batch)
        inputs = program.jaxpr.invars[len(program.consts) :]
        program.join(program.jaxpr.outvars[1:], inputs[: len(jax.tree.leaves(params))])
        return axes_of(program, params, batch, inputs)

    return found


def axes_of(program: AxisProgram, params: Any, batch: Any, variables: Sequence[Any]) -> Axes:
    """The axes of a program by the names of parameters and batch, whose variables are given."""
    members: dict[Place, list[str]] = defaultdict(list)
    first: dict[Place, int] = {}
    leaves = [*named("params", params), *named("batch", batch)]
    for (name, _), v in zip(leaves, variables, strict=True):
        for d, size in enumerate(shape(v)):
            if size > 1:
                root = program.find((v, d))
                members[root].append(f"{name}[{d}]")
                first.setdefault(root, size)
    work = program.work()
    found = [
        Axis(first[root], tuple(names), program.reasons.get(root), work.get(root, 0), root)
        for root, names in members.items()
    ]
    return Axes(tuple(sorted(found, key=lambda axis: -axis.flops)), program)


def named(what: str, tree: Any) -> list[tuple[str, Any]]:
    """The leaves of a tree by their path, as `params/Dense_0/kernel`."""
    paths = jax.tree.leaves_with_path(tree)
    return [
        ("/".join(filter(None, [what, jax.tree_util.keystr(path, simple=True, separator="/")])), leaf)
        for path, leaf in paths
    ]
