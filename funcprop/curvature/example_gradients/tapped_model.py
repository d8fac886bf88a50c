"""A model that takes perturbations at its taps and returns the activations there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax

from funcprop import _jax
from funcprop.curvature.example_gradients.taps import Tap, TapPlan
from funcprop.program.facts import CHECKPOINTS
from funcprop.program.layer_calls import boundary_p

Arrays = list[Any]
Numbered = dict[int, Any]


def run(
    plan: TapPlan, taps: Sequence[Tap], args: Sequence[Any], deltas: Mapping[int, Any]
) -> tuple[Arrays, Numbered]:
    """The results of the plan's jaxpr for one example, and each tap's other operand.

    `deltas` are the perturbations of its taps. Inside a loop, both have a leading axis for the iterations.
    """
    jaxpr = plan.jaxpr
    values: dict[Any, Any] = dict(zip(jaxpr.invars, args, strict=True))
    perturbed: dict[Any, Any] = {}
    activations: Numbered = {}

    def read(position: int, k: int, atom: Any) -> Any:
        if isinstance(atom, _jax.Literal):
            return atom.val
        number = plan.perturbed.get((position, k))
        if number is None:
            return values[atom]
        if atom not in perturbed:
            perturbed[atom] = values[atom] + deltas[number]
        return perturbed[atom]

    for i, eqn in enumerate(jaxpr.eqns):
        operands = [read(i, k, atom) for k, atom in enumerate(eqn.invars)]
        if i in plan.inner:
            results, found = _enter(eqn, plan.inner[i], taps, operands, deltas)
            activations.update(found)
        elif eqn.primitive is boundary_p:
            # What is left of a layer that is entered.
            results = operands[eqn.params["call"].tree.num_leaves :]
        else:
            results = _jax.one_equation(eqn)(*operands)
        for n in plan.taps.get(i, ()):
            results = [results[0] + deltas[n]]
            if (partner := taps[n].partner) is not None:
                activations[n] = operands[partner]
        values.update(zip(eqn.outvars, results, strict=True))
    end = len(jaxpr.eqns)
    return [read(end, k, atom) for k, atom in enumerate(jaxpr.outvars)], activations


def _enter(
    eqn: Any, plan: TapPlan, taps: Sequence[Tap], operands: Arrays, deltas: Mapping[int, Any]
) -> tuple[Arrays, Numbered]:
    mine = {n: deltas[n] for n in plan.numbers()}
    with _jax.context_of(eqn):
        if eqn.primitive.name == "scan":
            return _loop(eqn, plan, taps, operands, mine)
        if eqn.primitive.name in CHECKPOINTS:

            def body(operands: Arrays, mine: Numbered) -> tuple[Arrays, Numbered]:
                return run(plan, taps, operands, mine)

            kept = {key: eqn.params[key] for key in ("prevent_cse", "policy")}
            return jax.checkpoint(body, **kept)(operands, mine)
        return run(plan, taps, operands, mine)


def _loop(
    eqn: Any, plan: TapPlan, taps: Sequence[Tap], operands: Arrays, deltas: Numbered
) -> tuple[Arrays, Numbered]:
    params = eqn.params
    consts, carries = _jax.scan_counts(params)
    closed_over, init, xs = (
        operands[:consts],
        operands[consts : consts + carries],
        operands[consts + carries :],
    )

    def step(carry: Arrays, sliced: tuple[Arrays, Numbered]) -> tuple[Arrays, tuple[Arrays, Numbered]]:
        x, mine = sliced
        results, activations = run(plan, taps, [*closed_over, *carry, *x], mine)
        return results[:carries], (results[carries:], activations)

    final, (stacked, activations) = jax.lax.scan(
        step,
        list(init),
        (list(xs), deltas),
        length=params["length"],
        reverse=params["reverse"],
        unroll=params["unroll"],
    )
    return [*final, *stacked], activations
