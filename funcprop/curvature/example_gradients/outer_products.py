"""The outer form of each operator: how its operands and cotangent lie in `W[k] = Σ_t a[t, k] ⊗ g[t, k]`.

`k` counts independent blocks (layers that a loop stacks, groups of a convolution, batch axes of a product),
`t` the positions over which the sum goes (rows, space, time), `i` and `o` the rows and columns of a block. An
operator says this for one example and one iteration; `OuterForm` adds the loops.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from funcprop.curvature.example_gradients.parameter_views import View
from funcprop.curvature.example_gradients.taps import Tap
from funcprop.rules.primitives.patches import geometry_of, patches_of, with_channels_last

Fold = Callable[[Any], Any]


@dataclass(frozen=True, eq=False)
class OuterForm:
    """`activations` and `cotangents` of one example as `[k, t, i]` and `[k, t, o]`; `to_leaf` of `[k, i, o]`.

    `positions` is the number of `t`. Without `activations` they are all 1 (a sum, whose `i` is 1).
    """

    activations: Fold | None
    cotangents: Fold
    to_leaf: Fold
    positions: int

    def with_row(self, constant: float) -> OuterForm:
        """One more row of every block, whose activation is a constant at every position."""
        assert self.activations is not None
        fold = self.activations

        def activations(x: Any) -> Any:
            a = fold(x)
            return jnp.concatenate([a, jnp.full((*a.shape[:-1], 1), constant, a.dtype)], -1)

        return replace(self, activations=activations)


def outer_form(tap: Tap) -> OuterForm | None:
    """The outer form of a tap, or None if its operator has none."""
    split = folding(tap)
    return None if split is None else _with_loops(tap, split)


def folding(tap: Tap) -> ProductFolding | None:
    """The outer form of one iteration of the loops around."""
    if tap.eqn is None or tap.eqn.primitive.name not in _FORMS:
        return None
    split = _FORMS[tap.eqn.primitive.name](tap)
    return split if split is not None and split.view.distinct else None


class ProductFolding(NamedTuple):
    """How an operator's activations and cotangent fold in one iteration, and how its operand unfolds."""

    view: View
    activations: Fold | None
    cotangents: Fold
    join: Fold
    positions: int


def _with_loops(tap: Tap, split: ProductFolding) -> OuterForm:
    """The form with loops that slice the leaf among the blocks, and all others among the positions."""
    loops = tap.loops
    slicing = [i for i, loop in enumerate(loops) if loop.slices]
    order = slicing + [len(loops)] + [i for i, loop in enumerate(loops) if not loop.slices] + [len(loops) + 1]
    layers = [loops[i].length for i in slicing]
    times = math.prod(loop.length for loop in loops if not loop.slices)

    def over_loops(fold: Fold) -> Fold:
        if not loops:
            return fold
        for _ in loops:
            fold = jax.vmap(fold)

        def folded(x: Any) -> Any:
            y = fold(x)
            y = jnp.transpose(y, (*order, y.ndim - 1))
            blocks, steps = math.prod(y.shape[: len(slicing) + 1]), math.prod(y.shape[len(slicing) + 1 : -1])
            return y.reshape(blocks, steps, y.shape[-1])

        return folded

    def to_leaf(blocks: Any) -> Any:
        join = split.join
        for _ in layers:
            join = jax.vmap(join)
        return split.view.to_leaf(join(blocks.reshape(*layers, -1, *blocks.shape[1:])))

    activations = None if split.activations is None else over_loops(split.activations)
    return OuterForm(activations, over_loops(split.cotangents), to_leaf, times * split.positions)


def _folded(x: Any, *groups: Sequence[int]) -> Any:
    """The axes in this order, each group as one."""
    shape = [math.prod(x.shape[d] for d in group) for group in groups]
    return jnp.transpose(x, [d for group in groups for d in group]).reshape(shape)


def _unfolded(x: Any, shape: Sequence[int], *groups: Sequence[int]) -> Any:
    """The inverse of `_folded`, for an array of this shape."""
    order = [d for group in groups for d in group]
    return jnp.transpose(x.reshape([shape[d] for d in order]), np.argsort(order).tolist())


# --- products ---------------------------------------------------------------------------------


