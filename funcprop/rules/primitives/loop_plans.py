"""Which products leave a loop, and the loop taken apart accordingly.

Two x86 cores with 2 MB of L2 cache each, float32, ratios to `jax.value_and_grad` (median of
paired ratios, ±0.03; temporary bytes):

    LSTM T64 B4 H512    0.28 / 0.66      both projections and weight gradients leave the loop
    LSTM T256 B16 H128  0.42 / 0.94      by hand: 21.1 ms and 29.5 MB; input projection hoisted: 28.6 and 44.1
    GRU T64 B4 H512     0.27 / 0.69      RNN T256 B16 H128  0.62 / 0.86

* A weight gradient inside of the loop reads and writes its sum at every step. That costs more than stacking
  one activation and one cotangent as soon as the constant is larger than these two together; the rule asks
  for twice that (`defers`). With more rows the products are as fast inside: a chunked cross-entropy, whose
  logits are larger than a step's share of the vocabulary matrix, is left alone.
* A product before the loop is as fast as its arithmetic; inside, with few rows, as reading its constant. Its
  results are stacked, so it pays only where they are small: a quarter of the constant (`hoists`).
* `g Wᵀ` in the reversed loop: 5.4 ms against 3.4 with `Wᵀ` made once (T256 B16 H128, 128 × 512); of the
  whole gradient that is a tenth (T256 B16 H128 22.1 and 19.8 ms, RNN 6.1 and 5.5; GRU T128 B16 H128 10.2 and
  8.3). A large matrix and few rows are multiplied as `(W gᵀ)ᵀ` instead, and nothing is made
  (`row_products`): LSTM T64 B4 H512 23 and 18 ms.
* Matrices side by side have one contraction after the loop, whose result is cut up. One for each, so that no
  array of them all is made, gained nothing: LSTM T64 B4 H512 21.1 and 21.1 ms, T256 B16 H128 20.6 and 22.7.
* `sigmoid`, `tanh`, `exp` are stacked and not made again: 34.6 ms against 40.5 for a whole LSTM gradient.
* Above 32 MB of temporary memory the C library returns the pages at every call, and faulting them in again
  cost 10 of 31 ms: holding less is also faster.

An LSTM of T64 B4 H512 is bound by its products: three of 1.7 ms outside of the loops, and inside each of the
128 steps reads `W`, whose 4 MB are just the two caches.

**Byte guard.** Of several plans, the most ambitious is taken that holds no more than autodiff does, else the
one that holds least. Ours: stacked residuals, cotangents and hoisted results, results copied for the
reversed loop, transposed copies of the activations, constants turned and put side by side, and cotangents of
constants that are made of others, added up in the loop. Autodiff's: its residuals, and for each product one
step's cotangent of the constant. A fiftieth of the made constants, which both hold, is no difference.

Of 60 drawn models, 8 of them recurrent, none held more than 1.014 of autodiff's bytes (seed 1301 of
`experiments/never_worse.py`). The worst that is known is MGU T64 B4 H128: 1.04, and 1.09 from 16 inputs in
one layer, where the estimates above are too small by that.
LSTM T10 B1 H96 had held 1.23 (now 0.83), MGU T100 B8 H64 1.10 (0.90), GRU T100 B1 H96 1.08 (0.82). In a short
loop, whose constants are larger than all that is stacked, only what is held at the same time counts: MGU T33
B1 H256 then takes 0.20 of autodiff's CPU time, and 1.09 where everything is counted.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from funcprop import _jax
from funcprop.program.facts import PRODUCTS
from funcprop.program.sizes import nbytes
from funcprop.rules.machine import Machine, host
from funcprop.rules.primitives.loop_bodies import BodySplit, split, widened
from funcprop.rules.primitives.loop_sites import Site, run_perturbed, sites
from funcprop.rules.primitives.loop_steps import ForwardStep, LoopStep, StepBody

Arrays = list[Any]


class Costs(NamedTuple):
    """When a product leaves the loop: its constant is so many times larger than what is stacked for it.

    `defers`: than one step's result and activation, for the weight gradient to follow the loop.
    `hoists`: than one step's result, for the product itself to precede the loop.
    `guards`: whether what is stacked may not exceed what autodiff holds.
    `machine`: the one that is compiled for; this one if None.
    """

    defers: float
    hoists: float
    guards: bool = True
    machine: Machine | None = None


MEASURED = Costs(defers=2, hoists=4)
ALWAYS = Costs(defers=0, hoists=0, guards=False)


@dataclass(frozen=True, eq=False)
class LoopEquation:
    """A scan equation taken apart: what runs before the loop, and its step."""

    params: dict[str, Any]
    closed_over: Arrays
    consts: int
    carries: int
    split: BodySplit
    hoisted_sites: list[Site]
    step: LoopStep

    def once(self, consts: Arrays) -> Arrays:
        """The constants, and what is made of them alone."""
        return [*consts, *_jax.evaluate(self.split.once, (), consts)]

    def parallel(
        self, frozen: Arrays, consts: Arrays, xs: Arrays, perturbations: Arrays
    ) -> tuple[Arrays, Arrays]:
        """What is made of the scanned inputs before the loop; also the activations of its sites."""

        def step(xs: Arrays, deltas: Arrays) -> tuple[Arrays, Arrays]:
            return run_perturbed(self.split.parallel, self.hoisted_sites, [*consts, *xs], frozen, deltas)

        return jax.vmap(step, axis_size=self.params["length"])(xs, perturbations)

    def perturbations(self) -> Arrays:
        """Zeros for the sites before the loop; no value depends on them, so they are never made."""
        eqns = [self.split.parallel.eqns[site.position] for site in self.hoisted_sites]
        zeros = [_jax.zeros_like_aval(eqn.outvars[0].aval) for eqn in eqns]
        return [jnp.broadcast_to(zero, (self.params["length"], *zero.shape)) for zero in zeros]


# --- the cost model ---------------------------------------------------------------------------


def _defers(jaxpr: Any, site: Site, costs: Costs) -> bool:
    return worth_deferring(jaxpr.eqns[site.position], site.operand, costs)


def worth_deferring(eqn: Any, operand: int, costs: Costs) -> bool:
    """Whether a product's weight gradient is to follow the loop."""
    stacked = nbytes(eqn.outvars[0]) + nbytes(eqn.invars[1 - operand])
    return nbytes(eqn.invars[operand]) >= costs.defers * stacked


