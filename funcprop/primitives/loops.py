"""`scan`: what need not be in the loop is taken out of it, forwards and backwards.

    carry, y_t = body(constants, carry, x_t)        for t = 1 … T

*Forwards*, what depends on the constants alone runs once; products of one carried value with several
constants are one product; and products of `x_t` with constants (the input projections of a recurrent network)
run for all steps at once, before the loop, where that pays.

*Backwards*, a product `z_t = a_t W` with a constant `W` contributes `W̄ = Σ_t a_tᵀ z̄_t`. Autodiff adds up `T`
products of parameter size inside the reversed loop. Here the loop hands back the cotangents `z̄_t`, and ONE
product follows it, over time and batch together. The same holds for a bias, whose sum follows the loop. The
transposes `Wᵀ` that the reversed loop multiplies with are made once.

How: in the body, `z = a W` becomes `z = perturbed(a · W°, δ)`, where `W°` is not differentiated and `δ` is
zero: it has no value and only receives the cotangent of `z`. JAX differentiates one step of this body
(`loop_steps`), and of its residuals as few and small as possible are stacked (`stacking`).

Residuals of products are activations; where an activation is the carry and the carry is also a result, it is
that result one step later, and nothing is stacked for it. Where nothing is differentiated, the loop stays as
it is written.

**Cost model.** Two x86 cores with 2 MB of L2 cache each, float32, ratios to `jax.value_and_grad` (median of
paired ratios, ±0.03; temporary bytes):

    LSTM T64 B4 H512    0.33 / 0.66      both projections and weight gradients leave the loop
    LSTM T256 B16 H128  0.52 / 0.94      by hand: 21.1 ms and 29.5 MB; input projection hoisted: 28.6 and 44.1
    GRU T64 B4 H512     0.36 / 0.69      RNN T256 B16 H128  0.64 / 0.86

* A weight gradient inside of the loop reads and writes its sum at every step. That costs more than stacking
  one activation and one cotangent as soon as the constant is larger than these two together; the rule asks
  for twice that (`defers`). With more rows the products are as fast inside: a chunked cross-entropy, whose
  logits are larger than a step's share of the vocabulary matrix, is left alone.
* A product before the loop is as fast as its arithmetic; inside, with few rows, as reading its constant. Its
  results are stacked, so it pays only where they are small: a quarter of the constant (`hoists`).
* `g Wᵀ` in the reversed loop: 5.4 ms against 3.4 with `Wᵀ` made once (T256 B16 H128, 128 × 512); the sum of
  products over parts of 512 takes 4.5 ms where one over 2048 takes 8.5 (T64 B4 H512).
* `sigmoid`, `tanh`, `exp` are stacked and not made again: 34.6 ms against 40.5 for a whole LSTM gradient.
* Above 32 MB of temporary memory the C library returns the pages at every call, and faulting them in again
  cost 10 of 31 ms: holding less is also faster.

**Byte guard.** Of several plans, the most ambitious is taken that holds no more than autodiff does. Ours:
stacked residuals, cotangents and hoisted results, transposed copies of the activations, constants turned and
put side by side. Autodiff's: its residuals, and for each product one step's cotangent of the constant.

Source: Appleyard et al., "Optimizing performance of recurrent neural networks on GPUs", 2016, for the batched
projections and weight gradients of an LSTM; here for any loop.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from funcprop import _compat
from funcprop.primitives.loop_bodies import (
    PRODUCTS,
    Site,
    Split,
    contribution,
    depths,
    nbytes,
    run_perturbed,
    sites,
    split,
    variables,
    widened,
)
from funcprop.primitives.loop_steps import Saved, Step
from funcprop.registry import OperatorKey, Rule

Arrays = list[Any]


class Costs(NamedTuple):
    """When a product leaves the loop: its constant is so many times larger than what is stacked for it.

    `defers`: than one step's result and activation, for the weight gradient to follow the loop.
    `hoists`: than one step's result, for the product itself to precede the loop.
    `guards`: whether what is stacked may not exceed what autodiff holds.
    """

    defers: float
    hoists: float
    guards: bool = True


MEASURED = Costs(defers=2, hoists=4)
ALWAYS = Costs(defers=0, hoists=0, guards=False)


@dataclass(frozen=True, eq=False)
class Loop:
    """A scan equation taken apart: what runs before the loop, and its step."""

    params: dict[str, Any]
    closed_over: Arrays
    consts: int
    carries: int
    split: Split
    hoisted_sites: list[Site]
    step: Step

    def once(self, consts: Arrays) -> Arrays:
        """The constants, and what is made of them alone."""
        return [*consts, *_compat.evaluate(self.split.once, (), consts)]

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
        zeros = [_compat.zeros_like_aval(eqn.outvars[0].aval) for eqn in eqns]
        return [jnp.broadcast_to(zero, (self.params["length"], *zero.shape)) for zero in zeros]


def _contributions(
    jaxpr: Any, places: Sequence[Site], cotangents: Arrays, activations: Arrays, consts: Arrays
) -> dict[int, Any]:
    """For each constant, what its sites contribute: one contraction over time for each."""
    total: dict[int, Any] = {}
    remaining = iter(activations)
    for site, g in zip(places, cotangents, strict=True):
        eqn = jaxpr.eqns[site.position]
        a = next(remaining) if eqn.primitive.name in PRODUCTS else None
        term = contribution(eqn, site.operand, a, g, consts[site.constant])
        total[site.constant] = total[site.constant] + term if site.constant in total else term
    return total


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["pull_once", "pull_parallel", "hoisted_activations", "saved", "activations", "constants"],
    meta_fields=["loop"],
)
@dataclass(frozen=True)
class LoopResiduals:
    """JAX's pullbacks of what precedes the loop, what the step saves, and the operands of the products."""

    pull_once: Any
    pull_parallel: Any
    hoisted_activations: Arrays
    saved: Saved
    activations: Arrays
    constants: Arrays
    loop: Loop


