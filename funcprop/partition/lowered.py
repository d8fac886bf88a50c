"""A flat program as the compiler for CPUs runs it: with copies that its equations do not show."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import jax

from funcprop import _jax
from funcprop.program.facts import facts_of

SizeOf = Callable[[Any], int]


class Lowered:
    """The program as the compiler runs it, with copies that its equations do not show.

    A product is one of matrices, after batch axes; an operand that is not in this order is transposed,
    once for all products that need the same order. The transpose of a product is the product of the other
    two. Operands that an elementwise operator repeats are repeated before.
    """

    def __init__(self, jaxpr: Any, size_of: SizeOf, reduced: Mapping[Any, tuple[str, ...]]) -> None:
        self._size_of, self.reduced = size_of, dict(reduced)
        self._like: dict[Any, Any] = {}
        self._copies: dict[Any, Any] = {}
        self._equations: list[Any] = []
        for eqn in self._turned(jaxpr):
            if eqn.primitive.name == "dot_general":
                orders = zip(eqn.invars, _orders(eqn), strict=True)
                eqn = eqn.replace(invars=[v if o is None else self._transposed(v, o) for v, o in orders])
            elif eqn.primitive.name == "conv_general_dilated":
                self._convolution(eqn)
                continue
            elif facts_of(eqn).elementwise and len(eqn.outvars) == 1:
                eqn = eqn.replace(invars=[self._repeated(v, eqn.outvars[0]) for v in eqn.invars])
            self._equations.append(eqn)
        self.jaxpr = _jax.jaxpr_of(self._equations, jaxpr.invars, jaxpr.outvars, "flat")

    def bytes_of(self, v: Any) -> int:
        """Bytes of a variable on one device; those of copies are their originals'."""
        like = self._like.get(v)
        if like is None:
            return self._size_of(v)
        return self._size_of(like) // like.aval.dtype.itemsize * int(v.aval.dtype.itemsize)

    def _add(self, key: Any, like: Any, fun: Callable[[Any], Any]) -> Any:
        """Add the one equation of `fun`, once for each `key`, whose first part it reads."""
        if key not in self._copies:
            (eqn,) = _jax.open_jaxpr(jax.make_jaxpr(fun)(_plain_type(key[0]))).eqns
            self._copies[key] = eqn.outvars[0]
            self._like[eqn.outvars[0]] = like
            self._equations.append(eqn.replace(invars=[key[0]]))
        return self._copies[key]

    def _transposed(self, v: Any, order: tuple[int, ...]) -> Any:
        if isinstance(v, _jax.Literal):
            return v
        return self._add((v, order), self._like.get(v, v), lambda x: jax.lax.transpose(x, order))

    def _convolution(self, eqn: Any) -> None:
        """A convolution of images with features last; others are transposed before and after."""
        numbers, result = eqn.params["dimension_numbers"], eqn.outvars[0]
        image, kernel, out = numbers.lhs_spec, numbers.rhs_spec, numbers.out_spec
        orders = (image[0], *image[2:], image[1]), (*kernel[2:], kernel[1], kernel[0])
        operands = [
            v if list(order) == sorted(order) else self._transposed(v, order)
            for v, order in zip(eqn.invars, orders, strict=True)
        ]
        after = (out[0], *out[2:], out[1])
        if list(after) == sorted(after):
            self._equations.append(eqn.replace(invars=operands))
            return
        own = _jax.Var(result.aval)
        self._like[own] = result
        if result in self.reduced:
            self.reduced[own] = self.reduced.pop(result)
        self._equations.append(eqn.replace(invars=operands, outvars=[own]))
        back = tuple(sorted(range(len(after)), key=lambda d: after[d]))
        closed = jax.make_jaxpr(lambda x: jax.lax.transpose(x, back))(_plain_type(result))
        self._equations.append(_jax.open_jaxpr(closed).eqns[0].replace(invars=[own], outvars=[result]))

    def _repeated(self, v: Any, result: Any) -> Any:
        sizes = result.aval.shape
        if isinstance(v, _jax.Literal) or v.aval.shape in ((), sizes) or len(v.aval.shape) != len(sizes):
            return v
        axes = tuple(range(len(sizes)))
        return self._add((v, sizes), result, lambda x: jax.lax.broadcast_in_dim(x, sizes, axes))

    def _turned(self, jaxpr: Any) -> list[Any]:
        """The equations; the transpose of a product of two matrices is the product of the others."""
        readers: dict[Any, list[Any]] = defaultdict(list)
        for eqn in jaxpr.eqns:
            for v in _jax.variables(eqn.invars):
                readers[v].append(eqn)
        results = set(_jax.variables(jaxpr.outvars))
        gone: set[int] = set()
        found = []
        for eqn in jaxpr.eqns:
            if id(eqn) in gone:
                continue
            after = readers[eqn.outvars[0]] if eqn.primitive.name == "dot_general" else []
            if (
                len(after) == 1
                and after[0].primitive.name == "transpose"
                and eqn.outvars[0] not in results
                and all(len(v.aval.shape) == 2 for v in [*eqn.invars, *eqn.outvars])
            ):
                (left, right), _ = eqn.params["dimension_numbers"]
                params = {**eqn.params, "dimension_numbers": ((right, left), ((), ()))}
                if eqn.outvars[0] in self.reduced:
                    self.reduced[after[0].outvars[0]] = self.reduced.pop(eqn.outvars[0])
                eqn = eqn.replace(invars=eqn.invars[::-1], outvars=after[0].outvars, params=params)
                gone.add(id(after[0]))
            found.append(eqn)
        return found


def _plain_type(v: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype)


def _orders(eqn: Any) -> tuple[tuple[int, ...] | None, tuple[int, ...] | None]:
    """The order of axes in which a product needs its two operands; None for one that it reads as it is."""
    (left_summed, right_summed), (left_batch, right_batch) = eqn.params["dimension_numbers"]
    found: list[tuple[int, ...] | None] = []
    plain = len(left_summed) == 1
    for v, summed, batch in zip(
        eqn.invars, (left_summed, right_summed), (left_batch, right_batch), strict=True
    ):
        rank = len(v.aval.shape)
        plain = plain and tuple(batch) == tuple(range(len(batch))) and rank - len(batch) - len(summed) <= 1
    for side, (v, summed, batch) in enumerate(
        zip(eqn.invars, (left_summed, right_summed), (left_batch, right_batch), strict=True)
    ):
        sizes = v.aval.shape
        free = [d for d in range(len(sizes)) if d not in summed and d not in batch]
        order = (*batch, *free, *summed) if side == 0 else (*batch, *summed, *free)
        moved = [d for d in order if sizes[d] > 1]
        found.append(None if plain or len(sizes) < 3 or moved == sorted(moved) else tuple(order))
    return found[0], found[1]
