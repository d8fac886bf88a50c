"""How many bytes a value takes."""

from __future__ import annotations

import math
from typing import Any


def nbytes(value: Any) -> int:
    """Bytes of an atom of a jaxpr, or of its type; 0 for what has no size of its own (a reference, a token).

    A key of random numbers counts as its words.
    """
    aval = getattr(value, "aval", value)
    dtype = getattr(aval, "dtype", None)
    if dtype is None or hasattr(aval, "inner_aval"):
        return 0
    return math.prod(aval.shape) * int(dtype.itemsize)
