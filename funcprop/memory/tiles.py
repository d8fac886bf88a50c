"""How a TPU keeps arrays: in tiles of 8 × 128 entries, or of fewer rows; what fits stays on the chip."""

from __future__ import annotations

import itertools
import math
from typing import Any

from funcprop.program.sizes import nbytes
from funcprop.rules.machine import Machine

_ROWS, _COLUMNS = 8, 128


def kept_bytes(aval: Any, platform: str) -> int:
    """The bytes of an argument or a result in memory, in the order of axes that pads it least."""
    if platform != "tpu":
        return nbytes(aval)
    size, shape, entries = aval.dtype.itemsize, aval.shape, math.prod(aval.shape)
    packed = max(1, 4 // size)
    if len(shape) < 2:
        return size * _up(entries, min(max(_power(entries), _COLUMNS * packed), _ROWS * _COLUMNS))
    tiled = (
        _up(rows, max(packed, min(_power(rows), _ROWS)))
        * _up(columns, _COLUMNS)
        * entries
        // (rows * columns)
        for rows, columns in itertools.permutations(shape, 2)
    )
    return size * min(tiled) if entries else 0


def on_chip(platform: str) -> int:
    """Bytes of temporary values that a compiler keeps on the chip, where it decides what is there."""
    return Machine.of(platform).caches[-1] if platform == "tpu" else 0


def _up(count: int, tile: int) -> int:
    return -(-count // tile) * tile


def _power(count: int) -> int:
    """The smallest power of two that is not below."""
    return 1 << max(count - 1, 0).bit_length()
