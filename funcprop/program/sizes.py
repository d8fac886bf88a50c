"""How many bytes a value takes, and how a number of bytes is written."""

from __future__ import annotations

import math
import re
import sys
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


def budget_or_share(text: str, what: str) -> int | float:
    """`"25%"` as a share, a float; other text as a number of bytes, an int. Errors as of `budget_bytes`."""
    if not text.strip().endswith("%"):
        return budget_bytes(text, what)
    found = re.fullmatch(r"(\d+\.?\d*) *%", text.strip())
    if found is None or not 0 <= float(found[1]) <= 100:
        raise ValueError(f"{what}={text!r} is no share from 0% to 100%; write '25%', or bytes as '64MB'.")
    return float(found[1]) / 100


def budget_bytes(budget: int | str, what: str) -> int:
    """A number of bytes: an int, or text as `"64MB"` (10⁶ each) or `"1.5GiB"` (2³⁰ each).

    Raises:
        TypeError: `budget` is neither; the message begins with `what`, the name of the argument.
        ValueError: the text is no number of bytes, or the number is not positive.
    """
    if isinstance(budget, bool) or not (isinstance(budget, str) or hasattr(budget, "__index__")):
        raise TypeError(f"{what}={budget!r} is not a number of bytes; pass an int, or text as '64MB'.")
    if not isinstance(budget, str):
        number = int(budget)
    else:
        found = re.fullmatch(r"(\d+\.?\d*(?:e\d+)?) *([kKMGT]?)(i?)B?", budget.strip())
        if found is None:
            raise ValueError(
                f"{what}={budget!r} is not a number of bytes; write '100000', '64MB' or '1.5GiB'."
            )
        scale = (1024 if found[3] else 1000) ** " KMGT".index(found[2].upper() or " ")
        number = int(min(float(found[1]) * scale, sys.maxsize + 1))
    if number > sys.maxsize:
        raise ValueError(f"{what}={budget!r} is more than any machine has; write '64MB' or '1.5GiB'.")
    if number <= 0:
        raise ValueError(f"{what}={budget!r} holds nothing; pass more than 0 bytes.")
    return number
