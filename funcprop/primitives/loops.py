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

Source: Appleyard et al., "Optimizing performance of recurrent neural networks on GPUs", 2016, for the batched
projections and weight gradients of an LSTM; here for any loop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax

from funcprop import _compat
from funcprop.primitives.loop_bodies import PRODUCTS, Site, contribution, depths, nbytes, sites, split, variables, widened
from funcprop.primitives.loop_steps import Saved, Step
from funcprop.registry import OperatorKey, Rule

Arrays = list[Any]


class Costs(NamedTuple):
    """When a product leaves the loop: its constant is so many times larger than what is stacked for it.

    `defers`: than one step's result and activation, for the weight gradient to follow the loop. `hoists`: than
    one step's result, for the product itself to precede it. `guards`: whether what is stacked may not exceed
    what autodiff holds.
    """

    defers: float
    hoists: float
    guards: bool = True


MEASURED = Costs(defers=2, hoists=32)
ALWAYS = Costs(defers=0, hoists=0, guards=False)


@dataclass(frozen=True, eq=False)
class Loop:
    """A scan equation taken apart: what runs before the loop, and its step."""

    params: dict[str, Any]
    closed_over: Arrays
    consts: int
    carries: int
    split: Any
    step: Step

    def before(self, consts: Arrays, xs: Arrays) -> tuple[Arrays, Arrays]:
        """What runs outside of the loop: the loop's own constants and scanned inputs."""
        consts = [*consts, *_compat.evaluate(self.split.once, (), consts)]
        if self.split.parallel.eqns:
            step = lambda *x: _compat.evaluate(self.split.parallel, (), [*consts, *x])  # noqa: E731
            xs = [*xs, *jax.vmap(step)(*xs)]
        return [consts[i] for i in self.split.rest_constants], [xs[i] for i in self.split.rest_scanned]

    def contributions(self, cotangents: Arrays, activations: Arrays, consts: Arrays) -> dict[int, Any]:
        """For each constant, what its sites contribute: one contraction over time for each."""
        total: dict[int, Any] = {}
        remaining = iter(activations)
        for site, g in zip(self.step.sites, cotangents, strict=True):
            eqn = self.step.rest.eqns[site.position]
            a = next(remaining) if eqn.primitive.name in PRODUCTS else None
            term = contribution(eqn, site.operand, a, g, consts[site.constant])
            total[site.constant] = total[site.constant] + term if site.constant in total else term
        return total


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["pull_before", "saved", "activations", "constants"],
    meta_fields=["loop"],
)
@dataclass(frozen=True)
class LoopResiduals:
    """JAX's pullback of what precedes the loop, what the step saves, and the operands of its products."""

    pull_before: Any
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


def _defers(eqn: Any, operand: int, costs: Costs) -> bool:
    stacked = nbytes(eqn.outvars[0]) + nbytes(eqn.invars[1 - operand])
    return nbytes(eqn.invars[operand]) >= costs.defers * stacked


def _hoists(eqn: Any, costs: Costs) -> bool:
    return max(map(nbytes, variables(eqn.invars))) >= costs.hoists * nbytes(eqn.outvars[0])


def _plans(places: Sequence[Site], rest: Any) -> Iterator[tuple[bool, Sequence[Site]]]:
    """Ever more modest plans: whether constants are turned, and which sites follow the loop."""
    yield True, places
    yield False, places
    products = [s for s in places if rest.eqns[s.position].primitive.name in PRODUCTS]

    def gain(site: Site) -> float:
        eqn = rest.eqns[site.position]
        return nbytes(eqn.invars[site.operand]) / max(nbytes(eqn.outvars[0]), 1)

    for site in sorted(products, key=gain):
        places = [s for s in places if s != site]
        yield False, places


# --- the rule ---------------------------------------------------------------------------------


def _opened(params: dict[str, Any]) -> tuple[Any, Arrays, int, int]:
    """The body with nested jits inlined and constants as inputs; these, and how many inputs of each kind."""
    opened, closed_over = _compat.with_constants_as_inputs(_compat.inlined(params["jaxpr"]))
    consts, carries = _compat.scan_counts(params)
    return opened, closed_over, consts + len(closed_over), carries


