"""Seconds of compiled programs, and how fast this machine is, for predicting them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from funcprop import _jax
from funcprop.cost.work import Product, Work
from funcprop.rules.measuring.ruled_programs import random_operand

# An elementwise operation is measured on at least and at most as many numbers.
_FEWEST, _MOST = 2**12, 2**23
# A product is repeated in one program, in a loop or in a row: at most so often, for so many operations.
_REPETITIONS, _IN_A_ROW, _OPERATIONS = 512, 8, 2**28
# Of so many calls a program may differ from its prediction without its operators being slower or faster.
_CALLS = 4
# Kinds of products are measured that take this share of a program's operations; at most so many.
_LEAST_SHARE, _MOST_KINDS = 0.02, 16


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


def compiled_together(lowered: Iterable[Any]) -> list[Any]:
    """The executables of lowered programs, in order.

    XLA compiles outside of python's lock: two at a time take little more than half the time of one by one.
    """
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda program: program.compile(), lowered))


@dataclass(frozen=True)
class Rates:
    """How fast this machine is at the operators of one function.

    `products` are the seconds of each kind of its products on which it spends most, repeated in one program,
    in a loop or in a row as the function has it; others take `flops_per_second`, the mean of these (infinite
    without one), and at least `step_seconds`, the time of a small product, 16 × 16. `bytes_per_second` is
    that of a loop that reads and writes as many numbers as its largest value has, `call_seconds` the time to
    start a program with the function's arguments. `scale` is what the sum is multiplied by.
    """

    products: Mapping[Product, float]
    flops_per_second: float
    bytes_per_second: float
    call_seconds: float
    step_seconds: float
    scale: float = 1.0

    def seconds(self, work: Work) -> float:
        """The predicted time: products by their kinds, all else by the bytes it moves."""
        rate, least = self.flops_per_second, self.step_seconds
        products = sum(
            times * (self.products[kind] if kind in self.products else max(least, kind.flops / rate))
            for kind, times in work.kinds.items()
        )
        return self.call_seconds + self.scale * (products + work.moved / self.bytes_per_second)

    def calibrated(self, work: Work, seconds: float) -> Rates:
        """Scale the rates so that a program of some work takes the seconds that were measured.

        What is short beside a call may as well be a longer start, of threads for example, as slower
        operators: the scale is drawn to 1 as if a few calls' time were predicted and measured besides, and
        what it leaves over belongs to the call.
        """
        predicted, call = self.seconds(work) - self.call_seconds, self.call_seconds
        if predicted <= 0:
            return self
        scale = (seconds - call + _CALLS * call) / (predicted + _CALLS * call)
        return replace(self, scale=self.scale * scale, call_seconds=max(call, seconds - scale * predicted))


def measured_rates(works: Sequence[Work], operands: Sequence[Any], largest: int, repeats: int) -> Rates:
    """The rates for programs of some work on `operands`, the largest of whose values has so many entries."""
    numbers = jnp.ones(min(max(largest, _FEWEST), _MOST), jnp.float32)
    square = jnp.ones((16, 16), jnp.float32)
    small = Product.of(jax.make_jaxpr(lambda x, y: x @ y)(square, square).eqns[0], looped=True)
    kinds = _costliest(works)
    count = max(1, min(_REPETITIONS, _MOST // numbers.size))
    moving = jax.jit(lambda x: jax.lax.fori_loop(0, count, lambda _, y: 0.5 * y + 1, x))
    nothing = jax.jit(lambda x, *_: x + 1, keep_unused=True).lower(numbers[0], *operands)
    runs = [(nothing, [numbers[0], *operands], 1), (moving.lower(numbers), [numbers], count)]
    runs += [_repeated(kind) for kind in (small, *kinds)]
    compiled = compiled_together([program for program, _, _ in runs])
    call, *others = fastest([(p, values) for p, (_, values, _) in zip(compiled, runs, strict=True)], repeats)
    # A clock cannot tell the time of what is quicker than the call around it.
    each = [max(t - call, 0.1 * call) / times for t, (*_, times) in zip(others, runs[1:], strict=True)]
    move, step, *seconds = each
    rate = sum(kind.flops for kind in kinds) / sum(seconds) if kinds else float("inf")
    return Rates(dict(zip(kinds, seconds, strict=True)), rate, 2 * numbers.nbytes / move, call, step)


def _costliest(works: Sequence[Work]) -> list[Product]:
    """The kinds of products on which a program spends most of its operations, one after the other."""
    shares: dict[Product, float] = {}
    for work in works:
        total = sum(kind.flops * times for kind, times in work.kinds.items())
        for kind, times in work.kinds.items():
            if kind.flops:  # Not of an empty batch.
                shares[kind] = max(shares.get(kind, 0.0), kind.flops * times / total)
    wanted = sorted(shares, key=lambda kind: -shares[kind])
    return [kind for kind in wanted if shares[kind] >= _LEAST_SHARE][:_MOST_KINDS]


def _repeated(product: Product) -> tuple[Any, list[Any], int]:
    """A product again and again in one program, in a loop or in a row; its operands; and how often.

    An entry of each result becomes one of the next first operand, so that all are computed.
    """
    rng = np.random.default_rng(0)
    one = _jax.one_equation_jaxpr(product.equation)
    operands = [random_operand(rng, v.aval) for v in one.invars]
    most = _REPETITIONS if product.looped else _IN_A_ROW
    count = max(1, min(most, _OPERATIONS // product.flops))
    result = one.outvars[0].aval

    def step(carry: tuple[Any, Any], rest: Sequence[Any]) -> tuple[Any, Any]:
        first, last = carry
        entry = jnp.clip(jnp.real(last[(0,) * last.ndim]), -1, 1).astype(first.dtype)
        first = first.at[(0,) * first.ndim].set(entry)
        return first, _jax.evaluate(one, (), [first, *rest])[0]

    def repeated(first: Any, *rest: Any) -> Any:
        carry = first, jnp.zeros(result.shape, result.dtype)
        if product.looped:
            return jax.lax.fori_loop(0, count, lambda _, carry: step(carry, rest), carry)
        for _ in range(count):
            carry = step(carry, rest)
        return carry

    return jax.jit(repeated).lower(*operands), operands, count
