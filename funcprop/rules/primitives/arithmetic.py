"""Equations of primitives that autodiff already differentiates best; `fp.derive` writes them out.

Operands of a primitive have equal shapes, except that one may be a scalar or have axes of size 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from funcprop.rules.expressions import Equations, Expression, OperatorSymbols, apply, outer, promoted


def _fit(cotangent: Expression, operand: Expression) -> Expression:
    """The cotangent of an operand that was broadcast: a scalar beside an array, or along axes of size 1."""
    if operand.shape == ():
        return cotangent if cotangent.shape == () else cotangent.sum()
    sizes = zip(operand.shape, cotangent.shape, strict=True)
    stretched = [axis for axis, (own, result) in enumerate(sizes) if own != result]
    return cotangent.sum(stretched, keepdims=True)


def _binary(
    forward: Callable[[Any, Any], Expression], backward: Callable[[Any, Any, Any], tuple[Any, Any]]
) -> Callable[[OperatorSymbols], Equations]:
    def equations(op: OperatorSymbols) -> Equations:
        a, b = op.args
        a_cotangent, b_cotangent = backward(a, b, op.cotangent)
        return Equations(forward(a, b), (_fit(a_cotangent, a), _fit(b_cotangent, b)))

    return equations


def _unary(
    function: Callable[[Any], Any], derivative: Callable[[Expression], Expression]
) -> Callable[[OperatorSymbols], Equations]:
    def equations(op: OperatorSymbols) -> Equations:
        (x,) = op.args
        return Equations(apply(op.name, function, x, type_=x.type), (op.cotangent * derivative(x),))

    return equations


def _power(op: OperatorSymbols) -> Equations:
    (x,) = op.args
    n = op.static.get("y", 2)
    slope = n * x if n == 2 else n * x ** (n - 1)
    return Equations(x**n, (op.cotangent * slope,))


def _product(op: OperatorSymbols) -> Equations | None:
    a, b = op.args
    g = op.cotangent
    contraction, batch = op.static["dimension_numbers"]
    standard = tuple(map(tuple, contraction)) == ((len(a.shape) - 1,), (0,)) and not any(map(len, batch))
    if not standard or len(a.shape) > 2 or len(b.shape) > 2:
        return None
    # The cotangent of a real operand beside a complex one is the real part alone.
    if len({jnp.issubdtype(v.type.dtype, jnp.complexfloating) for v in (a, b)}) > 1:
        return None
    # Terms are added in the result's precision (`preferred_element_type`), which may be more than that of
    # the operands.
    a, b = (promoted(v, op.output.type) for v in (a, b))
    if len(a.shape) == 2 and len(b.shape) == 2:
        return Equations(a @ b, (g @ b.T, a.T @ g))
    if len(a.shape) == 2:
        return Equations(a @ b, (outer(g, b), a.T @ g))
    if len(b.shape) == 2:
        return Equations(a @ b, (b @ g, outer(a, g)))
    return Equations(a @ b, (g * b, g * a))


def _sum(op: OperatorSymbols) -> Equations:
    (x,) = op.args
    axes = tuple(int(axis) for axis in op.static["axes"])

    def spread(g: Any) -> Any:
        return jnp.broadcast_to(jnp.expand_dims(g, axes), x.shape)

    whole = axes == tuple(range(len(x.shape)))
    return Equations(x.sum(None if whole else axes), (apply("broadcast", spread, op.cotangent),))


def _moved(
    name: str, forward: Callable[[Any, Any], Any], backward: Callable[[Any, Any, Any], Any]
) -> Callable[[OperatorSymbols], Equations]:
    """An operator that only moves entries; its backward moves them back."""

    def equations(op: OperatorSymbols) -> Equations:
        x = op.args[0]
        static = op.static
        back = apply(
            f"{name}⁻¹",
            lambda g: backward(g, x.type, static),
            op.cotangent,
            latex=f"\\mathrm{{{name}}}^{{-1}}",
        )
        return Equations(apply(name, lambda v: forward(v, static), x), (back,))

    return equations


def _transpose(op: OperatorSymbols) -> Equations:
    (x,) = op.args
    if len(x.shape) == 2:
        return Equations(x.T, (op.cotangent.T,))
    permutation = tuple(op.static["permutation"])
    inverse = tuple(permutation.index(i) for i in range(len(permutation)))
    back = apply("transpose", lambda g: jnp.transpose(g, inverse), op.cotangent)
    return Equations(apply("transpose", lambda v: jnp.transpose(v, permutation), x), (back,))


def _spread(op: OperatorSymbols) -> Equations | None:
    x = op.args[0]
    shape, kept = op.static["shape"], tuple(int(d) for d in op.static["broadcast_dimensions"])
    if len(op.args) > 1:
        return None

    def forward(v: Any) -> Any:
        return lax.broadcast_in_dim(v, shape, kept)

    def back(g: Any) -> Any:
        return jax.linear_transpose(forward, jax.ShapeDtypeStruct(x.shape, g.dtype))(g)[0]

    # A mask has no cotangent.
    is_smooth = jnp.issubdtype(x.type.dtype, jnp.inexact)
    backward = apply("sum", back, op.cotangent) if is_smooth else None
    return Equations(apply("broadcast", forward, x), (backward,))


def _same(op: OperatorSymbols) -> Equations:
    (x,) = op.args
    if x.type.dtype == op.output.type.dtype:
        return Equations(x, (op.cotangent,))

    def to(dtype: Any, v: Expression) -> Expression:
        if jnp.issubdtype(v.type.dtype, jnp.complexfloating) and jnp.issubdtype(dtype, jnp.floating):
            v = apply("real", jnp.real, v)
        return apply(
            str(dtype), lambda array: array.astype(dtype), v, type_=jax.ShapeDtypeStruct(v.shape, dtype)
        )

    return Equations(to(op.output.type.dtype, x), (to(x.type.dtype, op.cotangent),))


EQUATIONS: dict[str, Callable[[OperatorSymbols], Equations | None]] = {
    "add": _binary(lambda a, b: a + b, lambda a, b, g: (g, g)),
    "add_any": _binary(lambda a, b: a + b, lambda a, b, g: (g, g)),
    "sub": _binary(lambda a, b: a - b, lambda a, b, g: (g, -g)),
    "mul": _binary(lambda a, b: a * b, lambda a, b, g: (g * b, g * a)),
    "div": _binary(lambda a, b: a / b, lambda a, b, g: (g / b, -(g * a) / b**2)),
    "neg": lambda op: Equations(-op.args[0], (-op.cotangent,)),
    "log": _unary(jnp.log, lambda x: 1 / x),
    "sin": _unary(jnp.sin, lambda x: apply("cos", jnp.cos, x, type_=x.type)),
    "cos": _unary(jnp.cos, lambda x: -apply("sin", jnp.sin, x, type_=x.type)),
    "square": _power,
    "integer_pow": _power,
    "dot_general": _product,
    "reduce_sum": _sum,
    "transpose": _transpose,
    "reshape": _moved("reshape", lambda v, p: v.reshape(p["new_sizes"]), lambda g, t, p: g.reshape(t.shape)),
    "squeeze": _moved(
        "squeeze", lambda v, p: jnp.squeeze(v, p["dimensions"]), lambda g, t, p: g.reshape(t.shape)
    ),
    "broadcast_in_dim": _spread,
    "convert_element_type": _same,
    "name": _same,
}
