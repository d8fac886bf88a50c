"""The table of facts about primitives, by their values and by JAX's own derivatives of them."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from primitive_examples import EXAMPLES, Example, normal

from funcprop import _jax
from funcprop.program import facts
from funcprop.program.facts import OPAQUE, TABLE, Facts, facts_of, is_linear, is_piecewise_linear

UNTRIED = {
    *(name for name, found in TABLE.items() if found.random),
    # They need an axis of devices, or a layout.
    *{"all_gather", "all_gather_invariant", "all_gather_reduced", "all_to_all", "layout_constraint"},
    *{"pbroadcast", "pbroadcast_dynamic", "pmax", "pmin", "ppermute", "preduced", "psum", "psum_invariant"},
    *{"pvary", "reduce_scatter", "reduced_vary_cast", "reduced_vary_cast_p", "relayout", "reshard"},
    *{"sharding_constraint", "unreduced_pmax", "unreduced_pmin", "unreduced_psum", "vary_unreduced_cast"},
    *{"unreduced_reduce_scatter", "vary_unreduced_cast_p"},
    # They are for whole numbers, or a part of a derivative, or change less than any tolerance shows.
    *{"and", "bitcast_convert_type", "clz", "eq_to", "igamma_grad_a", "iota", "le_to", "lt_to", "mulhi"},
    *{"nextafter", "not", "or", "population_count", "reduce_and", "reduce_or", "reduce_xor", "shift_left"},
    *{"shift_right_arithmetic", "shift_right_logical", "threefry2x32", "xor"},
    # Nothing that numbers could show is said of them.
    *{"addupdate", "custom_linear_solve", "debug_callback", "debug_print", "eigh", "freeze"},
    *{"funcprop_layer", "get", "householder_product", "io_callback", "lu", "new_ref", "pure_callback"},
    *{"qr", "reduce", "reduce_window", "select_and_scatter", "svd", "swap"},
}
# JAX has no derivative of them, or only one for indices of which no two are equal.
UNDIFFERENTIABLE = {"zeta", "scatter-mul"}
# Of JAX alone: what other packages have defined in this process is none of the table's business.
KNOWN = subprocess.run(
    [sys.executable, "-c", "from funcprop import _jax; print(*sorted(_jax.known_primitives()))"],
    capture_output=True, text=True, check=True,
).stdout.split()  # fmt: skip
TRIED = sorted(set(EXAMPLES) & set(KNOWN))


def test_every_primitive_is_classified_or_called_opaque() -> None:
    assert [name for name in KNOWN if name not in TABLE and name not in OPAQUE] == []
    assert [name for name in TABLE if name in OPAQUE] == []


def test_every_fact_is_tried_or_said_to_be_untried() -> None:
    assert [name for name in KNOWN if name in TABLE and name not in UNTRIED and name not in EXAMPLES] == []
    assert [name for name in EXAMPLES if name in UNTRIED or name not in TABLE] == []


def test_an_unknown_primitive_has_no_properties() -> None:
    unknown = Example.of("sin").eqn.replace(primitive=jax.extend.core.Primitive("unheard_of"))
    assert facts_of(unknown) == Facts()
    assert not is_linear(unknown, [0])


def named(fun: Any, *args: Any) -> list[str]:
    return [eqn.primitive.name for eqn in jax.make_jaxpr(fun)(*args).eqns]


def test_groups_have_the_names_of_this_jax() -> None:
    assert named(jax.jit(jnp.sin), 1.0) == [_jax.JIT]
    assert set(named(jax.checkpoint(jnp.sin), 1.0)) == facts.CHECKPOINTS
    forward, reverse = jax.custom_jvp(jnp.sin), jax.custom_vjp(jnp.sin)
    forward.defjvps(lambda t, y, x: t)
    reverse.defvjp(lambda x: (x, None), lambda _, g: (g,))
    assert {*named(forward, 1.0), *named(reverse, 1.0)} == facts.CUSTOM_RULES
    loops = {
        *named(lambda x: jax.lax.scan(lambda c, _: (c, None), x, None, length=2), 1.0),
        *named(lambda x: jax.lax.while_loop(lambda c: c < 0, lambda c: c, x), 1.0),
        *named(lambda x: jax.lax.cond(x < 0, jnp.sin, jnp.cos, x), 1.0)[-1:],
    }
    assert loops == facts.CONTROL_FLOW - facts.CALLS - facts.CHECKPOINTS


# --- derivatives ------------------------------------------------------------------------------


def subsets(example: Example) -> list[tuple[int, ...]]:
    """Choices of operands."""
    count = range(len(example.operands))
    return [chosen for n in count for chosen in itertools.combinations(count, n + 1)]


def others_like(operand: Any) -> Any:
    """Other numbers for an operand, far from its own."""
    moved = normal(*operand.shape)
    return moved + 1j * normal(*operand.shape) if jnp.iscomplexobj(operand) else moved


def is_affine(example: Example, chosen: Sequence[int]) -> bool:
    """Whether `f(a u + (1 − a) v) = a f(u) + (1 − a) f(v)` in some of the operands."""
    for a in (2.5, 0.25):
        u = list(example.operands)
        v = [others_like(x) if i in chosen else x for i, x in enumerate(u)]
        between = [
            a * x + (1 - a) * y if i in chosen else x for i, (x, y) in enumerate(zip(u, v, strict=True))
        ]
        expected = a * example.smooth(*u) + (1 - a) * example.smooth(*v)
        found = example.smooth(*between)
        if not np.allclose(found, expected, rtol=1e-9, atol=1e-9):
            return False
    return True


@pytest.mark.sampled(60)
@pytest.mark.parametrize("name", TRIED)
def test_operators_are_linear_in_the_operands_that_the_table_says(name: str) -> None:
    example = Example.of(name)
    if TABLE[name].flat:
        assert TABLE[name].linear_in == ()
        return
    for chosen in subsets(example):
        claimed = is_linear(example.eqn, [example.places[i] for i in chosen])
        assert is_affine(example, chosen) == claimed, chosen
    for group in TABLE[name].linear_in:
        # In the whole group there is no constant either.
        inside = [i for i, place in enumerate(example.places) if place in group]
        scaled = [3 * x if i in inside else x for i, x in enumerate(example.operands)]
        np.testing.assert_allclose(example.smooth(*scaled), 3 * example.smooth(*example.operands), rtol=1e-9)


def test_the_first_power_is_linear() -> None:
    (eqn,) = jax.make_jaxpr(lambda x: jax.lax.integer_pow(x, 1))(1.0).eqns
    assert is_linear(eqn, [0])


def curvature(example: Example, chosen: Sequence[int]) -> float:
    """The largest second derivative of a result along a line through some of the operands."""

    def along_line(t: Any) -> Any:
        moved = list(example.operands)
        for i in chosen:
            moved[i] = moved[i] + t * line[i]
        return example.smooth(*moved)

    line = [others_like(x) for x in example.operands]
    slope = lambda t: jax.jvp(along_line, (t,), (1.0,))[1]  # noqa: E731
    return float(jnp.abs(jax.jvp(slope, (0.0,), (1.0,))[1]).max())


@pytest.mark.sampled(60)
@pytest.mark.parametrize("name", sorted(set(TRIED) - UNDIFFERENTIABLE))
def test_operators_are_piecewise_linear_where_they_have_no_curvature(name: str) -> None:
    example = Example.of(name)
    if TABLE[name].flat:
        return
    for chosen in subsets(example):
        claimed = is_piecewise_linear(example.eqn, [example.places[i] for i in chosen])
        assert (curvature(example, chosen) < 1e-12) == claimed, chosen


def test_the_absolute_value_of_a_complex_number_is_curved() -> None:
    (eqn,) = jax.make_jaxpr(jnp.abs)(1j).eqns
    assert not is_piecewise_linear(eqn, [0])


@pytest.mark.parametrize("name", sorted(set(TRIED) - UNDIFFERENTIABLE))
def test_flat_operators_are_those_without_a_derivative(name: str) -> None:
    example = Example.of(name)
    results = [jnp.issubdtype(v.aval.dtype, jnp.inexact) for v in example.eqn.outvars]
    if not any(results):
        assert TABLE[name].flat
        return
    primals = tuple(example.operands)
    _, pushed = jax.jvp(example.smooth, primals, tuple(map(others_like, primals)))
    assert bool((pushed == 0).all()) == TABLE[name].flat


# --- places -----------------------------------------------------------------------------------


def is_elementwise(example: Example) -> bool:
    """Whether a change of one entry of an operand changes no other entry of the one result."""
    (result, *others) = example.fun(*example.operands)
    if others or any(x.shape != result.shape for x in example.operands):
        return False
    for i, x in enumerate(example.operands):
        for place in np.ndindex(x.shape):
            # 0.99 keeps arguments where the functions are defined; -x changes what compares them.
            for changed in (x.at[place].multiply(0.99), x.at[place].multiply(-1)):
                operands = [changed if k == i else y for k, y in enumerate(example.operands)]
                (found,) = example.fun(*operands)
                same = np.isclose(found, result, rtol=1e-12, atol=0, equal_nan=True)
                same[place] = True
                if not same.all():
                    return False
    return True


@pytest.mark.sampled(60)
@pytest.mark.parametrize("name", TRIED)
def test_elementwise_operators_keep_entries_apart(name: str) -> None:
    assert is_elementwise(Example.of(name)) == TABLE[name].elementwise


@pytest.mark.parametrize("name", TRIED)
def test_moves_commute_with_functions_of_entries(name: str) -> None:
    example, found = Example.of(name), TABLE[name]
    one = len(example.eqn.invars) == 1 and not any(map(jnp.iscomplexobj, example.operands))
    if not one:
        assert not found.moves
        return
    (x,) = example.operands
    pairs = zip(example.fun(jnp.exp(x)), map(jnp.exp, example.fun(x)), strict=True)
    commutes = all(np.array_equal(a, b) for a, b in pairs if a.dtype == x.dtype)
    # So do those that choose entries by comparing them; what they choose from reversed signs is another.
    chooses = found.flat or not is_affine(example, (0,))
    renames = found.identity and not found.moves
    assert (commutes and not chooses and not renames) == found.moves


@pytest.mark.parametrize("name", [name for name in TRIED if TABLE[name].identity])
def test_identities_give_back_their_operands(name: str) -> None:
    example = Example.of(name)
    for given, found in zip(example.operands, example.fun(*example.operands), strict=True):
        np.testing.assert_array_equal(found, given)


@pytest.mark.parametrize("name", TRIED)
def test_exact_operators_round_nothing(name: str) -> None:
    example = Example.of(name)
    results = np.asarray(example.smooth(*example.operands))
    if name in ("convert_element_type", "reduce_precision") or results.size == 0:
        return  # They round to what their parameters say; those have no floating-point results.
    # All operands are numbers of float32. What is computed of them in float64 mostly is none.
    fits = np.array_equal(results, results.astype(np.float32))
    assert fits == TABLE[name].exact


@pytest.mark.parametrize("name", [name for name in TRIED if TABLE[name].reduces])
def test_reductions_remove_their_axes(name: str) -> None:
    eqn = Example.of(name).eqn
    kept = [n for axis, n in enumerate(eqn.invars[0].aval.shape) if axis not in eqn.params["axes"]]
    assert list(eqn.outvars[0].aval.shape) == kept


@pytest.mark.parametrize("name", [name for name in TRIED if TABLE[name].cumulative])
def test_cumulative_operators_read_what_stands_before(name: str) -> None:
    example = Example.of(name)
    axis, (x,) = example.eqn.params["axis"], example.operands
    (full,), (part,) = example.fun(x), example.fun(jnp.take(x, jnp.arange(2), axis))
    np.testing.assert_allclose(jnp.take(full, jnp.arange(2), axis), part, rtol=1e-12)
    assert full.shape == x.shape


# XLA counts a conversion, and the places to which its CPU backend's loop writes.
@pytest.mark.parametrize(
    "name",
    [n for n in TRIED if TABLE[n].cost == "free" and n not in ("convert_element_type", "scatter")],
)
def test_what_is_free_has_no_arithmetic_in_xla(name: str) -> None:
    example = Example.of(name)
    call = _jax.one_equation(example.eqn)
    shapes = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in example.eqn.invars]
    assert not _jax.counted_flops(jax.jit(call).lower(*shapes).compile())
