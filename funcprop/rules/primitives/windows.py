"""Sliding windows, as layers are told them and as `lax` takes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

from jax import lax

Padding: TypeAlias = "str | int | tuple[int | tuple[int, int], ...]"


def each(value: int | Sequence[int], rank: int) -> tuple[int, ...]:
    """Repeat one number for every spatial axis, or check that there is one for each."""
    return (value,) * rank if isinstance(value, int) else tuple(value)


def paddings(padding: Padding, rank: int) -> Any:
    """As `lax` takes it: `"SAME"`, `"VALID"`, or a pair for every spatial axis."""
    if isinstance(padding, str):
        if padding.upper() not in ("SAME", "SAME_LOWER", "VALID"):
            raise ValueError(
                f"padding={padding!r} is not known; use 'SAME', 'VALID', a number, or for each axis a number "
                "or a pair."
            )
        return padding
    both = (padding,) * rank if isinstance(padding, int) else padding
    return tuple((p, p) if isinstance(p, int) else tuple(p) for p in both)


def pool_window(
    shape: Sequence[int],
    *,
    window: tuple[int, ...],
    strides: int | tuple[int, ...] | None,
    padding: Padding,
    channels_last: bool,
    dilation: int | tuple[int, ...] = 1,
) -> dict[str, Any]:
    """The parameters of `lax.reduce_window`, with an entry for every axis of an input of this shape."""
    rank = len(window)
    before, after = (len(shape) - rank - 1, 1) if channels_last else (len(shape) - rank, 0)
    if rank < 1 or before < 0:
        raise ValueError(
            f"pooling: window={window} has more axes than x of shape {tuple(shape)} has beside its channels."
        )

    def along_all(values: Sequence[Any], elsewhere: Any) -> tuple[Any, ...]:
        return (elsewhere,) * before + tuple(values) + (elsewhere,) * after

    sizes = along_all(window, 1)
    steps = along_all(window if strides is None else each(strides, rank), 1)
    between = along_all(each(dilation, rank), 1)
    pads = paddings(padding, rank)
    if isinstance(pads, str):
        reach = [(n - 1) * d + 1 for n, d in zip(sizes, between, strict=True)]
        pads = tuple(lax.padtype_to_pads(shape, reach, steps, pads))
    else:
        pads = along_all(pads, (0, 0))
    return {
        "window_dimensions": sizes,
        "window_strides": steps,
        "padding": pads,
        "window_dilation": between,
    }
