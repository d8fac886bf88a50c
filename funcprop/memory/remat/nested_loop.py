"""A loop in chunks: a loop over loops, which holds one carry for each chunk.

Of `T` steps in `k` chunks, reverse mode holds the `k` carries at which chunks begin, and what `T/k` steps
hold while a chunk is differentiated; each step is run once more (Chen et al. 2016 for layers; Gruslys et al.,
"Memory-efficient backpropagation through time", 2016, for recurrent networks).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

from funcprop import _jax

CARRY = "funcprop: carry at which a chunk begins"


def chunk_counts(length: int) -> list[int]:
    """Numbers of chunks to try: divisors near the root of the length, a fourth and the fourfold of it."""
    divisors = [k for k in range(2, length // 2 + 1) if length % k == 0]
    if not divisors:
        return []
    aims = (length**0.5 / 4, length**0.5, length**0.5 * 4)
    return sorted({min(divisors, key=lambda k: abs(k / aim - 1) + abs(aim / k - 1)) for aim in aims})


def in_chunks(eqn: Any, count: int) -> Any:
    """The equation of a scan as one of a jitted loop over `count` scans, each recomputed as a whole."""
    ((_, closed),) = _jax.sub_jaxprs(eqn)
    jaxpr, constants = _jax.open_jaxpr(closed), _jax.array_constants(closed)
    consts, carries = _jax.scan_counts(eqn.params)
    length, reverse = eqn.params["length"], eqn.params["reverse"]

    # The checkpoint is around all, so that what is scanned is held as it is and not in chunks.
    @functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names(CARRY))
    def loop(*operands: Any) -> list[Any]:
        shared = operands[:consts]

        def step(carry: list[Any], x: Sequence[Any]) -> tuple[list[Any], list[Any]]:
            results = _jax.evaluate(jaxpr, constants, [*shared, *carry, *x])
            return results[:carries], results[carries:]

        @jax.checkpoint
        def steps(carry: list[Any], xs: Sequence[Any]) -> tuple[list[Any], list[Any]]:
            return jax.lax.scan(step, carry, xs, length=length // count, reverse=reverse)

        def chunk(carry: Sequence[Any], xs: Sequence[Any]) -> tuple[list[Any], list[Any]]:
            return steps([checkpoint_name(c, CARRY) for c in carry], xs)

        xs = [x.reshape(count, length // count, *x.shape[1:]) for x in operands[consts + carries :]]
        carry = list(operands[consts : consts + carries])
        carry, ys = jax.lax.scan(chunk, carry, xs, length=count, reverse=reverse)
        return [*carry, *(y.reshape(length, *y.shape[2:]) for y in ys)]

    traced = jax.make_jaxpr(jax.jit(loop))(*(v.aval for v in eqn.invars))
    (call,) = _jax.open_jaxpr(traced).eqns
    return _jax.in_place_of(eqn, call, eqn.invars)
