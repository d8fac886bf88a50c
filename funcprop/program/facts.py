"""What is known of JAX's primitives: where they are linear, what they move or reduce, what they cost.

Whoever reads a jaxpr asks here, so that a new primitive is one line of one table. A primitive that is not in
the table has none of the properties; `OPAQUE` names those of which nothing can be said.

A primitive may be linear in several operands together (`x + y`) or in each by itself (`x · y`): `linear_in`
lists groups of operands, in each of which it is linear while all others are fixed.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax.numpy as jnp

from funcprop import _jax

CALLS = frozenset({_jax.JIT, "closed_call"})
CHECKPOINTS = frozenset({"remat2"})
LOOPS = frozenset({"scan", "while"})
CONTROL_FLOW = CALLS | CHECKPOINTS | LOOPS | {"cond"}
# A function of the user's own with a derivative of its own, in forward or in reverse mode.
CUSTOM_RULES = frozenset({"custom_jvp_call", "custom_vjp_call"})
PRODUCTS = frozenset({"dot_general", "conv_general_dilated"})
SUMS = frozenset({"add", "add_any", "sub"})
_REORDERS = frozenset({"transpose", "rev"})

_MANY = sys.maxsize
ALL, FIRST, SECOND, LATER = range(_MANY), range(1), range(1, 2), range(1, _MANY)
EACH = (FIRST, SECOND)
# What is written into and what is written, without the places between them.
_UPDATED = range(0, 3, 2)

# How floating-point operations are counted: none, or one for each entry of the result, of the operand, of
# what is written, or of all windows; products have formulas of their own.
Cost = Literal["free", "result", "operand", "updates", "windows", "product"]


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What is known of a primitive; by default nothing.

    Attributes:
        linear_in: groups of operands in which it is linear, all others fixed.
        piecewise_linear_in: groups in which it is so almost everywhere, for real numbers.
        flat: its derivative is zero wherever it has one.
        elementwise: an entry of a result depends on one entry of each operand, in the same place.
        identity: results are the operands; at most their type, their layout or their name is another.
        moves: the results' entries are those of the one operand, moved, repeated or left out.
        reduces: it turns the axes in the parameter `axes` into one number.
        cumulative: it runs along the one axis in the parameter `axis`.
        exact: results are entries of the operands or simple parts of them, so that nothing is rounded.
        accumulates: it adds up terms, whose roundings are not those of its result alone.
        combines: a jaxpr among its parameters says only how two numbers become one.
        random: it makes random numbers or their keys.
        cheap: computing it takes less time than reading its result from memory.
        fuses: XLA computes it together with what surrounds it.
        cost: how its floating-point operations are counted.
    """

    linear_in: tuple[range, ...] = ()
    piecewise_linear_in: tuple[range, ...] = ()
    flat: bool = False
    elementwise: bool = False
    identity: bool = False
    moves: bool = False
    reduces: bool = False
    cumulative: bool = False
    exact: bool = False
    accumulates: bool = False
    combines: bool = False
    random: bool = False
    cheap: bool = False
    fuses: bool = True
    cost: Cost = "result"


def facts_of(eqn: Any) -> Facts:
    """The facts about the primitive of an equation."""
    return TABLE.get(eqn.primitive.name, _NOTHING)


def is_linear(eqn: Any, operands: Collection[int]) -> bool:
    """Whether an operator is linear in some operands together, up to a constant that the others make."""
    if eqn.primitive.name == "integer_pow":
        return bool(eqn.params["y"] == 1)
    return _has_group(facts_of(eqn).linear_in, operands)


def is_piecewise_linear(eqn: Any, operands: Collection[int]) -> bool:
    """Whether an operator is linear in them almost everywhere: it has no second derivative there."""
    if is_linear(eqn, operands):
        return True
    # The absolute value of a complex number is curved.
    is_real = not any(jnp.issubdtype(eqn.invars[k].aval.dtype, jnp.complexfloating) for k in operands)
    return is_real and _has_group(facts_of(eqn).piecewise_linear_in, operands)


def _has_group(groups: Collection[range], operands: Collection[int]) -> bool:
    return any(all(k in group for k in operands) for group in groups)


def is_move(eqn: Any) -> bool:
    """Whether the one result holds entries of the one operand, and nothing else."""
    return facts_of(eqn).moves and len(eqn.invars) == len(eqn.outvars) == 1


def is_view(eqn: Any) -> bool:
    """Whether the one result holds each entry of the one operand once, perhaps in another type."""
    facts = facts_of(eqn)
    if not (facts.moves or facts.identity) or not len(eqn.invars) == len(eqn.outvars) == 1:
        return False
    return bool(eqn.outvars[0].aval.size == eqn.invars[0].aval.size)


