"""A formula as data: a function of operands, and how it is written as text and as LaTeX."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax

Environment = Mapping[str, Any]

# How tightly an operator binds; an operand that binds less tightly is put in parentheses.
SUM, TERM, QUOTIENT, PRODUCT, POWER, ATOM = range(6)

_PLAIN_DIGITS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹", "0123456789")
# How a sign and a fraction are written.
MINUS, FRACTION = "−{0}", "{0} / {1}"

# A product, and how its transpose is written.
TRANSPOSED = {
    "{0} {1}": "{1}ᵀ {0}ᵀ", "{0}ᵀ {1}": "{1}ᵀ {0}", "{0} {1}ᵀ": "{1} {0}ᵀ", "{0}ᵀ {1}ᵀ": "{1} {0}",
    "{1} {0}": "{0}ᵀ {1}ᵀ", "{1}ᵀ {0}": "{0}ᵀ {1}", "{1} {0}ᵀ": "{0} {1}ᵀ", "{1}ᵀ {0}ᵀ": "{0} {1}",
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Formula:
    """A function of operands, with a template for each notation (`{0}`, `{1}` are the operands).

    `binding` is how tightly the whole binds, `inner` how tightly its operands must bind to need no
    parentheses. Operands of different dtypes are promoted, to that of a wider one. A `uniform` array has one
    number in all of its entries, and is written as that number; a number that is known is `constant`. Where
    the axes have another order than in what is written, `places` are those of the axes there; `new_axes` are
    those that are not there at all.
    """

    function: Callable[..., Any]
    operands: tuple[Any, ...]
    template: str
    latex_template: str
    binding: int
    inner: int
    known_type: jax.ShapeDtypeStruct | None = None
    uniform: bool = False
    constant: float | None = None
    places: tuple[int, ...] | None = None
    new_axes: tuple[int, ...] = ()

    @cached_property
    def type(self) -> jax.ShapeDtypeStruct:
        """Shape and dtype of the value; found by tracing where they are not known."""
        if self.known_type is not None:
            return self.known_type
        return jax.eval_shape(self.function, *(operand.type for operand in self.operands))

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the value."""
        return tuple(self.type.shape)

    @property
    def is_number(self) -> bool:
        """Whether it is one number, in one entry or in all of them."""
        return self.shape == () or self.uniform

    @property
    def is_sum(self) -> bool:
        """Whether it is written as a sum, or with a sign: in a sum over entries it stands in parentheses."""
        return self.binding <= TERM

    @property
    def spelled(self) -> Any:
        """What is written of it: itself, without changes of shape and type."""
        inner = self
        while inner.template == "{0}" and inner.operands:
            inner = inner.operands[0]
        return inner

    def evaluate(self, environment: Environment) -> Any:
        """The value of the expression, with the symbols' values in `environment`."""
        return self.function(*(operand.evaluate(environment) for operand in self.operands))

    def symbols(self) -> set[str]:
        """The keys of the symbols in it."""
        return set().union(*(operand.symbols() for operand in self.operands))

    def text(self) -> str:
        """Unicode text."""
        return self.template.format(*(self._inside(o, o.text(), "({})") for o in self.operands))

    def latex(self) -> str:
        """LaTeX, without dollar signs."""
        wrap = "\\left({}\\right)"
        return self.latex_template.format(*(self._inside(o, o.latex(), wrap) for o in self.operands))

    def _inside(self, operand: Formula, rendered: str, parentheses: str) -> str:
        return parentheses.format(rendered) if operand.binding < self.inner else rendered


def factored(expression: Any) -> tuple[Any | None, Any]:
    """A known factor of all entries, and the rest; a product of matrices has none, even with a constant."""
    if expression.template == "{0} {1}" and expression.inner == QUOTIENT:
        factor, rest = expression.operands
        if factor.constant is not None:
            return factor, rest
    return None, expression


def fraction_of(expression: Any) -> tuple[Any, Any] | None:
    """Numerator and denominator of a fraction, be it a number in every entry of an array."""
    inner = expression.operands[0] if expression.template == "{0}" and expression.operands else None
    if inner is not None and inner.shape == () and inner.type.dtype == expression.type.dtype:
        expression = inner
    return expression.operands if expression.template == FRACTION else None


def exponent_of(template: str) -> int | None:
    """The whole number to which an expression is the power of its operand."""
    digits = template.removeprefix("{0}").translate(_PLAIN_DIGITS)
    return int(digits) if template.startswith("{0}") and template[3:] and digits.isdecimal() else None


def is_one(expression: Any) -> bool:
    """Whether the expression is the constant 1, which a product leaves out."""
    return expression.constant == 1 and expression.shape == ()