def worth_hoisting(eqn: Any, costs: Costs) -> bool:
    """Whether a product of scanned inputs is to precede the loop."""
    return max(map(nbytes, _jax.variables(eqn.invars))) >= costs.hoists * nbytes(eqn.outvars[0])


class LoopPlan(NamedTuple):
    """What to do with a loop: whether products precede it, whether constants are turned and put side by side.

    And how many of its products, those with the smallest constants first, are not followed by a contraction.
    """

    hoists: bool
    turns: bool
    widens: bool
    kept: int = 0


def _plans(products: int) -> Iterator[LoopPlan]:
    """Ever more modest plans for a loop with so many products."""
    for hoists, widens, turns in itertools.product((True, False), repeat=3):
        yield LoopPlan(hoists, turns, widens)
    yield from (LoopPlan(False, False, False, kept) for kept in range(1, products + 1))


def _gain(jaxpr: Any, site: Site) -> float:
    """How much larger the constant of a product is than the result, whose cotangent would be stacked."""
    eqn = jaxpr.eqns[site.position]
    return nbytes(eqn.invars[site.operand]) / max(nbytes(eqn.outvars[0]), 1)


def opened_body(params: dict[str, Any]) -> tuple[Any, Arrays, int, int]:
    """The body with nested jits inlined and constants as inputs; these, and how many inputs of each kind."""
    opened, closed_over = _jax.with_constants_as_inputs(_jax.inlined(params["jaxpr"]))
    consts, carries = _jax.scan_counts(params)
    return opened, closed_over, consts + len(closed_over), carries


class LoopBody(NamedTuple):
    """A loop's body, how many constants and carries it has, and the bytes of constants it is given beside."""

    jaxpr: Any
    closed_over: Arrays
    consts: int
    carries: int
    copies: int = 0


def take_apart(costs: Costs, params: dict[str, Any]) -> LoopEquation:
    """The loop under the most ambitious plan that holds no more than autodiff."""
    plain = LoopBody(*opened_body(params))
    wide = _side_by_side(plain)
    limit = _autodiff_bytes(plain, params["length"])
    products = sum(eqn.primitive.name in PRODUCTS for eqn in plain.jaxpr.eqns)
    tried: list[PlannedLoop] = []
    for plan in _plans(products):
        if plan.widens and wide is None:
            continue
        tried.append(_planned(plan, costs, params, wide if plan.widens and wide else plain))
        if not costs.guards or tried[-1].nbytes <= limit + tried[-1].made // 50:
            return tried[-1].loop
        if tried[-1].modest:
            break
    return min(tried, key=lambda found: found.nbytes).loop


def _side_by_side(body: LoopBody) -> LoopBody | None:
    widened_jaxpr, made = widened(body.jaxpr, body.consts, body.carries)
    if widened_jaxpr is None:
        return None
    opened, more = _jax.with_constants_as_inputs(widened_jaxpr)
    return LoopBody(opened, [*more, *body.closed_over], body.consts + len(more), body.carries, made)


