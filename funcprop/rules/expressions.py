"""Symbolic expressions that print as text and LaTeX, and evaluate to arrays.

An equation of `fp.derive` is one of these, so what is verified is exactly what is printed. They are added,
multiplied, transposed and summed with the ordinary operators, which write numbers and signs as on paper.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from funcprop.program.dtypes import common_dtype, is_weak
from funcprop.rules.formula import (
    ATOM,
    FRACTION,
    MINUS,
    POWER,
    PRODUCT,
    QUOTIENT,
    SUM,
    TERM,
    TRANSPOSED,
    Environment,
    Formula,
    exponent_of,
    factored,
    fraction_of,
    is_one,
)
from funcprop.rules.notation import SUPERSCRIPT, literally, number_text, reduction


class Expression(Formula):
    """What a formula is of: it is added, multiplied, transposed and summed as numbers and matrices are."""

    def __add__(self, other: Any) -> Expression:
        other = as_expression(other)
        if other.constant is not None and other.constant < 0:
            return self - _constant(-other.constant, other)
        if other.template == MINUS:
            return self - other.operands[0]
        if other.template in ("{0} + {1}", "{0} − {1}"):
            first, second = other.operands
            return self + first + second if "+" in other.template else self + first - second
        for zero, rest in ((self, other), (other, self)):
            if zero.constant == 0 and rest.type.dtype == common_dtype(zero.type, rest.type):
                return spread_over(rest, np.broadcast_shapes(zero.shape, rest.shape))
        if self.template == other.template and self.shape == other.shape and self.text() == other.text():
            return 2 * self
        return _entrywise(jnp.add, (self, other), "{0} + {1}", "{0} + {1}", SUM, SUM)

    def __radd__(self, other: Any) -> Expression:
        return as_expression(other) + self

    def __sub__(self, other: Any) -> Expression:
        other = as_expression(other)
        if other.template == MINUS:
            return self + other.operands[0]
        if self.template == "{0} − {1}" and other.shape == self.shape:
            first, second = self.operands
            if second.text() == other.text():
                return first - 2 * other
        # The right operand of a difference needs parentheses if it is a sum itself.
        subtrahend = parenthesised(other) if other.binding == SUM else other
        return _entrywise(jnp.subtract, (self, subtrahend), "{0} − {1}", "{0} - {1}", SUM, SUM)

    def __rsub__(self, other: Any) -> Expression:
        return as_expression(other) - self

    def __neg__(self) -> Expression:
        if self.template == MINUS:
            return self.operands[0]
        if self.constant is not None:
            return _constant(-self.constant, self)
        return _entrywise(jnp.negative, (self,), MINUS, "-{0}", TERM, QUOTIENT)

    def __mul__(self, other: Any) -> Expression:
        other = as_expression(other)
        for simpler in _SIMPLER_PRODUCTS:
            if (product := simpler(self, other)) is not None:
                return product
        return _written_product(self, other)

    def __rmul__(self, other: Any) -> Expression:
        return as_expression(other) * self

    def __truediv__(self, other: Any) -> Expression:
        other = as_expression(other)
        if is_one(other):
            return self
        if self.template == MINUS:
            return -(self.operands[0] / other)
        if self.constant is not None and other.constant:
            return _constant(self.constant / other.constant, self, other)
        if self.constant is not None and self.constant < 0:
            return -(-self / other)
        if self.constant and abs(self.constant) < 1 and not other.is_sum:
            inverse = round(1 / self.constant)
            if abs(inverse * self.constant - 1) < jnp.finfo(self.type.dtype).eps:
                return number(1, self.type.dtype) / (_constant(inverse, self) * other)
        factor, rest = factored(self)
        if factor is not None and factor.constant and other.constant:
            return _constant(factor.constant / other.constant, factor, other) * rest
        if factor is not None and other.constant is None:
            return factor * (rest / other)
        if other.constant and other.constant < 1 and (1 / other.constant).is_integer():
            return _constant(1 / other.constant, other) * self
        # A product above the line needs no parentheses.
        above = replace(self, binding=max(self.binding, POWER)) if self.binding >= PRODUCT else self
        return _entrywise(jnp.divide, (above, other), FRACTION, "\\frac{{{0}}}{{{1}}}", QUOTIENT, POWER)

    def __rtruediv__(self, other: Any) -> Expression:
        return as_expression(other) / self

    def __matmul__(self, other: Any) -> Expression:
        other = as_expression(other)
        return Expression(of_one_dtype(jnp.matmul), (self, other), "{0} {1}", "{0}\\, {1}", PRODUCT, PRODUCT)

    def __pow__(self, exponent: float) -> Expression:
        if exponent == 1:
            return self
        if exponent == 2 and self.template.startswith("√") and self.operands:
            return self.operands[0]
        before = exponent_of(self.template)
        if before is not None and isinstance(exponent, int) and exponent > 0:
            return self.operands[0] ** (before * exponent)
        text = (
            "{0}" + str(exponent).translate(SUPERSCRIPT) if isinstance(exponent, int) else f"{{0}}^{exponent}"
        )
        latex = "{0}^{{" + str(exponent) + "}}"
        return _entrywise(lambda x: x**exponent, (self,), text, latex, POWER, ATOM)

    @property
    def T(self) -> Expression:  # noqa: N802
        """The transpose of a matrix."""
        if self.template == "{0}ᵀ":
            return self.operands[0]
        if self.template in _OF_MATRIX[1:]:
            mark, latex = ("⁻ᵀ", "-\\top") if self.template == "{0}⁻¹" else ("⁻¹", "-1")
            turn = lambda *v: jnp.transpose(self.function(*v))  # noqa: E731
            return Expression(turn, self.operands, "{0}" + mark, "{0}^{{" + latex + "}}", POWER, ATOM)
        if self.is_number:
            turned = jax.ShapeDtypeStruct(self.shape[::-1], self.type.dtype)
            return unwritten(jnp.transpose, self, turned)
        if (peeled := without_scale(self)) is not None and len(peeled[1].shape) == 2:
            return peeled[0](peeled[1].T)
        if self.template in TRANSPOSED and len(self.shape) == 2 and not self.operands[0].is_number:
            text = TRANSPOSED[self.template]
            latex = text.replace(" ", "\\, ").replace("ᵀ", "^{{\\top}}")
            return factors(lambda *v: jnp.transpose(self.function(*v)), self.operands, text, latex)
        return Expression(jnp.transpose, (self,), "{0}ᵀ", "{0}^{{\\top}}", POWER, ATOM)

    def sum(self, axes: int | Sequence[int] | None = None, keepdims: bool = False) -> Expression:
        """The sum over axes, all of them by default."""
        axes = (axes,) if isinstance(axes, int) else axes
        if axes is not None and not len(axes):
            return self
        if self.constant is not None and self.shape:
            rest = jax.eval_shape(lambda x: jnp.sum(x, axes, keepdims=keepdims), self.type).shape
            count = math.prod(self.shape) // max(math.prod(rest), 1)
            return spread_over(number(self.constant * count, self.type.dtype), rest)
        if (peeled := without_scale(self)) is not None and peeled[1].shape == self.shape:
            return peeled[0](peeled[1].sum(axes, keepdims))
        text, latex = reduction("sum", axes, self.is_sum)
        return Expression(lambda x: jnp.sum(x, axes, keepdims=keepdims), (self,), text, latex, ATOM, SUM)


@dataclass(frozen=True, eq=False)
class Symbol(Expression):
    """A named value; `key` finds it in the environment."""

    key: str = ""

    def evaluate(self, environment: Environment) -> Any:
        """The symbol's value."""
        return environment[self.key]

    def symbols(self) -> set[str]:
        """Its own key."""
        return {self.key}


