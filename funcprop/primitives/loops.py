"""`scan`: what need not be in the loop is taken out of it, forwards and backwards.

    carry, y_t = body(constants, carry, x_t)        for t = 1 … T

*Forwards*, what depends on the constants alone runs once, and products of `x_t` with constants (the input
projections of a recurrent network) run for all steps at once, before the loop.

*Backwards*, a product `z_t = a_t W` with a constant `W` contributes `W̄ = Σ_t a_tᵀ z̄_t`. Autodiff adds up `T`
products of parameter size inside the reversed loop. Here the loop hands back the cotangents `z̄_t`, and ONE
product follows it, over time and batch together. The same holds for a bias, whose sum follows the loop.

How: in the body, `z = a W` becomes `z = perturbed(a · W°, δ_t)`, where `W°` is not differentiated and `δ_t`
is a scanned input that is zero: it has no value and only receives the cotangent of `z_t`. The rest is JAX's
own differentiation of the loop.

Source: Appleyard et al., "Optimizing performance of recurrent neural networks on GPUs", 2016, for the batched
projections and weight gradients of an LSTM; here for any loop.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from funcprop import _compat
from funcprop.primitives.stacking import without_repeated_stacking
from funcprop.registry import OperatorKey, Rule

Arrays = list[Any]

_PRODUCTS = frozenset({"dot_general", "conv_general_dilated"})
# Cheap operators that follow a hoisted product out of the loop.
_FOLLOWERS = frozenset({"add", "sub", "reshape", "convert_element_type", "broadcast_in_dim"})


class LoopResiduals(NamedTuple):
    """JAX's pullbacks of what runs before the loop and of the loop, and the operands of its products."""

    pull_before: Any
    pull_loop: Any
    activations: Arrays
    constants: Arrays


# --- what can leave the loop ------------------------------------------------------------------


@dataclass(frozen=True)
class Split:
    """A loop's body in three: `once` (constants alone), `parallel` (scanned inputs), `rest` (the loop)."""

    once: Any
    parallel: Any
    rest: Any
    rest_constants: list[int]
    rest_scanned: list[int]


def split(jaxpr: Any, consts: int, carries: int) -> Split:
    """Cut a body by what its equations depend on.

    `once` maps the constants to further constants; `parallel` maps all constants and one step's inputs to
    further inputs; `rest` takes the constants and inputs at the given positions, and the carry.
    """
    const_vars = list(jaxpr.invars[:consts])
    carry_vars = list(jaxpr.invars[consts : consts + carries])
    x_vars = list(jaxpr.invars[consts + carries :])
    depth = {**dict.fromkeys(const_vars, 0), **dict.fromkeys(x_vars, 1), **dict.fromkeys(carry_vars, 2)}

    def depth_of(eqn: Any) -> int:
        # Random bits of a batch are not the batch of the random bits (`rng_bit_generator`).
        if eqn.effects or eqn.primitive.name.startswith(("random_", "rng_")):
            return 2
        return max((depth[v] for v in eqn.invars if not isinstance(v, _compat.Literal)), default=0)

    for eqn in jaxpr.eqns:
        depth.update(dict.fromkeys(eqn.outvars, depth_of(eqn)))
    levels = [depth_of(eqn) for eqn in jaxpr.eqns]
    hoisted = _hoisted(jaxpr.eqns, levels, depth)
    once = [e for e, level in zip(jaxpr.eqns, levels, strict=True) if level == 0]
    parallel = [e for i, e in enumerate(jaxpr.eqns) if i in hoisted]
    rest = [e for i, e in enumerate(jaxpr.eqns) if levels[i] > 0 and i not in hoisted]

    results = {v for v in jaxpr.outvars if not isinstance(v, _compat.Literal)}
    read_by_rest = set(_compat.free_variables(rest)) | results
    read_later = set(_compat.free_variables(parallel)) | read_by_rest
    once_out = [v for e in once for v in e.outvars if v in read_later]
    parallel_out = [v for e in parallel for v in e.outvars if v in read_by_rest]
    all_consts, all_xs = const_vars + once_out, x_vars + parallel_out
    used_consts = [i for i, v in enumerate(all_consts) if v in read_by_rest]
    used_xs = [i for i, v in enumerate(all_xs) if v in read_by_rest]
    rest_in = [all_consts[i] for i in used_consts] + carry_vars + [all_xs[i] for i in used_xs]
    return Split(
        _compat.jaxpr_of(once, const_vars, once_out, "once"),
        _compat.jaxpr_of(parallel, [*all_consts, *x_vars], parallel_out, "parallel"),
        _compat.jaxpr_of(rest, rest_in, jaxpr.outvars, "rest"),
        used_consts,
        used_xs,
    )


