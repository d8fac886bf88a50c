"""Functions that have a name, recognised by what they compute.

A region of a graph is given random values and compared with functions that have a name, in value and in
derivative: it does not matter how a framework spells softmax. What is printed and verified is the region's
own function under that name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from funcprop import _jax
from funcprop._jax.xla_options import jit_once
from funcprop.equations.elementwise import at_points, elementwise_functions, is_elementwise
from funcprop.equations.flow import Region
from funcprop.equations.losses import cross_entropies, logsumexps, soft_losses, softmaxes
from funcprop.equations.named_function import NamedFunction
from funcprop.equations.norms import lengths, norms
from funcprop.graph.graph import Variable
from funcprop.sweeps.evaluation import drawn


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
    candidates = list(_candidates(region))
    if not candidates:
        return None
    compared = _AtRandomPoints(region)
    return next((candidate for candidate in candidates if compared.agrees(candidate.reference)), None)


def _candidates(region: Region) -> Iterator[NamedFunction]:
    """The functions that a region may be, by its shapes and primitives."""
    if is_elementwise(region):
        yield from elementwise_functions(region)
        return
    names = set(region.primitives())
    x, *others = region.inputs
    if not x.shape:
        return
    is_of_one_shape = region.output.shape == x.shape
    if not others and "exp" in names:
        yield from softmaxes(region)
        if "log" in names and len(region.output.shape or ()) < len(x.shape):
            yield from logsumexps(region)
    if not others and names & {"rsqrt", "sqrt"} and "reduce_sum" in names:
        yield from lengths(region)
    if len(others) <= 2 and is_of_one_shape and names & {"rsqrt", "sqrt", "pow"}:
        yield from norms(region)
    if {"exp", "log"} <= names and all(jnp.issubdtype(v.dtype, jnp.integer) for v in others):
        yield from cross_entropies(region)
    if len(others) == 1 and others[0].shape == x.shape and names & {"exp", "log", "log1p", "logistic"}:
        yield from soft_losses(region)


class _AtRandomPoints:
    """A region at random points, to which functions are compared in value and pullback."""

    def __init__(self, region: Region) -> None:
        self.region = region
        x, *others = region.inputs
        random = np.random.default_rng(0)
        if is_elementwise(region):
            self.values = [at_points(region)]
        else:
            classes = (x.shape or (1,))[-1]
            apart = [_values_apart(region, v, classes) for v in others]
            count = 2 + max(map(len, apart), default=0)
            scales = np.reshape([2.0, 20.0, *[2.0] * (count - 2)], (count, *(1 for _ in x.shape or ())))
            points = random.normal(size=(count, *(x.shape or ()))) * scales
            operands = []
            for v, values in zip(others, apart, strict=True):
                operand = drawn(random, v, classes, (count, *(v.shape or ())))
                if values:  # With NumPy: on a device each place would be a program.
                    operand = np.array(operand)
                    for k, value in enumerate(values, 2):
                        operand[k] = value
                operands.append(operand)
            self.values = [jnp.asarray(points, x.dtype), *operands]
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

        return jit_once(jax.vmap(both))(*self.values, jnp.asarray(self.cotangent, self.region.output.dtype))

    def agrees(self, reference: Callable[..., Any]) -> bool:
        """Whether values and pullbacks are those of the reference, but for rounding."""
        types = [jax.ShapeDtypeStruct(v.shape[1:], v.dtype) for v in self.values]
        if jax.eval_shape(reference, *types).shape != self.region.output.shape:
            return False
        return all(
            _near(a, b, factor * self.tolerance, is_elementwise(self.region))
            for a, b, factor in zip(self.found, self._of(reference), (1, 16), strict=True)
        )


def _values_apart(region: Region, v: Variable, classes: int) -> list[Any]:
    """Labels or targets that a loss may leave out: −1, NaN, and every number that stands in it."""
    literals = [w.value for op in region.operators for w in op.inputs if w.kind == "literal"]
    numbers = {x.item() for x in map(np.asarray, literals) if x.ndim == 0}
    if jnp.issubdtype(v.dtype, jnp.signedinteger):
        return sorted(n for n in {-1, *numbers} if isinstance(n, int) and n < classes)
    if jnp.issubdtype(v.dtype, jnp.floating):
        return [*sorted({-1.0, *(n for n in numbers if isinstance(n, float) and np.isfinite(n))}), np.nan]
    return []


def _near(a: Any, b: Any, tolerance: float, by_entry: bool) -> bool:
    a, b = (np.asarray(v, np.float64) for v in (a, b))
    if a.shape != b.shape:
        return False
    largest = float(np.max(np.abs(b), initial=0.0, where=np.isfinite(b)))
    scale = 1.0 if by_entry else max(1.0, largest)
    return bool(np.all(np.isclose(a, b, rtol=tolerance, atol=tolerance * scale, equal_nan=True)))
