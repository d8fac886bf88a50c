"""Softmax, its logarithm, and losses: candidates for what a region computes, and their equations."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from funcprop.equations.flow import Region
from funcprop.equations.named_function import NamedFunction, Write
from funcprop.rules.expressions import Equations, Expression, apply, unwritten, written


def softmaxes(region: Region) -> Iterator[NamedFunction]:
    """Softmax and log-softmax over each axis."""
    for axis in reversed(range(len(region.output.shape or ()))):
        yield NamedFunction("softmax", "softmax", partial(jax.nn.softmax, axis=axis), _softmax(axis))
        if "log" in region.primitives():
            log_softmax = partial(jax.nn.log_softmax, axis=axis)
            yield NamedFunction("log_softmax", "log_softmax", log_softmax, _log_softmax(axis))


def _softmax(axis: int) -> Write:
    def write(
        function: Callable[..., Any], operands: Sequence[Expression], g: Expression, output: Expression
    ) -> Equations:
        (x,) = operands
        p = output
        return Equations(apply("softmax", function, x), (p * (g - (g * p).sum(axis, keepdims=True)),))

    return write


def _log_softmax(axis: int) -> Write:
    def write(
        function: Callable[..., Any], operands: Sequence[Expression], g: Expression, output: Expression
    ) -> Equations:
        (x,) = operands
        p = apply("softmax", partial(jax.nn.softmax, axis=axis), x)
        return Equations(apply("log softmax", function, x), (g - p * g.sum(axis, keepdims=True),))

    return write


def _cross_entropy(z: Any, y: Any) -> Any:
    return -jnp.take_along_axis(jax.nn.log_softmax(z), y[..., None], -1)[..., 0]


def cross_entropies(region: Region) -> Iterator[NamedFunction]:
    """Cross-entropy with labels: of each row, their mean, their sum."""
    z, y = region.inputs
    if z.shape is None or y.shape is None or y.shape != z.shape[:-1]:
        return
    text, latex = "−log softmax({0})[{1}]", "-\\log \\mathrm{{softmax}}\\!\\left({0}\\right)_{{{1}}}"
    if region.output.shape == y.shape:
        yield NamedFunction("cross_entropy", "loss", _cross_entropy, _label_loss(text, latex, 1))
    elif region.output.shape == ():
        size = int(np.prod(y.shape))
        mean, total = (f"\\mathrm{{{{{name}}}}}\\!\\left({latex}\\right)" for name in ("mean", "sum"))
        yield NamedFunction(
            "cross_entropy",
            "loss",
            lambda z, y: _cross_entropy(z, y).mean(),
            _label_loss(f"mean({text})", mean, size),
        )
        yield NamedFunction(
            "cross_entropy",
            "loss",
            lambda z, y: _cross_entropy(z, y).sum(),
            _label_loss(f"sum({text})", total, 1),
        )


def _label_loss(text: str, latex: str, count: int) -> Write:
    def write(
        function: Callable[..., Any], operands: Sequence[Expression], g: Expression, output: Expression
    ) -> Equations:
        z, y = operands
        p = apply("softmax", jax.nn.softmax, z)
        hot = apply("onehot", lambda i: jax.nn.one_hot(i, z.shape[-1], dtype=z.type.dtype), y)
        scale = g / count if count != 1 else g
        if scale.shape != ():
            column = jax.ShapeDtypeStruct((*scale.shape, 1), scale.type.dtype)
            scale = unwritten(lambda v: v[..., None], scale, column)
        return Equations(written(function, (z, y), text, latex), (scale * (p - hot), None))

    return write


# How the losses of entries or rows become one number, or one for each row.
_REDUCTIONS: dict[str, Callable[[Any], Any]] = {
    "": lambda v: v,
    "mean": jnp.mean,
    "sum": jnp.sum,
    "row sum": lambda v: v.sum(-1),
    "row mean": lambda v: v.mean(-1),
    "mean of sums": lambda v: v.sum(-1).mean(),
}


def soft_losses(region: Region) -> Iterator[NamedFunction]:
    """Cross-entropy and binary cross-entropy with probabilities, and how they become fewer numbers."""
    for loss, function in (
        ("cross_entropy", optax.softmax_cross_entropy),
        ("binary_cross_entropy", optax.sigmoid_binary_cross_entropy),
    ):
        for name, reduce in _REDUCTIONS.items():
            reference = partial(_reduced, reduce, function)
            yield NamedFunction(loss, "loss", reference, _soft_loss(loss, name, reduce))


def _reduced(reduce: Callable[[Any], Any], loss: Callable[..., Any], z: Any, t: Any) -> Any:
    values = loss(z, t)
    return reduce(values) if values.ndim else values


def _soft_loss(loss: str, name: str, reduce: Callable[[Any], Any]) -> Write:
    """`−t · log softmax(z)` or `−t log σ(z) − (1 − t) log σ(−z)`, whose slope is `p − t` for each entry."""
    of_rows = loss == "cross_entropy"

    def write(
        function: Callable[..., Any], operands: Sequence[Expression], g: Expression, output: Expression
    ) -> Equations:
        z, t = operands
        p = apply("softmax", jax.nn.softmax, z) if of_rows else apply("σ", jax.nn.sigmoid, z)
        total = t.sum(len(t.shape) - 1, keepdims=True) * p if of_rows else p
        losses = jax.ShapeDtypeStruct(z.shape[:-1] if of_rows else z.shape, g.type.dtype)

        def spread(v: Any) -> Any:
            pulled = jax.linear_transpose(reduce, losses)(v)[0]
            return jnp.broadcast_to(pulled[..., None], z.shape) if of_rows else pulled

        count = int(np.prod(losses.shape))
        share = {"mean": count, "row mean": losses.shape[-1] if losses.shape else 1}.get(name, 1)
        if name == "mean of sums":
            share = int(np.prod(losses.shape[:-1]))
        scale = unwritten(lambda v: spread(v * share), g / share, jax.ShapeDtypeStruct(z.shape, g.type.dtype))
        text, latex = "{1} · log softmax({0})", "{1} \\cdot \\log \\mathrm{{softmax}}\\!\\left({0}\\right)"
        if not of_rows:
            text = "{1} ⊙ log σ({0}) + (1 − {1}) ⊙ log σ(−{0})"
            latex = "{1} \\odot \\log \\sigma({0}) + (1 - {1}) \\odot \\log \\sigma(-{0})"
        for word in reversed(name.replace("row ", "").replace("sums", "sum").split(" of ")):
            text, latex = f"{word}({text})", f"\\mathrm{{{{{word}}}}}\\!\\left({latex}\\right)"
        return Equations(written(function, (z, t), f"−{text}", f"-{latex}"), (scale * (total - t), None))

    return write
