"""Equations of primitives that autodiff already differentiates best; `fp.derive` writes them out.

Operands of a primitive have equal shapes, except that one may be a scalar or have axes of size 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from funcprop.rules.equations import (
    Equations,
    OperatorSymbols,
    apply,
    opaque,
    outer,
    written,
)
from funcprop.rules.expressions import (
    Expression,
    factors,
    of_one_dtype,
    promoted,
    unwritten,
    without_scale,
)


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


def _product(op: OperatorSymbols) -> Equations | None:
    a, b = op.args
    g = op.cotangent
    contraction, batch = op.static["dimension_numbers"]
    # The cotangent of a real operand beside a complex one is the real part alone.
    if len({jnp.issubdtype(v.type.dtype, jnp.complexfloating) for v in (a, b)}) > 1:
        return None
    # What scales an operand or the cotangent stands before the product.
    if (peeled := without_scale(g)) is not None and not g.is_number:
        scale, inner = peeled
        found = _product(op._replace(cotangent=inner))
        return None if found is None else found._replace(backward=tuple(map(scale, found.backward)))
    for i, v in enumerate((a, b)):
        if (peeled := without_scale(v)) is not None and not v.is_number and peeled[1].type == v.type:
            scale, inner = peeled
            found = _product(op._replace(args=(inner, b) if i == 0 else (a, inner)))
            if found is None:
                return None
            backward = (x if k == i else scale(x) for k, x in enumerate(found.backward))
            return Equations(scale(found.forward), tuple(backward))
    # Terms are added in the result's precision (`preferred_element_type`), which may be more than that of
    # the operands.
    a, b = (promoted(v, op.output.type) for v in (a, b))
    standard = tuple(map(tuple, contraction)) == ((len(a.shape) - 1,), (0,)) and not any(map(len, batch))
    if not standard or len(a.shape) > 2 or len(b.shape) > 2:
        return _general_product(a, b, g, op)
    if len(a.shape) == 2 and len(b.shape) == 2:
        return Equations(a @ b, (g @ b.T, a.T @ g))
    if len(a.shape) == 2:
        return Equations(a @ b, (outer(g, b), a.T @ g))
    if len(b.shape) == 2:
        return Equations(a @ b, (b @ g, outer(a, g)))
    dot = of_one_dtype(jnp.matmul)
    return Equations(factors(dot, (a, b), "{0}ᵀ {1}", "{0}^{{\\top}}\\, {1}"), (g * b, g * a))


def _general_product(a: Expression, b: Expression, g: Expression, op: OperatorSymbols) -> Equations:
    """A product over any axes, written as one of matrices for each entry of the batch: `a bᵀ`.

    The axes of a product of matrices are those that are summed and those that stay, in one order or in the
    other; it is the order in what is written that counts.
    """
    numbers = op.static["dimension_numbers"]
    static = {k: v for k, v in op.static.items() if k != "dimension_numbers"}
    contraction, batch = numbers
    summed_first = [_is_summed_first(v, *axes) for v, *axes in zip((a, b), contraction, batch, strict=True)]
    has_free = bool(b.shape) and len(contraction[1]) + len(batch[1]) < len(b.shape)
    # In `a b` the axes that are summed are the last of `a` and the first of `b`.
    flips = summed_first[0], has_free and not summed_first[1]

    def product(x: Any, y: Any) -> Any:
        return lax.dot_general(x, y, numbers, **static)

    def of_first(g: Any, y: Any) -> Any:
        return jax.linear_transpose(lambda x: product(x, y), a.type)(g.astype(op.output.type.dtype))[0]

    def of_second(x: Any, g: Any) -> Any:
        return jax.linear_transpose(lambda y: product(x, y), b.type)(g.astype(op.output.type.dtype))[0]

    def shown(text: str, flip: bool) -> tuple[str, str]:
        return (f"{text}ᵀ", f"{text}^{{{{\\top}}}}") if flip else (text, text)

    def pair(function: Any, x: Any, y: Any, marks: tuple[bool, bool], type_: Any) -> Expression:
        (left, left_latex), (right, right_latex) = map(shown, ("{0}", "{1}"), marks)
        return factors(function, (x, y), f"{left} {right}", f"{left_latex}\\, {right_latex}", type_)

    type_ = op.output.type
    if all(flips) and len(type_.shape) > 2:
        # `aᵀ bᵀ` is `b a` in another order of its axes, which is not written anyway.
        whole = pair(lambda y, x: product(x, y), b, a, (False, False), type_)
        first = pair(lambda y, g: of_first(g, y), b, g, (True, False), a.type)
        return Equations(whole, (first, pair(lambda g, x: of_second(x, g), g, a, (False, True), b.type)))
    # From `y = A B`: `Ā = ȳ Bᵀ`, `B̄ = Aᵀ ȳ`; where an operand is written transposed, so is its cotangent.
    if flips[0]:
        first = pair(lambda y, g: of_first(g, y), b, g, (flips[1], True), a.type)
    else:
        first = pair(of_first, g, b, (False, not flips[1]), a.type)
    if flips[1]:
        second = pair(lambda g, x: of_second(x, g), g, a, (True, flips[0]), b.type)
    else:
        second = pair(of_second, a, g, (not flips[0], False), b.type)
    return Equations(pair(product, a, b, flips, type_), (first, second))


def _is_summed_first(v: Expression, summed: Sequence[int], batch: Sequence[int]) -> bool:
    """Whether the axes that a product sums stand before the last of those that stay, as in `aᵀ b`."""
    places = v.places or range(len(v.shape))
    free = [places[i] for i, n in enumerate(v.shape) if i not in (*summed, *batch) and n > 1]
    return bool(free and summed) and max(places[i] for i in summed) < max(free)


def _where(op: OperatorSymbols) -> Equations | None:
    if len(op.args) != 3 or op.args[0].type.dtype != bool:
        return None
    mask, otherwise, value = op.args

    def chosen(mask: Any, value: Any, otherwise: Any) -> Any:
        return lax.select_n(mask, otherwise, value)

    def kept(mask: Any, g: Any) -> Any:
        return lax.select_n(mask, jnp.zeros_like(g), g)

    def left_out(mask: Any, g: Any) -> Any:
        return lax.select_n(mask, g, jnp.zeros_like(g))

    g = op.cotangent
    return Equations(
        apply("where", chosen, mask, value, otherwise, type_=op.output.type),
        (
            None,
            written(left_out, (mask, g), "where({0}, 0, {1})", _WHERE.replace("#", "0, {1}"), g.type),
            written(kept, (mask, g), "where({0}, {1}, 0)", _WHERE.replace("#", "{1}, 0"), g.type),
        ),
    )


_WHERE = "\\mathrm{{where}}\\!\\left({0}, #\\right)"


def _sum(op: OperatorSymbols) -> Equations:
    (x,) = op.args
    axes = tuple(int(axis) for axis in op.static["axes"])

    def spread(g: Any) -> Any:
        return jnp.broadcast_to(jnp.expand_dims(g, axes), x.shape)

    whole = axes == tuple(range(len(x.shape)))
    type_ = jax.ShapeDtypeStruct(x.shape, op.cotangent.type.dtype)
    return Equations(x.sum(None if whole else axes), (unwritten(spread, op.cotangent, type_),))


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


def _positions(op: OperatorSymbols) -> Equations | None:
    """`arange(n)`, the index of every entry along an axis."""
    shape, dtype, axis = op.static["shape"], op.static["dtype"], op.static["dimension"]
    text, latex = f"arange({shape[axis]})", f"\\mathrm{{arange}}({shape[axis]})"
    make = partial(lax.broadcasted_iota, dtype, shape, axis)
    return Equations(opaque(make, (), text, latex, op.output.type), ())


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
    if not jnp.issubdtype(x.type.dtype, jnp.inexact) and jnp.issubdtype(op.output.type.dtype, jnp.number):
        # A whole number is the number that it is; of what is true or false, `[x > 0]` is 1 or 0.
        return Equations(_counted(x, op.output.type), (None,))

    def to(dtype: Any, v: Expression) -> Expression:
        if jnp.issubdtype(v.type.dtype, jnp.complexfloating) and jnp.issubdtype(dtype, jnp.floating):
            v = apply("real", jnp.real, v)
        return apply(
            str(dtype), lambda array: array.astype(dtype), v, type_=jax.ShapeDtypeStruct(v.shape, dtype)
        )

    return Equations(to(op.output.type.dtype, x), (to(x.type.dtype, op.cotangent),))


def _counted(x: Expression, type_: Any) -> Expression:
    def number(v: Any) -> Any:
        return v.astype(type_.dtype)

    if x.type.dtype != bool:
        return unwritten(number, x, type_)
    if x.template == "{0} = {1}" and any(o.text().startswith("arange(") for o in x.operands):
        label = next((o for o in x.operands if not o.text().startswith("arange(")), None)
        if label is not None:
            both = x.operands
            text = "onehot({0})" if label is both[0] else "onehot({1})"
            latex = f"\\mathrm{{{{onehot}}}}\\!\\left({{{0 if label is both[0] else 1}}}\\right)"
            return written(lambda a, b: number(a == b), both, text, latex, type_)
    return written(number, (x,), "[{0}]", "\\left[{0}\\right]", type_)


EQUATIONS: dict[str, Callable[[OperatorSymbols], Equations | None]] = {
    "add": _binary(lambda a, b: a + b, lambda a, b, g: (g, g)),
    "add_any": _binary(lambda a, b: a + b, lambda a, b, g: (g, g)),
    "sub": _binary(lambda a, b: a - b, lambda a, b, g: (g, -g)),
    "mul": _binary(lambda a, b: a**2 if a is b else a * b, lambda a, b, g: (g * b, g * a)),
    "div": _binary(lambda a, b: a / b, lambda a, b, g: (g / b, -(g * a) / b**2)),
    "neg": lambda op: Equations(-op.args[0], (-op.cotangent,)),
    "dot_general": _product,
    "select_n": _where,
    "reduce_sum": _sum,
    "transpose": _transpose,
    "reshape": _moved("reshape", lambda v, p: v.reshape(p["new_sizes"]), lambda g, t, p: g.reshape(t.shape)),
    "iota": _positions,
    "squeeze": _moved(
        "squeeze", lambda v, p: jnp.squeeze(v, p["dimensions"]), lambda g, t, p: g.reshape(t.shape)
    ),
    "broadcast_in_dim": _spread,
    "convert_element_type": _same,
    "name": _same,
}
