"""Which form each node's columns take, and which nodes share a compiled program.

A program of several nodes makes each column at the price of the longest of their tails, but is traced and
compiled once. Nodes are sorted by the length of their tails, and runs of them share a program where

    seconds to compile what is saved  >  seconds that its columns cost more, as often as it may be run.

Whatever is estimated here decides on time alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from funcprop import _jax
from funcprop.curvature.diagonal.affine_cuts import find_cut
from funcprop.curvature.diagonal.columns import (
    DIRECTIONS,
    EIGENVECTORS,
    OUTPUTS,
    UNITS,
    ColumnForm,
    ColumnLoop,
    program_of,
)
from funcprop.curvature.diagonal.nodes import LossNode
from funcprop.program.facts import PRODUCTS
from funcprop.program.flops import flops
from funcprop.rules.rule_set import RuleSet

# The eigenvectors of larger matrices, one for every example, cost more than they save.
_LARGEST_SLICE = 256
# Measured on two x86 cores: seconds to trace and compile an equation of a tail, to compile a program at all,
# and for a floating-point operation; and as how many runs of the program a compilation counts.
_PER_EQUATION, _PER_PROGRAM, _PER_FLOP, _RUNS = 5e-3, 0.1, 4e-11, 10


def programs(
    nodes: Iterable[LossNode],
    read: Callable[[Any], Any],
    rules: RuleSet | None,
    byte_limit: int,
    block: int | None,
) -> list[ColumnLoop]:
    """Programs for all nodes; `read` gives the values of variables."""
    groups: dict[Any, list[ColumnForm]] = {}
    for columns in (_chosen(node, byte_limit) for node in nodes):
        cut = columns.cut
        # Of the same outputs two nodes may see slices of different sizes: pixels, where images mix none.
        key = id(columns.node.term), None if cut is None else (cut.outputs, cut.order, cut.size)
        groups.setdefault(key, []).append(columns)
    shared = [s for group in groups.values() for s in ([group] if group[0].cut else _runs(group))]
    return [program_of(members, read, rules, byte_limit, block) for members in shared]


def _chosen(node: LossNode, byte_limit: int) -> ColumnForm:
    """The form with the fewest operations."""
    _, M, Q, _ = node.sizes()
    found = [ColumnForm(node, DIRECTIONS, node.inputs * Q)]
    if node.activations is not None:
        found.append(ColumnForm(node, UNITS, M * Q))
    cut = find_cut(node)
    if cut is not None and cut.size <= min(2 * min(c.count for c in found), _LARGEST_SLICE):
        by_outputs = ColumnForm(node, OUTPUTS, cut.size, cut)
        found += [by_outputs] if by_outputs.own_bytes() <= byte_limit else []
    product = sum(_estimates(node.tail.eqns, node.variable))
    return min(found, key=lambda c: c.count * (_of_column(c, product) + c.own_flops()))


def _of_column(columns: ColumnForm, product: float) -> float:
    """The operations of a product, or of a sweep and the share of a column in its preparation."""
    cut = columns.cut
    if cut is None:
        return product
    sweep = sum(_estimates(cut.model.eqns, cut.model.invars[0])) / 2
    outputs = cut.outputs.aval.size
    return sweep + sum(_estimates(cut.loss.eqns, cut.loss.invars[0])) + EIGENVECTORS * cut.size * outputs


def _estimates(equations: Sequence[Any], start: Any) -> list[int]:
    """About the operations of each equation's part in a product with the Hessian by a variable."""
    dependent, found = {start}, []
    for eqn in equations:
        moved = sum(v in dependent for v in _jax.variables(eqn.invars))
        # The tangent, and that of the cotangent; of a product of both operands each of these is two products.
        found.append((2 if eqn.primitive.name in PRODUCTS and moved == 1 else 6) * flops(eqn))
        dependent.update(eqn.outvars)
    return found


def _runs(group: Sequence[ColumnForm]) -> list[list[ColumnForm]]:
    """The partition into runs that takes the least time, by dynamic programming."""
    ordered = sorted(group, key=lambda c: -len(c.node.after))
    read = np.zeros((len(ordered), len(ordered[0].node.term.eqns)), bool)
    work = np.zeros(read.shape)
    for k, columns in enumerate(ordered):
        at = list(columns.node.after)
        read[k, at] = True
        work[k, at] = _estimates(columns.node.tail.eqns, columns.node.variable)
    counts = np.array([c.count for c in ordered])
    best: list[tuple[float, int]] = [(0.0, 0)]  # of the first k: the seconds, and where the last run begins
    for end in range(1, len(ordered) + 1):
        equations, operations, choices = read[end - 1].copy(), work[end - 1].copy(), []
        for start in range(end - 1, -1, -1):
            equations |= read[start]
            np.maximum(operations, work[start], out=operations)
            running = _RUNS * _PER_FLOP * counts[start:end].sum() * operations.sum()
            compiling = _PER_PROGRAM + _PER_EQUATION * equations.sum()
            choices.append((best[start][0] + float(running + compiling), start))
        best.append(min(choices))
    runs, end = [], len(ordered)
    while end:
        start = best[end][1]
        runs.append(ordered[start:end])
        end = start
    return runs[::-1]