def _take_apart(costs: Costs, params: dict[str, Any]) -> Loop:
    body, closed_over, consts, carries = _opened(params)
    wide = widened(body, consts, carries)
    if wide is not None:
        body, more = _compat.with_constants_as_inputs(wide)
        closed_over, consts = [*more, *closed_over], consts + len(more)
    for hoists in (True, False):
        cut = split(body, consts, carries, lambda eqn, yes=hoists: yes and _hoists(eqn, costs))
        if hoists and not cut.parallel.eqns:
            continue
        step = _step(costs, cut, carries, params["length"], last=not hoists)
        if step is not None:
            return Loop(params, closed_over, consts, carries, cut, step)
    raise AssertionError("the last plan takes nothing out of the loop")


def _step(costs: Costs, cut: Any, carries: int, length: int, last: bool) -> Step | None:
    """The most ambitious step that holds no more than autodiff, or None."""
    rest, consts = cut.rest, len(cut.rest_constants)
    places = [
        s
        for s in sites(rest, consts)
        if rest.eqns[s.position].primitive.name not in PRODUCTS
        or _defers(rest.eqns[s.position], s.operand, costs)
    ]
    outside = sum(map(nbytes, cut.once.outvars))
    hoisted = sum(map(nbytes, cut.parallel.outvars))
    for turn, chosen in _plans(places, rest):
        step = Step(rest, consts, carries, chosen, turn)
        shared = [s for s in chosen if _earns(step, s)] if costs.guards else chosen
        if len(shared) < len(chosen):
            step = Step(rest, consts, carries, shared, turn)
        deferred = {s.constant: nbytes(step.const_vars[s.constant]) for s in step.sites}
        ours = outside + step.turned_bytes + length * (hoisted + step.stacked_bytes + step.site_bytes)
        theirs = sum(deferred.values()) + length * step.autodiff_bytes
        if not costs.guards or ours <= theirs:
            return step
    return step if last else None


def _earns(step: Step, site: Site) -> bool:
    """A product, or a sum whose cotangent is stacked for another reason."""

    def is_product(s: Site) -> bool:
        return step.rest.eqns[s.position].primitive.name in PRODUCTS

    if is_product(site):
        return True
    cotangent = dict(zip(step.sites, step.back_sites, strict=True))
    elsewhere = {cotangent[s] for s in step.sites if is_product(s)} | set(step.back_inputs)
    return not step.varies(cotangent[site]) or cotangent[site] in elsewhere


def _forward(costs: Costs, *operands: Any, **params: Any) -> tuple[Arrays, LoopResiduals]:
    loop = _take_apart(costs, params)
    everything = [*loop.closed_over, *operands]
    carry_end = loop.consts + loop.carries
    consts, init, xs = everything[: loop.consts], everything[loop.consts : carry_end], everything[carry_end:]
    (loop_consts, loop_xs), pull_before = jax.vjp(loop.before, consts, xs)
    results, saved, activations = loop.step.run(loop_consts, init, loop_xs, params)
    site_constants = {s.constant for s in loop.step.sites}
    constants = [c if i in site_constants else None for i, c in enumerate(loop_consts)]
    return results, LoopResiduals(pull_before, saved, activations, constants, loop)


def _backward(residuals: LoopResiduals, cotangents: Arrays, needs: Any, **params: Any) -> Arrays:
    loop, step = residuals.loop, residuals.loop.step
    found = step.pull(residuals.saved, list(cotangents), params)
    added = loop.contributions(found.sites, residuals.activations, residuals.constants)
    const_cts = []
    for i, v in enumerate(step.const_vars):
        terms = [ct for ct in (found.constants[i], added.get(i)) if ct is not None]
        const_cts.append(sum(terms[1:], start=terms[0]) if terms else _zero(v.aval))
    x_cts = [
        _zero(v.aval, params["length"]) if ct is None else ct
        for v, ct in zip(step.x_vars, found.scanned, strict=True)
    ]
    outer_consts, outer_xs = residuals.pull_before((const_cts, x_cts))
    everything = [*outer_consts, *found.init, *outer_xs][len(loop.closed_over) :]
    return [
        ct if need and ct is not None and _compat.is_differentiable(jax.typeof(ct)) else None
        for ct, need in zip(everything, needs, strict=True)
    ]


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
        step, list(init), list(xs), length=params["length"], reverse=params["reverse"], unroll=params["unroll"]
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
    if not any(_defers(eqn, operand, costs) or _hoists(eqn, costs) for eqn, operand in products):
        return "its constants are small against one step's products: taking these out of the loop costs more"
    return True


def _has_while(jaxpr: Any) -> bool:
    return any(
        eqn.primitive.name == "while" or any(_has_while(_compat.open_jaxpr(b)) for _, b in _compat.sub_jaxprs(eqn))
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
