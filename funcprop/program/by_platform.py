"""One function in two forms: for the platforms that one of them is made for, and for all others.

A program is traced before it is known what it is lowered for. So the choice between the forms is an operator
of the program, which is made when that is known: by `jax.jit` for the devices of its arguments, by
`jax.export` for each of its platforms. The first form is traced where it is applied, the other only if it is
needed. What is derived of the choice is again a choice, between what is derived of its forms.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax

from funcprop import _jax

Arrays = list[Any]
Function = Callable[..., Arrays]


@dataclass(frozen=True, eq=False)
class Forms:
    """A function of arrays (flat) for some platforms, and the same function for all others."""

    platforms: frozenset[str]
    first: Function
    other: Function

    def both(self, derive: Callable[[Function], Function]) -> Forms:
        """The forms of what is derived of the function."""
        return Forms(self.platforms, derive(self.first), derive(self.other))

    def __call__(self, *operands: Any) -> Arrays:
        """Apply the function: one operator, whose form is chosen when it is lowered."""
        closed = jax.make_jaxpr(lambda *xs: list(self.first(*xs)))(*operands)
        jaxpr, closed_over = _jax.with_constants_as_inputs(closed)
        count = len(closed_over)
        other = self.other if not count else lambda *xs: self.other(*xs[count:])
        forms = Forms(self.platforms, lambda *xs: _jax.evaluate(jaxpr, (), xs), other)
        return list(by_platform_p.bind(*closed_over, *operands, jaxpr=jaxpr, forms=forms))

    def __repr__(self) -> str:
        return f"Forms(for {', '.join(sorted(self.platforms))}, and for others)"


def _call(*operands: Any, jaxpr: Any, forms: Forms) -> Arrays:
    return _jax.evaluate(jaxpr, (), operands)


def _abstract(*operands: Any, jaxpr: Any, forms: Forms) -> Arrays:
    return [v.aval for v in jaxpr.outvars]


def _jvp(primals: Any, tangents: Any, *, jaxpr: Any, forms: Forms) -> Any:
    results = by_platform_p.bind(*primals, jaxpr=jaxpr, forms=forms)
    moving = [i for i, t in enumerate(tangents) if type(t) is not _jax.Zero]
    smooth = [i for i, y in enumerate(results) if _jax.is_differentiable(jax.typeof(y))]

    def tangent_of(fun: Function) -> Function:
        def call(*operands: Any) -> Arrays:
            given, dots = list(operands[: len(primals)]), operands[len(primals) :]

            def of_moving(*values: Any) -> Arrays:
                found = fun(*_replaced(given, moving, values))
                return [found[i] for i in smooth]

            return list(jax.jvp(of_moving, tuple(given[i] for i in moving), tuple(dots))[1])

        return call

    dots = [_jax.instantiate_zeros(tangents[i]) for i in moving]
    pushed = iter(forms.both(tangent_of)(*primals, *dots) if moving and smooth else [])
    zero = lambda y: _jax.Zero(jax.typeof(y).to_tangent_aval())  # noqa: E731
    return results, [next(pushed) if i in smooth and moving else zero(y) for i, y in enumerate(results)]


def _transpose(cotangents: Any, *operands: Any, jaxpr: Any, forms: Forms) -> Arrays:
    linear = [i for i, x in enumerate(operands) if _jax.is_undefined_primal(x)]
    known = [x for x in operands if not _jax.is_undefined_primal(x)]
    types = [operands[i].aval for i in linear]
    places = [i for i in range(len(operands)) if i not in linear]

    def transpose_of(fun: Function) -> Function:
        def call(*given: Any) -> Arrays:
            full = _replaced([None] * len(operands), places, given[: len(known)])

            def of_linear(*values: Any) -> Arrays:
                return list(fun(*_replaced(full, linear, values)))

            return list(jax.linear_transpose(of_linear, *types)(list(given[len(known) :])))

        return call

    found = iter(forms.both(transpose_of)(*known, *map(_jax.instantiate_zeros, cotangents)))
    return [next(found) if i in linear else None for i in range(len(operands))]


def _batch(axis: Any, operands: Any, dims: Any, *, jaxpr: Any, forms: Forms) -> Any:
    mapped = partial(
        jax.vmap, in_axes=tuple(dims), axis_size=axis.size, axis_name=axis.name, spmd_axis_name=axis.spmd_name
    )
    results = forms.both(mapped)(*operands)
    return results, [0] * len(results)


def form_for(eqn: Any, platform: str) -> Any:
    """The program that an equation of this operator is on a platform."""
    forms, jaxpr = eqn.params["forms"], eqn.params["jaxpr"]
    if platform in forms.platforms:
        return jaxpr
    return jax.make_jaxpr(forms.other)(
        *(jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in eqn.invars)
    )


def _replaced(values: Sequence[Any], places: Sequence[int], others: Sequence[Any]) -> Arrays:
    full = list(values)
    for i, value in zip(places, others, strict=True):
        full[i] = value
    return full


by_platform_p = _jax.define_primitive(
    "by_platform",
    call=_call,
    abstract=_abstract,
    jvp=_jvp,
    transpose=_transpose,
    batch=_batch,
    lowering=_jax.lowered_by_platform,
)
