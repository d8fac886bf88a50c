"""How names, numbers and axes are written, as text and as LaTeX."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import jax.numpy as jnp
import numpy as np

_GREEK = {
    "λ": "\\lambda", "φ": "\\phi", "η": "\\eta", "σ": "\\sigma", "α": "\\alpha", "β": "\\beta",
    "γ": "\\gamma", "μ": "\\mu", "θ": "\\theta", "ε": "\\epsilon", "ψ": "\\psi", "χ": "\\chi",
    "ℓ": "\\ell",
}  # fmt: skip


SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_DIGITS = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")

_ESCAPES = {c: f"\\{c}" for c in "_%&#${}"} | {"\\": "\\backslash ", "^": "\\wedge ", "~": "\\sim "}


def latex_name(name: str) -> str:
    """A variable's name in LaTeX: one letter with digits as a subscript, Greek letters, or upright text."""
    if match := re.fullmatch(r"(.+)\[(t|t[−+]1)\]", name):
        return f"{{{latex_name(match[1])}[{match[2].replace('−', '-')}]}}"
    stem = name.rstrip("′ᵀ")
    marks = "'" * name.count("′") + ("^{\\top}" if name.endswith("ᵀ") else "")
    stem = stem.translate(_DIGITS)
    if match := re.fullmatch(f"([{''.join(_GREEK)}])_?(\\d*)", stem):
        written = _GREEK[match[1]] + (f"_{{{match[2]}}}" if match[2] else "")
    elif match := re.fullmatch(r"([A-Za-z])_?(\d*)", stem):
        letter, digits = match.groups()
        letter = f"\\mathbf{{{letter}}}" if letter.isupper() and digits else letter
        written = f"{letter}_{{{digits}}}" if digits else letter
    else:
        words = re.split(f"([{''.join(_GREEK)}])", stem)
        written = "".join(_GREEK.get(word) or _upright(word) for word in words if word)
    return written + marks


def _upright(text: str) -> str:
    return f"\\mathrm{{{''.join(_ESCAPES.get(c, c) for c in text)}}}"


def latex_path(path: str) -> str:
    """A path of a pytree as upright text."""
    return f"\\texttt{{{''.join(_ESCAPES.get(c, c) for c in path)}}}"


_WRITTEN = {"…": "$\\ldots$", "−": "-", "∂": "$\\partial$"} | {k: f"${v}$" for k, v in _GREEK.items()}


def latex_title(text: str) -> str:
    """Words and short equations as LaTeX text."""
    digits = re.sub("[₀-₉]+", lambda m: f"$_{{{m[0].translate(_DIGITS)}}}$", text)
    return "".join(_WRITTEN.get(c, c) for c in digits.replace("_", "\\_") if c in digits).replace(
        "$\\_{", "$_{"
    )


def literally(text: str) -> str:
    """Text as a template that has no operands."""
    return text.replace("{", "{{").replace("}", "}}")


def decimal(value: float, dtype: Any = None) -> str:
    """The shortest decimal number that is `value` in a dtype."""
    if abs(value) < 1e6 and value == int(value):
        return str(int(value))
    if (short := f"{value:.1g}") and abs(value) >= 1e6 and float(short) == value:
        return short
    if dtype is not None and jnp.issubdtype(dtype, jnp.floating) and np.isfinite(value):
        # A product of rounded numbers, such as 0.01 · 0.1 in single precision.
        resolution = float(jnp.finfo(dtype).eps)
        for near in (float(f"{value:.{digits}g}") for digits in range(1, 5)):
            if resolution < 1e-6 and abs(near / value - 1) < 3 * resolution:
                return repr(near)
    is_half = dtype is not None and jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 32
    written = repr(float(value)) if dtype is None or is_half else str(np.dtype(dtype).type(value))
    return f"{value:.4g}" if is_half or (len(written) > 12 and abs(value) > 1e6) else written


_KNOWN_NUMBERS = {
    np.pi: ("π", "\\pi"),
    2 * np.pi: ("2π", "2\\pi"),
    np.log(2): ("log 2", "\\log 2"),
    np.log(2 * np.pi): ("log 2π", "\\log 2\\pi"),
    np.log(2 * np.pi) / 2: ("1/2 log 2π", "\\frac{{1}}{{2}} \\log 2\\pi"),
}


