"""Numbers as a page writes them."""

from __future__ import annotations

from typing import Any

from funcprop.graph.graph import bytes_text

_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def count(number: int) -> str:
    """All digits, in groups of three."""
    return f"{number:,}"


def amount(number: int, unit: str) -> str:
    """A number in a table of costs: bytes, or a count that is rounded when it is large."""
    if unit == "bytes":
        return bytes_text(number)
    return count(number) if number < 1_000_000 else _scientific(f"{number:.2e}")


def digits(number: Any) -> str:
    """Four significant digits, or a dash."""
    return "–" if number is None else _scientific(f"{number:.4g}").replace("-", "−")


def _scientific(text: str) -> str:
    """`1.5e-07` as `1.5 · 10⁻⁷`."""
    mantissa, e, exponent = text.partition("e")
    return f"{mantissa} · 10{str(int(exponent)).translate(_SUPERSCRIPT)}" if e else text