def _dot(tap: Tap) -> ProductFolding:
    contracted, batch = tap.eqn.params["dimension_numbers"]
    k, shape = tap.operand, tap.eqn.invars[tap.operand].aval.shape
    own, other = (list(contracted[k]), list(batch[k])), (list(contracted[1 - k]), list(batch[1 - k]))
    ndim = len(tap.eqn.invars[1 - k].aval.shape)
    rows = [d for d in range(ndim) if d not in other[0] + other[1]]
    columns = [d for d in range(len(shape)) if d not in own[0] + own[1]]
    blocks = list(range(len(own[1])))
    # A product's result has the batch axes, then what is left of each operand in turn.
    first, second = (columns, rows) if k == 0 else (rows, columns)
    at = len(blocks)
    places = [list(range(at, at + len(first))), list(range(at + len(first), at + len(first) + len(second)))]
    row_places, column_places = places[::-1] if k == 0 else places
    positions = math.prod(tap.eqn.invars[1 - k].aval.shape[d] for d in rows)
    return ProductFolding(
        tap.view,
        lambda a: _folded(a, other[1], rows, other[0]),
        lambda g: _folded(g, blocks, row_places, column_places),
        lambda w: _unfolded(w, shape, own[1], own[0], columns),
        positions,
    )


# --- convolutions -----------------------------------------------------------------------------


def _conv(tap: Tap) -> ProductFolding | None:
    params = tap.eqn.params
    if tap.operand != 1 or params["batch_group_count"] != 1:
        return None
    x, w = (jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in tap.eqn.invars)
    lhs, rhs, out = params["dimension_numbers"]
    groups, dilation = params["feature_group_count"], params["lhs_dilation"]

    def dilated(x: Any) -> Any:
        interior = {axis: d - 1 for axis, d in zip(lhs[2:], dilation, strict=True)}
        if not any(interior.values()):
            return x
        return lax.pad(x, np.array(0, x.dtype), [(0, 0, interior.get(axis, 0)) for axis in range(x.ndim)])

    geometry = geometry_of(jax.eval_shape(dilated, x), w, params)
    taps, inputs = math.prod(geometry.kernel), geometry.inputs // groups

    def activations(x: Any) -> Any:
        rows = patches_of(with_channels_last(dilated(x), lhs), params, geometry)
        if groups == 1:
            return rows[None]
        rows = rows.reshape(-1, taps, groups, inputs)
        return jnp.transpose(rows, (2, 0, 1, 3)).reshape(groups, -1, taps * inputs)

    def cotangents(g: Any) -> Any:
        rows = with_channels_last(g, out).reshape(-1, groups, geometry.outputs // groups)
        return jnp.transpose(rows, (1, 0, 2))

    def join(w: Any) -> Any:
        w = jnp.moveaxis(w.reshape(groups, *geometry.kernel, inputs, -1), 0, -2)
        w = w.reshape(*geometry.kernel, inputs, geometry.outputs)
        return jnp.transpose(w, np.argsort((*rhs[2:], rhs[1], rhs[0])).tolist())

    return ProductFolding(tap.view, activations, cotangents, join, geometry.batch * geometry.rows)


# --- sums -------------------------------------------------------------------------------------


def _sum(tap: Tap) -> ProductFolding:
    """A sum has no activations; the axes along which the parameter is broadcast are positions."""
    view, shape = tap.view, tap.eqn.invars[tap.operand].aval.shape
    axes = list(range(len(shape)))
    last = view.steps[-1] if view.steps else None
    if last is not None and not view.distinct and last.eqn.primitive.name == "broadcast_in_dim":
        view = replace(view, steps=view.steps[:-1])
        shape, axes = last.eqn.invars[0].aval.shape, list(last.eqn.params["broadcast_dimensions"])
    kept = [d for d, size in zip(axes, shape, strict=True) if size == tap.shape[d]]
    rows = [d for d in range(len(tap.shape)) if d not in kept]
    return ProductFolding(
        view,
        None,
        lambda g: _folded(g, [], rows, kept),
        lambda w: w.reshape(shape),
        math.prod(tap.shape[d] for d in rows),
    )


_FORMS: dict[str, Callable[[Tap], ProductFolding | None]] = {
    "dot_general": _dot,
    "conv_general_dilated": _conv,
    "add": _sum,
    "add_any": _sum,
    "sub": _sum,
}
