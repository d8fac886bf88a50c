"""Seconds of compiled programs, and how fast this machine is, for predicting them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from funcprop import _compat
from funcprop.flops import flops
from funcprop.work import Work, costliest_product

# An elementwise operation is measured on at least and at most as many numbers.
_FEWEST, _MOST = 2**12, 2**23
# A product is repeated inside of one program: at most so often, for so many operations and so many numbers.
_REPETITIONS, _OPERATIONS, _NUMBERS = 512, 2**28, 2**22


def fastest(programs: Sequence[tuple[Callable[..., Any], Sequence[Any]]], repeats: int) -> list[float]:
    """Seconds of the fastest of `repeats` runs of each program, which take turns."""
    found = [float("inf")] * len(programs)
    for turn in range(repeats + 1):
        for i, (program, values) in enumerate(programs):
            start = time.perf_counter()
            jax.block_until_ready(program(*values))
            # The first turn touches memory for the first time and does not count.
            if turn:
                found[i] = min(found[i], time.perf_counter() - start)
    return found


def random_operand(rng: np.random.Generator, aval: Any) -> Any:
    """Standard normal numbers; zeros of a type without derivative."""
    if not _compat.is_differentiable(aval):
        return jnp.zeros(aval.shape, aval.dtype)
    return jnp.asarray(rng.standard_normal(aval.shape), aval.dtype)


@dataclass(frozen=True)
class Rates:
    """How fast this machine is at the operators of one function.

    `flops_per_second` is that of its costliest product, repeated inside of one program (infinite without
    one), `bytes_per_second` that of a loop that reads and writes as many numbers as its largest value
    has, `call_seconds` the time to start a program, `step_seconds` that of a small product, 16 × 16.
    """

    flops_per_second: float
    bytes_per_second: float
    call_seconds: float
    step_seconds: float

    def seconds(self, work: Work) -> float:
        """The predicted time: products by their operations, all else by the bytes it moves."""
        rate, least = self.flops_per_second, self.step_seconds
        products = sum(times * max(least, size / rate) for size, times in work.sizes.items())
        return self.call_seconds + products + work.moved / self.bytes_per_second


def measured_rates(closed: Any, repeats: int) -> Rates:
    """The rates for the operators of a jaxpr."""
    jaxpr = _compat.open_jaxpr(closed)
    sizes = [v.aval.size for eqn in jaxpr.eqns for v in eqn.outvars if hasattr(v.aval, "size")]
    numbers = jnp.ones(min(max([*sizes, _FEWEST]), _MOST), jnp.float32)
    square = jnp.ones((16, 16), jnp.float32)
    small = jax.make_jaxpr(lambda x, y: x @ y)(square, square).eqns[0]
    product = costliest_product(closed)
    if product is not None and not flops(product):  # Of an empty batch.
        product = None
    products = [_repeated(eqn) for eqn in (small, product) if eqn is not None]
    count = max(1, min(_REPETITIONS, _MOST // numbers.size))
    moving = jax.jit(lambda x: jax.lax.fori_loop(0, count, lambda _, y: 0.5 * y + 1, x))
    nothing = jax.jit(lambda x: x + 1).lower(numbers[0]).compile(), [numbers[0]], 1
    runs = [nothing, (moving.lower(numbers).compile(), [numbers], count), *products]
    call, *others = fastest([(program, operands) for program, operands, _ in runs], repeats)
    # A clock cannot tell the time of what is quicker than the call around it.
    each = [max(t - call, 0.1 * call) / times for t, (*_, times) in zip(others, runs[1:], strict=True)]
    rate = float("inf") if product is None else flops(product) / each[2]
    return Rates(rate, 2 * numbers.nbytes / each[0], call, each[1])


def _repeated(eqn: Any) -> tuple[Any, list[Any], int]:
    """A product, repeated with other first operands in one program; the operands; and how often."""
    rng = np.random.default_rng(0)
    one = _compat.one_equation_jaxpr(eqn)
    first, *rest = [random_operand(rng, v.aval) for v in one.invars]
    entries = max(first.size, one.outvars[0].aval.size, 1)
    count = max(1, min(_REPETITIONS, _OPERATIONS // flops(eqn), _NUMBERS // entries))
    operands = [jnp.stack([first] * count), *rest]

    def repeated(several: Any, *rest: Any) -> Any:
        return jax.lax.map(lambda x: _compat.evaluate(one, (), [x, *rest])[0], several)

    return jax.jit(repeated).lower(*operands).compile(), operands, count