# --- the cost model ---------------------------------------------------------------------------


def _constant_operand(eqn: Any, operators: frozenset[str], is_constant: Callable[[Any], bool]) -> int | None:
    """Which operand of one of these operators is constant, if exactly one is."""
    if eqn.primitive.name not in operators:
        return None
    constant = [k for k, v in enumerate(eqn.invars) if not isinstance(v, _compat.Literal) and is_constant(v)]
    return constant[0] if len(constant) == 1 and _compat.is_differentiable(eqn.invars[0].aval) else None


def _defers(jaxpr: Any, site: Site, costs: Costs) -> bool:
    return _worth_deferring(jaxpr.eqns[site.position], site.operand, costs)


def _worth_deferring(eqn: Any, operand: int, costs: Costs) -> bool:
    stacked = nbytes(eqn.outvars[0]) + nbytes(eqn.invars[1 - operand])
    return nbytes(eqn.invars[operand]) >= costs.defers * stacked


def _hoists(eqn: Any, costs: Costs) -> bool:
    return max(map(nbytes, variables(eqn.invars))) >= costs.hoists * nbytes(eqn.outvars[0])


class Plan(NamedTuple):
    """What to do with a loop: whether products precede it, whether constants are turned and put side by side.

    And how many of its products, those with the smallest constants first, are not followed by a contraction.
    """

    hoists: bool
    turns: bool
    widens: bool
    kept: int = 0


def _plans(products: int) -> Iterator[Plan]:
    """Ever more modest plans for a loop with so many products."""
    for hoists, widens, turns in itertools.product((True, False), repeat=3):
        yield Plan(hoists, turns, widens)
    yield from (Plan(False, False, False, kept) for kept in range(1, products + 1))


def _gain(jaxpr: Any, site: Site) -> float:
    """How much larger the constant of a product is than the result, whose cotangent would be stacked."""
    eqn = jaxpr.eqns[site.position]
    return nbytes(eqn.invars[site.operand]) / max(nbytes(eqn.outvars[0]), 1)


# --- the rule ---------------------------------------------------------------------------------


def _opened(params: dict[str, Any]) -> tuple[Any, Arrays, int, int]:
    """The body with nested jits inlined and constants as inputs; these, and how many inputs of each kind."""
    opened, closed_over = _compat.with_constants_as_inputs(_compat.inlined(params["jaxpr"]))
    consts, carries = _compat.scan_counts(params)
    return opened, closed_over, consts + len(closed_over), carries


class Body(NamedTuple):
    """A loop's body, how many constants and carries it has, and the bytes of constants it is given beside."""

    jaxpr: Any
    closed_over: Arrays
    consts: int
    carries: int
    copies: int = 0


def _take_apart(costs: Costs, params: dict[str, Any]) -> Loop:
    """The loop under the most ambitious plan that holds no more than autodiff."""
    plain = Body(*_opened(params))
    wide = _side_by_side(plain)
    limit = _autodiff_bytes(plain, params["length"])
    products = sum(eqn.primitive.name in PRODUCTS for eqn in plain.jaxpr.eqns)
    for plan in _plans(products):
        if plan.widens and wide is None:
            continue
        loop, size, modest = _planned(plan, costs, params, wide if plan.widens and wide else plain)
        if not costs.guards or size <= limit or modest:
            return loop
    raise AssertionError("a plan that keeps all products in the loop is the most modest one")


