"""How far rounding can carry the results of a function, by Monte Carlo arithmetic.

The function is run several times, and every operation that rounds is rounded otherwise each time: its result,
and each term of a sum, is changed at random by a unit in the last place. Where terms cancel, the results
differ by what the rounding of these terms amounts to, however small the result itself is.

Reference: Parker, "Monte Carlo Arithmetic: exploiting randomness in floating-point arithmetic", UCLA, 1997.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from funcprop import _jax
from funcprop._jax.xla_options import jit_once
from funcprop.program.facts import CALLS, CHECKPOINTS, CUSTOM_RULES, facts_of

RUNS = 8

# What adds up where one of its operands is largest: a change of that one would move the place.
_PICKED = frozenset({"select_and_scatter_add", "select_and_scatter"})


def spread(fun: Callable[..., Any], *args: Any) -> np.ndarray:
    """How far each entry of `fun(*args)`, one array, is from itself at most when roundings change.

    Example:
        >>> import jax.numpy as jnp
        >>> one_ulp = float(spread(lambda x: x * x, jnp.float32(3.0)))
        >>> cancelled = float(spread(lambda x: (x + 1e4) * 1.0 - 1e4, jnp.float32(3.0)))
        >>> one_ulp < 1e-5 < 1e-4 < cancelled < 1e-2
        True
    """
    leaves, tree = jax.tree.flatten(args)
    closed = jax.make_jaxpr(lambda *values: fun(*jax.tree.unflatten(tree, values)))(*leaves)
    consts = _jax.array_constants(closed)

    @jit_once
    def run(seed: Any, consts: Sequence[Any], values: Sequence[Any]) -> Any:
        return _Rounded(seed).evaluate(_jax.open_jaxpr(closed), consts, values)[0]

    results = [np.asarray(run(np.uint32(seed), consts, leaves)) for seed in range(1, RUNS + 1)]
    expected = np.asarray(jit_once(fun)(*args))
    wide = np.result_type(expected.dtype if expected.dtype.kind in "fc" else np.float32, np.float32)
    with np.errstate(all="ignore"):
        distances = [np.abs(result.astype(wide) - expected.astype(wide)) for result in results]
    return np.max([np.where(np.isfinite(d), d, 0) for d in distances], axis=0)


class _Rounded:
    """An evaluation in which the roundings are those of one seed."""

    def __init__(self, seed: Any) -> None:
        self.seed = seed
        self.count = itertools.count()

    def evaluate(self, jaxpr: Any, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
        """The results of a jaxpr."""
        values: dict[Any, Any] = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))

        def read(atom: Any) -> Any:
            return atom.val if isinstance(atom, _jax.Literal) else values[atom]

        for eqn in jaxpr.eqns:
            results = self.equation(eqn, [read(v) for v in eqn.invars])
            values.update(zip(eqn.outvars, results, strict=True))
        return [read(v) for v in jaxpr.outvars]

    def body(self, closed: Any, args: Sequence[Any]) -> list[Any]:
        """The results of a jaxpr in an equation."""
        return self.evaluate(_jax.open_jaxpr(closed), _jax.array_constants(closed), args)

    def equation(self, eqn: Any, operands: Sequence[Any]) -> list[Any]:
        """The results of one equation."""
        name = eqn.primitive.name
        bodies = [body for _, body in _jax.sub_jaxprs(eqn)]
        if name == "scan":
            return self.loop(eqn, bodies[0], operands)
        if name == "cond":
            branches = [lambda *xs, body=body: self.body(body, xs) for body in bodies]
            return list(lax.switch(operands[0], branches, *operands[1:]))
        if bodies and name in CALLS | CHECKPOINTS | CUSTOM_RULES:
            return self.body(bodies[0], operands)
        facts = facts_of(eqn)
        if facts.exact or not any(_jax.is_differentiable(v.aval) for v in eqn.outvars):
            return _jax.one_equation(eqn)(*operands)
        if facts.accumulates or not (name in _PICKED or _is_entrywise(eqn)):
            operands = [self.changed(x) for x in operands]
        results = _jax.one_equation(eqn)(*operands)
        if name == "convert_element_type" and not _narrows(operands[0], results[0]):
            return results
        return [self.changed(y) for y in results]

    def loop(self, eqn: Any, body: Any, operands: Sequence[Any]) -> list[Any]:
        """The results of a `scan`."""
        params = eqn.params
        consts, carry = _jax.scan_counts(params)

        def step(state: Any, xs: Any) -> Any:
            results = self.body(body, [*operands[:consts], *state, *xs])
            return results[:carry], results[carry:]

        init, xs = list(operands[consts : consts + carry]), list(operands[consts + carry :])
        last, stacked = lax.scan(step, init, xs, length=params["length"], reverse=params["reverse"])
        return [*last, *stacked]

    def changed(self, x: Any) -> Any:
        """A value with every entry larger or smaller by a unit in its last place."""
        if not _jax.is_differentiable(jax.typeof(x)):
            return x
        if jnp.iscomplexobj(x):
            return lax.complex(self.changed(lax.real(x)), self.changed(lax.imag(x)))
        x = jnp.asarray(x)
        bits = lax.iota(np.uint32, max(x.size, 1)) * np.uint32(2654435761)
        bits = bits + self.seed * np.uint32(2246822519) + np.uint32(next(self.count) * 3266489917 % 2**32)
        for shift, factor in ((15, 2246822519), (13, 3266489917), (16, 668265263)):
            bits = (bits ^ (bits >> np.uint32(shift))) * np.uint32(factor)
        up = (bits >> np.uint32(31)).reshape(x.shape) if x.size else jnp.zeros(x.shape, np.uint32)
        eps = jnp.finfo(x.dtype).eps
        one = np.ones((), x.dtype)
        larger, smaller = (np.asarray(one + sign * eps, x.dtype) for sign in (1, -1))
        return _jax.with_weak_type(
            lax.mul(x, lax.select(up == 1, lax.full(x.shape, larger), lax.full(x.shape, smaller))),
            bool(getattr(jax.typeof(x), "weak_type", False)),
        )


def _is_entrywise(eqn: Any) -> bool:
    """Whether each entry of the result can be a function of one entry of each operand."""
    given, (result, *others) = [v.aval.shape for v in eqn.invars], [v.aval.shape for v in eqn.outvars]
    sizes = zip(*(shape for shape in given if len(shape) == len(result)), strict=True)
    is_broadcast = all({*found} <= {1, size} for found, size in zip(sizes, result, strict=False))
    return not others and all(len(shape) in (0, len(result)) for shape in given) and is_broadcast


def _narrows(operand: Any, result: Any) -> bool:
    """Whether a conversion rounds."""
    types = [jax.typeof(x).dtype for x in (operand, result)]
    if not all(jnp.issubdtype(t, jnp.inexact) for t in types):
        return True
    before, after = (jnp.finfo(t).eps for t in types)
    return bool(after > before)
