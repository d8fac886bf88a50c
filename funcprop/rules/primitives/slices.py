"""Equations of operators that take entries of an array by their places, and of those that put them there.

slice           y = x[1:, :3]           x̄ = pad(ȳ, [1:, :3])
dynamic_slice   y = x[i : i + 3]        x̄ = pad(ȳ, [i : i + 3])
pad             y = pad(x, [1:-1])      x̄ = ȳ[1:-1]
concatenate     y = concat(a, b)        ā = ȳ[:2], b̄ = ȳ[2:]
stack           y = stack(a, b)         ā = ȳ[0], b̄ = ȳ[1]
rev             y = x[:, ::-1]          x̄ = ȳ[:, ::-1]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from funcprop.rules.equations import Equations, OperatorSymbols, apply, indexed, written
from funcprop.rules.expressions import ATOM, Expression, parenthesised, unwritten


def _slice(op: OperatorSymbols) -> Equations | None:
    """`x[1:, :3]`; one entry of an axis is its index alone, as after the squeeze that follows."""
    (x,) = op.args
    order = _order(x)
    if order is None:
        return None
    starts, limits = op.static["start_indices"], op.static["limit_indices"]
    steps = op.static["strides"] or (1,) * len(starts)
    where = _range(*([given[k] for k in order] for given in (starts, limits, steps, x.shape)))

    def cut(v: Any) -> Any:
        return lax.slice(v, starts, limits, steps)

    def put(g: Any) -> Any:
        return jax.linear_transpose(cut, jax.ShapeDtypeStruct(x.shape, g.dtype))(g)[0]

    is_smooth = jnp.issubdtype(x.type.dtype, jnp.inexact)
    forward = indexed(cut, x, where, op.output.type)
    text, latex = f"pad({{0}}, [{where}])", _PAD.replace("#", where)
    back = written(put, (op.cotangent,), text, latex) if is_smooth else None
    return Equations(forward, (back,))


def _dynamic_slice(op: OperatorSymbols) -> Equations | None:
    """`x[i]`, `x[:, i : i + 3]`: entries whose place is computed."""
    x, *starts = op.args
    if _is_reshaped(x):
        return None
    sizes = op.static["slice_sizes"]
    inside = []
    for i, (size, whole) in enumerate(zip(sizes, x.shape, strict=True), 1):
        one = f"{{{i}}}"
        inside.append(":" if size == whole else one if size == 1 else f"{one} : {one} + {size}")
    while len(inside) > 1 and inside[-1] == ":":
        inside.pop()

    def cut(v: Any, *at: Any) -> Any:
        return lax.dynamic_slice(v, at, sizes)

    def put(g: Any, *at: Any) -> Any:
        like = jax.ShapeDtypeStruct(x.shape, g.dtype)
        return jax.linear_transpose(lambda v: lax.dynamic_slice(v, at, sizes), like)(g)[0]

    where = ", ".join(inside)
    operands = [x if x.binding == ATOM else parenthesised(x), *starts]
    forward = written(cut, operands, f"{{0}}[{where}]", f"{{0}}\\left[{where}\\right]", op.output.type)
    if not jnp.issubdtype(x.type.dtype, jnp.inexact):
        return Equations(forward, (None,) * len(op.args))
    latex = f"\\mathrm{{{{pad}}}}\\!\\left({{0}}, \\left[{where}\\right]\\right)"
    back = written(put, (op.cotangent, *starts), f"pad({{0}}, [{where}])", latex, x.type)
    return Equations(forward, (back, *(None for _ in starts)))


_PAD = "\\mathrm{{pad}}\\!\\left({0}, [\\texttt{{#}}]\\right)"


def _is_reshaped(x: Expression) -> bool:
    """Whether it is another shape of what is written: indices would be read as those of the latter."""
    while x.template == "{0}" and x.operands and (x.type.dtype != x.operands[0].type.dtype or _is_row(x)):
        x = x.operands[0]
    return x.template == "{0}" and bool(x.operands)


def _is_row(x: Expression) -> bool:
    """Whether it is another shape of the one axis of what is written."""
    long = [[n for n in v.shape if n > 1] for v in (x, x.operands[0])]
    return len(x.shape) == 1 and long[0] == long[1] and len(long[0]) <= 1


def _order(x: Expression) -> Sequence[int] | None:
    """The axes in the order in which they are written, if that is of the same shape but for the order."""
    if not _is_reshaped(x):
        return range(len(x.shape))
    inner = x.spelled
    places = x.places or ()
    if sorted(places) != list(range(len(inner.shape))) or x.shape != tuple(inner.shape[k] for k in places):
        return None
    return [places.index(k) for k in range(len(places))]


def _range(starts: Sequence[int], limits: Sequence[int], steps: Sequence[int], shape: Sequence[int]) -> str:
    words = [
        str(a)
        if b - a == 1 < size
        else (f"{a}" if a else "") + ":" + (f"{b}" if b < size else "") + (f":{step}" if step > 1 else "")
        for a, b, step, size in zip(starts, limits, steps, shape, strict=True)
    ]
    while len(words) > 1 and words[-1] == ":":
        words.pop()
    return ", ".join(words)


def _pad(op: OperatorSymbols) -> Equations | None:
    """Entries among zeros: `pad(x, [1:-1])` has `x` at these places."""
    x, value = op.args
    config = op.static["padding_config"]
    if value.constant != 0 or any(low < 0 or high < 0 for low, high, _ in config):
        return None
    if _is_reshaped(op.cotangent) and not op.cotangent.is_number:
        return None
    steps = [within + 1 for _, _, within in config]
    starts = [low for low, _, _ in config]
    limits = [a + (n - 1) * step + 1 for a, n, step in zip(starts, x.shape, steps, strict=True)]
    where = _range(starts, limits, steps, op.output.shape)
    text, latex = f"pad({{0}}, [{where}])", _PAD.replace("#", where)
    forward = written(lambda v: lax.pad(v, jnp.zeros((), v.dtype), config), (x,), text, latex, op.output.type)
    back = _entries(lambda g: lax.slice(g, starts, limits, steps), op.cotangent, where, x.shape)
    return Equations(forward, (back, None))


def _entries(cut: Callable[[Any], Any], g: Expression, where: str, shape: Sequence[int]) -> Expression:
    """Some entries of a cotangent; where all are one number, that number."""
    type_ = jax.ShapeDtypeStruct(tuple(shape), g.type.dtype)
    return unwritten(cut, g, type_) if g.is_number else indexed(cut, g, where, type_)


def _concatenate(op: OperatorSymbols) -> Equations | None:
    """`concat(x, h)`; each operand has its entries of the cotangent."""
    if _is_reshaped(op.cotangent) and not op.cotangent.is_number:
        return None
    axis, shape = op.static["dimension"], op.output.shape
    forward = apply(op.name, lambda *v: jnp.concatenate(v, axis), *op.args, type_=op.output.type)
    backward: list[Expression | None] = []
    end = 0
    for x in op.args:
        start, end = end, end + x.shape[axis]
        starts, limits = [0] * len(shape), list(shape)
        starts[axis], limits[axis] = start, end
        cut = partial(lax.slice_in_dim, start_index=start, limit_index=end, axis=axis)
        where = _range(starts, limits, [1] * len(shape), shape)
        is_smooth = jnp.issubdtype(x.type.dtype, jnp.inexact)
        backward.append(_entries(cut, op.cotangent, where, x.shape) if is_smooth else None)
    return Equations(forward, tuple(backward))


def _stack(op: OperatorSymbols) -> Equations | None:
    """`stack(a, b)`; each operand has its entry of the cotangent along the new axis."""
    if _is_reshaped(op.cotangent) and not op.cotangent.is_number:
        return None
    axis = op.static["axis"]
    forward = apply(op.name, lambda *v: jnp.stack(v, axis), *op.args, type_=op.output.type)
    backward: list[Expression | None] = []
    for i, x in enumerate(op.args):
        cut = partial(jnp.take, indices=i, axis=axis)
        where = ", ".join([":"] * axis + [str(i)])
        is_smooth = jnp.issubdtype(x.type.dtype, jnp.inexact)
        backward.append(_entries(cut, op.cotangent, where, x.shape) if is_smooth else None)
    return Equations(forward, tuple(backward))


def _reversed(op: OperatorSymbols) -> Equations | None:
    """`x[:, ::-1]`, and so is its cotangent."""
    (x,) = op.args
    if _is_reshaped(x):
        return None
    axes = op.static["dimensions"]
    where = ", ".join("::-1" if i in axes else ":" for i in range(max(axes) + 1))
    turn = partial(lax.rev, dimensions=axes)
    is_smooth = jnp.issubdtype(x.type.dtype, jnp.inexact)
    back = indexed(turn, op.cotangent, where) if is_smooth else None
    return Equations(indexed(turn, x, where, op.output.type), (back,))


EQUATIONS: dict[str, Callable[[OperatorSymbols], Equations | None]] = {
    "slice": _slice,
    "dynamic_slice": _dynamic_slice,
    "pad": _pad,
    "concatenate": _concatenate,
    "stack": _stack,
    "rev": _reversed,
}
