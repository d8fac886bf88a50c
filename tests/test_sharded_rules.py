"""A batch spread over eight devices: gradients are exact, rules fire, and no more is moved than by JAX."""

from __future__ import annotations

import functools
import math
import re
from collections import Counter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from sharded_cases import CASES, Case

import funcprop as fp
from funcprop._jax import hlo

MESHES = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
SINGLE_NUMBERS = 64  # bytes of collectives that are of no account: losses and counts
AUTO_ONLY = ("embedding", "dropout")  # JAX itself asks for the layout of their results


def nbytes(types: str) -> int:
    """Bytes of the arrays that an instruction makes; all that matter are float64."""
    shapes = re.findall(r"\[([\d,]*)\]", types)
    return sum(8 * math.prod(map(int, filter(None, sizes.split(",")))) for sizes in shapes)


def collectives(text: str) -> Counter[str]:
    """Bytes that each kind of collective makes in a run of a compiled program; loops count their trips.

    But not for sums: what a loop adds up is reduced in each of its steps by XLA's CPU backend, for JAX's own
    gradients too.
    """
    computations, entry = hlo.instructions(text)
    found: Counter[str] = Counter()

    def visit(name: str, times: int) -> None:
        for instruction in computations.get(name, ()):
            kind = instruction.opcode.removesuffix("-start")
            if kind in COLLECTIVES:
                found[kind] += nbytes(instruction.type) * (1 if kind == "all-reduce" else times)
            for called in instruction.calls:
                visit(called, times * (instruction.trips or 1))

    visit(entry, 1)
    return found


class Program(NamedTuple):
    """What a compiled gradient gives, how its parts lie on the devices, and what it moves between them."""

    gradient: Any
    whole: list[bool]
    moved: Counter[str]


def arguments(made: Case, mesh: Any) -> tuple[Any, ...]:
    """Parameters on every device, the batch cut."""
    cut = NamedSharding(mesh, P(*[None] * made.axis, "data"))
    whole = NamedSharding(mesh, P())
    return jax.device_put(made.params, whole), *(jax.device_put(x, cut) for x in made.batch)


def argnums(made: Case) -> tuple[int, ...]:
    return 0, *(i for i, x in enumerate(made.batch, 1) if jnp.issubdtype(x.dtype, jnp.floating))


def on_a_mesh(kind: str) -> Any:
    return jax.make_mesh((8,), ("data",), axis_types=(MESHES[kind],))


def program(made: Case, kind: str, gradient: Any) -> Program:
    """A gradient compiled for the mesh and run."""
    mesh = on_a_mesh(kind)
    with jax.set_mesh(mesh):
        args = arguments(made, mesh)
        compiled = jax.jit(gradient).lower(*args).compile()
        result = compiled(*args)
        whole = [leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(result)]
        return Program(jax.device_get(result), whole, collectives(compiled.as_text()))


@functools.cache
def by_rules(name: str, kind: str) -> Program:
    made = CASES[name]()
    return program(made, kind, fp.grad(made.loss, argnums(made), rules=made.rules))


@functools.cache
def by_jax(name: str, kind: str) -> Program:
    made = CASES[name]()
    return program(made, kind, jax.grad(made.plain or made.loss, argnums(made)))


TAKEN = [(name, kind) for name in CASES for kind in MESHES if kind == "auto" or name not in AUTO_ONLY]
every_case = pytest.mark.parametrize(("name", "kind"), TAKEN, ids=map(" ".join, TAKEN))


@pytest.mark.sampled(6)
@every_case
def test_gradient(name, kind):
    """To rounding that of the plain function on one device."""
    made = CASES[name]()
    expected = jax.jit(jax.grad(made.plain or made.loss, argnums(made)))(made.params, *made.batch)
    actual = by_rules(name, kind).gradient
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    largest = max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(expected))
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, e, rtol=0, atol=1e-12 * max(float(jnp.max(jnp.abs(e))), 1e-2 * largest))


@pytest.mark.sampled(6)
@every_case
def test_collectives(name, kind):
    """No kind that the plain function's gradient lacks, no more bytes of any, and its layout at the end."""
    ours, theirs = by_rules(name, kind), by_jax(name, kind)
    assert ours.whole == theirs.whole
    assert theirs.moved["all-reduce"] > 0, "nothing is reduced: the batch is not spread"
    for each in COLLECTIVES:
        allowed = theirs.moved[each] + (SINGLE_NUMBERS if each == "all-reduce" else 0)
        assert ours.moved[each] <= allowed, (each, dict(ours.moved), dict(theirs.moved))


@pytest.mark.sampled(26)
@every_case
def test_rules_fire(name, kind):
    """On arrays and on their shapes."""
    made, mesh = CASES[name](), on_a_mesh(kind)
    with jax.set_mesh(mesh):
        args = arguments(made, mesh)
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), args)
        for given in (args, shapes):
            found = fp.matches(made.loss, made.rules)(*given)
            fired = {match.operator for match in found if match.reason is None}
            assert fired.issuperset(made.fires), [(match.operator, match.reason) for match in found]


@pytest.mark.parametrize("name", AUTO_ONLY)
def test_what_jax_refuses_with_explicit_axes(name):
    with pytest.raises(Exception, match="sharding") as refused:
        by_jax(name, "explicit")
    with pytest.raises(refused.type):
        by_rules(name, "explicit")


@pytest.mark.parametrize("kind", MESHES)
def test_rules_are_what_runs(kind):
    """A rule with twice the derivative doubles the gradient; that of a max-pool spares XLA's gathers."""
    tanh, mesh = fp.rules.handwritten["tanh"], on_a_mesh(kind)
    double = fp.Rule(tanh.forward, lambda *args, **static: (2 * tanh.backward(*args, **static)[0],))
    rules = fp.rules.handwritten.replace({"tanh": double})
    made = CASES["dense_and_tanh"]()
    with jax.set_mesh(mesh):
        args = arguments(made, mesh)
        doubled, plain = (jax.jit(g)(*args) for g in (fp.grad(made.loss, rules=rules), jax.grad(made.loss)))
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, 2 * e, rtol=1e-12), doubled, plain)
    assert by_jax("max_pool", kind).moved["all-gather"] > 0
    for name in ("max_pool", "relu_and_max_pool", "conv_and_max_pool"):
        assert by_rules(name, kind).moved["all-gather"] == 0, name
