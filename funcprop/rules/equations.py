"""What a rule writes its equations with, besides the operators of expressions.

`g * apply("tanh′", derivative, z)`: a function by its name; `written`: one in a notation of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from funcprop.rules.expressions import (
    ATOM,
    POWER,
    PRODUCT,
    SUM,
    TERM,
    Expression,
    as_expression,
    of_one_dtype,
    parenthesised,
)
from funcprop.rules.notation import latex_name, literally


class OperatorSymbols(NamedTuple):
    """An operator as symbols, from which a rule writes its equations.

    `args` has the structure of the operator's arguments, `output` that of its results; `cotangent` is
    `∂J/∂output`, which may be the constant 1; `name` is how the operator is written; `static` are its
    parameters.
    """

    name: str
    args: tuple[Any, ...]
    output: Any
    cotangent: Any
    static: Mapping[str, Any]


class Equations(NamedTuple):
    """`output = forward`, and for each argument its cotangent (None where it has none)."""

    forward: Expression
    backward: tuple[Any, ...]


def apply(
    name: str, function: Callable[..., Any], *operands: Any, latex: str | None = None, type_: Any = None
) -> Expression:
    """A function by its name: `tanh(z)`, `φ′(z)`; `type_` is its result's, where that is known."""
    arguments = ", ".join(f"{{{i}}}" for i in range(len(operands)))
    written = latex if latex is not None else latex_name(name)
    return Expression(
        function,
        tuple(map(as_expression, operands)),
        f"{literally(name)}({arguments})",
        f"{literally(written)}\\!\\left({arguments}\\right)",
        ATOM,
        SUM,
        type_,
    )


def written(
    function: Callable[..., Any],
    operands: Sequence[Expression],
    text: str,
    latex: str,
    type_: Any = None,
    is_sum: bool = False,
) -> Expression:
    """A function of operands that is written by templates, in which `{0}`, `{1}` … are the operands."""
    binding = SUM if is_sum else TERM if text.startswith("−") else ATOM
    return Expression(function, tuple(operands), text, latex, binding, PRODUCT if is_sum else SUM, type_)


def indexed(
    function: Callable[..., Any], x: Expression, index: Expression | str, type_: Any = None, axis: int = 0
) -> Expression:
    """Some entries of `x`: `x[1:, :3]`, `E[t]`, along an axis `x[:, t]`."""
    operands = [x if x.binding == ATOM else parenthesised(x)]
    inner = inner_latex = "{1}"
    if isinstance(index, str):
        inner, inner_latex = literally(index), f"\\texttt{{{{{index}}}}}"
    else:
        operands.append(index)
        inner, inner_latex = ":, " * axis + inner, ":, " * axis + inner_latex
    latex = f"{{0}}\\left[{inner_latex}\\right]"
    return Expression(function, tuple(operands), f"{{0}}[{inner}]", latex, ATOM, SUM, type_)


def outer(a: Expression, b: Expression) -> Expression:
    """The outer product `a bᵀ` of two column vectors, with the axes of `a` before those of `b`."""
    product = of_one_dtype(lambda x, y: jnp.tensordot(x, y, axes=0))
    return Expression(product, (a, b), "{0} {1}ᵀ", "{0}\\, {1}^{{\\top}}", PRODUCT, POWER)


def squared_norm(a: Expression) -> Expression:
    """The squared Frobenius norm `‖a‖²_F`."""
    return Expression(lambda x: jnp.sum(x * x), (a,), "‖{0}‖²_F", "\\lVert {0} \\rVert_F^2", ATOM, SUM)


def opaque(
    function: Callable[..., Any],
    operands: Sequence[Expression],
    text: str,
    latex: str,
    type_: Any = None,
) -> Expression:
    """An expression that is written in its own way; `type_` is its result's, where that is known."""
    return Expression(function, tuple(operands), literally(text), literally(latex), ATOM, SUM, type_)
