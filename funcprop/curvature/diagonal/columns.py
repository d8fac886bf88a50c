"""The columns of a diagonal: in which form a node's are made, and how a program makes those of many nodes.

With `L(Z)` the loss as a function of the node (`nodes`) and `H = ∂²L/∂Z²`, an entry is

    diagonal[q, i, r] = Σ_{s, m, m'} a[s, m, i] a[s, m', i] H[(s, m, q, r), (s, m', q, r)].

Three forms compute it. Two make products with `H`, which is linearised once:

* *units*: one product for every `(m, q)`, all `s` and `r` at once, for they do not mix;
* *directions*: one product for every `(i, q)`, in the direction `a[:, :, i]`.

The third, *outputs*, sweeps backwards from outputs up to which the loss is piecewise affine, once for every
entry of an independent slice of them (`affine_cuts`).

A leaf that is its own node has `a = 1` and as many columns as entries that mix.

A program is what XLA compiles: a loop (`column_loops`) whose body is one linear map on blocks of
columns. That of several nodes takes a tangent for each of them, of which all but one are zero, so that one
body serves every node; `column_programs` says which share one. A sweep backwards passes all nodes
on its way.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from funcprop import _jax
from funcprop.curvature.diagonal.affine_cuts import Cut, eigensystem, functions_of
from funcprop.curvature.diagonal.nodes import LossNode, perturbed
from funcprop.memory.estimate import peak_bytes
from funcprop.program.flops import of_jaxpr
from funcprop.program.sizes import nbytes
from funcprop.rules.rule_set import RuleSet
from funcprop.rules.running import with_rules

UNITS, DIRECTIONS, OUTPUTS = "units", "directions", "outputs"
Read = Callable[[Any], Any]
# Measured on two x86 cores: smaller blocks leave them idle, larger ones leave their caches.
CACHE_BYTES = 20 << 20
_FEWEST, _MOST = 8, 128
_STEP = 2  # what a step of the loop costs besides its columns, in columns
# Operations for the eigenvectors of an n × n matrix, divided by n³.
EIGENVECTORS = 25


@dataclass(frozen=True, eq=False)
class ColumnForm:
    """The form in which a node's columns are made, and how many there are."""

    node: LossNode
    form: str
    count: int
    cut: Cut | None = None

    def own_flops(self) -> int:
        """Count the operations of one column, without the product or the sweep."""
        S, M, Q, R = self.node.sizes()
        pairs, inputs = S * M * R, self.node.inputs
        if self.form == UNITS:
            return 2 * pairs * inputs
        if self.form == DIRECTIONS:
            return 3 * pairs if self.node.activations is not None else 0
        terms = S * Q * R * inputs
        return 3 * pairs * Q + (2 * terms * (M + 1) if M > 1 else 2 * terms // self.count)

    def own_bytes(self) -> int:
        """Count the bytes of one column, without those of the product or the sweep."""
        S, M, Q, R = self.node.sizes()
        itemsize = self.node.variable.aval.dtype.itemsize
        if self.form == UNITS:
            return itemsize * S * M * R * min(M, 2)
        return itemsize * S * Q * R * self.node.inputs if self.form == OUTPUTS and M > 1 else 0

    def longest(self) -> int:
        """The most columns that can be made at once: of units, those of one position."""
        return self.node.sizes()[2] if self.form == UNITS else self.count

    def blocks(self, block: int) -> int:
        """How many blocks of a length; the last one of a row may be partly empty."""
        return self.count // self.longest() * -(-self.longest() // block)


@dataclass(frozen=True, eq=False)
class ColumnLoop:
    """Columns made by one compiled loop: `linear` maps a tangent of each node, or of the outputs, to all.

    `flops` and `nbytes` are those of one column; `block` columns are made at once.
    """

    members: tuple[ColumnForm, ...]
    linear: Callable[[Any], Any]
    flops: int
    nbytes: int
    block: int
    eigensystem: Callable[[], tuple[Any, Any]] | None = None

    @property
    def form(self) -> str:
        """The form of the first member; members by outputs have no others beside them."""
        return self.members[0].form

    @property
    def _rows(self) -> tuple[ColumnForm, ...]:
        """The members with columns of their own: all members share a sweep from outputs."""
        return self.members[:1] if self.form == OUTPUTS else self.members

    @property
    def products(self) -> int:
        """How many products, or sweeps."""
        return sum(columns.count for columns in self._rows)

    def steps(self) -> list[tuple[int, int]]:
        """The iterations of the loop: whose columns, and which block of them."""
        return [(k, number) for k, m in enumerate(self._rows) for number in range(m.blocks(self.block))]

    def products_of_steps(self) -> list[int]:
        """How many products each iteration makes."""
        found: list[int] = []
        for columns in self._rows:
            blocks = columns.blocks(self.block)
            ends = [round(columns.count * n / blocks) for n in range(blocks + 1)]
            found += [end - start for start, end in itertools.pairwise(ends)]
        return found


def program_of(
    members: Sequence[ColumnForm], read: Read, rules: RuleSet | None, byte_limit: int, block: int | None
) -> ColumnLoop:
    """The program for some columns of one term; `read` gives the values of variables."""
    nodes, cut = [m.node for m in members], members[0].cut
    eigen = None
    if cut is not None:
        linear, product, outputs = functions_of(cut, nodes, read, rules)
        tangents: Any = outputs
        of_loss, loss_bytes = _cost(product, outputs)
        at_once = max(1, CACHE_BYTES // max(loss_bytes, 1))
        eigen = lambda: eigensystem(product, outputs, at_once)  # noqa: E731
    else:
        of_loss, (linear, tangents) = 0, hessian_of(nodes, read, rules)
    flops, size = _cost(linear, tangents)
    if cut is not None:
        flops += of_loss + EIGENVECTORS * cut.size * outputs.size + sum(m.own_flops() for m in members)
    size += sum(m.own_bytes() for m in members)
    return ColumnLoop(tuple(members), linear, flops, size, _block(members, size, byte_limit, block), eigen)


def hessian_of(
    nodes: Sequence[LossNode], read: Read, rules: RuleSet | None
) -> tuple[Callable[[Any], Any], Any]:
    """`V ↦ H V` in the nodes' coordinates, `H` of all of them together, linearised; and a `V` of zeros."""
    jaxpr, free = perturbed(nodes, *nodes[0].term.outvars)
    values = [read(v) for v in free]

    def loss(deltas: Sequence[Any]) -> Any:
        operands = [node.to_variable(delta) for node, delta in zip(nodes, deltas, strict=True)]
        return _jax.evaluate(jaxpr, (), [*operands, *values])[0]

    zeros = [jnp.zeros(node.sizes(), node.variable.aval.dtype) for node in nodes]
    return jax.linearize(jax.grad(with_rules(loss, rules)), zeros)[1], zeros


def _cost(linear: Callable[[Any], Any], like: Any) -> tuple[int, int]:
    """Floating-point operations and bytes of one column; of what is given, one at a time."""
    jaxpr = jax.make_jaxpr(linear)(jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), like))
    given = [nbytes(v) for v in _jax.open_jaxpr(jaxpr).invars]
    return of_jaxpr(jaxpr), peak_bytes(jaxpr) - sum(given) + max(given)


def _block(members: Sequence[ColumnForm], size: int, byte_limit: int, block: int | None) -> int:
    """How many columns are made at once: as many as fit, and so that little is computed in vain."""
    if block is None:
        most = min(_MOST, max(1, byte_limit // max(size, 1)))
        block = min(max(_FEWEST, CACHE_BYTES // max(size, 1)), most)
    block = min(block, max(m.longest() for m in members))
    return min(
        range(1, block + 1),
        key=lambda b: sum(m.blocks(b) for m in members) * (b + _STEP),
    )
