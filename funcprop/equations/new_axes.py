"""New axes of operands: told where a reader would take others, as in `x[:, None] − y[None]`."""

from __future__ import annotations

from collections.abc import Sequence

from funcprop.rules.equations import indexed
from funcprop.rules.expressions import Expression, Symbol


def with_told_axes(operands: Sequence[Expression]) -> list[Expression]:
    """The operands of an entrywise operator, the new axes of some of them written.

    They are where each of two operands has an axis that the other has not, and where a value that has a name
    would be taken to be repeated along other axes than it is: in `A ⊙ v[:, None]`, if `A` is square.
    """
    arrays = [x for x in operands if not x.is_number]
    axes = [set(x.new_axes) for x in arrays]
    if any(not (a <= b or b <= a) for a in axes for b in axes):
        return [x if x.is_number else _told(x) for x in operands]
    shared = set(kept_axes(operands))
    return [_told(x) if set(x.new_axes) > shared and _is_misread(x, arrays) else x for x in operands]


def kept_axes(operands: Sequence[Expression]) -> tuple[int, ...]:
    """The new axes that a function of each entry of these operands has as they have them."""
    axes = [set(x.new_axes) for x in operands if not x.is_number]
    return tuple(sorted(set.intersection(*axes))) if axes else ()


def _told(x: Expression) -> Expression:
    words = ["None" if i in x.new_axes else ":" for i in range(len(x.shape))]
    while words and words[-1] == ":":
        words.pop()
    return indexed(lambda v: v, x, ", ".join(words), x.type) if words else x


def _is_misread(x: Expression, beside: Sequence[Expression]) -> bool:
    """Whether a value by its name, put below the last axes of what is beside it, stands below wrong ones."""
    inner = x.spelled
    own = [i for i in range(len(x.shape)) if i not in x.new_axes]
    if not isinstance(inner, Symbol) or inner.shape != tuple(x.shape[i] for i in own):
        return False
    rank = len(x.shape)
    last = list(range(rank - len(own), rank))
    sizes = [max(y.shape[i] for y in beside if len(y.shape) == rank) for i in last]
    return own != last and all(n in (1, size) for n, size in zip(inner.shape, sizes, strict=True))
