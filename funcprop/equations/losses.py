"""Softmax, its logarithm, and losses: candidates for what a region computes, and their equations."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from funcprop._jax.xla_options import jit_once
from funcprop.equations.flow import Region
from funcprop.equations.named_function import NamedFunction, Write
from funcprop.rules.equations import Equations, apply, written
from funcprop.rules.expressions import Expression, number, unwritten
from funcprop.rules.notation import reduction


def softmaxes(region: Region) -> Iterator[NamedFunction]:
    """Softmax and log-softmax over each axis; softmax also with the axes in another order."""
    (x,) = region.inputs
    for order in _orders(region):
        for axis in reversed(range(len(order))):
            softmax = partial(_moved, partial(jax.nn.softmax, axis=axis), order)
            yield NamedFunction("softmax", "softmax", softmax, _softmax(axis, order))
            if "log" in region.primitives() and x.shape == region.output.shape:
                log_softmax = partial(jax.nn.log_softmax, axis=axis)
                yield NamedFunction("log_softmax", "log_softmax", log_softmax, _log_softmax(axis))


def _orders(region: Region) -> Iterator[tuple[int, ...]]:
    """The orders of axes in which a region reads its operand, if its result has that shape."""
    x, shape = region.inputs[0], region.output.shape
    if x.shape == shape:
        yield tuple(range(len(shape or ())))
    for op in region.operators:
        if op.op == "transpose" and op.inputs[0].name == x.name and op.outputs[0].shape == shape:
            yield tuple(op.static["permutation"])


def _moved(function: Callable[[Any], Any], order: Sequence[int], x: Any) -> Any:
    return function(jnp.transpose(x, order))


def _softmax(axis: int, order: Sequence[int]) -> Write:
    def write(
        function: Callable[..., Any], operands: Sequence[Expression], g: Expression, output: Expression
    ) -> Equations:
        (x,) = operands
        p = output
        pulled = p * (g - (g * p).sum(axis, keepdims=True))
        if tuple(order) != tuple(range(len(order))):
            back = tuple(map(int, np.argsort(order)))
            pulled = unwritten(lambda v: jnp.transpose(v, back), pulled, x.type)
        return Equations(apply("softmax", function, x), (pulled,))

    return write


def _log_softmax(axis: int) -> Write:
    def write(
        function: Callable[..., Any], operands: Sequence[Expression], g: Expression, output: Expression
    ) -> Equations:
        (x,) = operands
        p = apply("softmax", partial(jax.nn.softmax, axis=axis), x)
        return Equations(apply("log softmax", function, x), (g - p * g.sum(axis, keepdims=True),))

    return write


def logsumexps(region: Region) -> Iterator[NamedFunction]:
    """The logarithm of a sum of exponentials over one axis or all, whose slope is the softmax."""
    (x,) = region.inputs
    axes: list[int | None] = [*reversed(range(len(x.shape or ()))), None]
    for axis in axes:
        kept = tuple(n for i, n in enumerate(x.shape or ()) if axis is not None and i != axis)
        if kept == region.output.shape:
            yield NamedFunction(
                "logsumexp",
                "value",
                partial(jax.nn.logsumexp, axis=axis),
                _logsumexp(axis, len(x.shape or ())),
            )


def _logsumexp(axis: int | None, ndim: int) -> Write:
    def write(
        function: Callable[..., Any], operands: Sequence[Expression], g: Expression, output: Expression
    ) -> Equations:
        (x,) = operands
        over = None if axis is None or ndim == 1 else (axis,)
        text, latex = reduction("logsumexp", over)
        forward = written(function, (x,), text, latex, output.type)
        p = apply("softmax", partial(jax.nn.softmax, axis=axis), x, type_=x.type)
        if axis is not None and g.shape:
            g = unwritten(
                partial(jnp.expand_dims, axis=axis),
                g,
                jax.eval_shape(partial(jnp.expand_dims, axis=axis), g.type),
            )
        return Equations(forward, (g * p,))

    return write


# Of more classes than these a label that is no argument is not sought.
_MOST_LABELS = 64


def _cross_entropy(z: Any, y: Any) -> Any:
    return -jnp.take_along_axis(jax.nn.log_softmax(z), y[..., None], -1)[..., 0]


def cross_entropies(region: Region) -> Iterator[NamedFunction]:
    """Cross-entropy with labels, or with one label that is known: of each row, their mean, their sum."""
    z, *labels = region.inputs
    rows = (z.shape or ())[:-1]
    if not z.shape or len(labels) > 1 or any(y.shape != rows for y in labels):
        return
    reductions: dict[str, Callable[[Any], Any]] = {"mean": jnp.mean, "sum": jnp.sum}
    if region.output.shape == rows:
        reductions = {"": lambda v: v}
    elif np.prod(rows) == 1:
        reductions = {"": jnp.sum}
    elif region.output.shape != ():
        return
    for name, reduce in reductions.items():
        count = int(np.prod(rows)) if name == "mean" else 1
        if labels:
            known = lambda z, y, reduce=reduce: reduce(_cross_entropy(z, y))  # noqa: E731
            yield NamedFunction("cross_entropy", "loss", known, _label_loss(name, count))
        elif (label := _one_label(region, reduce)) is not None:
            of_label = partial(_loss_of_label, label, reduce)
            yield NamedFunction("cross_entropy", "loss", of_label, _label_loss(name, count, label))


def _loss_of_label(label: int, reduce: Callable[[Any], Any], z: Any) -> Any:
    return reduce(_cross_entropy(z, jnp.full(z.shape[:-1], label)))


def _one_label(region: Region, reduce: Callable[[Any], Any]) -> int | None:
    """The label of all rows with which a region may be the cross-entropy: the one that is nearest."""
    z = region.inputs[0]
    shape = z.shape or (1,)
    picks = {"gather", "slice", "dynamic_slice"} & set(region.primitives())
    if shape[-1] > _MOST_LABELS or not picks:
        return None
    values = jnp.asarray(np.random.default_rng(0).normal(size=shape), z.dtype)
    found, of_labels = jit_once(
        lambda v: (region(v), jnp.stack([_loss_of_label(k, reduce, v) for k in range(shape[-1])]))
    )(values)
    distances = jnp.max(jnp.abs(of_labels - found), axis=range(1, of_labels.ndim), initial=0)
    return int(jnp.argmin(distances))


def _label_loss(reduction: str, count: int, label: int | None = None) -> Write:
    text, latex = "−log softmax({0})[#]", "-\\log \\mathrm{{softmax}}\\!\\left({0}\\right)_{{#}}"
    text, latex = (t.replace("#", "{1}" if label is None else str(label)) for t in (text, latex))
    if reduction:
        text, latex = f"{reduction}({text})", f"\\mathrm{{{{{reduction}}}}}\\!\\left({latex}\\right)"

    def write(
        function: Callable[..., Any], operands: Sequence[Expression], g: Expression, output: Expression
    ) -> Equations:
        z, *labels = operands
        p = apply("softmax", jax.nn.softmax, z)
        y = labels[0] if labels else number(label or 0)
        hot = apply("onehot", lambda i: _one_hot(i, z), y)
        scale = g / count if count != 1 else g
        if scale.shape != ():
            column = jax.ShapeDtypeStruct((*scale.shape, 1), scale.type.dtype)
            scale = unwritten(lambda v: v[..., None], scale, column)
        no_cotangents = (None,) * len(labels)
        return Equations(written(function, operands, text, latex), (scale * (p - hot), *no_cotangents))

    return write


def _one_hot(labels: Any, z: Expression) -> Any:
    """One in the place of each label; negative ones count from the last class, as where the loss is read."""
    places, classes = jnp.asarray(labels, int), z.shape[-1]
    return jax.nn.one_hot(jnp.where(places < 0, places + classes, places), classes, dtype=z.type.dtype)


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
