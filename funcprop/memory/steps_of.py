"""A jaxpr as steps: calls are inlined, equal equations are one, loops are one step, or unrolled as by XLA."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from funcprop import _jax
from funcprop.memory import products
from funcprop.memory.donations import with_rescued
from funcprop.memory.epilogues import write_late
from funcprop.memory.fusion import WINDOWS, Value, with_copies
from funcprop.memory.liveness import BARRIER, Liveness
from funcprop.memory.step_forms import (
    RESHAPES,
    Steps,
    is_copied,
    is_one_of_a_row,
    is_renamed,
    is_rounded,
    summed,
)
from funcprop.memory.tiles import on_chip
from funcprop.program.by_platform import by_platform_p, form_for
from funcprop.program.facts import CALLS, CHECKPOINTS, CUSTOM_RULES, PRODUCTS, facts_of
from funcprop.program.layer_calls import boundary_p
from funcprop.program.linear_map import linear_body
from funcprop.program.sizes import nbytes

_INLINED = CALLS | CHECKPOINTS | CUSTOM_RULES | {"custom_lin", "custom_vjp_call_jaxpr", "shard_map"}
_MOVES = frozenset({"slice", "rev", "split", "dynamic_slice", "iota", "pad", "concatenate"})
_UPDATES = frozenset({"dynamic_update_slice", "scatter", "scatter-add", "scatter_add"})
# A TPU writes their results over their operands.
_ALL_REDUCES = frozenset({"all_reduce", "psum", "psum_invariant"})
# How often they need their results' bytes besides, while they run.
_AGAIN = dict.fromkeys(("sort", "cumsum", "cumlogsumexp", "cummax", "cummin", "cumprod", "fft"), 1)
_AGAIN |= dict.fromkeys(("random_bits", "threefry2x32"), 3)


class StepsOf(Steps):
    """The steps of a jaxpr for a platform; with `barriers`, those that keep recomputation apart are kept."""

    def walk(self, jaxpr: Any, given: Sequence[Value | None], scope: str) -> list[Value | None]:
        """Append the steps of a jaxpr whose arguments are `given`; its results. None is a literal."""
        inner = _jax.open_jaxpr(jaxpr)
        consts = [Value(v.aval) for v in inner.constvars]
        self.constants += consts
        values = dict(zip([*inner.constvars, *inner.invars], [*consts, *given], strict=True))

        def read(atom: Any) -> Value | None:
            return None if isinstance(atom, _jax.Literal) else values[atom]

        for eqn in inner.eqns:
            around = "/".join(part for part in (scope, _jax.scope(eqn)) if part)
            made = self._equation(eqn, [read(v) for v in eqn.invars], around)
            values.update(zip(eqn.outvars, made, strict=True))
        return [read(v) for v in inner.outvars]

    def liveness(
        self,
        results: Sequence[Value | None],
        donated: Mapping[int, Value] | None = None,
        library: bool = True,
    ) -> Liveness:
        """When what is in memory; `library` says whether a CPU's library computes long sums."""
        self.steps = with_copies(self.steps, results, donated)
        if self.platform == "cpu" and donated:
            self.steps = with_rescued(self.steps, donated)
        if self.platform == "tpu":
            write_late(self.steps, results)
        return Liveness(self.steps, results, library and self.platform == "cpu", on_chip(self.platform))

    # --- equations ----------------------------------------------------------------------------

    def _equation(self, eqn: Any, operands: list[Value | None], scope: str) -> Sequence[Value | None]:
        name, facts = eqn.primitive.name, facts_of(eqn)
        bodies = [body for _, body in _jax.sub_jaxprs(eqn)]
        if (tangent_map := linear_body(eqn)) is not None:
            return self.walk(tangent_map, operands, scope)
        if eqn.primitive is by_platform_p:
            return self.walk(form_for(eqn, self.platform), operands, scope)
        if eqn.primitive is boundary_p:
            return operands[eqn.params["call"].tree.num_leaves :]
        if bodies and name in _INLINED:
            given = operands[len(operands) - len(_jax.open_jaxpr(bodies[0]).invars) :]
            if name in CHECKPOINTS and eqn.params["prevent_cse"] and eqn.params["differentiated"]:
                given = self._behind_barrier(given, scope)
            return self.walk(bodies[0], given, scope)
        if name == BARRIER:
            return self._behind_barrier(operands, scope)
        if name == "scan":
            return self._scan(eqn, operands, bodies[0], scope)
        if name == "select_and_scatter_add" and self.platform != "tpu":
            return [self._unpooled(eqn, operands, scope)]
        if name in PRODUCTS:
            return [self._product(eqn, operands, scope)]
        if is_renamed(eqn, operands):
            return operands[: len(eqn.outvars)]
        if name in RESHAPES and (value := operands[0]) is not None:
            return [self.reshaped(value, eqn.outvars[0].aval, scope)]
        if name == "logistic" and (value := operands[0]) is not None:
            return [self.logistic(value, scope)]
        if name == "broadcast_in_dim":
            axes = eqn.params["broadcast_dimensions"]
            return [self.spread(eqn.invars[0], operands[0], axes, eqn.outvars[0].aval.shape, scope)]
        if facts.elementwise and len(eqn.invars) > 1:
            shape = eqn.outvars[0].aval.shape
            operands = [
                v if a.aval.shape == shape else self.spread(a, v, range(len(a.aval.shape)), shape, scope)
                for a, v in zip(eqn.invars, operands, strict=True)
            ]
        if name == "max" and len(larger := [v for v in operands if not self.is_lowest(v)]) == 1:
            return larger
        numerator, by = (*operands, None, None)[:2]
        if name == "div" and numerator is not None and by is not None and by.is_spread and not by.is_number:
            return [self.divided(numerator, by, scope)]
        reduces = 0
        if facts.reduces:
            source, reduces = summed(operands[0], eqn)
            operands = [source]
        key: Hashable = None
        if not eqn.effects and (not bodies or facts.combines):
            atoms = (str(a) if v is None else id(v) for a, v in zip(eqn.invars, operands, strict=False))
            key = (name, tuple(atoms), str(eqn.params))
            if key in self.known:
                return self.known[key]
        moves = facts.moves or name in _MOVES
        compared = self.platform == "tpu" and is_one_of_a_row(eqn)
        over = name in _UPDATES and operands[0] is not None and not compared
        written_over = len(operands) if self.platform == "tpu" and name in _ALL_REDUCES else int(over)
        inside = 0 if facts.combines else max(map(self._inside, bodies), default=0)
        results = self.add(
            *(name, scope, operands, [v.aval for v in eqn.outvars]),
            fuses=(moves and not is_copied(eqn))
            or name == "gather"
            or compared
            or (facts.fuses and not facts.reduces and (facts.elementwise or facts.flat)),
            reduces=reduces,
            entrywise=facts.elementwise and not facts.moves,
            expensive=is_rounded(eqn.invars[0].aval, eqn.outvars[0].aval)
            and not (operands[0] is None or operands[0].is_spread)
            if name == "convert_element_type"
            else name == "pad" or not (facts.cheap or facts.flat or moves),
            library=name in WINDOWS and products.windows_are_apart(eqn),
            effects=bool(eqn.effects),
            in_place={k: k for k in range(written_over)},
            inside=inside + _AGAIN.get(name, 0) * sum(map(nbytes, eqn.outvars)),
        )
        if key is not None:
            self.known[key] = results
        return results

    def _behind_barrier(self, given: list[Value | None], scope: str) -> list[Value | None]:
        """The same values, when all of them are there, under new names; these, where no barrier is kept."""
        if not self.barriers:
            return given
        there = [v for v in given if v is not None]
        made = iter(self.add(BARRIER, scope, there, [v.aval for v in there]))
        return [None if v is None else next(made) for v in given]

    def _product(self, eqn: Any, operands: list[Value | None], scope: str) -> Value:
        """A product, behind copies of operands whose axes are in another order, or, on a CPU, of 16 bits."""
        if self.platform == "tpu":
            return self._multiplied(eqn, operands, scope)
        result, wide, arranged = eqn.outvars[0].aval, jnp.dtype("float32"), []
        orders, (*flat, made_flat) = products.orders(eqn), products.matrices(eqn)
        for value, order, shape, atom in zip(operands, orders, flat, eqn.invars, strict=False):
            if value is not None and value.step is not None and value.step.op == "transpose":
                # A transposed matrix is read as it is.
                value = value.step.operands[0] if len(atom.aval.shape) == 2 else value
            if value is not None and order is not None:
                aval = value.aval.update(shape=tuple(atom.aval.shape[d] for d in order))
                value = self.moved("transpose", scope, value, aval, tuple(order))
            if value is not None and self._is_widened(value.aval):
                value = self.moved("convert_element_type", scope, value, value.aval.update(dtype=wide))
            if value is not None and shape is not None:
                value = self.reshaped(value, value.aval.update(shape=shape), scope)
            arranged.append(value)
        widened = self._is_widened(result)
        aval = result.update(dtype=wide) if widened else result
        types = [aval.update(shape=made_flat or aval.shape)]
        library = products.is_in_library(eqn)
        if self.platform == "cpu" and (whole := products.with_all_channels(eqn)) is not None:
            types = [aval.update(shape=whole)]
        (made,) = self.add(eqn.primitive.name, scope, arranged, types, library=library)
        if made.size > math.prod(aval.shape):
            (copied,) = self.add("transpose", scope, [made], types)
            (made,) = self.add("diagonal", scope, [copied], [aval])
        made = self.reshaped(made, aval, scope)
        if len(orders) > 2 and orders[2] is not None:
            made = self.moved("transpose", scope, made, aval, "result")
        return self.moved("convert_element_type", scope, made, result) if widened else made

    def _multiplied(self, eqn: Any, operands: list[Value | None], scope: str) -> Value:
        """A product on a TPU, which reads any order of axes, and 16 bits unless more are asked for."""
        exact = {str(p) for p in eqn.params["precision"] or ()} - {"DEFAULT"}
        short = jnp.dtype("bfloat16")
        for k, v in enumerate(operands):
            if v is not None and v.aval.dtype == jnp.float32 and not exact:
                operands[k] = self.moved("convert_element_type", scope, v, v.aval.update(dtype=short))
        return self.add(eqn.primitive.name, scope, operands, [eqn.outvars[0].aval])[0]

    def _is_widened(self, aval: Any) -> bool:
        return self.platform == "cpu" and aval.dtype.itemsize == 2 and jnp.issubdtype(aval.dtype, jnp.inexact)

    def _unpooled(self, eqn: Any, operands: list[Value | None], scope: str) -> Value:
        """The derivative of max-pooling: of each window the largest entry and its position, then a scatter.

        The positions of all entries are arrays of their own, padded as the entries are.
        """
        result, padding = eqn.outvars[0].aval, eqn.params["padding"]
        shape = tuple(d + low + high for d, (low, high) in zip(result.shape, padding, strict=True))
        padded, values = result.update(shape=shape), operands[1]
        places = padded.update(dtype=jnp.dtype("int32"))
        positions = [self.add("iota", scope, [], [places])[0] for _ in shape]
        if values is not None and shape != result.shape:
            values = self.moved("pad", scope, values, padded)
        window = eqn.invars[0].aval
        chosen = [window, *[window.update(dtype=places.dtype)] * len(shape)]
        _, *found = self.add("select", scope, [values, *positions], chosen)
        start = self.add("zeros", scope, [], [padded])[0]
        (made,) = self.add(
            "select_and_scatter_add", scope, [start, operands[0], *found], [padded], in_place={0: 0}
        )
        return made if shape == result.shape else self.moved("slice", scope, made, result)

    # --- bodies -------------------------------------------------------------------------------

    def _inside(self, body: Any) -> int:
        """The bytes of temporary values in a body that is run once."""
        inner = StepsOf(self.barriers, self.platform)
        given = [Value(v.aval) for v in _jax.open_jaxpr(body).invars]
        results = inner.walk(body, given, "")
        return inner.liveness(results).peak({}).nbytes

    def _scan(self, eqn: Any, operands: list[Value | None], body: Any, scope: str) -> Sequence[Value | None]:
        """A loop: unrolled where XLA unrolls it, or one step that writes carries in place."""
        length, reverse = eqn.params["length"], eqn.params["reverse"]
        unroll = min(int(eqn.params["unroll"]), length)
        consts, carries = _jax.scan_counts(eqn.params)
        filled = [Value(a.aval) if v is None else v for a, v in zip(eqn.invars, operands, strict=True)]
        if length == unroll:
            carry, ys = self._unrolled(body, filled, consts, carries, length, reverse, scope)
            types = [v.aval for v in eqn.outvars[carries:]]
            columns = zip(*ys, strict=True) if length else ((),) * len(types)
            return [
                *carry,
                *(self.stacked(list(y), t, scope) for y, t in zip(columns, types, strict=True)),
            ]
        inner = StepsOf(self.barriers, self.platform)
        given = [Value(v.aval) for v in filled]
        carry, ys = inner._unrolled(body, given, consts, carries, max(unroll, 1), False, "")
        results = [*carry, *(y for of_step in ys for y in of_step)]
        live = inner.liveness(results)
        outside = live.invariant(given[:consts])
        over = {id(c): given[consts + i] for i, c in enumerate(carry)}
        inside = live.peak(over, outside, in_loop=True).nbytes
        hoisted = [self.add("hoisted", scope, filled[:consts], [v.aval])[0] for v in outside]
        # What is made of single numbers is made in the loop.
        read = [v for v in filled[:consts] if not v.is_number]
        in_place = {len(read) + i: i for i in range(carries)}
        types = [v.aval for v in eqn.outvars]
        given = [*read, *filled[consts:], *hoisted]
        if self.platform == "cpu":
            # What a loop fills is made of zeros as soon as the program begins.
            in_place |= {len(given) + i: carries + i for i in range(len(types) - carries)}
            given += [self.add("zeros", scope, [], [aval])[0] for aval in types[carries:]]
        return self.add("scan", scope, given, types, in_place=in_place, inside=inside)

    def _unrolled(
        self,
        body: Any,
        operands: list[Value],
        consts: int,
        carries: int,
        times: int,
        reverse: bool,
        scope: str,
    ) -> tuple[list[Value], list[list[Value]]]:
        """Append so many steps of a loop; the carry after them, and what each stacks."""
        inner = _jax.open_jaxpr(body)
        carry, ys = operands[consts : consts + carries], []
        types = [v.aval for v in inner.invars[consts + carries :]]
        for k in range(times):
            i = times - 1 - k if reverse else k
            xs = [
                self.sliced(v, t, i, scope) for v, t in zip(operands[consts + carries :], types, strict=True)
            ]
            results = self.walk(body, [*operands[:consts], *carry, *xs], scope)
            made = [Value(a.aval) if v is None else v for a, v in zip(inner.outvars, results, strict=True)]
            carry = made[:carries]
            ys.append(made[carries:])
        return carry, ys[::-1] if reverse else ys
