"""One step of a loop, forwards and backwards, with control over what is stacked between the two.

*Forwards*, JAX's `vjp` of the body is traced, and of its residuals only what `stacking` chooses leaves the
loop. *Backwards*, the pullback is traced on these; it returns the cotangents of the carry, of the scanned
inputs, of the constants that it must add up, and of the sites. Equal results are stacked once.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from funcprop import _jax
from funcprop.program.equal_equations import merged
from funcprop.program.facts import PRODUCTS
from funcprop.program.sizes import nbytes
from funcprop.rules.machine import Machine
from funcprop.rules.primitives.loop_bodies import BodySplit, depths, split, with_arranged_products
from funcprop.rules.primitives.loop_sites import Site, run_perturbed
from funcprop.rules.primitives.stacking import to_stack

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


class StackedBytes(NamedTuple):
    """Bytes of one step: residuals; results that the reversed loop reads one step later, which are copied.

    And what the backward adds: cotangents of sites and of inputs that were made for the loop, and transposed
    copies of the activations that are contracted after it, some of which are the loop's `own`.
    """

    residuals: int
    later: int
    cotangents: int
    copies: int
    own: int

    def at_once(self, hoisted: int) -> int:
        """The most at the end of the loop, of the reversed one, and after it; `hoisted` precedes the loop."""
        forward, backward = hoisted + self.residuals, self.residuals + self.later + self.cotangents
        return max(forward, backward, self.cotangents + self.copies + self.own)


def _smooth(atoms: Sequence[Any]) -> list[int]:
    return [i for i, v in enumerate(atoms) if _jax.is_differentiable(v.aval)]


def _traced(fun: Any, avals: Sequence[Any]) -> tuple[Any, Arrays]:
    """The jaxpr of `fun` with its constants as leading inputs and equal equations merged; these constants."""
    opened, constants = _jax.with_constants_as_inputs(jax.make_jaxpr(fun)(*avals))
    return merged(opened), constants


@dataclass(frozen=True, eq=False)
class StepBody:
    """The body `jaxpr` of a loop with `consts` constants and `carries` carries, and its sites.

    `smooth` are its inputs to differentiate: not constants that sites alone read.
    """

    jaxpr: Any
    consts: int
    carries: int
    sites: Sequence[Site]
    smooth: list[int]

    @classmethod
    def of(cls, jaxpr: Any, consts: int, carries: int, sites: Sequence[Site]) -> StepBody:
        """Find the inputs to differentiate of a body with these sites."""
        at = {(site.position, site.operand) for site in sites}
        read = set(_jax.variables(jaxpr.outvars))
        for position, eqn in enumerate(jaxpr.eqns):
            read.update(_jax.variables([v for k, v in enumerate(eqn.invars) if (position, k) not in at]))
        smooth = [i for i in _smooth(jaxpr.invars) if i >= consts or jaxpr.invars[i] in read]
        return cls(jaxpr, consts, carries, sites, smooth)

    def by_kind(self, values: Sequence[Any]) -> Sequence[Sequence[Any]]:
        """Split values of the inputs to differentiate: of constants, carries and scanned inputs."""
        first, end = (sum(i < n for i in self.smooth) for n in (self.consts, self.consts + self.carries))
        return values[:first], values[first:end], values[end:]

    def differentiated(self) -> tuple[Any, Arrays, Any]:
        """Trace the body with activations of its products and leaves of its pullback as further results.

        A jaxpr, its constants, which are leading inputs, and the pullback's tree.
        """
        trees: list[Any] = []

        def forward(*given: Any) -> Arrays:
            args = list(given)

            def of_smooth(smooth: Arrays, deltas: Arrays) -> Any:
                full = _replaced(args, self.smooth, smooth)
                outputs, activations = run_perturbed(self.jaxpr, self.sites, full, args, deltas)
                outputs = [_full(y, v.aval) for y, v in zip(outputs, self.jaxpr.outvars, strict=True)]
                return [outputs[i] for i in _smooth(self.jaxpr.outvars)], [*outputs, *activations]

            deltas = [_jax.zeros_like_aval(self.jaxpr.eqns[s.position].outvars[0].aval) for s in self.sites]
            _, pull, results = jax.vjp(of_smooth, [args[i] for i in self.smooth], deltas, has_aux=True)
            leaves, tree = jax.tree.flatten(pull)
            trees.append(tree)
            return [*results, *leaves]

        return *_traced(forward, [v.aval for v in self.jaxpr.invars]), trees[-1]


def _cut(jaxpr: Any, results: Sequence[Any], consts: int, carries: int, also: Sequence[Any]) -> BodySplit:
    return split(_jax.with_results(jaxpr, results), consts, carries, hoists=lambda eqn: False, also=also)


@dataclass(frozen=True, eq=False)
class ForwardStep:
    """A step that stacks what the backward needs; `extra` are its first constants.

    After the loop these are known, besides what is `stacked`: scanned inputs, results (`result_of`, by their
    places), and carries that are results one step later (`carry_of`, with the places of both). The equations
    `again` make the `leaves` of the pullback, whose tree is `pull`, of variables that are the same in all
    steps (`fixed`) and others (`per_step`). Autodiff would stack `autodiff_bytes`.
    """

    body: StepBody
    cut: BodySplit
    extra: Arrays
    scanned: list[Any]
    result_of: dict[Any, int]
    carry_of: dict[Any, tuple[int, int]]
    activations: list[Any]
    stacked: list[Any]
    pull: Any
    leaves: list[Any]
    again: list[Any]
    fixed: list[Any]
    per_step: list[Any]
    autodiff_bytes: int

    @classmethod
    def of(cls, body: StepBody) -> ForwardStep:
        """Trace the step of a body; to be called while tracing: names of mapped axes must be bound."""
        jaxpr, extra, pull = body.differentiated()
        consts, carries, count = len(extra) + body.consts, body.carries, len(body.jaxpr.outvars)
        products = sum(body.jaxpr.eqns[s.position].primitive.name in PRODUCTS for s in body.sites)
        outs, leaves = jaxpr.outvars[:count], jaxpr.outvars[count + products :]
        activations = jaxpr.outvars[count : count + products]
        carry_in, scanned = jaxpr.invars[consts : consts + carries], jaxpr.invars[consts + carries :]
        depth = depths(jaxpr, consts, carries)
        first = reversed(list(enumerate(outs[carries:])))
        result_of = {v: i for i, v in first if not isinstance(v, _jax.Literal)}
        # A carry that is also stacked as a result is known one step later: h_{t−1} is the last step's h_t.
        both = [i for i, v in enumerate(outs[:carries]) if not isinstance(v, _jax.Literal) and v in result_of]
        carry_of = {carry_in[i]: (i, result_of[outs[i]]) for i in both}
        free = {v for v, level in depth.items() if level == 0} | {*scanned, *result_of, *carry_of}
        pinned = _jax.variables(activations)
        wanted = list(dict.fromkeys([*_jax.variables(leaves), *pinned]))
        stacked = to_stack(jaxpr, wanted, pinned, free)
        again = _jax.needed_equations(jaxpr.eqns, leaves, free | set(stacked))
        made_again = {v for eqn in again for v in eqn.outvars}
        read = dict.fromkeys(v for v in [*_jax.free_variables(again), *wanted] if v not in made_again)
        fixed, per_step = [v for v in read if depth[v] == 0], [v for v in read if depth[v] > 0]
        return cls(
            body, _cut(jaxpr, [*outs, *stacked], consts, carries, fixed), extra, scanned, result_of, carry_of,
            activations, stacked, pull, leaves, again, fixed, per_step,
            autodiff_bytes=sum(nbytes(v) for v in wanted if depth[v] > 0 and v not in scanned),
        )  # fmt: skip

    def run(
        self, consts: Arrays, init: Arrays, xs: Arrays, params: dict[str, Any]
    ) -> tuple[Arrays, LoopSaved, Arrays]:
        """The loop: its results, what the backward loop reads, and the activations of product sites."""
        constants, loop_consts = self.cut.made([*self.extra, *consts])
        carries, count = self.body.carries, len(self.body.jaxpr.outvars)

        def step(carry: Arrays, x: Arrays) -> tuple[Arrays, tuple[Arrays, Arrays]]:
            results = _jax.evaluate(self.cut.rest, (), [*loop_consts, *carry, *x])
            return results[:carries], (results[carries:count], results[count:])

        final, (ys, stacked) = lax.scan(
            step, init, [xs[i] for i in self.cut.rest_scanned],
            length=params["length"], reverse=params["reverse"], unroll=params["unroll"],
        )  # fmt: skip
        arrays = dict(zip(self.stacked, stacked, strict=True))
        arrays.update((v, ys[i]) for v, i in self.result_of.items())
        arrays.update((v, _shifted(init[i], ys[j], params["reverse"])) for v, (i, j) in self.carry_of.items())
        arrays.update(zip(self.scanned, xs, strict=True))
        saved = LoopSaved([constants[v] for v in self.fixed], [arrays[v] for v in self.per_step])
        return [*final, *ys], saved, [arrays[v] for v in self.activations]


@dataclass(frozen=True, eq=False)
class LoopStep:
    """A step and its pullback, which is a step of the reversed loop; `extra` are that one's first constants.

    Of the cotangents of `inputs` and `sites`, `added` are carried as sums and `stacked` are results. What is
    in `constant` is the same in all steps, as literals are.
    """

    forward: ForwardStep
    cut: BodySplit
    extra: Arrays
    scanned: list[Any]
    inputs: list[Any]
    sites: list[Any]
    added: list[Any]
    stacked: list[Any]
    constant: frozenset[Any]

    @classmethod
    def of(cls, body: StepBody, turn: bool, machine: Machine) -> LoopStep:
        """Trace the step of a body and its pullback; `turn` and `machine` as for `with_arranged_products`."""
        forward = ForwardStep.of(body)
        fixed, per_step = forward.fixed, forward.per_step
        leaves = list(dict.fromkeys(_jax.variables(forward.leaves)))
        again = _jax.jaxpr_of(forward.again, [*fixed, *per_step], leaves, "again")

        def backward(fixed: Arrays, carry: Arrays, per_step: Arrays, ys: Arrays) -> Arrays:
            found = dict(zip(leaves, _jax.evaluate(again, (), [*fixed, *per_step]), strict=True))
            values = [v.val if isinstance(v, _jax.Literal) else found[v] for v in forward.leaves]
            cotangents, sites = jax.tree.unflatten(forward.pull, values)([*carry, *ys])
            return [*cotangents, *sites]

        _, carry, _ = body.by_kind([body.jaxpr.invars[i] for i in body.smooth])
        results = [body.jaxpr.outvars[i] for i in _smooth(body.jaxpr.outvars)]
        cotangents = [v.aval.to_tangent_aval() for v in (*carry, *results[len(carry) :])]
        carries, saved = len(carry), [v.aval for v in (*fixed, *per_step)]
        given, stepped = saved[: len(fixed)], saved[len(fixed) :]
        jaxpr, extra = _traced(backward, [given, cotangents[:carries], stepped, cotangents[carries:]])
        turned = with_arranged_products(jaxpr, len(extra) + len(fixed), carries, turn, machine)
        if turned is not None:
            opened, more = _jax.with_constants_as_inputs(turned)
            jaxpr, extra = merged(opened), [*more, *extra]
        consts, outs = len(extra) + len(fixed), list(jaxpr.outvars)
        constant = frozenset(v for v, level in depths(jaxpr, consts, carries).items() if level == 0)
        inputs, sites, scanned = (
            outs[: len(body.smooth)],
            outs[len(body.smooth) :],
            jaxpr.invars[consts + carries :],
        )
        loose, init, xs = body.by_kind(inputs)

        def varying(atoms: Sequence[Any], known: Sequence[Any] = ()) -> list[Any]:
            return [v for v in dict.fromkeys(_jax.variables(atoms)) if v not in constant and v not in known]

        added, stacked = varying(loose), varying([*xs, *sites], known=scanned)
        also = [v for v in _jax.variables(outs) if v in constant]
        cut = _cut(jaxpr, [*init, *added, *stacked], consts, carries, also)
        return cls(forward, cut, extra, scanned, inputs, sites, added, stacked, constant)

    @property
    def turned_bytes(self) -> int:
        """Bytes of the constants that are made for the reversed loop."""
        return sum(map(nbytes, self.cut.once.outvars))

    def stacked_bytes(self, hoisted: int) -> StackedBytes:
        """Count what a step stacks; so many of the scanned inputs, the last ones, were made for the loop."""
        body, forward = self.forward.body, self.forward
        first = len(body.jaxpr.invars) - hoisted
        positions, xs = (body.by_kind(of)[2] for of in (body.smooth, self.inputs))
        made = [v for i, v in zip(positions, xs, strict=True) if i >= first]
        returned = [v for v in self.stacked if v in {*_jax.variables([*self.sites, *made])}]
        activations = dict.fromkeys(_jax.variables(forward.activations))
        in_loop = {*_jax.free_variables(forward.again), *_jax.variables(forward.leaves)}
        own = [v for v in activations if v not in forward.scanned]
        kinds = forward.stacked, in_loop.intersection(forward.carry_of), returned, activations, own
        return StackedBytes(*(sum(map(nbytes, kind)) for kind in kinds))

    def summed_bytes(self, constants: Collection[int]) -> int:
        """Count the bytes of the sums that the backward carries for these constants, by their positions."""
        body = self.forward.body
        positions, loose = (body.by_kind(of)[0] for of in (body.smooth, self.inputs))
        pairs = zip(positions, loose, strict=True)
        return sum(nbytes(v) for i, v in pairs if i in constants and self.varies(v))

    def varies(self, atom: Any) -> bool:
        """Decide whether a cotangent is not the same in all steps."""
        return not isinstance(atom, _jax.Literal) and atom not in self.constant

    def pull(self, saved: LoopSaved, cotangents: Arrays, params: dict[str, Any]) -> LoopCotangents:
        """The reversed loop: cotangents of everything from those of the results."""
        body, length = self.forward.body, params["length"]
        loose, init, xs = body.by_kind(self.inputs)
        carries, added = len(init), len(self.added)
        smooth = [cotangents[i] for i in _smooth(body.jaxpr.outvars)]
        values, loop_consts = self.cut.made([*self.extra, *saved.fixed])
        scanned = [*saved.stacked, *smooth[carries:]]

        def step(carry: tuple[Arrays, Arrays], x: Arrays) -> tuple[tuple[Arrays, Arrays], Arrays]:
            cts, total = carry
            results = _jax.evaluate(self.cut.rest, (), [*loop_consts, *cts, *x])
            moved = [_full(y, v.aval) for y, v in zip(results[:carries], init, strict=True)]
            terms = results[carries : carries + added]
            return (moved, [a + b for a, b in zip(total, terms, strict=True)]), results[carries + added :]

        zeros = [_jax.zeros_like_aval(v.aval) for v in self.added]
        (init_cts, totals), stacked = lax.scan(
            step, (smooth[:carries], zeros), [scanned[i] for i in self.cut.rest_scanned],
            length=length, reverse=not params["reverse"], unroll=params["unroll"],
        )  # fmt: skip
        values.update(zip(self.scanned, scanned, strict=True))
        values.update(zip(self.stacked, stacked, strict=True))
        sums = dict(zip(self.added, totals, strict=True))

        def same(atom: Any) -> Any:
            return atom.val if isinstance(atom, _jax.Literal) else values[atom]

        def spread(value: Any, aval: Any, *axes: int) -> Any:
            return jnp.broadcast_to(jnp.asarray(value, aval.dtype), (*axes, *aval.shape))

        def over_time(atom: Any) -> Any:
            return values[atom] if self.varies(atom) else spread(same(atom), atom.aval, length)

        of_loose = [sums[v] if self.varies(v) else spread(same(v) * length, v.aval) for v in loose]
        found, end = [*of_loose, *init_cts, *map(over_time, xs)], body.consts + body.carries
        full = _replaced([None] * len(body.jaxpr.invars), body.smooth, found)
        sites = [over_time(v) for v in self.sites]
        return LoopCotangents(full[body.consts : end], full[: body.consts], full[end:], sites)


def _shifted(first: Any, later: Any, reverse: bool) -> Any:
    """The carry at the start of every step, from its first value and those after each step."""
    parts = [later[1:], first[None]] if reverse else [first[None], later[:-1]]
    return jnp.concatenate(parts)


def _replaced(values: Arrays, which: Sequence[int], by: Sequence[Any]) -> Arrays:
    full = list(values)
    for i, value in zip(which, by, strict=True):
        full[i] = value
    return full


def _full(value: Any, aval: Any) -> Any:
    """A literal result is a plain number in the jaxpr."""
    if isinstance(value, jax.Array):
        return value
    return jnp.broadcast_to(jnp.asarray(value, aval.dtype), aval.shape)
