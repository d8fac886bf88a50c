"""The body of a loop, cut and rewritten before it runs.

A body is a jaxpr whose inputs are the loop's constants, its carry and one step's inputs, in this order. What
an equation depends on is its *depth*: constants alone (0), scanned inputs (1), the carry (2).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from jax import lax

from funcprop import _jax
from funcprop.program.facts import PRODUCTS, SUMS, facts_of, is_view
from funcprop.program.sizes import nbytes
from funcprop.rules.machine import Machine, row_form
from funcprop.rules.primitives.row_products import by_columns

Arrays = list[Any]


# --- what can leave the loop ------------------------------------------------------------------


def depths(jaxpr: Any, consts: int, carries: int) -> dict[Any, int]:
    """The depth of every variable of a body."""
    inputs = list(jaxpr.invars)
    depth = {
        **dict.fromkeys(inputs[:consts], 0),
        **dict.fromkeys(inputs[consts + carries :], 1),
        **dict.fromkeys(inputs[consts : consts + carries], 2),
    }
    for eqn in jaxpr.eqns:
        deepest = 2 if _is_bound(eqn) else max((depth[v] for v in _jax.variables(eqn.invars)), default=0)
        depth.update(dict.fromkeys(eqn.outvars, deepest))
    return depth


def _is_bound(eqn: Any) -> bool:
    """Whether an equation stays in its loop in any case."""
    # Random bits of a batch are not the batch of the random bits (`rng_bit_generator`).
    return bool(eqn.effects) or facts_of(eqn).random


def with_constant_operand(
    jaxpr: Any, constants: Collection[Any], operators: frozenset[str]
) -> Iterator[tuple[Any, int]]:
    """Equations of these operators with one constant operand, and which that is; also in nested jits."""
    known = {*jaxpr.constvars, *constants}

    def is_known(atom: Any) -> bool:
        return isinstance(atom, _jax.Literal) or atom in known

    for eqn in jaxpr.eqns:
        if eqn.primitive.name == _jax.JIT:
            body = _jax.open_jaxpr(eqn.params["jaxpr"])
            given = [v for v, outer in zip(body.invars, eqn.invars, strict=True) if is_known(outer)]
            yield from with_constant_operand(body, given, operators)
        if all(map(is_known, eqn.invars)) and not _is_bound(eqn):
            known.update(eqn.outvars)
        elif eqn.primitive.name in operators and _jax.is_differentiable(eqn.invars[0].aval):
            constant = [k for k, v in enumerate(eqn.invars) if not isinstance(v, _jax.Literal) and v in known]
            if len(constant) == 1:
                yield eqn, constant[0]


def _level(eqn: Any, depth: dict[Any, int]) -> int:
    return max((depth[v] for v in eqn.outvars), default=2)


@dataclass(frozen=True)
class BodySplit:
    """A loop's body in three: `once` (constants alone), `parallel` (scanned inputs), `rest` (the loop)."""

    once: Any
    parallel: Any
    rest: Any
    rest_constants: list[int]
    rest_scanned: list[int]

    def made(self, consts: Arrays) -> tuple[dict[Any, Any], Arrays]:
        """Compute all constants, by their variables, and list those that `rest` takes."""
        everything = [*consts, *_jax.evaluate(self.once, (), consts)]
        values = dict(zip([*self.once.invars, *self.once.outvars], everything, strict=True))
        return values, [everything[i] for i in self.rest_constants]


