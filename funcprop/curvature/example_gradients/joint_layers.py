"""Layers `x W + b`, whose bias is one more row of the matrix.

Where a bias is added to the result of a product, and to nothing else is this result given, both leaves have
the same cotangents at the same positions, and the gradient of both is one outer product, of `[a, s]` and `g`.
The constant `s` is 1 unless the model multiplies a leaf by a number.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from funcprop.curvature.example_gradients.matrix_layout import MatrixLayout
from funcprop.curvature.example_gradients.outer_products import folding
from funcprop.curvature.example_gradients.parameter_views import View, seen_through
from funcprop.curvature.example_gradients.taps import Tap, TapPlan


class JointLayer(NamedTuple):
    """The leaf of a matrix, that of its bias, and the constant `s`."""

    weight: int
    bias: int
    constant: float


@dataclass(frozen=True)
class JointLayout:
    """How the entries of a matrix and of its bias, the last row, lie in blocks `[k, i, o]`."""

    weight: MatrixLayout
    bias: MatrixLayout

    @property
    def matrix(self) -> tuple[int, int, int]:
        """The shape of the blocks."""
        blocks, rows, columns = self.weight.matrix
        return blocks, rows + 1, columns

    def to_matrix(self, weight: Any, bias: Any) -> Any:
        """Both leaves as blocks."""
        return jnp.concatenate([self.weight.to_matrix(weight), self.bias.to_matrix(bias)], 1)

    def to_leaves(self, blocks: Any) -> list[Any]:
        """Blocks as both leaves."""
        return [self.weight.to_leaf(blocks[:, :-1]), self.bias.to_leaf(blocks[:, -1:])]


def joint_layers(plan: TapPlan, taps: Sequence[Tap]) -> list[JointLayer]:
    """All layers of a model, in the order of their matrices."""
    uses = [tap.view.leaf for tap in taps]
    found = []
    for here in _plans(plan):
        for i, numbers in here.taps.items():
            for n in numbers:
                end = _added_to(here, i, taps) if taps[n].partner is not None else None
                if end is None or uses.count(uses[n]) > 1 or uses.count(uses[end.number]) > 1:
                    continue
                ratio = taps[n].scale * end.scale
                if ratio and _same_columns(taps[n], taps[end.number], end.view):
                    found.append(JointLayer(uses[n], uses[end.number], taps[end.number].scale / ratio))
    return sorted(found)


def _plans(plan: TapPlan) -> Iterator[TapPlan]:
    yield plan
    for inner in plan.inner.values():
        yield from _plans(inner)


class _Sum(NamedTuple):
    """The tap of a bias, the view of the product that it is added to, and what that is multiplied by."""

    number: int
    view: View
    scale: float


def _added_to(plan: TapPlan, position: int, taps: Sequence[Tap]) -> _Sum | None:
    """The sum that the result of an equation goes into, through views, if it goes nowhere else."""
    jaxpr, view = plan.jaxpr, View(0)
    var = jaxpr.eqns[position].outvars[0]
    while True:
        users = [(i, eqn) for i, eqn in enumerate(jaxpr.eqns) for v in eqn.invars if v is var]
        if len(users) != 1 or var in jaxpr.outvars:
            return None
        ((i, eqn),) = users
        operands = [view if v is var else None for v in eqn.invars]
        for n in plan.taps.get(i, ()):
            if taps[n].partner is None and len(operands) == 2 and operands[1 - taps[n].operand] is not None:
                negated = eqn.primitive.name == "sub" and operands[1] is not None
                return _Sum(n, view, -view.scale if negated else view.scale)
        moved = None if i in plan.inner else seen_through(eqn, operands)
        if moved is None or len(moved) != 1 or not moved[0].distinct:
            return None
        (view,), var = moved, eqn.outvars[0]


def _same_columns(product: Tap, bias: Tap, view: View) -> bool:
    """Whether the columns of a product's blocks are, one after the other, the entries of the bias."""
    of_product, of_bias = folding(product), folding(bias)
    if of_product is None or of_bias is None or product.loops != bias.loops:
        return False
    with jax.ensure_compile_time_eval():
        numbers = jnp.arange(np.prod(product.shape, dtype=int)).reshape(product.shape)
        folded = np.asarray(of_product.cotangents(numbers))  # k t o
        moved = numbers
        for step in view.steps:
            assert step is not None
            moved = step(moved)
        if moved.shape != bias.shape:
            return False
        entries = np.asarray(of_bias.cotangents(moved))[0]
    columns = np.moveaxis(folded, 1, 0).reshape(folded.shape[1], -1)
    return columns.shape == entries.shape and np.array_equal(np.sort(columns, 0), np.sort(entries, 0))