def _hoisted(eqns: Sequence[Any], levels: Sequence[int], depth: dict[Any, int]) -> set[int]:
    """Products of scanned inputs with constants, what they need, and cheap operators on their results."""
    maker = {v: i for i, e in enumerate(eqns) for v in e.outvars}
    taken: set[int] = set()

    def take(i: int) -> None:
        if i in taken or levels[i] != 1:
            return
        taken.add(i)
        for v in eqns[i].invars:
            if not isinstance(v, _compat.Literal) and v in maker:
                take(maker[v])

    for i, eqn in enumerate(eqns):
        operands = [v for v in eqn.invars if not isinstance(v, _compat.Literal)]
        if levels[i] != 1:
            continue
        projects = eqn.primitive.name in _PRODUCTS and any(depth[v] == 0 for v in operands)
        follows = eqn.primitive.name in _FOLLOWERS and any(maker.get(v) in taken for v in operands)
        if projects or follows:
            take(i)
    return taken


# --- perturbed products -----------------------------------------------------------------------


@jax.custom_jvp
def perturbed(z: Any, perturbation: Any) -> Any:
    """`z`; the perturbation is zero and matters for derivatives alone."""
    return z


@perturbed.defjvp
def _perturbed_jvp(primals: Any, tangents: Any) -> tuple[Any, Any]:
    return primals[0], tangents[0] + tangents[1]


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
        if eqn.primitive.name not in _PRODUCTS | {"add", "sub"}:
            continue
        constant = [k for k, v in enumerate(eqn.invars) if not isinstance(v, _compat.Literal) and v in index]
        if len(constant) == 1:
            (operand,) = constant
            var = eqn.invars[operand]
            if _compat.is_differentiable(var.aval) and not isinstance(
                eqn.invars[1 - operand], _compat.Literal
            ):
                found.append(Site(position, operand, index[var]))
    return found


def _run_perturbed(
    jaxpr: Any, places: Sequence[Site], args: Arrays, frozen: Arrays, perturbations: Arrays
) -> tuple[Arrays, Arrays]:
    """Evaluate a body with perturbed sites; also the activation that each product's constant meets.

    `frozen` are the constants as the sites see them: of equal value, but not differentiated with the others.
    (Not `stop_gradient`: the pullback depends on them, and so does the second derivative.)
    """
    values = dict(zip(jaxpr.invars, args, strict=True))
    at = {site.position: (site, delta) for site, delta in zip(places, perturbations, strict=True)}
    activations = []
    for position, eqn in enumerate(jaxpr.eqns):
        operands = [v.val if isinstance(v, _compat.Literal) else values[v] for v in eqn.invars]
        if position in at:
            site, delta = at[position]
            operands[site.operand] = frozen[site.constant]
            (z,) = _compat.one_equation(eqn)(*operands)
            values[eqn.outvars[0]] = perturbed(z, delta)
            if eqn.primitive.name in _PRODUCTS:
                activations.append(operands[1 - site.operand])
        else:
            values.update(zip(eqn.outvars, _compat.one_equation(eqn)(*operands), strict=True))
    outputs = [v.val if isinstance(v, _compat.Literal) else values[v] for v in jaxpr.outvars]
    return outputs, activations


# --- the rule ---------------------------------------------------------------------------------


