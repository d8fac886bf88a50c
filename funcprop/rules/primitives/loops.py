"""`scan`: what need not be in the loop is taken out of it, forwards and backwards.

    carry, y_t = body(constants, carry, x_t)        for t = 1 … T

*Forwards*, what depends on the constants alone runs once; products of one carried value with several
constants are one product; and products of `x_t` with constants (the input projections of a recurrent network)
run for all steps at once, before the loop, where that pays.

*Backwards*, a product `z_t = a_t W` with a constant `W` contributes `W̄ = Σ_t a_tᵀ z̄_t`. Autodiff adds up `T`
products of parameter size inside the reversed loop. Here the loop hands back the cotangents `z̄_t`, and ONE
product follows it, over time and batch together. The same holds for a bias, whose sum follows the loop.
Products `z̄_t Wᵀ` of the reversed loop have the form that is fastest for their size (`row_products`).

How: in the body, `z = a W` becomes `z = perturbed(a · W°, δ)`, where `W°` is not differentiated and `δ` is
zero: it has no value and only receives the cotangent of `z`. JAX differentiates one step of this body
(`loop_steps`), and of its residuals as few and small as possible are stacked (`stacking`).

Residuals of products are activations; where an activation is the carry and the carry is also a result, it is
that result one step later, and nothing is stacked for it. Where nothing is differentiated, the loop stays as
it is written.

What leaves a loop, and what that costs: `loop_plans`.

Source: Appleyard et al., "Optimizing performance of recurrent neural networks on GPUs", 2016, for the batched
projections and weight gradients of an LSTM; here for any loop.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax

from funcprop import _jax
from funcprop.program.facts import PRODUCTS, SUMS
from funcprop.rules.machine import Machine
from funcprop.rules.primitives.loop_bodies import with_constant_operand
from funcprop.rules.primitives.loop_plans import ALWAYS as ALWAYS
from funcprop.rules.primitives.loop_plans import (
    MEASURED,
    Costs,
    LoopEquation,
    take_apart,
    worth_deferring,
    worth_hoisting,
)
from funcprop.rules.primitives.loop_sites import contributions
from funcprop.rules.primitives.loop_steps import LoopSaved
from funcprop.rules.rule import PLATFORMS, Rule
from funcprop.rules.rule_set import OperatorKey

Arrays = list[Any]


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
    saved: LoopSaved
    activations: Arrays
    constants: Arrays
    loop: LoopEquation


# --- the rule ---------------------------------------------------------------------------------


def _forward(
    costs: Costs, *operands: Any, machine: Machine | None = None, **params: Any
) -> tuple[Arrays, LoopResiduals]:
    loop = take_apart(costs._replace(machine=machine), params)
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
    results, saved, activations = loop.step.forward.run(loop_consts, init, loop_xs, params)
    read = {loop.split.rest_constants[s.constant] for s in loop.step.forward.body.sites}
    read |= {s.constant for s in loop.hoisted_sites}
    constants = [c if i in read else None for i, c in enumerate(consts)]
    residuals = LoopResiduals(
        pull_once, pull_parallel, hoisted_activations, saved, activations, constants, loop
    )
    return results, residuals


def _backward(
    residuals: LoopResiduals, cotangents: Arrays, needs: Any, *, machine: Machine | None = None, **params: Any
) -> Arrays:
    loop, step, cut = residuals.loop, residuals.loop.step, residuals.loop.split
    body = step.forward.body
    found = step.pull(residuals.saved, list(cotangents), params)
    loop_constants = [residuals.constants[i] for i in cut.rest_constants]
    deferred = contributions(body.jaxpr, body.sites, found.sites, residuals.activations, loop_constants)
    x_count = len(cut.parallel.invars) - len(residuals.constants)
    xs = [*cut.parallel.invars[len(residuals.constants) :], *cut.parallel.outvars]
    x_cts = [_zero(v.aval, params["length"]) for v in xs]
    for i, ct in zip(cut.rest_scanned, found.scanned, strict=True):
        x_cts[i] = x_cts[i] if ct is None else ct
    const_cts, raw_x_cts, site_cts = residuals.pull_parallel(x_cts[x_count:])
    hoisted = contributions(
        cut.parallel, loop.hoisted_sites, site_cts, residuals.hoisted_activations, residuals.constants
    )
    terms = [[ct, hoisted.get(i)] for i, ct in enumerate(const_cts)]
    for place, i in enumerate(cut.rest_constants):
        terms[i] += [found.constants[place], deferred.get(place)]
    (outer_consts,) = residuals.pull_once([_added(each) for each in terms])
    outer_xs = [_added(pair) for pair in zip(x_cts[:x_count], raw_x_cts, strict=True)]
    everything = [*outer_consts, *found.init, *outer_xs][len(loop.closed_over) :]
    return [
        ct if need and ct is not None and _jax.is_differentiable(jax.typeof(ct)) else None
        for ct, need in zip(everything, needs, strict=True)
    ]


def _added(terms: Sequence[Any]) -> Any:
    """The sum of cotangents, of which None is zero; the first says of what type."""
    first, *rest = [ct for ct in terms if ct is not None]
    return sum(rest, start=first) if _jax.is_differentiable(jax.typeof(first)) else first


def _zero(aval: Any, length: int | None = None) -> Any:
    """The cotangent of what no result depends on."""
    shape = aval.shape if length is None else (length, *aval.shape)
    if not _jax.is_differentiable(aval):
        return _jax.zero_tangent(jax.ShapeDtypeStruct(shape, aval.dtype))
    return jax.numpy.zeros(shape, aval.dtype)


def _value(*operands: Any, machine: Machine | None = None, **params: Any) -> Arrays:
    """The loop as it stands."""
    consts, carries = _jax.scan_counts(params)
    constants, init, xs = operands[:consts], operands[consts : consts + carries], operands[consts + carries :]
    body = params["jaxpr"]

    def step(carry: Sequence[Any], x: Sequence[Any]) -> tuple[Arrays, Arrays]:
        results = _jax.evaluate(_jax.open_jaxpr(body), _jax.constants(body), [*constants, *carry, *x])
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


def _applies(costs: Costs, *operands: Any, machine: Machine | None = None, **params: Any) -> bool | str:
    if params["length"] == 0:
        return "the loop has no steps"
    if any(e.primitive.name == "while" for e in _jax.equations(_jax.open_jaxpr(params["jaxpr"]))):
        return "the body holds a `while`, which has no reverse mode"
    # A sum is worth nothing by itself: what is stacked for it is as large as what a product needs.
    products = _of_constants(params, PRODUCTS if costs.guards else PRODUCTS | SUMS)
    if not products:
        return "no product of the loop has a constant operand"
    if not any(
        worth_deferring(eqn, operand, costs) or worth_hoisting(eqn, costs) for eqn, operand in products
    ):
        return "its constants are small against one step's products: taking these out of the loop costs more"
    return True


def _claims(costs: Costs, *, machine: Machine | None = None, **params: Any) -> list[Any]:
    """Products whose weight gradient is to leave the loop: a rule of their own would hide them.

    Not convolutions, whose own rules know better forms of that gradient.
    """
    return [
        eqn
        for eqn, operand in _of_constants(params, frozenset({"dot_general"}))
        if worth_deferring(eqn, operand, costs) or worth_hoisting(eqn, costs)
    ]


def _of_constants(params: dict[str, Any], operators: frozenset[str]) -> list[tuple[Any, int]]:
    body, (consts, _) = _jax.open_jaxpr(params["jaxpr"]), _jax.scan_counts(params)
    return list(with_constant_operand(body, body.invars[:consts], operators))


def rule(costs: Costs = MEASURED) -> Rule:
    """The rule of a loop under a cost model."""
    return Rule(
        partial(_forward, costs),
        _backward,
        platforms=frozenset(PLATFORMS),
        applies=partial(_applies, costs),
        claims=partial(_claims, costs),
        value=_value,
        sized=True,
        ways=_ways if costs is MEASURED else None,
    )


@functools.cache
def _ways() -> dict[str, Rule]:
    return {
        "nothing before the loop": rule(MEASURED._replace(hoists=math.inf)),
        "all products before the loop": rule(MEASURED._replace(hoists=0)),
        "all products out of the loop": rule(ALWAYS),
    }


RULES: dict[OperatorKey, Rule] = {"scan": rule()}
