"""Equations of functions of each entry that are written with a sign: `√h`, `|z|`, `z²`, `z > 0`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax

from funcprop.rules.equations import Equations, OperatorSymbols, apply, written
from funcprop.rules.expressions import ATOM, POWER, SUM, TERM, Expression, of_one_dtype, parenthesised
from funcprop.rules.formula import MINUS


def _unary(
    function: Callable[[Any], Any], derivative: Callable[[Expression, Expression], Expression]
) -> Callable[[OperatorSymbols], Equations]:
    def equations(op: OperatorSymbols) -> Equations:
        (x,) = op.args
        return Equations(apply(op.name, function, x, type_=x.type), (derivative(op.cotangent, x),))

    return equations


def _absolute(op: OperatorSymbols) -> Equations | None:
    """`|z|`, whose slope is its sign."""
    (x,) = op.args
    if not jnp.issubdtype(x.type.dtype, jnp.floating):
        return None
    size = written(jnp.abs, (x,), "|{0}|", "\\left|{0}\\right|", x.type)
    return Equations(size, (op.cotangent * apply("sign", jnp.sign, x, type_=x.type),))


def _root(x: Expression) -> Expression:
    """`√h`, `√(h + 1)`."""
    text = "√{0}" if x.binding == ATOM else "√({0})"
    return Expression(jnp.sqrt, (x,), text, "\\sqrt{{{0}}}", POWER, SUM, x.type)


def _power_of_numbers(op: OperatorSymbols) -> Equations | None:
    """`z^0.7`, where the exponent is known."""
    x, exponent = op.args
    if exponent.constant is None or not jnp.issubdtype(x.type.dtype, jnp.floating):
        return None
    n = exponent.constant
    n = int(n) if n == int(n) else n
    return Equations(x**n, (op.cotangent * (n * x ** (n - 1)), None))


def _larger(sign: int) -> Callable[[OperatorSymbols], Equations | None]:
    """`max(a, b)`, whose slope is 1 where `a` is larger, and 1/2 where both are equal."""

    def equations(op: OperatorSymbols) -> Equations | None:
        a, b = op.args
        if not jnp.issubdtype(a.type.dtype, jnp.floating):
            return None
        compute = lax.max if sign > 0 else lax.min
        forward = apply(op.name, of_one_dtype(compute), a, b, type_=op.output.type)
        difference = b if a.constant == 0 else a if b.constant == 0 else a - b
        of_a = _step(sign, difference) if difference is not b else None
        of_b = _step(sign if difference is b else -sign, difference) if b.constant is None else None
        return Equations(forward, tuple(None if s is None else op.cotangent * s for s in (of_a, of_b)))

    return equations


def _log_of_one_plus(x: Expression) -> Expression:
    sign, inner = ("−", x.operands[0]) if x.template == MINUS else ("+", x)
    inner = parenthesised(inner) if sign == "−" and inner.binding == SUM else inner
    latex = f"\\log\\!\\left(1 {'-' if sign == '−' else '+'} {{0}}\\right)"
    compute = (lambda v: jnp.log1p(-v)) if sign == "−" else jnp.log1p
    return written(compute, (inner,), f"log(1 {sign} {{0}})", latex, x.type)


def _log_of_sum(op: OperatorSymbols) -> Equations | None:
    """`logaddexp(a, b)`, whose slope is the share of `eᵃ`."""
    a, b = op.args
    if not a.type.dtype == b.type.dtype == op.output.type.dtype or not a.shape == b.shape == op.output.shape:
        return None
    shares = (apply("σ", lambda d: lax.logistic(d), d, type_=d.type) for d in (a - b, b - a))
    return Equations(
        apply("logaddexp", jnp.logaddexp, a, b, type_=a.type), tuple(op.cotangent * p for p in shares)
    )


def _step(sign: int, x: Expression) -> Expression:
    """1 where the sign of `x` is `sign`, else 0, and 1/2 where `x` is 0."""
    x = x if sign > 0 else -x
    return apply("step", lambda v: jnp.heaviside(v, jnp.asarray(0.5, v.dtype)), x, type_=x.type)


_COMPARISONS = {
    "gt": (">", ">"), "lt": ("<", "<"), "ge": ("≥", "\\geq"), "le": ("≤", "\\leq"),
    "eq": ("=", "="), "ne": ("≠", "\\neq"),
}  # fmt: skip


def _comparison(sign: str, latex: str) -> Callable[[OperatorSymbols], Equations]:
    """`z > 0`, which has no derivative."""

    def equations(op: OperatorSymbols) -> Equations:
        texts = f"{{0}} {sign} {{1}}", f"{{0}} {latex} {{1}}"
        return Equations(
            Expression(getattr(lax, op.name), op.args, *texts, SUM, TERM, op.output.type), (None, None)
        )

    return equations


def _remainder(op: OperatorSymbols) -> Equations:
    """`mod(a, b)`, of integers."""
    return Equations(apply("mod", jnp.remainder, *op.args, type_=op.output.type), (None, None))


def _both(word: str, sign: str) -> Callable[[OperatorSymbols], Equations | None]:
    """`a and b`, of what is true or false."""

    def equations(op: OperatorSymbols) -> Equations | None:
        if op.output.type.dtype != bool:
            return None
        join = lambda a, b: a & b if word == "and" else a | b  # noqa: E731
        latex = f"{{0}} {sign} {{1}}"
        both = written(join, op.args, f"{{0}} {word} {{1}}", latex, op.output.type, is_sum=True)
        return Equations(both, (None, None))

    return equations


def _power(op: OperatorSymbols) -> Equations:
    (x,) = op.args
    n = op.static.get("y", 2)
    slope = n * x if n == 2 else n * x ** (n - 1)
    return Equations(x**n, (op.cotangent * slope,))


_EXP = "\\exp\\!\\left({0}\\right)"

EQUATIONS: dict[str, Callable[[OperatorSymbols], Equations | None]] = {
    "log": _unary(jnp.log, lambda g, x: g / x),
    "log1p": lambda op: Equations(
        _log_of_one_plus(op.args[0]),
        (op.cotangent / (1 + op.args[0]),),
    ),
    "expm1": lambda op: Equations(
        written(jnp.expm1, op.args, "exp({0}) − 1", _EXP + " - 1", op.args[0].type, is_sum=True),
        (op.cotangent * apply("exp", jnp.exp, op.args[0], type_=op.args[0].type),),
    ),
    "sqrt": lambda op: Equations(_root(op.args[0]), (op.cotangent / (2 * _root(op.args[0])),)),
    "rsqrt": lambda op: Equations(
        1 / _root(op.args[0]), (-op.cotangent / (2 * op.args[0] * _root(op.args[0])),)
    ),
    "pow": _power_of_numbers,
    "and": _both("and", "\\wedge"),
    "or": _both("or", "\\vee"),
    "mod": _remainder,
    "logaddexp": _log_of_sum,
    "max": _larger(1),
    "min": _larger(-1),
    "sin": _unary(jnp.sin, lambda g, x: g * apply("cos", jnp.cos, x, type_=x.type)),
    "cos": _unary(jnp.cos, lambda g, x: -g * apply("sin", jnp.sin, x, type_=x.type)),
    "abs": _absolute,
    **{name: _comparison(sign, latex) for name, (sign, latex) in _COMPARISONS.items()},
    "square": _power,
    "integer_pow": _power,
    # Of JAX 0.12, in the slope of tanh.
    "one_minus_square": lambda op: Equations(1 - op.args[0] ** 2, (-op.cotangent * (2 * op.args[0]),)),
}
