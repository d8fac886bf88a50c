"""Where a loop's body reads a constant in a product or a sum, and the constant's cotangent after the loop.

In the loop the constant is not differentiated there; the result takes a perturbation of zero, whose cotangent
is that of the result. After the loop, one contraction over all steps is the constant's cotangent.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax import lax

from funcprop import _jax
from funcprop.program.facts import PRODUCTS, SUMS
from funcprop.rules.primitives.loop_bodies import Read, evaluated

Arrays = list[Any]


class Site(NamedTuple):
    """An equation of the loop with one constant operand: its position, and which operand that is."""

    position: int
    operand: int
    constant: int


def sites(jaxpr: Any, consts: int) -> list[Site]:
    """Products and sums of the loop with one constant operand that has a derivative."""
    index = {v: i for i, v in enumerate(jaxpr.invars[:consts])}
    found = []
    for position, eqn in enumerate(jaxpr.eqns):
        if eqn.primitive.name not in PRODUCTS | SUMS:
            continue
        constant = [k for k, v in enumerate(eqn.invars) if not isinstance(v, _jax.Literal) and v in index]
        if len(constant) == 1:
            (operand,) = constant
            var = eqn.invars[operand]
            other = eqn.invars[1 - operand]
            if _jax.is_differentiable(var.aval) and not isinstance(other, _jax.Literal):
                found.append(Site(position, operand, index[var]))
    return found


@jax.custom_jvp
def perturbed(z: Any, perturbation: Any) -> Any:
    """`z`; the perturbation is zero and matters for derivatives alone."""
    return z


@perturbed.defjvp
def _perturbed_jvp(primals: Any, tangents: Any) -> tuple[Any, Any]:
    return primals[0], tangents[0] + tangents[1]


def run_perturbed(
    jaxpr: Any, places: Sequence[Site], args: Arrays, frozen: Arrays, perturbations: Arrays
) -> tuple[Arrays, Arrays]:
    """Evaluate a body with perturbed sites; also the activation that each product's constant meets.

    `frozen` are the constants as the sites see them: of equal value, but not differentiated with the others.
    (Not `stop_gradient`: the pullback depends on them, and so does the second derivative.)
    """
    at = {site.position: (site, delta) for site, delta in zip(places, perturbations, strict=True)}
    activations = []

    def shifted(i: int, read: Read) -> dict[Any, Any] | None:
        if i not in at:
            return None
        (site, delta), eqn = at[i], jaxpr.eqns[i]
        operands = list(map(read, eqn.invars))
        operands[site.operand] = frozen[site.constant]
        if eqn.primitive.name in PRODUCTS:
            activations.append(operands[1 - site.operand])
        return {eqn.outvars[0]: perturbed(*_jax.one_equation(eqn)(*operands), delta)}

    return evaluated(jaxpr, args, shifted), activations


# --- after the loop ---------------------------------------------------------------------------


def contributions(
    jaxpr: Any, places: Sequence[Site], cotangents: Arrays, activations: Arrays, consts: Arrays
) -> dict[int, Any]:
    """For each constant, what its sites contribute: one contraction over time for each."""
    total: dict[int, Any] = {}
    remaining = iter(activations)
    for site, g in zip(places, cotangents, strict=True):
        eqn = jaxpr.eqns[site.position]
        a = next(remaining) if eqn.primitive.name in PRODUCTS else None
        term = _contribution(eqn, site.operand, a, g, consts[site.constant])
        total[site.constant] = total[site.constant] + term if site.constant in total else term
    return total


def _contribution(eqn: Any, operand: int, activations: Any, g: Any, w: Any) -> Any:
    """`Σ_t (∂z_t/∂w)ᵀ z̄_t` of a site over all steps; `activations` is None at a sum."""
    if eqn.primitive.name in PRODUCTS:
        return _contraction(eqn, operand, activations, g, w)
    total = _sum_to(g, w.shape)
    return -total if eqn.primitive.name == "sub" and operand == 1 else total


def _contraction(eqn: Any, operand: int, activations: Any, g: Any, w: Any) -> Any:
    if eqn.primitive.name == "dot_general" and operand == 1:
        (lhs, rhs), batch = eqn.params["dimension_numbers"]
        kept = [i for i in range(activations.ndim - 1) if i not in lhs]
        if not any(map(len, batch)) and tuple(rhs) == tuple(range(len(rhs))) and list(lhs) == sorted(lhs):
            over_a = (0, *(i + 1 for i in kept))
            over_g = tuple(range(len(kept) + 1))
            # Activations first: the other order makes XLA's CPU backend copy a transpose.
            product = lax.dot_general(
                activations, g, ((over_a, over_g), ((), ())), precision=eqn.params["precision"]
            )
            return product.astype(w.dtype)
    call = _jax.one_equation(eqn)

    def all_steps(w: Any) -> Any:
        return jax.vmap(lambda a: call(*((a, w) if operand == 1 else (w, a)))[0])(activations)

    return jax.linear_transpose(all_steps, w)(g)[0]


def _sum_to(g: Any, shape: tuple[int, ...]) -> Any:
    """The sum over time and over the axes along which an operand of this shape was broadcast."""
    if shape == ():
        return g.sum()
    stretched = [i + 1 for i, (n, m) in enumerate(zip(shape, g.shape[1:], strict=True)) if n != m]
    return g.sum((0, *stretched)).reshape(shape)