def _entrywise(
    function: Callable[..., Any],
    operands: tuple[Expression, ...],
    template: str,
    latex: str,
    binding: int,
    inner: int,
) -> Expression:
    """A function of the entries of operands that are broadcast to one shape, and have one dtype."""
    types = [o.type for o in operands]
    dtype = common_dtype(*types)
    is_plain = jnp.issubdtype(dtype, jnp.inexact) and not all(map(is_weak, types))
    shape = np.broadcast_shapes(*(t.shape for t in types))
    known = jax.ShapeDtypeStruct(shape, dtype) if is_plain else None
    made = Expression(of_one_dtype(function), operands, template, latex, binding, inner, known)
    is_uniform = any(o.uniform for o in operands) and all(o.is_number for o in operands)
    return replace(made, uniform=True) if is_uniform else made


def of_one_dtype(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, with operands of different dtypes promoted to one."""

    def promoted(*operands: Any) -> Any:
        types = [jax.typeof(x) for x in operands]
        if len({t.dtype for t in types}) == 1:
            return function(*operands)
        dtype = common_dtype(*types)
        given = (x if is_weak(t) else x.astype(dtype) for x, t in zip(operands, types, strict=True))
        return function(*given)

    return promoted


def symbol(key: str, text: str, latex: str, type_: jax.ShapeDtypeStruct) -> Symbol:
    """A named value of a given type."""
    return Symbol(lambda: None, (), literally(text), literally(latex), ATOM, ATOM, type_, key=key)


def number(value: float, dtype: Any = None) -> Expression:
    """A constant; a ratio of small integers is written as one. Without a dtype it takes that of others."""
    text, latex, is_product = number_text(value, dtype)
    binding = TERM if value < 0 else PRODUCT if is_product else ATOM
    constant = jnp.asarray(float(value), dtype)
    type_ = jax.ShapeDtypeStruct((), constant.dtype, weak_type=dtype is None)
    return Expression(lambda: constant, (), text, latex, binding, ATOM, type_, constant=float(value))


def _constant(value: float, *operands: Expression) -> Expression:
    """A number that is computed from constants, in every entry of the largest of them."""
    types = [o.type for o in operands]
    result = number(value, None if all(map(is_weak, types)) else common_dtype(*types))
    return spread_over(result, np.broadcast_shapes(*(t.shape for t in types)))


def as_expression(value: Any) -> Expression:
    """An expression, or a number as one.

    Raises:
        TypeError: it is neither.
    """
    if isinstance(value, Expression):
        return value
    try:
        return number(value)
    except TypeError:
        raise TypeError(
            f"{value!r} is neither a symbol nor a number; apply other functions with "
            "`apply(name, function, *symbols)`, and leave out an argument that is None."
        ) from None


def _trivial_product(a: Expression, b: Expression) -> Expression | None:
    """`1 a` is `a`, and two constants are one."""
    if is_one(a):
        return b
    if is_one(b):
        return a
    if a.constant is None or b.constant is None:
        return None
    return _constant(a.constant * b.constant, a, b)


def _scale_first(a: Expression, b: Expression) -> Expression | None:
    """A sign and known factors stand before the whole product."""
    (of_a, x), (of_b, y) = factored(a), factored(b)
    if of_a is not None and of_b is not None:
        return (of_a * of_b) * (x * y)
    if (positive := _without_sign(a)) is not None:
        return -(positive * b)
    if (positive := _without_sign(b)) is not None:
        return -(a * positive)
    if of_b is not None and of_b.constant is not None and a.constant is not None:
        return _constant(a.constant * of_b.constant, a, of_b) * y
    if of_b is not None and of_b.shape == ():
        divided = fraction_of(a)
        if of_b.constant and divided is not None and divided[1].constant and a.shape == ():
            return (of_b * a) * y  # `(λ / 2) 2 w` is `λ w`.
        return of_b * (a * y)
    if of_a is not None and of_a.shape == () and not b.is_number:
        return of_a * (x * b)
    return None


def _of_ones(a: Expression, b: Expression) -> Expression | None:
    """An array of ones changes at most the shape of the other."""
    for ones, array in ((a, b), (b, a)):
        if ones.constant != 1:
            continue
        shape = np.broadcast_shapes(ones.shape, array.shape)
        if shape == array.shape and common_dtype(ones.type, array.type) == array.type.dtype:
            return array
        if shape == ones.shape:
            same = array.type.dtype == ones.type.dtype
            return spread_over(array, ones.shape) if same or array.shape == ones.shape else array
    return None


def _number_first(a: Expression, b: Expression) -> Expression | None:
    """A number stands before what is none, a known one before an unknown one."""
    is_later = b.is_number and (not a.is_number or (b.constant is not None and a.constant is None))
    return b * a if is_later else None


def _by_fraction(a: Expression, b: Expression) -> Expression | None:
    """`2 (1 / u)` is `2 / u`, `2 (z / 2)` is `z`, and `2 (z / (2 u))` is `z / u`."""
    if (fraction := fraction_of(b)) is None:
        return None
    above, below = fraction
    shape = np.broadcast_shapes(a.shape, b.shape)
    if is_one(above):
        return spread_over(a / below, shape)
    if not a.constant:
        return None
    if a.constant == below.constant:
        return spread_over(above, shape)
    factor, rest = factored(below)
    if factor is not None and factor.constant and (a.constant / factor.constant).is_integer():
        return _constant(a.constant / factor.constant, a, factor) * (above / rest)
    return None


def _of_fraction(a: Expression, b: Expression) -> Expression | None:
    """`(2 / u) z` is `2 (z / u)`, and `(g / 2) ⊙ z` is `g ⊙ z / 2`."""
    if (fraction := fraction_of(a)) is None:
        return None
    above, below = fraction
    if above.constant and a.shape == b.shape:
        return number(above.constant, above.type.dtype) * (b / below)
    if below.shape == () and not b.is_number:
        return spread_over(above, a.shape) * b / below
    return None


# Tried in this order.
_SIMPLER_PRODUCTS = (_trivial_product, _scale_first, _of_ones, _number_first, _by_fraction, _of_fraction)


def _written_product(a: Expression, b: Expression) -> Expression:
    """A product that is not simplified."""
    if b.binding == QUOTIENT and a.constant is None:
        # `a (b / c)`; a fraction needs no parentheses in LaTeX.
        b = Expression(lambda x: x, (b,), "({0})", "{0}", ATOM, SUM, b.known_type)
    if a.is_number:
        return _entrywise(jnp.multiply, (a, b), "{0} {1}", "{0}\\, {1}", PRODUCT, QUOTIENT)
    return _entrywise(jnp.multiply, (a, b), "{0} ⊙ {1}", "{0} \\odot {1}", PRODUCT, QUOTIENT)


def _without_sign(expression: Expression) -> Expression | None:
    """The negative of an expression that is written with a minus, else None."""
    is_negative = expression.constant is not None and expression.constant < 0
    return -expression if is_negative or expression.template == MINUS else None


def without_scale(
    expression: Expression,
) -> tuple[Callable[[Expression], Expression], Expression] | None:
    """A sign, a known factor or a known divisor of all entries as a function, and what it is applied to."""
    if (positive := _without_sign(expression)) is not None:
        return (lambda v: -v), positive
    factor, rest = factored(expression)
    if factor is not None and factor.constant is not None:
        known = number(factor.constant, factor.type.dtype)
        return (lambda v: known * v), rest
    if expression.template == FRACTION and (divisor := expression.operands[1]).constant is not None:
        numerator = expression.operands[0]
        # It may have been written above a line, where a product needs no parentheses.
        lowered = PRODUCT if numerator.template.startswith("{0} ") else numerator.binding
        return (lambda v: v / divisor), replace(numerator, binding=lowered)
    return None


def parenthesised(expression: Expression) -> Expression:
    """Parenthesise the expression."""
    return Expression(
        lambda x: x, (expression,), "({0})", "\\left({0}\\right)", ATOM, SUM, expression.known_type
    )


def promoted(expression: Expression, type_: Any) -> Expression:
    """Promote the expression to the wider of its own dtype and that of `type_`, which is not written."""
    dtype = common_dtype(expression.type, type_)
    if dtype == expression.type.dtype:
        return expression
    wider = jax.ShapeDtypeStruct(expression.shape, dtype)
    template, binding = "{0}", expression.binding
    return Expression(lambda x: x.astype(dtype), (expression,), template, template, binding, binding, wider)


# Of these the transpose is written without brackets.
_OF_MATRIX = ("{0}ᵀ", "{0}⁻¹", "{0}⁻ᵀ")


def factors(
    function: Callable[..., Any], operands: Sequence[Expression], text: str, latex: str, type_: Any = None
) -> Expression:
    """A product that is written by templates; operands that are sums are put in parentheses.

    The transpose of a transpose is the matrix itself, that of an inverse has a sign of its own.
    """
    given, twice = list(operands), set[int]()
    for i, operand in enumerate(operands):
        if f"{{{i}}}ᵀ" in text and operand.template in _OF_MATRIX and len(operand.shape) == 2:
            text = text.replace(f"{{{i}}}ᵀ", f"{{{i}}}")
            latex = latex.replace(f"{{{i}}}^{{{{\\top}}}}", f"{{{i}}}")
            given[i] = operand.T
            twice.add(i)

    def of_given(*values: Any) -> Any:
        return function(*(v.T if i in twice else v for i, v in enumerate(values)))

    return Expression(of_given, tuple(given), text, latex, PRODUCT, POWER, type_)


def unwritten(function: Callable[..., Any], x: Expression, type_: Any) -> Expression:
    """A function of one operand that is not written: a change of shape or type."""
    if x.template == MINUS:
        return -unwritten(function, x.operands[0], type_)
    is_divided = x.template == FRACTION and x.operands[1].constant is not None
    if is_divided and x.operands[0].shape == x.shape and x.type.dtype == type_.dtype:
        above, below = x.operands
        return unwritten(function, above, type_) / below
    factor, rest = factored(x)
    if factor is not None and factor.shape == () and rest.type.dtype == type_.dtype and rest.shape == x.shape:
        return factor * unwritten(function, rest, type_)
    made = Expression(function, (x,), "{0}", "{0}", x.binding, x.binding, type_)
    return replace(made, uniform=x.is_number and made.shape != (), constant=x.constant)


def spread_over(x: Expression, shape: Sequence[int]) -> Expression:
    """A number in every entry of an array, which is written as the number."""
    type_ = jax.ShapeDtypeStruct(tuple(shape), x.type.dtype)
    return x if x.shape == tuple(shape) else unwritten(lambda v: jnp.broadcast_to(v, shape), x, type_)
