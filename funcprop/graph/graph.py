"""A function as plain data: its operators and variables, with names.

A graph is what the chapter draws: variables (squares) and operators (circles) in the order in which forward
propagation computes them. A nested `jit` is shown as its body, a layer (`fp.layer`) as one operator; `scan`,
`cond`, `while`, `checkpoint` and custom derivatives are operators whose bodies are graphs themselves.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import jax
from jax.ad_checkpoint import checkpoint_name

from funcprop.graph.pictured import Pictured
from funcprop.program.layer_calls import LayerCall

Kind = Literal["input", "constant", "literal", "intermediate"]


@dataclass(frozen=True, eq=False)
class Variable:
    """A value of the graph: a square of the figure.

    `name` is unique in its graph. `nbytes` is None for values without a size (references, tokens, keys).
    `named` says that the user gave the name. `value` is that of a literal, else None.
    """

    name: str
    kind: Kind
    scope: str
    shape: tuple[int, ...] | None
    dtype: Any
    nbytes: int | None
    named: bool
    aval: Any = field(repr=False)
    value: Any = field(repr=False, default=None)

    def __str__(self) -> str:
        return f"{self.name}: {self.type}"

    @property
    def type(self) -> str:
        """Dtype and shape, as `float32[3,4]`; the type's own text for a value without a shape."""
        if self.shape is None:
            return str(self.aval)
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


@dataclass(frozen=True, eq=False)
class Operator:
    """A step of the graph: a circle of the figure.

    `op` is the name of the primitive or layer, `bodies` the graphs inside a control-flow operator by their
    parameter (`jaxpr`, `branches[0]` …), `source` the user's `file:line (function)`.
    """

    name: str
    op: str
    scope: str
    inputs: tuple[Variable, ...]
    outputs: tuple[Variable, ...]
    flops: int
    source: str | None
    bodies: Mapping[str, Graph]
    call: LayerCall | None = field(repr=False)
    jaxpr: Any = field(repr=False)

    @property
    def equation(self) -> Any | None:
        """The one equation that this operator is; None for a group that shares references."""
        return self.jaxpr.eqns[0] if len(self.jaxpr.eqns) == 1 else None

    @property
    def nbytes(self) -> int:
        """Bytes of the results that have a size."""
        return sum(v.nbytes or 0 for v in self.outputs)

    @property
    def static(self) -> dict[str, Any]:
        """The parameters that are not arrays."""
        if self.call is not None:
            return dict(self.call.static)
        return {} if self.equation is None else dict(self.equation.params)

    @property
    def shape(self) -> tuple[int, ...] | None:
        """The shape of the first result."""
        return self.outputs[0].shape if self.outputs else None

    @property
    def dtype(self) -> Any:
        """The dtype of the first result."""
        return self.outputs[0].dtype if self.outputs else None


@dataclass(frozen=True, eq=False)
class Graph(Pictured):
    """A function as data. `operators` are in the order of forward propagation.

    `print(graph)` is an aligned table. `variables` are inputs, constants and intermediates, in this order.
    """

    name: str
    inputs: tuple[Variable, ...]
    constants: tuple[Variable, ...]
    operators: tuple[Operator, ...]
    outputs: tuple[Variable, ...]

    @property
    def variables(self) -> tuple[Variable, ...]:
        """Inputs, constants and intermediates; not literals."""
        computed = (v for op in self.operators for v in op.outputs)
        return (*self.inputs, *self.constants, *computed)

    @property
    def flops(self) -> int:
        """Floating-point operations of all operators."""
        return sum(op.flops for op in self.operators)

    def __iter__(self) -> Iterator[Operator]:
        return iter(self.operators)

    def __len__(self) -> int:
        return len(self.operators)

    def __str__(self) -> str:
        rows = [("variable", "operator", "inputs", "type", "bytes", "flops", "scope")]
        given = (*self.inputs, *self.constants)
        rows += [(v.name, v.kind, "", v.type, _count(v.nbytes), "", v.scope) for v in given]
        for op in self.operators:
            operands = ", ".join(v.name for v in op.inputs)
            if not op.outputs:
                rows.append(("", op.op, operands, "", "", _count(op.flops), op.scope))
            for i, v in enumerate(op.outputs):
                cells = (op.op, operands) if i == 0 else ("", "")
                work = _count(op.flops) if i == 0 else ""
                rows.append((v.name, *cells, v.type, _count(v.nbytes), work, op.scope))
        title = f"{self.name}: {len(self.operators)} operators, {self.flops:,} flops"
        return title + "\n" + aligned(rows, right={4, 5}, widest=48)

    __repr__ = __str__


def _count(n: int | None) -> str:
    return "-" if n is None else f"{n:,}"


def needed(
    operators: Sequence[Operator], results: Iterable[Variable], given: Iterable[Variable] = ()
) -> list[Operator]:
    """The operators on which results depend, in order, where some values are given; and those without one."""
    known = {id(v) for v in given}
    wanted = {id(v) for v in results} - known
    kept = []
    for op in reversed(operators):
        if not op.outputs or any(id(v) in wanted for v in op.outputs):
            kept.append(op)
            wanted.update({id(v) for v in op.inputs} - known)
    return kept[::-1]


def shape_text(shape: Sequence[int] | None) -> str:
    """A shape as the chapter writes it: `3 × 4`, or `scalar`."""
    return " × ".join(map(str, shape or ())) or "scalar"


def bytes_text(nbytes: int) -> str:
    """A number of bytes with at most four digits: `48 B`, `1.5 KiB`."""
    if nbytes < 1024:
        return f"{nbytes} B"
    size = float(nbytes)
    for unit in ("KiB", "MiB", "GiB", "TiB"):
        size /= 1024
        if size < 1000 or unit == "TiB":
            break
    return f"{size:.3g} {unit}"


def place_text(scope: str, source: str | None) -> str:
    """Where an operator stands, for people: its scope, or the user's line with the name of the file alone."""
    return scope or (source or "").rpartition("/")[2]


def aligned(rows: Sequence[Sequence[str]], right: set[int], widest: int = 110) -> str:
    """Rows as columns of text under the first row, cut to `widest`; columns in `right` end at the right."""
    clipped = [[c if len(c) <= widest else c[: widest - 1] + "…" for c in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*clipped, strict=True)]
    lines = [
        "  ".join(
            c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in clipped
    ]
    return "\n".join([lines[0], "  ".join("-" * w for w in widths), *lines[1:]])


def name(x: Any, label: str) -> Any:
    """Give an intermediate a name: the identity on `x`, an array or a pytree of arrays.

    The name is the variable's name in `fp.trace`, `fp.backprop` and `fp.derive`, prefixed by the named scopes
    around it. It is the same mark as `jax.ad_checkpoint.checkpoint_name`, which is honoured too.

    Raises:
        TypeError: `label` is not a string.

    Example:
        >>> import jax.numpy as jnp, funcprop as fp
        >>> graph = fp.trace(lambda x: fp.name(jnp.tanh(x), "h"))(1.0)
        >>> graph.operators[0].outputs[0].name
        'h'
    """
    if not isinstance(label, str) or not label:
        raise TypeError(f"fp.name: label={label!r} is not a name; pass a non-empty string.")
    return jax.tree.map(lambda leaf: checkpoint_name(leaf, label), x)