def keeps_order(eqn: Any) -> bool:
    """Whether the one result holds the entries of the one operand in their order."""
    return is_view(eqn) and eqn.primitive.name not in _REORDERS


_NOTHING = Facts()


def _row(names: str, **facts: Any) -> dict[str, Facts]:
    return dict.fromkeys(names.split(), Facts(**facts))


_LINEAR: dict[str, Any] = {"linear_in": (ALL,)}
_MOVES: dict[str, Any] = {**_LINEAR, "moves": True, "exact": True, "cost": "free"}
_IDENTITY: dict[str, Any] = {**_LINEAR, "identity": True, "elementwise": True, "cost": "free"}
_PIECEWISE: dict[str, Any] = {"piecewise_linear_in": (ALL,), "exact": True}
_FLAT: dict[str, Any] = {"flat": True, "elementwise": True}
_WRITES: dict[str, Any] = {"combines": True, "cost": "updates", "fuses": False}

_ELEMENTWISE = {
    **_row("add add_any sub", **_LINEAR, elementwise=True, cheap=True),
    **_row("neg", **_LINEAR, elementwise=True, cheap=True, exact=True),
    **_row("real imag conj complex", **_LINEAR, elementwise=True, exact=True),
    **_row("reduce_precision", **_LINEAR, elementwise=True),
    **_row("mul", linear_in=EACH, elementwise=True, cheap=True),
    **_row("div", linear_in=(FIRST,), elementwise=True),
    **_row("select_n", linear_in=(LATER,), elementwise=True, cheap=True, exact=True),
    **_row("max min abs", **_PIECEWISE, elementwise=True, cheap=True),
    **_row("clamp rem", **_PIECEWISE, elementwise=True),
    **_row("square integer_pow one_minus_square", elementwise=True, cheap=True),
    **_row("exp exp2 expm1 log log1p log2 logistic pow sqrt rsqrt cbrt", elementwise=True),
    **_row("sin cos tan asin acos atan atan2 sinh cosh tanh asinh acosh atanh", elementwise=True),
    **_row("erf erfc erf_inv lgamma digamma polygamma zeta bessel_i0e bessel_i1e", elementwise=True),
    **_row("igamma igammac igamma_grad_a regularized_incomplete_beta", elementwise=True),
    **_row("nextafter", elementwise=True),
    **_row("eq ne lt le gt ge and or xor not", **_FLAT, cheap=True),
    **_row("sign", **_FLAT, cheap=True, exact=True),
    **_row("floor ceil round", **_FLAT, exact=True),
    **_row("is_finite eq_to le_to lt_to mulhi clz population_count", **_FLAT),
    **_row("shift_left shift_right_logical shift_right_arithmetic", **_FLAT),
    **_row("stop_gradient", **_FLAT, exact=True, cost="free"),
}

_IDENTITIES = {
    **_row("convert_element_type", **_IDENTITY, cheap=True),
    **_row("copy", **_IDENTITY, moves=True, cheap=True, exact=True),
    **_row("name sharding_constraint layout_constraint reshard relayout", **_IDENTITY, exact=True),
    **_row("pvary preduced reduced_vary_cast reduced_vary_cast_p", **_IDENTITY, exact=True),
    **_row("vary_unreduced_cast vary_unreduced_cast_p device_put", **_IDENTITY, exact=True),
    **_row("optimization_barrier", **_IDENTITY, exact=True, fuses=False),
}

_MOVING = {
    **_row("reshape transpose squeeze broadcast_in_dim", **_MOVES, cheap=True),
    **_row("rev slice split tile unstack", **_MOVES),
    **_row("stack pad", **_LINEAR, exact=True, cost="free"),
    **_row("concatenate", **_LINEAR, exact=True, cost="free", fuses=False),
    **_row("gather", linear_in=(FIRST,), exact=True, cost="free", fuses=False),
    **_row("dynamic_slice", linear_in=(FIRST,), exact=True, cost="free"),
    **_row("dynamic_update_slice", linear_in=(range(2),), exact=True, cost="free", fuses=False),
    **_row("scatter", linear_in=(_UPDATED,), exact=True, cost="free", fuses=False),
    **_row("iota", flat=True, cost="free"),
    **_row("bitcast_convert_type", flat=True, cost="free"),
    **_row("sort top_k", **_PIECEWISE, fuses=False),
}

