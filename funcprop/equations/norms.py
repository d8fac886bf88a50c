"""Means and normalisations: candidates for what a region computes, and their equations."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from funcprop.equations.flow import Region
from funcprop.equations.named_function import NamedFunction, Write
from funcprop.rules.equations import Equations, written
from funcprop.rules.expressions import POWER, QUOTIENT, Expression, unwritten
from funcprop.rules.notation import reduction


def mean(axes: Sequence[int], rank: int, size: int) -> Write:
    """The equations of a mean over some axes of an array of `rank` axes."""

    def write(
        function: Callable[..., Any], operands: Sequence[Expression], g: Expression, output: Expression
    ) -> Equations:
        (x,) = operands

        def spread(v: Any) -> Any:
            return jnp.broadcast_to(jnp.expand_dims(v.reshape(kept), axes), x.shape)

        kept = tuple(n for i, n in enumerate(x.shape) if i not in axes)
        text, latex = reduction("mean", None if len(axes) == rank else axes)
        share = g / size
        type_ = jax.ShapeDtypeStruct(x.shape, share.type.dtype)
        return Equations(written(function, (x,), text, latex), (unwritten(spread, share, type_),))

    return write


@dataclass(frozen=True)
class _Norm:
    """A normalisation over axes, centred or not, of whole channels or of groups of them."""

    axes: tuple[int, ...]
    centred: bool
    eps: float
    groups: int = 1

    def _split(self, x: Any) -> Any:
        return x if self.groups == 1 else x.reshape(*x.shape[:-1], self.groups, x.shape[-1] // self.groups)

    def moments(self, x: Any) -> tuple[Any, Any]:
        """The deviations from the mean, and the root of the mean square of these."""
        wide = self._split(x).astype(jnp.promote_types(x.dtype, jnp.float32))
        if self.centred:
            wide = wide - wide.mean(self.axes, keepdims=True)
        return wide, jnp.sqrt((wide**2).mean(self.axes, keepdims=True) + self.eps)

    def __call__(self, x: Any) -> Any:
        deviation, scale = self.moments(x)
        return (deviation / scale).reshape(x.shape).astype(x.dtype)

    def sigma(self, x: Any) -> Any:
        """What a normalisation divides by, for each entry of `x`."""
        deviation, scale = self.moments(x)
        return jnp.broadcast_to(scale, deviation.shape).reshape(x.shape).astype(x.dtype)

    def mean(self, x: Any) -> Any:
        """The mean over the axes, for each entry of `x`."""
        wide = self._split(x)
        mean = wide.mean(self.axes, keepdims=True)
        return jnp.broadcast_to(mean, wide.shape).reshape(x.shape)

    def scaled(self, order: Sequence[int], x: Any, *others: Any) -> Any:
        """`γ ⊙ norm(x) + β`, with the parameters in an order of their own."""
        y = self(x)
        for k, v in enumerate(others[i] for i in order):
            y = y * v if k == 0 else y + v
        return y


def norms(region: Region) -> Iterator[NamedFunction]:
    """Normalisations over the axes that a region adds up, with scale and shift in any order."""
    x, *others = region.inputs
    rank = len(x.shape or ())
    if any(not _is_parameter_of(v.shape or (), x.shape or ()) for v in others):
        return
    literals = [v.value for op in region.operators for v in op.inputs if v.kind == "literal"]
    epsilons = sorted({float(value) for value in literals if _is_small(value)}) or [0.0]
    reduced = {
        (tuple(op.static["axes"]), op.inputs[0].shape) for op in region.operators if op.op == "reduce_sum"
    }
    for (axes, shape), centred, eps in itertools.product(sorted(reduced), (True, False), epsilons):
        groups = 1
        if shape is not None and len(shape) == rank + 1:
            groups = shape[-2]
        if shape not in (x.shape, (*(x.shape or ())[:-1], groups, (x.shape or (1,))[-1] // groups)):
            continue
        norm = _Norm(axes, centred, eps, groups)
        for order in itertools.permutations(range(len(others))):
            name = "norm" if centred else "rms_norm"
            roles = tuple(("scale", "shift")[order.index(i)] for i in range(len(others)))
            yield NamedFunction(name, "norm", partial(norm.scaled, order), _norm(name, norm, order), roles)


def lengths(region: Region) -> Iterator[NamedFunction]:
    """The length of vectors along axes that a region adds up, and what is divided by it."""
    (x,) = region.inputs
    reduced = {tuple(op.static["axes"]) for op in region.operators if op.op == "reduce_sum"}
    for axes in sorted(reduced):
        kept = tuple(n for i, n in enumerate(x.shape or ()) if i not in axes)
        if region.output.shape == x.shape:
            yield NamedFunction("unit", "norm", partial(_unit, axes), _of_length(axes, is_unit=True))
        elif region.output.shape in (kept, tuple(1 if i in axes else n for i, n in enumerate(x.shape or ()))):
            length = partial(_length, axes, region.output.shape != kept)
            yield NamedFunction("length", "value", length, _of_length(axes, is_unit=False))


def _length(axes: Sequence[int], keepdims: bool, x: Any) -> Any:
    return jnp.sqrt((x**2).sum(axes, keepdims=keepdims))


def _unit(axes: Sequence[int], x: Any) -> Any:
    return x / _length(axes, True, x)


def _of_length(axes: Sequence[int], is_unit: bool) -> Write:
    """`‖z‖`, whose cotangent is `ȳ z / ‖z‖`, and `n = z / ‖z‖`, of which it is `(n̄ − n (n̄ · n)) / ‖z‖`."""

    def write(
        function: Callable[..., Any], operands: Sequence[Expression], g: Expression, output: Expression
    ) -> Equations:
        (x,) = operands
        over = "" if len(axes) == len(x.shape) else f", {'axis' if len(axes) == 1 else 'axes'} "
        over += ", ".join(map(str, axes)) if over else ""
        text = f"‖{{0}}{over}‖"
        below = "\\text{{" + over + "}}" if over else ""
        latex = "\\left\\lVert {0}" + below + "\\right\\rVert"
        wide = written(partial(_length, axes, True), (x,), text, latex)
        if is_unit:
            y = output
            forward = Expression(
                function, (x,), f"{{0}} / {text}", "\\frac{{{0}}}{{" + latex + "}}", QUOTIENT, POWER
            )
            return Equations(forward, ((g - y * (g * y).sum(axes, keepdims=True)) / wide,))
        forward = written(function, (x,), text, latex, output.type)
        if not output.shape:
            return Equations(forward, (g * x / forward,))
        spread = unwritten(lambda v: v.reshape(wide.shape), g, jax.ShapeDtypeStruct(wide.shape, g.type.dtype))
        return Equations(forward, (spread * x / wide,))

    return write


def _is_parameter_of(shape: tuple[int, ...], of: tuple[int, ...]) -> bool:
    """Whether a scale or shift has the last axes of what is normalised, or all with the first of size 1."""
    last = shape
    while len(shape) == len(of) and last and last[0] == 1:
        last = last[1:]
    return len(shape) <= len(of) and last == of[len(of) - len(last) :]


def _is_small(value: Any) -> bool:
    return np.ndim(value) == 0 and np.asarray(value).dtype.kind == "f" and bool(0 < value < 0.1)


def _norm(name: str, norm: _Norm, order: Sequence[int]) -> Write:
    def write(
        function: Callable[..., Any], operands: Sequence[Expression], g: Expression, output: Expression
    ) -> Equations:
        x, *others = operands
        types = [v.type for v in others]

        def normalized(value: Any) -> Any:
            """The region's own normalisation, with a scale of 1 and a bias of 0."""
            fillings = [jnp.full(t.shape, 1 - order.index(i), t.dtype) for i, t in enumerate(types)]
            return function(value, *fillings)

        # Along the last axis if it is not said.
        along = None if norm.groups > 1 or norm.axes == (len(x.shape) - 1,) else norm.axes
        like = jax.ShapeDtypeStruct(x.shape, output.type.dtype)
        n = written(normalized, (x,), *reduction(name, along), like)
        text, latex, pulled = "{0}", "{0}", g
        cotangents: list[Expression | None] = [None] * len(others)
        for k, i in enumerate(order):
            shape = others[i].shape
            new = len(g.shape) - len(shape)
            stretched = (new + axis for axis, size in enumerate(shape) if size == 1 < g.shape[new + axis])
            over = (*range(new), *stretched)
            cotangents[i] = (g * n if k == 0 else g).sum(over, keepdims=new == 0)
            sign, latex_sign = (" ⊙ ", " \\odot ") if k == 0 else (" + ", " + ")
            text, latex = f"{text}{sign}{{{i + 1}}}", f"{latex}{latex_sign}{{{i + 1}}}"
            pulled = pulled * others[i] if k == 0 else pulled
        mean = lambda v: written(norm.mean, (v,), *reduction("mean", along))  # noqa: E731
        centred = pulled - mean(pulled) if norm.centred else pulled
        sigma = written(norm.sigma, (x,), *reduction("σ" if norm.centred else "rms", along), x.type)
        forward = written(
            lambda _, v, *p: function(v, *p), (n, x, *others), *_after(text, latex), is_sum=len(order) > 1
        )
        return Equations(forward, ((centred - n * mean(pulled * n)) / sigma, *cotangents))

    return write


def _after(text: str, latex: str) -> tuple[str, str]:
    """Templates in which the operands after the first two are one place later."""
    shift = str.maketrans({"1": "2", "2": "3"})
    return text.translate(shift), latex.translate(shift)
