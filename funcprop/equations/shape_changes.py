"""Changes of shape and type, which are not written; their cotangents add up what was repeated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from funcprop import _jax
from funcprop.graph.graph import Operator
from funcprop.rules.equations import Equations, written
from funcprop.rules.expressions import Expression, unwritten, without_scale
from funcprop.rules.notation import reduction


def of_shape(op: Operator, x: Expression, cotangent: Expression) -> Equations:
    """A change of shape or type, which is not written; entries that were repeated are added up again."""
    (output,) = op.outputs
    type_ = jax.ShapeDtypeStruct(output.shape or (), output.dtype)

    def function(value: Any) -> Any:
        return _jax.evaluate(op.jaxpr, (), [value])[0]

    def back(g: Any) -> Any:
        y, pull = jax.vjp(function, jnp.zeros(x.shape, x.type.dtype))
        return pull(g.astype(y.dtype))[0]

    if op.op == "transpose" and len(x.shape) == 2:
        return Equations(x.T, (cotangent.T,))
    forward = replace(unwritten(function, x, type_), places=_places(op, x, back=False))
    forward = replace(forward, new_axes=_new_axes(op, x))
    if not _jax.is_differentiable(op.inputs[0].aval):
        return Equations(forward, (None,))
    if np.prod(output.shape or ()) == np.prod(x.shape):
        pulled = replace(unwritten(back, cotangent, x.type), places=_places(op, cotangent, back=True))
        return Equations(forward, (pulled,))
    scales: list[Callable[[Expression], Expression]] = []
    while (peeled := without_scale(cotangent)) is not None and not cotangent.is_number:
        scales.append(peeled[0])
        cotangent = peeled[1]
    kept = op.static["broadcast_dimensions"]
    new = [axis for axis in range(len(output.shape or ())) if axis not in kept]
    text, latex = reduction("sum", new if new and x.shape != () else None, cotangent.is_sum)
    total = written(back, (cotangent,), text, latex, x.type)
    for scale in reversed(scales):
        total = scale(total)
    return Equations(forward, (total,))


def _new_axes(op: Operator, x: Expression) -> tuple[int, ...]:
    """The axes of the result of an operator that are not in what is written; none where that is not known."""
    before, after = x.shape, op.outputs[0].shape or ()
    if op.op == "broadcast_in_dim":
        kept = op.static["broadcast_dimensions"]
        return tuple(i for i in range(len(after)) if i not in kept or kept.index(i) in x.new_axes)
    if op.op == "reshape" and len(after) > len(before) and not x.new_axes:
        # Only axes of size 1 come in.
        found, k = [], 0
        for i, n in enumerate(after):
            if k < len(before) and n == before[k]:
                k += 1
            elif n == 1:
                found.append(i)
            else:
                return ()
        return tuple(found) if k == len(before) else ()
    return x.new_axes if before == after else ()


def _places(op: Operator, of: Expression, back: bool) -> tuple[int, ...] | None:
    """Which axes of what is written the axes are of which an operator changes shape or order.

    Of several axes that become one it is the last. There may be axes that were not there, of size 1.
    """
    shapes = [v.shape or () for v in (op.inputs[0], op.outputs[0])]
    places = of.places or tuple(range(len(of.shape)))
    if op.op == "transpose":
        order = op.static["permutation"]
        return tuple(places[np.argsort(order)[i] if back else order[i]] for i in range(len(order)))
    old, new = reversed(shapes) if back else shapes
    if old == new:
        return of.places
    # An axis of the one shape and the axis of the other in which the same number of entries ends.
    ends = {int(np.prod(old[: i + 1])): i for i in range(len(old))}
    found = []
    for i in range(len(new)):
        end = int(np.prod(new[: i + 1]))
        nearest = min((e for e in ends if e >= end), default=None)
        if nearest is None:
            return None
        found.append(places[ends[nearest]])
    return tuple(found)