class _Loop:
    """A scan equation, taken apart."""

    def __init__(self, params: dict[str, Any]) -> None:
        body = _compat.inlined(params["jaxpr"])
        opened, self.closed_over = _compat.with_constants_as_inputs(body)
        consts, self.carries = _compat.scan_counts(params)
        self.consts = consts + len(self.closed_over)
        self.params = params
        self.split = split(opened, self.consts, self.carries)
        self.sites = sites(self.split.rest, len(self.split.rest_constants))

    def taken_apart(self, operands: Sequence[Any]) -> tuple[Arrays, Arrays, Arrays]:
        """Constants (with those that the body closes over), initial carry, scanned inputs."""
        everything = [*self.closed_over, *operands]
        carry_end = self.consts + self.carries
        return everything[: self.consts], everything[self.consts : carry_end], everything[carry_end:]

    def before(self, consts: Arrays, xs: Arrays) -> tuple[Arrays, Arrays]:
        """What runs outside of the loop: the loop's own constants and scanned inputs."""
        consts = [*consts, *_compat.evaluate(self.split.once, (), consts)]
        if self.split.parallel.eqns:
            step = lambda *x: _compat.evaluate(self.split.parallel, (), [*consts, *x])  # noqa: E731
            xs = [*xs, *jax.vmap(step)(*xs)]
        return [consts[i] for i in self.split.rest_constants], [xs[i] for i in self.split.rest_scanned]

    def run(
        self, frozen: Arrays, consts: Arrays, init: Arrays, xs: Arrays, perturbations: Arrays
    ) -> tuple[Arrays, Arrays]:
        """The loop; also the stacked activations of its products with constants."""

        def step(carry: Arrays, slices: Any) -> Any:
            x, deltas = slices
            outputs, activations = _run_perturbed(
                self.split.rest, self.sites, [*consts, *carry, *x], frozen, deltas
            )
            return outputs[: self.carries], (outputs[self.carries :], activations)

        final, (ys, activations) = lax.scan(
            step,
            init,
            (xs, perturbations),
            length=self.params["length"],
            reverse=self.params["reverse"],
            unroll=self.params["unroll"],
        )
        return [*final, *ys], activations

    def perturbations(self) -> Arrays:
        """Zeros for every site and step."""
        results = [self.split.rest.eqns[site.position].outvars[0].aval for site in self.sites]
        return [jnp.zeros((self.params["length"], *aval.shape), aval.dtype) for aval in results]

    def constant_cotangents(self, cotangents: Arrays, activations: Arrays, consts: Arrays) -> dict[int, Any]:
        """For each constant, what its sites contribute: one contraction over time for each."""
        total: dict[int, Any] = {}
        remaining = iter(activations)
        for site, g in zip(self.sites, cotangents, strict=True):
            eqn = self.split.rest.eqns[site.position]
            w = consts[site.constant]
            if eqn.primitive.name in _PRODUCTS:
                contribution = _contraction(eqn, site.operand, next(remaining), g, w)
            else:
                sign = -1 if eqn.primitive.name == "sub" and site.operand == 1 else 1
                contribution = sign * _sum_to(g, w.shape)
            total[site.constant] = (
                total[site.constant] + contribution if site.constant in total else contribution
            )
        return total


def _contraction(eqn: Any, operand: int, activations: Any, g: Any, w: Any) -> Any:
    """`Σ_t (∂z_t/∂W)ᵀ z̄_t` of a product over all steps."""
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
    call = _compat.one_equation(eqn)

    def all_steps(w: Any) -> Any:
        return jax.vmap(lambda a: call(*((a, w) if operand == 1 else (w, a)))[0])(activations)

    return jax.linear_transpose(all_steps, w)(g)[0]


def _sum_to(g: Any, shape: tuple[int, ...]) -> Any:
    """The sum over time and over the axes along which an operand of this shape was broadcast."""
    if shape == ():
        return g.sum()
    stretched = [i + 1 for i, (n, m) in enumerate(zip(shape, g.shape[1:], strict=True)) if n != m]
    return g.sum((0, *stretched)).reshape(shape)


def _forward(*operands: Any, **params: Any) -> tuple[Arrays, LoopResiduals]:
    loop = _Loop(params)
    consts, init, xs = loop.taken_apart(operands)
    (loop_consts, loop_xs), pull_before = jax.vjp(loop.before, consts, xs)
    run = partial(loop.run, loop_consts)
    arguments = loop_consts, init, loop_xs, loop.perturbations()
    results, pull_loop, activations = jax.vjp(run, *arguments, has_aux=True)
    return results, LoopResiduals(pull_before, pull_loop, activations, loop_consts)


def _backward(residuals: LoopResiduals, cotangents: Arrays, needs: Any, **params: Any) -> Arrays:
    loop = _Loop(params)
    pull = without_repeated_stacking(lambda pullback, cts: pullback(cts))
    const_cts, init_cts, x_cts, site_cts = pull(residuals.pull_loop, list(cotangents))
    added = loop.constant_cotangents(site_cts, residuals.activations, residuals.constants)
    const_cts = [ct + added[i] if i in added else ct for i, ct in enumerate(const_cts)]
    outer_consts, outer_xs = residuals.pull_before((const_cts, x_cts))
    everything = [*outer_consts, *init_cts, *outer_xs][len(loop.closed_over) :]
    return [
        ct if need and _compat.is_differentiable(jax.typeof(ct)) else None
        for ct, need in zip(everything, needs, strict=True)
    ]


def _applies(*operands: Any, **params: Any) -> bool | str:
    if params["length"] == 0:
        return "the loop has no steps"
    loop = _Loop(params)
    if not loop.sites and not loop.split.parallel.eqns:
        return "no product or sum of the loop has a constant operand"
    return True


RULES: dict[OperatorKey, Rule] = {
    # In no default set yet: taking products out of a loop can hold far more than the loop did.
    "scan": Rule(_forward, _backward, platforms=frozenset(), applies=_applies)
}