def _side_by_side(body: Body) -> Body | None:
    widened_jaxpr, made = widened(body.jaxpr, body.consts, body.carries)
    if widened_jaxpr is None:
        return None
    opened, more = _compat.with_constants_as_inputs(widened_jaxpr)
    return Body(opened, [*more, *body.closed_over], body.consts + len(more), body.carries, made)


def _autodiff_bytes(body: Body, length: int) -> int:
    """About what autodiff holds for a loop: what it stacks, and each constant's cotangent of one step."""
    cut = split(body.jaxpr, body.consts, body.carries, hoists=lambda eqn: False)
    step = Step(cut.rest, len(cut.rest_constants), body.carries, [], turn=False)
    constants = set(step.const_vars)
    cotangents = [
        nbytes(v)
        for eqn in cut.rest.eqns
        # With a single row the cotangent is an outer product, which XLA adds up without making it.
        if eqn.primitive.name in PRODUCTS and _rows(eqn) > 1
        for v in variables(eqn.invars)
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


def _planned(plan: Plan, costs: Costs, params: dict[str, Any], body: Body) -> tuple[Loop, int, bool]:
    """The loop under a plan, about what it holds, and whether nothing more modest remains."""
    cut = split(body.jaxpr, body.consts, body.carries, lambda eqn: plan.hoists and _hoists(eqn, costs))
    xs = len(body.jaxpr.invars) - body.consts - body.carries
    rest, loop_consts = cut.rest, len(cut.rest_constants)
    hoisted_sites = sites(cut.parallel, len(cut.parallel.invars) - xs)
    candidates = sites(rest, loop_consts)
    deferred = [s for s in candidates if _is_product(rest, s) and _defers(rest, s, costs)]
    deferred = sorted(deferred, key=partial(_gain, rest))[plan.kept :]
    places = [s for s in candidates if s in deferred or not _is_product(rest, s)]
    step = Step(rest, loop_consts, body.carries, places, plan.turns)
    earning = [s for s in places if _earns(step, s)] if costs.guards else places
    if len(earning) < len(places):
        step = Step(rest, loop_consts, body.carries, earning, plan.turns)
    made = [v for eqn in cut.parallel.eqns if eqn.primitive.name in PRODUCTS for v in eqn.outvars]
    each = step.stacked_bytes(sum(i >= xs for i in cut.rest_scanned)) + max(
        sum(map(nbytes, made)), sum(map(nbytes, cut.parallel.outvars))
    )
    size = body.copies + step.turned_bytes + params["length"] * each
    loop = Loop(params, body.closed_over, body.consts, body.carries, cut, hoisted_sites, step)
    return loop, size, not deferred and not (plan.hoists or plan.turns or plan.widens)


def _is_product(jaxpr: Any, site: Site) -> bool:
    return jaxpr.eqns[site.position].primitive.name in PRODUCTS


def _earns(step: Step, site: Site) -> bool:
    """A product, or a sum whose cotangent is stacked for another reason."""
    if _is_product(step.rest, site):
        return True
    cotangent = dict(zip(step.sites, step.back_sites, strict=True))
    elsewhere = {cotangent[s] for s in step.sites if _is_product(step.rest, s)} | set(step.back_inputs)
    return not step.varies(cotangent[site]) or cotangent[site] in elsewhere


def _forward(costs: Costs, *operands: Any, **params: Any) -> tuple[Arrays, LoopResiduals]:
    loop = _take_apart(costs, params)
    everything = [*loop.closed_over, *operands]
    carry_end = loop.consts + loop.carries
    consts, init, xs = everything[: loop.consts], everything[loop.consts : carry_end], everything[carry_end:]
    consts, pull_once = jax.vjp(loop.once, consts)
    hoisted, pull_parallel, hoisted_activations = jax.vjp(
        partial(loop.parallel, consts), consts, xs, loop.perturbations(), has_aux=True
    )
    xs = [*xs, *hoisted]
    loop_consts = [consts[i] for i in loop.split.rest_constants]
    loop_xs = [xs[i] for i in loop.split.rest_scanned]
    results, saved, activations = loop.step.run(loop_consts, init, loop_xs, params)
    read = {loop.split.rest_constants[s.constant] for s in loop.step.sites}
    read |= {s.constant for s in loop.hoisted_sites}
    constants = [c if i in read else None for i, c in enumerate(consts)]
    residuals = LoopResiduals(
        pull_once, pull_parallel, hoisted_activations, saved, activations, constants, loop
    )
    return results, residuals


def _backward(residuals: LoopResiduals, cotangents: Arrays, needs: Any, **params: Any) -> Arrays:
    loop, step, cut = residuals.loop, residuals.loop.step, residuals.loop.split
    found = step.pull(residuals.saved, list(cotangents), params)
    loop_constants = [residuals.constants[i] for i in cut.rest_constants]
    deferred = _contributions(step.rest, step.sites, found.sites, residuals.activations, loop_constants)
    x_count = len(cut.parallel.invars) - len(residuals.constants)
    xs = [*cut.parallel.invars[len(residuals.constants) :], *cut.parallel.outvars]
    x_cts = [_zero(v.aval, params["length"]) for v in xs]
    for i, ct in zip(cut.rest_scanned, found.scanned, strict=True):
        x_cts[i] = x_cts[i] if ct is None else ct
    const_cts, raw_x_cts, site_cts = residuals.pull_parallel(x_cts[x_count:])
    hoisted = _contributions(
        cut.parallel, loop.hoisted_sites, site_cts, residuals.hoisted_activations, residuals.constants
    )
    terms = [[ct, hoisted.get(i)] for i, ct in enumerate(const_cts)]
    for place, i in enumerate(cut.rest_constants):
        terms[i] += [found.constants[place], deferred.get(place)]
    (outer_consts,) = residuals.pull_once([_added(each) for each in terms])
    outer_xs = [_added(pair) for pair in zip(x_cts[:x_count], raw_x_cts, strict=True)]
    everything = [*outer_consts, *found.init, *outer_xs][len(loop.closed_over) :]
    return [
        ct if need and ct is not None and _compat.is_differentiable(jax.typeof(ct)) else None
        for ct, need in zip(everything, needs, strict=True)
    ]


def _added(terms: Sequence[Any]) -> Any:
    """The sum of cotangents, of which None is zero; the first says of what type."""
    first, *rest = [ct for ct in terms if ct is not None]
    return sum(rest, start=first) if _compat.is_differentiable(jax.typeof(first)) else first


def _zero(aval: Any, length: int | None = None) -> Any:
    """The cotangent of what no result depends on."""
    shape = aval.shape if length is None else (length, *aval.shape)
    if not _compat.is_differentiable(aval):
        return _compat.zero_tangent(jax.ShapeDtypeStruct(shape, aval.dtype))
    return jax.numpy.zeros(shape, aval.dtype)


def _value(*operands: Any, **params: Any) -> Arrays:
    """The loop as it stands."""
    consts, carries = _compat.scan_counts(params)
    constants, init, xs = operands[:consts], operands[consts : consts + carries], operands[consts + carries :]
    body = params["jaxpr"]

    def step(carry: Sequence[Any], x: Sequence[Any]) -> tuple[Arrays, Arrays]:
        results = _compat.evaluate(
            _compat.open_jaxpr(body), _compat.constants(body), [*constants, *carry, *x]
        )
        return results[:carries], results[carries:]

    final, ys = jax.lax.scan(
        step,
        list(init),
        list(xs),
        length=params["length"],
        reverse=params["reverse"],
        unroll=params["unroll"],
    )
    return [*final, *ys]


def _applies(costs: Costs, *operands: Any, **params: Any) -> bool | str:
    if params["length"] == 0:
        return "the loop has no steps"
    body, _, consts, carries = _opened(params)
    if _has_while(body):
        return "the body holds a `while`, which has no reverse mode"
    depth = depths(body, consts, carries)
    # A sum is worth nothing by itself: what is stacked for it is as large as what a product needs.
    operators = PRODUCTS if costs.guards else PRODUCTS | {"add", "sub"}
    products = [
        (eqn, operand)
        for eqn in body.eqns
        if (operand := _constant_operand(eqn, operators, lambda v: depth[v] == 0)) is not None
        and depth[eqn.outvars[0]] > 0
    ]
    if not products:
        return "no product of the loop has a constant operand"
    if not any(_worth_deferring(eqn, operand, costs) or _hoists(eqn, costs) for eqn, operand in products):
        return "its constants are small against one step's products: taking these out of the loop costs more"
    return True


def _has_while(jaxpr: Any) -> bool:
    return any(
        eqn.primitive.name == "while"
        or any(_has_while(_compat.open_jaxpr(b)) for _, b in _compat.sub_jaxprs(eqn))
        for eqn in jaxpr.eqns
    )


def rule(costs: Costs = MEASURED) -> Rule:
    """The rule of a loop under a cost model."""
    return Rule(
        partial(_forward, costs),
        _backward,
        platforms=frozenset({"cpu"}),
        applies=partial(_applies, costs),
        value=_value,
    )


RULES: dict[OperatorKey, Rule] = {"scan": rule()}