def known_number(value: float, dtype: Any = None) -> tuple[str, str] | None:
    """A root of an integer, `π` or a logarithm that a decimal number is: templates of text and LaTeX."""
    if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
        return None
    resolution = float(jnp.finfo(dtype or float).eps)
    if not 1e-4 < abs(value) < 1e4 or resolution > 1e-6 or len(decimal(value, dtype)) < 8:
        return None

    def is_value(of: float) -> bool:
        return abs(of / abs(value) - 1) < 2 * resolution

    sign = "-" if value < 0 else ""
    for of, (text, latex) in _KNOWN_NUMBERS.items():
        if is_value(of):
            return sign + text, sign + latex
    for times in range(1, 21):
        # Such as the constant of a Gaussian in several dimensions.
        if is_value(times / 2 * np.log(2 * np.pi)):
            text = f"{times // 2} " if times % 2 == 0 else f"{times}/2 "
            latex = f"{times // 2}\\," if times % 2 == 0 else f"\\frac{{{{{times}}}}}{{{{2}}}}\\,"
            return f"{sign}{text}log 2π", f"{sign}{latex} \\log 2\\pi"
    square, inverse = round(value**2), round(value**-2)
    largest = max(square, inverse)
    # Roots of larger integers are so near to each other that one in a hundred numbers is one by chance.
    if math.isqrt(largest) ** 2 == largest or 8 * largest * resolution > 0.01:
        return None
    if square > 1 and is_value(square**0.5):
        return f"{sign}√{square}", f"{sign}\\sqrt{{{{{square}}}}}"
    if inverse > 1 and is_value(inverse**-0.5):
        return f"{sign}1/√{inverse}", f"{sign}\\frac{{{{1}}}}{{{{\\sqrt{{{{{inverse}}}}}}}}}"
    return None


def reduction(name: str, axes: Sequence[int] | None, of_sum: bool = False) -> tuple[str, str]:
    """Templates of a sum or a mean, as text and LaTeX, with the axes if they are not all of them.

    In LaTeX a sum of what is a sum itself (`of_sum`) needs parentheses.
    """
    index = "" if axes is None else f"{'axis' if len(axes) == 1 else 'axes'} {', '.join(map(str, axes))}"
    text = f"{name}({{0}}, {index})" if index else f"{name}({{0}})"
    below = "_{{\\text{{" + index + "}}}}" if index else ""
    if name == "sum":
        return text, f"\\sum{below} " + ("\\left({0}\\right)" if of_sum else "{0}")
    return text, "\\mathrm{{" + name + "}}" + below + "\\!\\left({0}\\right)"


# A decimal number that is longer than this may be that of a fraction.
_LONG_DECIMAL = 8


def number_text(value: float, dtype: Any = None) -> tuple[str, str, bool]:
    """A number as text and LaTeX, and whether it is written as a product or a ratio."""
    ratio = Fraction(value).limit_denominator(10_000)
    is_ratio = ratio.numerator / ratio.denominator == value and ratio.denominator != 1
    text = decimal(abs(value), dtype)
    if not is_ratio and len(text) > _LONG_DECIMAL:
        ratio = _short_ratio(value, dtype) or ratio
        is_ratio = _short_ratio(value, dtype) is not None
    mantissa, _, exponent = text.partition("e")
    latex = text
    if exponent:
        latex = f"{mantissa} \\cdot 10^{{{{{int(exponent)}}}}}"
        text = f"{mantissa}·10" + str(int(exponent)).translate(SUPERSCRIPT)
        text, latex = (t.removeprefix(one) for t, one in ((text, "1·"), (latex, "1 \\cdot ")))
    if value < 0:
        text, latex = f"-{text}", f"-{latex}"
    known = known_number(value, dtype)
    if is_ratio:
        text, latex = str(ratio), f"\\frac{{{{{ratio.numerator}}}}}{{{{{ratio.denominator}}}}}"
    elif known is not None:
        text, latex = known
    is_product = is_ratio or " " in text or "/" in text
    return text.replace("-", "−"), latex, is_product


def _short_ratio(value: float, dtype: Any) -> Fraction | None:
    """A third in single precision, or a few of a small part, such as 0.9 / 7, but for rounding."""
    if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
        return None
    resolution = 2 * float(jnp.finfo(dtype if dtype is not None else float).eps)
    for largest in (100, 10_000):
        ratio = Fraction(value).limit_denominator(largest)
        is_short = largest == 100 or abs(ratio.numerator) <= 3
        if is_short and ratio.denominator != 1 and abs(float(ratio) / value - 1) < resolution < 1e-6:
            return ratio
    return None