def split(
    jaxpr: Any, consts: int, carries: int, hoists: Callable[[Any], bool], also: Sequence[Any] = ()
) -> BodySplit:
    """Cut a body by what its equations depend on.

    `once` maps the constants to further constants; `parallel` maps all constants and one step's inputs to
    further inputs; `rest` takes the constants and inputs at the given positions, and the carry. `hoists` says
    which products of scanned inputs with constants run before the loop. `also` are variables that depend on
    constants alone and are wanted outside: they are among the results of `once`.
    """
    const_vars = list(jaxpr.invars[:consts])
    carry_vars = list(jaxpr.invars[consts : consts + carries])
    x_vars = list(jaxpr.invars[consts + carries :])
    depth = depths(jaxpr, consts, carries)
    levels = [_level(eqn, depth) for eqn in jaxpr.eqns]
    hoisted = _hoisted(jaxpr.eqns, levels, depth, hoists)
    once = [e for e, level in zip(jaxpr.eqns, levels, strict=True) if level == 0]
    parallel = [e for i, e in enumerate(jaxpr.eqns) if i in hoisted]
    rest = [e for i, e in enumerate(jaxpr.eqns) if levels[i] > 0 and i not in hoisted]

    read_by_rest = set(_jax.free_variables(rest)) | set(_jax.variables(jaxpr.outvars))
    read_later = set(_jax.free_variables(parallel)) | read_by_rest | set(also)
    once_out = [v for e in once for v in e.outvars if v in read_later]
    parallel_out = [v for e in parallel for v in e.outvars if v in read_by_rest]
    all_consts, all_xs = const_vars + once_out, x_vars + parallel_out
    used_consts = [i for i, v in enumerate(all_consts) if v in read_by_rest]
    used_xs = [i for i, v in enumerate(all_xs) if v in read_by_rest]
    rest_in = [all_consts[i] for i in used_consts] + carry_vars + [all_xs[i] for i in used_xs]
    return BodySplit(
        _jax.jaxpr_of(once, const_vars, once_out, "once"),
        _jax.jaxpr_of(parallel, [*all_consts, *x_vars], parallel_out, "parallel"),
        _jax.jaxpr_of(rest, rest_in, jaxpr.outvars, "rest"),
        used_consts,
        used_xs,
    )


def _hoisted(
    eqns: Sequence[Any], levels: Sequence[int], depth: dict[Any, int], hoists: Callable[[Any], bool]
) -> set[int]:
    """Products of scanned inputs with constants, what they need, and cheap operators on their results."""
    maker = {v: i for i, e in enumerate(eqns) for v in e.outvars}
    taken: set[int] = set()

    def take(i: int) -> None:
        if i in taken or levels[i] != 1:
            return
        taken.add(i)
        for v in _jax.variables(eqns[i].invars):
            if v in maker:
                take(maker[v])

    for i, eqn in enumerate(eqns):
        if levels[i] != 1:
            continue
        operands = _jax.variables(eqn.invars)
        projects = eqn.primitive.name in PRODUCTS and any(depth[v] == 0 for v in operands) and hoists(eqn)
        made = [maker[v] for v in operands if v in maker and depth[v] > 0]
        follows = _follows(eqn) and made and all(j in taken for j in made)
        if projects or follows:
            take(i)
    return taken


def _follows(eqn: Any) -> bool:
    """Whether an operator is so cheap that it follows a hoisted product out of the loop."""
    name = eqn.primitive.name
    return name in SUMS or name == "broadcast_in_dim" or is_view(eqn)


# --- products ---------------------------------------------------------------------------------


def _is_plain_product(eqn: Any) -> bool:
    """`a @ w`: the last axis of `a` with the first of a matrix `w`, no batch."""
    if eqn.primitive.name != "dot_general":
        return False
    a, w = (v.aval for v in eqn.invars)
    contracted, batch = eqn.params["dimension_numbers"]
    axes = tuple(map(tuple, contracted))
    return axes == ((a.ndim - 1,), (0,)) and w.ndim == 2 and not any(map(len, batch)) and a.dtype == w.dtype


Read = Callable[[Any], Any]


