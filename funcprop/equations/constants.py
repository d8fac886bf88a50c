"""What has no derivative and is no short formula: random draws, masks, positions."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from funcprop.equations.flow import Region
from funcprop.graph.graph import Variable
from funcprop.rules.equations import Equations, apply, opaque, written
from funcprop.rules.expressions import Expression, number, unwritten

# A list of integers that is not longer than this is written out.
_SHORT_LIST = 12

_DRAWS: dict[str, Callable[..., Any]] = {
    "normal": jax.random.normal,
    "uniform": jax.random.uniform,
    "gumbel": jax.random.gumbel,
    "exponential": jax.random.exponential,
    "laplace": jax.random.laplace,
    "rademacher": jax.random.rademacher,
}
# Larger numbers are no bounds of a draw, but what its bits are made with.
_LARGEST = 10**8


def named_function(name: str) -> Callable[..., Equations]:
    """How a line is written that is a function of its operands by name; they have no cotangents."""

    def write(
        function: Callable[..., Any], operands: Sequence[Expression], g: Expression, output: Expression
    ) -> Equations:
        if not operands:
            latex = f"\\text{{{name}}}"
            return Equations(opaque(function, (), name, latex, output.type), ())
        if "{0}" in name:
            latex = name.replace("randint(", "\\mathrm{{randint}}(")
            return Equations(written(function, operands, name, latex, output.type), (None,))
        return Equations(apply(name, function, *operands, type_=output.type), (None,) * len(operands))

    return write


def pattern(value: Any) -> str:
    """What an array that depends on nothing is called: a causal mask, positions, or a constant."""
    array = np.asarray(value)
    if (
        array.ndim >= 2
        and array.dtype == bool
        and np.array_equal(array, np.broadcast_to(np.tri(*array.shape[-2:]).astype(bool), array.shape))
    ):
        return "causal mask"
    if array.ndim == 2 and 0 < array.shape[0] == array.shape[1] and array.dtype.kind == "f":
        scale = float(array[0, 0])
        if scale and np.array_equal(array, scale * np.eye(len(array), dtype=array.dtype)):
            return "I" if scale == 1 else f"{number(scale, array.dtype).text()} I"
    last = np.arange(array.shape[-1]) if array.ndim and array.size else None
    if (
        last is not None
        and array.dtype.kind in "iuf"
        and np.array_equal(array, np.broadcast_to(last, array.shape))
    ):
        return "positions"
    if array.ndim == 1 and array.dtype.kind in "iu" and len(array) <= _SHORT_LIST:
        return str(array.tolist())
    return "mask" if array.dtype == bool else "constant"


def index_of(
    function: Callable[..., Any], operands: Sequence[Expression], g: Expression, output: Expression
) -> Equations:
    """How an index is written of which negative values count from the end: as it is."""
    return Equations(unwritten(function, operands[0], output.type), (None,))


def draw(region: Region) -> str | None:
    """The name of the draw that a function of a key is, or None: `normal`, `randint`, `bernoulli`."""
    (key,), output = region.inputs, region.output
    given = jax.random.key(7)
    if output.shape is None or jax.typeof(given).dtype != key.aval.dtype:
        return None
    if (many := key.aval.shape) and output.shape[: len(many)] == many:
        # One of each key.
        keys, shape = jax.random.split(given, many), output.shape[len(many) :]
        found = np.asarray(region(keys)).reshape(-1, *shape)
        each = [(name, lambda k, f=f: f(k, shape, output.dtype)) for name, f in _DRAWS.items()]
        is_real = jnp.issubdtype(output.dtype, jnp.floating)
        of_keys = ((name, jax.vmap(f)(keys.ravel())) for name, f in each) if is_real else ()
        return next((name for name, values in of_keys if np.array_equal(found, values)), None)
    if many:
        return None
    found = np.asarray(region(given))
    if jnp.issubdtype(output.dtype, jnp.floating):
        for name, of_key in _DRAWS.items():
            if np.array_equal(found, np.asarray(of_key(given, output.shape, output.dtype))):
                return name
    elif jnp.issubdtype(output.dtype, jnp.integer):
        if found.ndim == 1 and np.array_equal(found, jax.random.permutation(given, found.size)):
            return "permutation"
        numbers = {int(v.value) for op in region.operators for v in op.inputs if _is_whole(v)}
        for low, high in itertools.combinations(sorted(n for n in {0, *numbers} if abs(n) < _LARGEST), 2):
            drawn = jax.random.randint(given, output.shape, low, high, output.dtype)
            if np.array_equal(found, np.asarray(drawn)):
                return f"randint({{0}}, {low}, {high})"
    if np.isin(found, (0, 1)).all():
        found = found.astype(bool)
        share = float(np.mean(found))
        nearby = sorted({*(k / 20 for k in range(1, 20)), 1 / 3, 2 / 3}, key=lambda p: abs(p - share))
        if any(
            np.array_equal(found, np.asarray(jax.random.bernoulli(given, p, output.shape))) for p in nearby
        ):
            return "bernoulli"
    return None


def _is_whole(v: Variable) -> bool:
    return v.kind == "literal" and np.ndim(v.value) == 0 and np.asarray(v.value).dtype.kind in "iu"
