"""One step of a loop, forwards and backwards, with control over what is stacked between the two.

*Forwards*, JAX's `vjp` of the body is traced, and of its residuals only what `stacking` chooses leaves the
loop. *Backwards*, the pullback is traced on these; it returns the cotangents of the carry, of the scanned
inputs, of the constants that it must add up, and of the sites. Equal results are stacked once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from funcprop import _jax
from funcprop.program.facts import PRODUCTS
from funcprop.program.sizes import nbytes
from funcprop.rules.primitives.loop_bodies import Site, depths, run_perturbed, split, with_arranged_products
from funcprop.rules.primitives.stacking import merged, to_stack

Arrays = list[Any]


class LoopSaved(NamedTuple):
    """What the backward loop reads: values that do not change, and arrays over all steps."""

    fixed: Arrays
    stacked: Arrays


class LoopCotangents(NamedTuple):
    """Of the initial carry, the constants used outside of sites, the scanned inputs and the sites.

    The first three have an entry for every input, None for one without derivative or, among the constants,
    one that only sites read.
    """

    init: Arrays
    constants: Arrays
    scanned: Arrays
    sites: Arrays


def _smooth(atoms: Sequence[Any]) -> list[int]:
    return [i for i, v in enumerate(atoms) if _jax.is_differentiable(v.aval)]


def _traced(fun: Any, avals: Sequence[Any]) -> tuple[Any, Arrays]:
    """The jaxpr of `fun` with its constants as leading inputs and equal equations merged; these constants."""
    opened, constants = _jax.with_constants_as_inputs(jax.make_jaxpr(fun)(*avals))
    return merged(opened), constants


class LoopStep:
    """The body `rest` of a loop with `consts` constants and `carries` carries, and its pullback.

    To be made while tracing: names of mapped axes must be bound.
    """

    def __init__(self, rest: Any, consts: int, carries: int, sites: Sequence[Site], turn: bool) -> None:
        self.rest, self.consts, self.carries, self.sites = rest, consts, carries, list(sites)
        inputs = list(rest.invars)
        self.const_vars = inputs[:consts]
        self.carry_vars, self.x_vars = inputs[consts : consts + carries], inputs[consts + carries :]
        self.loose = self._loose()
        self.smooth_carry, self.smooth_x = _smooth(self.carry_vars), _smooth(self.x_vars)
        self.smooth_out = _smooth(rest.outvars)
        self.smooth_y = [i - carries for i in self.smooth_out if i >= carries]
        self._trace_forward()
        self._trace_backward(turn)

    def _loose(self) -> list[int]:
        """Constants with a derivative that are read elsewhere than at sites."""
        at = {(site.position, site.operand) for site in self.sites}
        read = {
            v
            for position, eqn in enumerate(self.rest.eqns)
            for k, v in enumerate(eqn.invars)
            if (position, k) not in at and not isinstance(v, _jax.Literal)
        } | set(_jax.variables(self.rest.outvars))
        return [i for i in _smooth(self.const_vars) if self.const_vars[i] in read]

    def stacked_bytes(self, hoisted: int) -> tuple[int, int]:
        """What one step stacks, if that many of the scanned inputs, the last ones, were made for the loop.

        Residuals; and what the backward adds: cotangents of sites and of those inputs, and the transposed
        copies of activations that the contractions after the loop are made with.
        """
        first = len(self.x_vars) - hoisted
        made = [v for i, v in zip(self.smooth_x, self.back_x, strict=True) if i >= first]
        returned = [v for v in dict.fromkeys([*self.back_sites, *made]) if v in set(self.back_stacked)]
        copies = dict.fromkeys(_jax.variables(self.activations))
        return sum(map(nbytes, self.to_stack)), sum(map(nbytes, [*returned, *copies]))

    # --- forwards -----------------------------------------------------------------------------

    def _trace_forward(self) -> None:
        pulls: list[Any] = []
        results = [self.rest.eqns[site.position].outvars[0].aval for site in self.sites]

        def forward(*args: Any) -> Arrays:
            consts, rest = list(args[: self.consts]), list(args[self.consts :])
            carry, xs = rest[: self.carries], rest[self.carries :]

            def differentiated(loose: Arrays, smooth_carry: Arrays, smooth_x: Arrays, deltas: Arrays) -> Any:
                full = [
                    *_replaced(consts, self.loose, loose),
                    *_replaced(carry, self.smooth_carry, smooth_carry),
                    *_replaced(xs, self.smooth_x, smooth_x),
                ]
                outputs, activations = run_perturbed(self.rest, self.sites, full, consts, deltas)
                outputs = [_full(y, v.aval) for y, v in zip(outputs, self.rest.outvars, strict=True)]
                return [outputs[i] for i in self.smooth_out], (outputs, activations)

            _, pull, (outputs, activations) = jax.vjp(
                differentiated,
                [consts[i] for i in self.loose],
                [carry[i] for i in self.smooth_carry],
                [xs[i] for i in self.smooth_x],
                [_jax.zeros_like_aval(aval) for aval in results],
                has_aux=True,
            )
            leaves, tree = jax.tree.flatten(pull)
            pulls.append(tree)
            return [*outputs, *activations, *leaves]

        jaxpr, self.extra = _traced(forward, [v.aval for v in self.rest.invars])
        self.pull_tree = pulls[-1]
        count = len(self.rest.outvars)
        products = [s for s in self.sites if self.rest.eqns[s.position].primitive.name in PRODUCTS]
        outs = list(jaxpr.outvars[:count])
        self.activations = list(jaxpr.outvars[count : count + len(products)])
        self.leaves = list(jaxpr.outvars[count + len(products) :])

        consts = len(self.extra) + self.consts
        depth = depths(jaxpr, consts, self.carries)
        self.x_inputs = list(jaxpr.invars[consts + self.carries :])
        self.y_position = {
            v: i for i, v in reversed(list(enumerate(variables_or_none(outs[self.carries :]))))
        }
        self.y_position.pop(None, None)
        constant = {v for v, level in depth.items() if level == 0}
        carry_in = jaxpr.invars[consts : consts + self.carries]
        # A carry that is also stacked as a result is known one step later: h_{t−1} is the last step's h_t.
        self.shifted = {
            v: (i, self.y_position[out])
            for i, (v, out) in enumerate(zip(carry_in, variables_or_none(outs[: self.carries]), strict=True))
            if out in self.y_position
        }
        free = constant | set(self.x_inputs) | set(self.y_position) | set(self.shifted)
        wanted = list(dict.fromkeys([*_jax.variables(self.leaves), *_jax.variables(self.activations)]))
        self.to_stack = to_stack(jaxpr, wanted, _jax.variables(self.activations), free)
        given = free | set(self.to_stack)
        self.again = _jax.needed_equations(jaxpr.eqns, self.leaves, given)
        read = [
            *_jax.free_variables(self.again),
            *_jax.variables(self.leaves),
            *_jax.variables(self.activations),
        ]
        made_again = {v for eqn in self.again for v in eqn.outvars}
        read = list(dict.fromkeys(v for v in read if v not in made_again))
        self.fixed = [v for v in read if depth[v] == 0]
        self.per_step = [v for v in read if depth[v] > 0]
        # What autodiff would stack for the same body.
        self.autodiff_bytes = sum(nbytes(v) for v in wanted if depth[v] > 0 and v not in self.x_inputs)
        cut = split(
            _jax.with_results(jaxpr, [*outs, *self.to_stack]),
            consts,
            self.carries,
            hoists=lambda eqn: False,
            also=self.fixed,
        )
        self.forward_split = cut
        self.forward_inputs = list(jaxpr.invars[:consts])

    def run(
        self, consts: Arrays, init: Arrays, xs: Arrays, params: dict[str, Any]
    ) -> tuple[Arrays, LoopSaved, Arrays]:
        """The loop: its results, what the backward loop reads, and the activations of product sites."""
        cut = self.forward_split
        consts = [*self.extra, *consts]
        made = _jax.evaluate(cut.once, (), consts)
        everything = [*consts, *made]
        loop_consts = [everything[i] for i in cut.rest_constants]
        loop_xs = [xs[i] for i in cut.rest_scanned]
        count = len(self.rest.outvars)

        def step(carry: Arrays, x: Arrays) -> tuple[Arrays, tuple[Arrays, Arrays]]:
            results = _jax.evaluate(cut.rest, (), [*loop_consts, *carry, *x])
            return results[: self.carries], (results[self.carries : count], results[count:])

        final, (ys, stacked) = lax.scan(
            step, init, loop_xs, length=params["length"], reverse=params["reverse"], unroll=params["unroll"]
        )
        constants = dict(zip([*self.forward_inputs, *cut.once.outvars], everything, strict=True))
        arrays = dict(zip(self.to_stack, stacked, strict=True))
        arrays.update((v, ys[i]) for v, i in self.y_position.items())
        arrays.update((v, _shifted(init[i], ys[j], params["reverse"])) for v, (i, j) in self.shifted.items())
        arrays.update(zip(self.x_inputs, xs, strict=True))
        saved = LoopSaved([constants[v] for v in self.fixed], [arrays[v] for v in self.per_step])
        return [*final, *ys], saved, [arrays[v] for v in self.activations]

    # --- backwards ----------------------------------------------------------------------------

    def _trace_backward(self, turn: bool) -> None:
        fixed, per_step = len(self.fixed), len(self.per_step)
        carry_avals = [self.carry_vars[i].aval.to_tangent_aval() for i in self.smooth_carry]
        y_avals = [self.rest.outvars[self.carries + i].aval.to_tangent_aval() for i in self.smooth_y]
        again = _jax.jaxpr_of(
            self.again,
            [*self.fixed, *self.per_step],
            list(dict.fromkeys(_jax.variables(self.leaves))),
            "again",
        )

        def backward(*args: Any) -> Arrays:
            given, rest = list(args[:fixed]), list(args[fixed:])
            carry_cts, rest = rest[: len(carry_avals)], rest[len(carry_avals) :]
            given += rest[:per_step]
            found = dict(zip(again.outvars, _jax.evaluate(again, (), given), strict=True))
            leaves = [v.val if isinstance(v, _jax.Literal) else found[v] for v in self.leaves]
            loose, init, xs, sites = jax.tree.unflatten(self.pull_tree, leaves)(
                [*carry_cts, *rest[per_step:]]
            )
            return [*init, *loose, *xs, *sites]

        avals = [
            *(v.aval for v in self.fixed),
            *carry_avals,
            *(v.aval for v in self.per_step),
            *y_avals,
        ]
        jaxpr, self.back_extra = _traced(backward, avals)
        consts = len(self.back_extra) + fixed
        arranged = with_arranged_products(jaxpr, consts, len(carry_avals), turn)
        if arranged is not None:
            opened, more = _jax.with_constants_as_inputs(arranged)
            jaxpr, self.back_extra = merged(opened), [*more, *self.back_extra]
        consts, carries = len(self.back_extra) + fixed, len(carry_avals)
        depth = depths(jaxpr, consts, carries)
        outs = list(jaxpr.outvars)
        self.back_init = outs[:carries]
        self.back_loose = outs[carries : carries + len(self.loose)]
        self.back_x = outs[carries + len(self.loose) :][: len(self.smooth_x)]
        self.back_sites = outs[carries + len(self.loose) + len(self.smooth_x) :]
        self.back_inputs = list(jaxpr.invars[consts + carries :])

        def varies(atom: Any) -> bool:
            return not isinstance(atom, _jax.Literal) and depth[atom] > 0

        given = set(self.back_inputs)
        self.added = list(dict.fromkeys(v for v in self.back_loose if varies(v)))
        results = [*self.back_x, *self.back_sites]
        self.back_stacked = list(dict.fromkeys(v for v in results if varies(v) and v not in given))
        self.varies = varies
        self.back_split = split(
            _jax.with_results(jaxpr, [*self.back_init, *self.added, *self.back_stacked]),
            consts,
            carries,
            hoists=lambda eqn: False,
            also=[v for v in outs if not isinstance(v, _jax.Literal) and depth[v] == 0],
        )
        self.back_constants = list(jaxpr.invars[:consts])
        self.turned_bytes = sum(nbytes(v) for v in self.back_split.once.outvars)

    def pull(self, saved: LoopSaved, cotangents: Arrays, params: dict[str, Any]) -> LoopCotangents:
        """The reversed loop: cotangents of everything from those of the results."""
        cut, length = self.back_split, params["length"]
        consts = [*self.back_extra, *saved.fixed]
        everything = [*consts, *_jax.evaluate(cut.once, (), consts)]
        loop_consts = [everything[i] for i in cut.rest_constants]
        scanned = [*saved.stacked, *(cotangents[self.carries + i] for i in self.smooth_y)]
        loop_xs = [scanned[i] for i in cut.rest_scanned]
        carries = len(self.smooth_carry)
        init_cts = [cotangents[i] for i in self.smooth_carry]
        zeros = [_jax.zeros_like_aval(v.aval) for v in self.added]

        def step(carry: tuple[Arrays, Arrays], x: Arrays) -> tuple[tuple[Arrays, Arrays], Arrays]:
            cts, total = carry
            results = _jax.evaluate(cut.rest, (), [*loop_consts, *cts, *x])
            moved = [_full(y, v.aval) for y, v in zip(results[:carries], self.back_init, strict=True)]
            terms = results[carries : carries + len(total)]
            added = [a + b for a, b in zip(total, terms, strict=True)]
            return (moved, added), results[carries + len(total) :]

        (init, totals), stacked = lax.scan(
            step,
            (init_cts, zeros),
            loop_xs,
            length=length,
            reverse=not params["reverse"],
            unroll=params["unroll"],
        )
        values = dict(zip([*self.back_constants, *cut.once.outvars], everything, strict=True))
        values.update(zip(self.back_inputs, scanned, strict=True))
        values.update(zip(self.back_stacked, stacked, strict=True))
        sums = dict(zip(self.added, totals, strict=True))

        def over_time(atom: Any) -> Any:
            """A result for all steps; one that is the same at each of them was not stacked."""
            if self.varies(atom):
                return values[atom]
            value = atom.val if isinstance(atom, _jax.Literal) else values[atom]
            return jnp.broadcast_to(jnp.asarray(value, atom.aval.dtype), (length, *atom.aval.shape))

        def summed(atom: Any) -> Any:
            if self.varies(atom):
                return sums[atom]
            value = atom.val if isinstance(atom, _jax.Literal) else values[atom]
            return jnp.broadcast_to(jnp.asarray(value * length, atom.aval.dtype), atom.aval.shape)

        return LoopCotangents(
            _placed(init, self.smooth_carry, self.carries),
            _placed([summed(v) for v in self.back_loose], self.loose, self.consts),
            _placed([over_time(v) for v in self.back_x], self.smooth_x, len(self.x_vars)),
            [over_time(v) for v in self.back_sites],
        )


def variables_or_none(atoms: Sequence[Any]) -> list[Any]:
    """The atoms, None in place of a literal."""
    return [None if isinstance(v, _jax.Literal) else v for v in atoms]


def _shifted(first: Any, later: Any, reverse: bool) -> Any:
    """The carry at the start of every step, from its first value and those after each step."""
    parts = [later[1:], first[None]] if reverse else [first[None], later[:-1]]
    return jnp.concatenate(parts)


def _replaced(values: Arrays, which: Sequence[int], by: Sequence[Any]) -> Arrays:
    full = list(values)
    for i, value in zip(which, by, strict=True):
        full[i] = value
    return full


def _placed(values: Sequence[Any], which: Sequence[int], count: int) -> Arrays:
    return _replaced([None] * count, which, values)


def _full(value: Any, aval: Any) -> Any:
    """A literal result is a plain number in the jaxpr."""
    if isinstance(value, jax.Array):
        return value
    return jnp.broadcast_to(jnp.asarray(value, aval.dtype), aval.shape)