_COMBINING = {
    **_row("reduce_sum", **_LINEAR, reduces=True, accumulates=True, cost="operand"),
    **_row("reduce_max reduce_min", **_PIECEWISE, reduces=True, cost="operand"),
    **_row("reduce_prod", reduces=True, cost="operand"),
    **_row("reduce_and reduce_or reduce_xor", flat=True, reduces=True, cost="operand"),
    **_row("argmax argmin", flat=True, reduces=True, cost="operand", fuses=False),
    **_row("reduce", combines=True, cost="operand", fuses=False),
    **_row("cumsum", **_LINEAR, cumulative=True, accumulates=True, cost="operand", fuses=False),
    **_row("cummax cummin", **_PIECEWISE, cumulative=True, cost="operand", fuses=False),
    **_row("cumlogsumexp", cumulative=True, accumulates=True, cost="operand", fuses=False),
    **_row("cumprod", cumulative=True, cost="operand", fuses=False),
    **_row("reduce_window_sum", **_LINEAR, cost="windows", fuses=False),
    **_row("reduce_window_max reduce_window_min", **_PIECEWISE, cost="windows", fuses=False),
    **_row("reduce_window select_and_scatter", combines=True, cost="windows", fuses=False),
    **_row("select_and_scatter_add", linear_in=(FIRST,), cost="windows", fuses=False),
    **_row("select_and_gather_add", linear_in=(FIRST,), cost="windows", exact=True, fuses=False),
    **_row("scatter-add scatter-sub", linear_in=(_UPDATED,), accumulates=True, **_WRITES),
    **_row("scatter-mul", linear_in=(FIRST,), **_WRITES),
    **_row("scatter-min scatter-max", piecewise_linear_in=(_UPDATED,), exact=True, **_WRITES),
}

_ALGEBRA = {
    **_row("dot_general conv_general_dilated", linear_in=EACH, accumulates=True, cost="product", fuses=False),
    **_row("ragged_dot_general", linear_in=EACH, accumulates=True),
    **_row("triangular_solve", linear_in=(SECOND,), accumulates=True, fuses=False),
    **_row("tridiagonal_solve", linear_in=(range(3, 4),), accumulates=True),
    **_row("fft", **_LINEAR, accumulates=True, fuses=False),
    **_row("cholesky eigh lu qr svd", accumulates=True, fuses=False),
    **_row("householder_product custom_linear_solve", accumulates=True),
}

_COLLECTIVES = {
    **_row("psum psum_invariant unreduced_psum", **_LINEAR, accumulates=True),
    **_row("reduce_scatter unreduced_reduce_scatter", **_LINEAR, accumulates=True),
    **_row("all_gather all_gather_invariant all_gather_reduced", **_LINEAR, exact=True),
    **_row("all_to_all ppermute pbroadcast pbroadcast_dynamic", **_LINEAR, exact=True),
    **_row("pmax pmin unreduced_pmax unreduced_pmin", **_PIECEWISE),
}

_EFFECTS = {
    **_row("random_seed random_wrap random_unwrap random_split random_fold_in", random=True, cost="free"),
    **_row("random_bits", random=True, cost="free", fuses=False),
    **_row("random_gamma rng_bit_generator rng_uniform", random=True),
    **_row("threefry2x32", fuses=False),
    **_row("get swap freeze", exact=True, cost="free"),
    **_row("new_ref debug_callback debug_print pure_callback io_callback", cost="free"),
    **_row("addupdate", exact=True),
    **_row("funcprop_layer", exact=True, cost="free"),
}

TABLE: Mapping[str, Facts] = {
    **_ELEMENTWISE,
    **_IDENTITIES,
    **_MOVING,
    **_COMBINING,
    **_ALGEBRA,
    **_COLLECTIVES,
    **_EFFECTS,
}

# Primitives of which the table says nothing.
OPAQUE = (
    # Known by their bodies alone.
    CONTROL_FLOW
    | CUSTOM_RULES
    | {"call", "call_hi_primitive", "composite", "custom_lin", "custom_vmap_call", "eval_jaxpr"}
    | {"linear_call", "remat_opt", "run_state", "shard_map", "stage", "xla_metadata_call"}
    # Computed elsewhere, or by an algorithm in which operands enter in no simple way.
    | {"polynomial"}
    | {"approx_top_k", "eig", "ffi_call", "hessenberg", "schur", "tridiagonal"}
    # About the devices around them, or about where values are kept.
    | {"axis_index", "inspect_sharding", "ragged_all_to_all", "with_memory_space_constraint"}
    # References, boxes, logs and tokens: order is their meaning.
    | {"accum_grad_in_ref", "after_all", "box_get", "box_set", "check", "create_token", "dce_sink", "empty2"}
    | {"empty_ref", "free_ref", "log_extend", "log_read", "new_box", "new_log", "program_order", "tie"}
    # Types whose entries are no numbers.
    | {"from_edtype", "to_edtype"}
)