def evaluated(
    jaxpr: Any, args: Sequence[Any], instead: Callable[[int, Read], dict[Any, Any] | None]
) -> Arrays:
    """Evaluate a body, some of whose equations are computed in another way than they are written.

    `instead(position, read)` are the values by their variables; None of an equation that stays.
    """
    values = dict(zip(jaxpr.invars, args, strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, _jax.Literal) else values[atom]

    for i, eqn in enumerate(jaxpr.eqns):
        found = instead(i, read)
        if found is None:
            found = dict(zip(eqn.outvars, _jax.one_equation(eqn)(*map(read, eqn.invars)), strict=True))
        values.update(found)
    return [read(v) for v in jaxpr.outvars]


def widened(jaxpr: Any, consts: int, carries: int) -> tuple[Any, int]:
    """Products of one carried value with several constants become one product with all of them side by side.

    A loop of few large products is faster than one of many small ones, and what is stacked for them is one
    array. Returns the new body, or None, and the bytes of the constants made so. To be called while tracing.
    """
    depth = depths(jaxpr, consts, carries)
    # Constants that the body makes come first: a product reads all of its group's where the first one stood.
    jaxpr = jaxpr.replace(eqns=sorted(jaxpr.eqns, key=lambda eqn: _level(eqn, depth) > 0))
    alike: dict[Any, list[int]] = {}
    for i, eqn in enumerate(jaxpr.eqns):
        if _is_plain_product(eqn) and len(_jax.variables(eqn.invars)) == 2:
            a, w = eqn.invars
            if depth[a] == 2 and depth[w] == 0:
                alike.setdefault((a, w.aval.dtype, *sorted(eqn.params.items())), []).append(i)
    group_of = {i: group for group in alike.values() if len(group) > 1 for i in group}
    if not group_of:
        return None, 0

    def side_by_side(i: int, read: Read) -> dict[Any, Any] | None:
        if i not in group_of or i != group_of[i][0]:
            return {} if i in group_of else None
        a, group = jaxpr.eqns[i].invars[0], [jaxpr.eqns[j] for j in group_of[i]]
        matrices = [read(eqn.invars[1]) for eqn in group]
        params = {k: v for k, v in group[0].params.items() if k != "out_sharding"}
        wide = lax.dot_general(read(a), lax.concatenate(matrices, 1), **params)
        parts = lax.split(wide, [m.shape[1] for m in matrices], wide.ndim - 1)
        return dict(zip([eqn.outvars[0] for eqn in group], parts, strict=True))

    copies = sum(nbytes(jaxpr.eqns[i].invars[1]) for i in group_of)
    return _jax.retrace(lambda *args: evaluated(jaxpr, args, side_by_side), jaxpr), copies


def with_arranged_products(jaxpr: Any, consts: int, carries: int, turn: bool, machine: Machine) -> Any:
    """Products `g wᵀ` with a constant matrix in their fastest form, as far as `turn` lets constants be made.

    Constants `wᵀ` are made once, before the loop. The new body, or None. To be called while tracing.
    """
    depth = depths(jaxpr, consts, carries)

    def form(eqn: Any) -> str:
        if eqn.primitive.name != "dot_general" or not _jax.variables(eqn.invars[1:]):
            return "plain"
        g, w = eqn.invars
        contracted, batch = eqn.params["dimension_numbers"]
        axes = tuple(map(tuple, contracted))
        transposed = axes == ((g.aval.ndim - 1,), (1,)) and w.aval.ndim == 2 and not any(map(len, batch))
        if not transposed or depth[w] > 0:
            return "plain"
        found = row_form(math.prod(g.aval.shape[:-1]), nbytes(w), machine)
        return "plain" if found == "turned" and not turn else found

    forms = list(map(form, jaxpr.eqns))
    if all(found == "plain" for found in forms):
        return None

    def arranged(i: int, read: Read) -> dict[Any, Any] | None:
        if forms[i] == "plain":
            return None
        eqn = jaxpr.eqns[i]
        g, w = map(read, eqn.invars)
        params = {k: eqn.params[k] for k in ("precision", "preferred_element_type")}
        if forms[i] == "columns":
            return {eqn.outvars[0]: by_columns(g, w, **params)}
        axes = (((g.ndim - 1,), (0,)), ((), ()))
        return {eqn.outvars[0]: lax.dot_general(g, lax.transpose(w, (1, 0)), axes, **params)}

    return _jax.retrace(lambda *args: evaluated(jaxpr, args, arranged), jaxpr)