def _autodiff_bytes(body: LoopBody, length: int) -> int:
    """About what autodiff holds for a loop: what it stacks, and each constant's cotangent of one step."""
    cut = split(body.jaxpr, body.consts, body.carries, hoists=lambda eqn: False)
    consts = len(cut.rest_constants)
    step = ForwardStep.of(StepBody.of(cut.rest, consts, body.carries, ()))
    constants = set(cut.rest.invars[:consts])
    cotangents = [
        nbytes(v)
        for eqn in cut.rest.eqns
        # With a single row the cotangent is an outer product, which XLA adds up without making it.
        if eqn.primitive.name in PRODUCTS and _rows(eqn) > 1
        for v in _jax.variables(eqn.invars)
        if v in constants
    ]
    return length * step.autodiff_bytes + sum(cotangents)


def _rows(eqn: Any) -> int:
    """The numbers over which the cotangent of a product's right operand is a sum."""
    if eqn.primitive.name != "dot_general":
        return 2
    (lhs, _), _ = eqn.params["dimension_numbers"]
    shape = eqn.invars[0].aval.shape
    return math.prod(n for i, n in enumerate(shape) if i not in lhs)


class PlannedLoop(NamedTuple):
    """The loop under a plan, and about what it holds besides the constants that are `made` of others.

    By autodiff these are held, too. `modest` says that nothing more modest remains.
    """

    loop: LoopEquation
    nbytes: int
    made: int
    modest: bool


def _planned(plan: LoopPlan, costs: Costs, params: dict[str, Any], body: LoopBody) -> PlannedLoop:
    cut = split(body.jaxpr, body.consts, body.carries, lambda eqn: plan.hoists and worth_hoisting(eqn, costs))
    xs = len(body.jaxpr.invars) - body.consts - body.carries
    rest, loop_consts = cut.rest, len(cut.rest_constants)
    hoisted_sites = sites(cut.parallel, len(cut.parallel.invars) - xs)
    candidates = sites(rest, loop_consts)
    deferred = [s for s in candidates if _is_product(rest, s) and _defers(rest, s, costs)]
    deferred = sorted(deferred, key=partial(_gain, rest))[plan.kept :]
    places = [s for s in candidates if s in deferred or not _is_product(rest, s)]
    step = LoopStep.of(
        StepBody.of(rest, loop_consts, body.carries, places), plan.turns, costs.machine or host()
    )
    earning = [s for s in places if _earns(step, s)] if costs.guards else places
    if len(earning) < len(places):
        step = LoopStep.of(
            StepBody.of(rest, loop_consts, body.carries, earning), plan.turns, costs.machine or host()
        )
    made = [v for eqn in cut.parallel.eqns if eqn.primitive.name in PRODUCTS for v in eqn.outvars]
    hoisted = max(sum(map(nbytes, made)), sum(map(nbytes, cut.parallel.outvars)))
    one, length = step.stacked_bytes(sum(i >= xs for i in cut.rest_scanned)), params["length"]
    size, copies = step.turned_bytes, body.copies
    if all(_is_short(rest, s, length) for s in deferred):
        size += copies + length * one.at_once(hoisted)
    else:
        # The backward reads the constants side by side, unless it has them turned.
        added = length * (one.cotangents + one.copies)
        size += max(copies, added) if step.turned_bytes >= copies else copies + added
        size += length * (hoisted + one.residuals + one.later)
    # Autodiff adds up the cotangents of the loop's own constants, which are results; ours are of made ones.
    size += step.summed_bytes([i for i, c in enumerate(cut.rest_constants) if c >= body.consts])
    loop = LoopEquation(params, body.closed_over, body.consts, body.carries, cut, hoisted_sites, step)
    made_once = sum(map(nbytes, cut.once.outvars))
    return PlannedLoop(loop, size, made_once, not deferred and not any(plan))


def _is_short(jaxpr: Any, site: Site, length: int) -> bool:
    """Whether all cotangents that are stacked for a product are no larger than its constant.

    XLA then finds places that others have left. In longer loops it left two or three such arrays unused, and
    what was held was about the sum of all that is stacked at any time: GRU T200 B4 H256, MGU T100 B16 H128.
    """
    eqn = jaxpr.eqns[site.position]
    return length * nbytes(eqn.outvars[0]) <= nbytes(eqn.invars[site.operand])


def _is_product(jaxpr: Any, site: Site) -> bool:
    return jaxpr.eqns[site.position].primitive.name in PRODUCTS


def _earns(step: LoopStep, site: Site) -> bool:
    """A product, or a sum whose cotangent is stacked for another reason."""
    body = step.forward.body
    if _is_product(body.jaxpr, site):
        return True
    cotangent = dict(zip(body.sites, step.sites, strict=True))
    elsewhere = {cotangent[s] for s in body.sites if _is_product(body.jaxpr, s)} | set(step.scanned)
    return not step.varies(cotangent[site]) or cotangent[site] in elsewhere
