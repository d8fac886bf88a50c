"""Functions that have a name, recognised by what they compute.

A region of a graph is given random values and compared with functions that have a name, in value and in
derivative: it does not matter how a framework spells softmax. What is printed and verified is the region's
own function under that name.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from funcprop import _jax
from funcprop.equations.flow import Region
from funcprop.program.facts import CALLS, CUSTOM_RULES, facts_of
from funcprop.program.layer_calls import boundary_p
from funcprop.rules.expressions import Equations, Expression, apply, unwritten, written

# `write(function, operands, cotangent, output)`, in which `output` is what the result is written as.
Write = Callable[[Callable[..., Any], Sequence[Expression], Expression, Expression], Equations]


@dataclass(frozen=True)
class NamedFunction:
    """A function with a name, and how its equations are written.

    `kind` is what a reader calls such a function; `roles` are those of its operands after the first.
    """

    name: str
    kind: str
    reference: Callable[..., Any]
    write: Write
    roles: tuple[str | None, ...] = ()


# Points at which functions of one number are compared: both signs, small and large.
_POINTS = np.concatenate([np.linspace(-8, 8, 223), [1e-3, -1e-3, 0.25, -0.25, 30.0, -30.0]])

ELEMENTWISE: dict[str, Sequence[Callable[[Any], Any]]] = {
    "relu": [jax.nn.relu],
    "relu6": [jax.nn.relu6],
    "tanh": [jnp.tanh],
    "σ": [jax.nn.sigmoid],
    "silu": [jax.nn.silu],
    "gelu": [partial(jax.nn.gelu, approximate=a) for a in (False, True)],
    "softplus": [jax.nn.softplus],
    "log σ": [jax.nn.log_sigmoid],
    "elu": [jax.nn.elu],
    "selu": [jax.nn.selu],
    "leaky_relu": [partial(jax.nn.leaky_relu, negative_slope=a) for a in (0.01, 0.1, 0.2)],
    "mish": [jax.nn.mish],
    "softsign": [jax.nn.soft_sign],
    "hard_tanh": [jax.nn.hard_tanh],
    "hard_σ": [jax.nn.hard_sigmoid],
    "hard_silu": [jax.nn.hard_silu],
}


# No function in the table is written by more operators.
_LONGEST_ACTIVATION = 20


@functools.cache
def _values(name: str, spelling: int, dtype: np.dtype) -> np.ndarray:
    """The values of a function of the table at the points."""
    return np.asarray(ELEMENTWISE[name][spelling](jnp.asarray(_POINTS, dtype)), np.float64)


def elementwise(name: str) -> Write:
    """The equations of a function of each entry: `h = φ(z)`, `z̄ = h̄ ⊙ φ′(z)`."""

    def write(
        function: Callable[..., Any], operands: Sequence[Expression], g: Expression, output: Expression
    ) -> Equations:
        (x,) = operands

        def slope(value: Any) -> Any:
            y, pull = jax.vjp(function, value)
            return pull(jnp.ones_like(y))[0]

        return Equations(apply(name, function, x), (g * apply(f"{name}′", slope, x, type_=x.type),))

    return write


def is_elementwise(region: Region) -> bool:
    """Whether each entry of the result is the same function of one entry of the one input."""
    if len(region.inputs) != 1 or region.inputs[0].shape != region.output.shape:
        return False
    shapes = {(), region.output.shape}
    for op in region.operators:
        for eqn in _jax.equations(op.jaxpr):
            facts = facts_of(eqn)
            is_call = eqn.primitive is boundary_p or eqn.primitive.name in CALLS | CUSTOM_RULES
            is_simple = facts.elementwise or facts.identity or is_call
            is_filled = eqn.primitive.name == "broadcast_in_dim" and eqn.invars[0].aval.shape == ()
            if not (is_simple or is_filled) or any(v.aval.shape not in shapes for v in eqn.outvars):
                return False
    return True


def find(region: Region) -> NamedFunction | None:
    """The function that a region computes, if it is one with a name."""
    x = region.inputs[0]
    if not jnp.issubdtype(x.dtype, jnp.floating) or not jnp.issubdtype(region.output.dtype, jnp.floating):
        return None
    if x.shape is None or 0 in x.shape or region.output.shape is None:
        return None
    if min(jnp.finfo(v.dtype).bits for v in (x, region.output)) < 16:
        # Nearly all functions are the same with so few numbers.
        return None
    candidates = list(_candidates(region, set(region.primitives())))
    if not candidates:
        return None
    compared = _AtRandomPoints(region)
    return next((candidate for candidate in candidates if compared.agrees(candidate.reference)), None)


def _candidates(region: Region, names: set[str]) -> Iterator[NamedFunction]:
    if is_elementwise(region):
        # One operator with a name of its own is called by that; a long chain is no function with a name.
        is_short = len(region.operators) <= _LONGEST_ACTIVATION
        if (is_short and len(names) > 1) or not facts_of(region.operators[-1].equation).elementwise:
            found = np.asarray(jax.vmap(region)(_at_points(region)), np.float64).ravel()
            for name, spellings in ELEMENTWISE.items():
                for k, function in enumerate(spellings):
                    expected = np.resize(_values(name, k, np.dtype(region.inputs[0].dtype)), found.shape)
                    if not np.allclose(found, expected, rtol=0.02, atol=0.02, equal_nan=True):
                        continue
                    yield NamedFunction(name, "activation", function, elementwise(name))
        return
    x, *others = region.inputs
    if not others and region.output.shape == x.shape and "exp" in names:
        for axis in reversed(range(len(x.shape or ()))):
            yield NamedFunction("softmax", "softmax", partial(jax.nn.softmax, axis=axis), _softmax(axis))
            if "log" in names:
                log_softmax = partial(jax.nn.log_softmax, axis=axis)
                yield NamedFunction("log_softmax", "log_softmax", log_softmax, _log_softmax(axis))
    if len(others) <= 2 and region.output.shape == x.shape and names & {"rsqrt", "sqrt", "pow"}:
        yield from _norms(region)
    if len(others) == 1 and jnp.issubdtype(others[0].dtype, jnp.integer) and {"exp", "log"} <= names:
        yield from _cross_entropies(region)
    if len(others) == 1 and others[0].shape == x.shape and names & {"exp", "log", "log1p", "logistic"}:
        yield from _with_soft_labels(region)


def _at_points(region: Region) -> Any:
    """The points in arrays of the shape of a region's input."""
    x = region.inputs[0]
    repeats = -(-_POINTS.size // max(1, int(np.prod(x.shape or ()))))
    return jnp.asarray(np.resize(_POINTS, (repeats, *(x.shape or ()))), x.dtype)


class _AtRandomPoints:
    """A region at random points, to which functions are compared in value and pullback."""

    def __init__(self, region: Region) -> None:
        self.region = region
        x, *others = region.inputs
        random = np.random.default_rng(0)
        if is_elementwise(region):
            self.values = [_at_points(region)]
        else:
            scales = np.reshape([2.0, 20.0], (2, *(1 for _ in x.shape or ())))
            points = random.normal(size=(2, *(x.shape or ()))) * scales
            self.values = [jnp.asarray(points, x.dtype), *(_drawn(random, v, x.shape or ()) for v in others)]
        count = self.values[0].shape[0]
        self.cotangent = random.normal(size=(count, *(region.output.shape or ())))
        self.found = self._of(region)
        # A part of it may be computed in a narrower type, such as the statistics of a normalisation.
        types = [v.dtype for op in region.operators for v in op.outputs if _jax.is_differentiable(v.aval)]
        eps = max(float(jnp.finfo(t).eps) for t in (region.output.dtype, *types))
        self.tolerance = eps * (64 if eps < 1e-6 else 2)

    def _of(self, function: Callable[..., Any]) -> tuple[Any, Any]:
        def both(*values: Any) -> Any:
            *given, g = values
            y, pull = jax.vjp(lambda v: function(v, *given[1:]), given[0])
            return y, pull(g.astype(y.dtype))[0]

        return jax.vmap(both)(*self.values, jnp.asarray(self.cotangent, self.region.output.dtype))

    def agrees(self, reference: Callable[..., Any]) -> bool:
        """Whether values and pullbacks are those of the reference, but for rounding."""
        types = [jax.ShapeDtypeStruct(v.shape[1:], v.dtype) for v in self.values]
        if jax.eval_shape(reference, *types).shape != self.region.output.shape:
            return False
        return all(
            _near(a, b, factor * self.tolerance, is_elementwise(self.region))
            for a, b, factor in zip(self.found, self._of(reference), (1, 16), strict=True)
        )


def _drawn(random: np.random.Generator, variable: Any, shape: Sequence[int]) -> Any:
    """Two values of an operand: labels of classes, or numbers between 0 and 1."""
    if jnp.issubdtype(variable.dtype, jnp.integer):
        return jnp.asarray(random.integers(0, max(1, shape[-1]), (2, *variable.shape)), variable.dtype)
    return jnp.asarray(random.uniform(0.1, 0.9, (2, *variable.shape)), variable.dtype)


def _near(a: Any, b: Any, tolerance: float, by_entry: bool) -> bool:
    a, b = (np.asarray(v, np.float64) for v in (a, b))
    if a.shape != b.shape:
        return False
    largest = float(np.max(np.abs(b), initial=0.0, where=np.isfinite(b)))
    scale = 1.0 if by_entry else max(1.0, largest)
    return bool(np.all(np.isclose(a, b, rtol=tolerance, atol=tolerance * scale, equal_nan=True)))


def mean(axes: Sequence[int], rank: int, size: int) -> Write:
    """The equations of a mean over some axes of an array of `rank` axes."""

    def write(
        function: Callable[..., Any], operands: Sequence[Expression], g: Expression, output: Expression
    ) -> Equations:
        (x,) = operands

        def spread(v: Any) -> Any:
            return jnp.broadcast_to(jnp.expand_dims(v.reshape(kept), axes), x.shape)

        kept = tuple(n for i, n in enumerate(x.shape) if i not in axes)
        names = (
            ""
            if len(axes) == rank
            else f", {'axis' if len(axes) == 1 else 'axes'} {', '.join(map(str, axes))}"
        )
        latex = f"\\mathrm{{{{mean}}}}{names and '_{{' + names[2:] + '}}'}\\!\\left({{0}}\\right)"
        share = g / size
        type_ = jax.ShapeDtypeStruct(x.shape, share.type.dtype)
        return Equations(
            written(function, (x,), f"mean({{0}}{names})", latex), (unwritten(spread, share, type_),)
        )

    return write


# --- softmax and losses -----------------------------------------------------------------------


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


def _cross_entropies(region: Region) -> Iterator[NamedFunction]:
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


def _with_soft_labels(region: Region) -> Iterator[NamedFunction]:
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


# --- normalisation ----------------------------------------------------------------------------


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


def _norms(region: Region) -> Iterator[NamedFunction]:
    x, *others = region.inputs
    rank = len(x.shape or ())
    if any(v.shape not in ((), (x.shape or ())[rank - len(v.shape or ()) :]) for v in others):
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

        n = apply(name, normalized, x, type_=jax.ShapeDtypeStruct(x.shape, output.type.dtype))
        text, latex, pulled = "{0}", "{0}", g
        cotangents: list[Expression | None] = [None] * len(others)
        for k, i in enumerate(order):
            over = tuple(range(len(g.shape) - len(others[i].shape)))
            cotangents[i] = (g * n if k == 0 else g).sum(over)
            sign, latex_sign = (" ⊙ ", " \\odot ") if k == 0 else (" + ", " + ")
            text, latex = f"{text}{sign}{{{i + 1}}}", f"{latex}{latex_sign}{{{i + 1}}}"
            pulled = pulled * others[i] if k == 0 else pulled
        mean = partial(apply, "mean", norm.mean)
        centred = pulled - mean(pulled) if norm.centred else pulled
        sigma = apply("σ" if norm.centred else "rms", norm.sigma, x, type_=x.type)
        forward = written(
            lambda _, v, *p: function(v, *p), (n, x, *others), *_after(text, latex), is_sum=len(order) > 1
        )
        return Equations(forward, ((centred - n * mean(pulled * n)) / sigma, *cotangents))

    return write


def _after(text: str, latex: str) -> tuple[str, str]:
    """Templates in which the operands after the first two are one place later."""
    shift = str.maketrans({"1": "2", "2": "3"})
    return text.translate(shift), latex.translate(shift)
