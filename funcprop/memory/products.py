"""How a compiler arranges products: matrices, and copies of operands whose axes are in another order."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any


def matrices(eqn: Any) -> list[Sequence[int] | None]:
    """The shapes in which operands and result of a matrix product are computed; None stands for their own."""
    if eqn.primitive.name != "dot_general":
        return [None, None, None]
    summed, batch = eqn.params["dimension_numbers"]
    shapes = [v.aval.shape for v in eqn.invars]
    of_batch, found, rows = [shapes[0][d] for d in batch[0]], [], []
    for k, shape in enumerate(shapes):
        kept = [d for d in range(len(shape)) if d not in summed[k] and d not in batch[k]]
        rows.append(math.prod(shape[d] for d in kept))
        sizes = [rows[k], math.prod(shape[d] for d in summed[k])]
        merged = len(kept) > 1 or len(summed[k]) > 1
        found.append([*of_batch, *(sizes if k == 0 else sizes[::-1])] if merged else None)
    return [*found, [*of_batch, *rows] if len(eqn.outvars[0].aval.shape) > 2 + len(of_batch) else None]


def summed_terms(eqn: Any) -> int | None:
    """How many products a product of matrices adds up for an entry."""
    if eqn.primitive.name != "dot_general":
        return None
    return math.prod(eqn.invars[0].aval.shape[d] for d in eqn.params["dimension_numbers"][0][0])


def orders(eqn: Any) -> list[Any]:
    """For both operands of a product, and a convolution's result, the order to which they are copied.

    None stands for one that is read as it is. In order are batch axes in front and one axis besides the
    summed ones; for a convolution `NHWC` and `HWIO`.
    """
    shapes, found = [a.aval.shape for a in (*eqn.invars, *eqn.outvars)], []
    if eqn.primitive.name == "dot_general":
        for k, (summed, batch) in enumerate(zip(*eqn.params["dimension_numbers"], strict=True)):
            rest = [d for d in range(len(shapes[k])) if d not in summed and d not in batch]
            order = [*batch, *rest, *summed] if k == 0 else [*batch, *summed, *rest]
            kept = [d for d in order if shapes[k][d] > 1]
            leads = list(batch) == list(range(len(batch))) and len(summed) == len(rest) == 1
            is_read = leads or kept == sorted(kept) or (not batch and len(kept) == 2)
            found.append(None if is_read else order)
        return found
    lhs, rhs, out = eqn.params["dimension_numbers"]
    wanted = [[lhs[0], *lhs[2:], lhs[1]], [*rhs[2:], rhs[1], rhs[0]], [out[0], *out[2:], out[1]]]
    for shape, order in zip(shapes, wanted, strict=True):
        kept = [d for d in order if shape[d] > 1]
        found.append(None if kept == sorted(kept) else order)
    return found
