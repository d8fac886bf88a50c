"""A function as data: when two programs are the same, what is data in them, and their derivatives."""

from __future__ import annotations

import gc
import weakref
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.nn import relu, softmax

import funcprop as fp
from funcprop import _jax
from funcprop.program.program import Program

X = jnp.array([0.3, -1.2, 2.0])
MATRIX = jnp.arange(9.0).reshape(3, 3) / 10
TABLE = jnp.array([1.0, 2.0, 3.0])


def traced(fun, *args) -> Program:
    """The program of a function that JAX has never seen."""
    return Program.of(lambda *values: fun(*values), *(args or (X,)))


def same(f, g, *args) -> bool:
    a, b = traced(f, *args).structure, traced(g, *args).structure
    assert a != b or hash(a) == hash(b)
    return a == b


def close(actual, expected) -> None:
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-12), actual, expected)


# --- the same, or another ---------------------------------------------------------------------


def named_one(x):
    return jnp.tanh(x)


def named_two(y):
    return jnp.tanh(y)


def looped(factor, length=3):
    return lambda x: jax.lax.scan(lambda c, _: (jnp.tanh(c) * factor, c), x, None, length=length)


def branched(factor):
    return lambda x: jax.lax.cond(x[0] > 0, lambda x: x * factor, jnp.sin, x)


SAME = {
    "variables": (lambda x: jnp.sin(x) * 2.0, lambda y: jnp.sin(y) * 2.0),
    "names of nested jits": (jax.jit(named_one), jax.jit(named_two)),
    "captured arrays": (lambda x: x * TABLE, lambda x: x * X),
    "arrays captured by a jit": (jax.jit(lambda x: x * TABLE), jax.jit(lambda x: x * X)),
    "arrays captured in a loop": (looped(TABLE), looped(X)),
    "arrays captured in a branch": (branched(TABLE), branched(X)),
    "dictionaries": (lambda x: {"a": x, "b": x}, lambda x: {"b": x, "a": x}),
    "not a number": (lambda x: x * np.nan, lambda x: x * np.nan),
    "policies": (
        jax.checkpoint(jnp.sin, policy=jax.checkpoint_policies.save_only_these_names("a", "b")),
        jax.checkpoint(jnp.sin, policy=jax.checkpoint_policies.save_only_these_names("b", "a")),
    ),
    "custom derivatives": (
        lambda x: relu(softmax(x)),
        lambda x: relu(softmax(x)),
    ),
}

DIFFERENT = {
    "a literal": (lambda x: x * 2.0, lambda x: x * 3.0),
    "an int and a float": (lambda n: n + 1, lambda n: n + 1.0, jnp.ones(1, int)),
    "weak and strong types": (lambda x: x[0] * 0 + 1, lambda x: x[0] * 0 + jnp.float64(1), jnp.ones(1, int)),
    "the sign of zero": (lambda x: jnp.copysign(x, 0.0), lambda x: jnp.copysign(x, -0.0)),
    "True and 1": (lambda x: {"a": jnp.array(True), "x": x}, lambda x: {"a": jnp.array(1), "x": x}),
    "a parameter": (lambda x: jnp.cumsum(x), lambda x: jax.lax.cumsum(x, reverse=True)),
    "the type of a parameter": (lambda x: x.astype("float32"), lambda x: x.astype("float16")),
    "operators": (jnp.sin, jnp.cos),
    "operands": (lambda x: x - x[0], lambda x: x[0] - x),
    "the body of a jit": (jax.jit(lambda x: x * 2.0), jax.jit(lambda x: x * 3.0)),
    "the body of a loop": (looped(2.0), looped(3.0)),
    "how often": (looped(2.0), looped(2.0, 4)),
    "the shape of a captured array": (lambda x: x * TABLE, lambda x: x * TABLE[0]),
    "an array and a number": (lambda x: x * TABLE[0], lambda x: x * 1.0),
    "a branch": (branched(2.0), branched(3.0)),
    "the results": (lambda x: {"a": x}, lambda x: [x]),
    "which result": (lambda x: (jnp.sin(x), jnp.cos(x)), lambda x: (jnp.cos(x), jnp.sin(x))),
    "a policy": (
        jax.checkpoint(jnp.sin, policy=jax.checkpoint_policies.save_only_these_names("a")),
        jax.checkpoint(jnp.sin, policy=jax.checkpoint_policies.save_only_these_names("b")),
    ),
    "a callback": (
        lambda x: jax.pure_callback(np.sin, x, x, vmap_method="sequential"),
        lambda x: jax.pure_callback(np.cos, x, x, vmap_method="sequential"),
    ),
}


@pytest.mark.parametrize("name", SAME)
def test_the_same_program(name: str) -> None:
    assert same(*SAME[name])


@pytest.mark.parametrize("name", DIFFERENT)
def test_another_program(name: str) -> None:
    assert not same(*DIFFERENT[name])


def test_types_of_arguments_are_part_of_it() -> None:
    structures = {
        traced(jnp.sin, x).structure for x in (X, X.astype("float32"), X[:2], 1.0, jnp.asarray(1.0))
    }
    assert len(structures) == 4  # a python float is what jnp.asarray makes of it


def test_a_program_is_what_the_function_was() -> None:
    """Globals, attributes and default arguments are read when it is traced; later changes do not matter."""
    table = {"scale": 2.0, "array": TABLE}

    def f(x):
        return x * table["scale"] + table["array"]

    before = traced(f)
    table["scale"], table["array"] = 5.0, -TABLE
    close(before(X), X * 2 + TABLE)
    close(traced(f)(X), X * 5 - TABLE)


# --- what is data -----------------------------------------------------------------------------


def hiding(array, factor=2.0):
    """A function that holds an array in every place where JAX lets it be hidden."""

    @jax.jit
    def inner(x):
        return jnp.tanh(x * array)

    def f(x):
        x = jax.lax.scan(lambda c, _: (inner(relu(c)) * factor, c), x, None, length=2)[0]
        x = jax.lax.while_loop(lambda c: jnp.sum(inner(c)) < 1, lambda c: c + inner(c) ** 2 + 1, x)
        x = x + jax.lax.cond(x[0] > 0, lambda: inner(x), lambda: x)
        return jnp.sum(jax.checkpoint(inner)(x) + jax.jit(jax.jit(inner))(x) + softmax(x))

    return f


def test_nothing_is_hidden_inside() -> None:
    f, program = hiding(TABLE), traced(hiding(TABLE))
    close(program(X), f(X))
    close(jax.jit(program)(X), f(X))
    assert not any(
        _jax.constants(body) for eqn in _jax.equations(program.jaxpr) for _, body in _jax.sub_jaxprs(eqn)
    )
    assert len(program.constants) == 1
    assert same(hiding(TABLE), hiding(TABLE + 1))
    assert not same(hiding(TABLE), hiding(TABLE, 3.0))


def test_equal_programs_share_a_compilation() -> None:
    traces = []
    run = jax.jit(lambda program, x: (traces.append(program), program(x))[1])
    for scale in range(1, 4):
        array = TABLE * scale
        close(run(traced(hiding(array)), X), hiding(array)(X))
        close(traced(hiding(array)).compiled(X), hiding(array)(X))
    assert len(traces) == 1


@pytest.mark.usefixtures("small_heap")
def test_nothing_is_kept_alive() -> None:
    @jax.custom_vjp
    def halved(x, array):
        return x * array

    halved.defvjp(lambda x, array: (halved(x, array), array), lambda array, g: (g * array / 2, None))
    references = []
    for scale in range(3):
        array = TABLE * scale + 1

        def f(x, array=array):
            return jnp.sum(halved(looped(array)(x)[0], array) ** 2)

        program = traced(f)
        program.compiled(X).block_until_ready()
        traced(jax.grad(f)).compiled(X).block_until_ready()
        traced(hiding(array)).compiled(X).block_until_ready()
        references += [weakref.ref(f), weakref.ref(array)]
        del f, array, program
    gc.collect()
    assert [r() for r in references] == [None] * 6


def test_it_is_a_pytree() -> None:
    """Through vmap over its constants, as what a loop carries, and as the result of branches and of jit."""

    def scaled(by):
        return Program.of(lambda x: x * by, X)

    close(jax.vmap(lambda by: scaled(by)(X))(MATRIX), X * MATRIX)
    stacked = jax.vmap(scaled)(MATRIX)
    close(jax.vmap(lambda program: program(X))(stacked), X * MATRIX)
    last, _ = jax.lax.scan(lambda program, by: (scaled(by), None), scaled(TABLE), MATRIX)
    close(last(X), X * MATRIX[-1])
    for flag in (True, False):
        chosen = jax.lax.cond(flag, lambda: scaled(TABLE), lambda: scaled(MATRIX[0]))
        close(chosen(X), X * (TABLE if flag else MATRIX[0]))
    made = jax.jit(scaled)
    close([made(TABLE)(X), made(MATRIX[0])(X)], [X * TABLE, X * MATRIX[0]])
    close(jax.grad(lambda by: jnp.sum(scaled(by)(X)))(TABLE), X)


def test_numbers_as_results() -> None:
    program = traced(lambda x: (1.0, 2, x))
    one, two, x = jax.jit(program)(X)
    assert (one.dtype, one.weak_type, two.dtype) == (np.dtype(float), True, np.dtype(int))
    close((one, two, x), (1.0, 2, X))


# --- derivatives ------------------------------------------------------------------------------


@jax.custom_jvp
def straight_through(x):
    return jnp.round(x)


straight_through.defjvp(lambda primals, tangents: (straight_through(*primals), tangents[0]))


@jax.custom_vjp
def clipped(x, low, by):
    return jnp.maximum(x, low) * by


clipped.defvjp(
    lambda x, low, by: (clipped(x, low, by), (x, by)),
    lambda saved, g: (g * saved[1] * jnp.cos(saved[0]), None, None),
)

CUSTOM = {
    "relu": lambda x: jnp.sum(relu(x) ** 3),
    "softmax": lambda x: jnp.sum(softmax(x) * TABLE),
    "in a loop": lambda x: jnp.sum(looped(softmax(TABLE))(relu(x))[0]),
    "in a jit": lambda x: jnp.sum(jax.jit(softmax)(x) ** 2),
    "straight through": lambda x: jnp.sum(straight_through(jnp.sin(x)) * x**2),
    "of integers": lambda x: jnp.sum(clipped(x, 1, TABLE)),
    "logsumexp": lambda x: jax.nn.logsumexp(x * TABLE),
}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", CUSTOM)
def test_custom_derivatives_survive(name: str) -> None:
    f, program = CUSTOM[name], traced(CUSTOM[name])
    orders = [jax.grad, lambda f: jax.grad(lambda x: jnp.sum(jax.grad(f)(x) ** 2))]
    if name != "of integers":  # JAX has no forward mode there
        orders += [jax.hessian, lambda f: jax.jacfwd(jax.hessian(f))]
    for derivative in orders:
        expected = jax.jit(derivative(f))(X)
        close(derivative(program)(X), expected)
        close(jax.jit(derivative(program))(X), expected)
    close(jax.vmap(jax.grad(program))(MATRIX), jax.vmap(jax.grad(f))(MATRIX))


def test_a_custom_vjp_has_forward_mode() -> None:
    """Its tangent map is the transpose of its backward: here `v ↦ TABLE cos(x) v`."""
    program = traced(lambda x: clipped(x, 1, TABLE))
    close(jax.jvp(program, (X,), (TABLE,))[1], TABLE**2 * jnp.cos(X))
    close(jax.jacfwd(program)(X), jnp.diag(TABLE * jnp.cos(X)))
    pushed = traced(lambda x: jax.jvp(lambda x: clipped(x, 1, TABLE), (x,), (TABLE,))[1])
    close(pushed(X), TABLE**2 * jnp.cos(X))


def with_rule(slope, second=None):
    """The identity with the derivative `slope(x)`, and that of the slope itself if given."""
    f = jax.custom_jvp(lambda x: x)
    g = jax.custom_jvp(slope)
    g.defjvp(lambda p, t: (slope(*p), t[0] * (second(*p) if second else jax.grad(jnp.sum)(*p))))
    f.defjvp(lambda p, t: (p[0], g(p[0]) * t[0]))
    return lambda x: jnp.sum(f(x))


def test_rules_are_part_of_the_program() -> None:
    """Functions of the same value and other derivatives, also of the second order alone."""
    assert same(with_rule(jnp.sin), with_rule(jnp.sin))
    assert not same(with_rule(jnp.sin), with_rule(jnp.cos))
    assert same(with_rule(jnp.sin, jnp.exp), with_rule(jnp.sin, jnp.exp))
    assert not same(with_rule(jnp.sin, jnp.exp), with_rule(jnp.sin, jnp.zeros_like))
    for second in (jnp.exp, jnp.zeros_like):
        f = with_rule(jnp.sin, second)
        close(jax.hessian(traced(f))(X), jnp.diag(second(X)))


def test_arrays_of_a_rule_are_data() -> None:
    def f_of(array):
        @jax.custom_jvp
        def f(x):
            return x * 1.0

        f.defjvp(lambda p, t: (f(*p), jnp.sin(p[0] * array) * t[0]))
        return lambda x: jnp.sum(f(x))

    assert same(f_of(TABLE), f_of(X))
    traces = []
    run = jax.jit(lambda program, x: (traces.append(program), jax.grad(program)(x))[1])
    close([run(traced(f_of(a)), X) for a in (TABLE, X)], [jnp.sin(X * TABLE), jnp.sin(X * X)])
    assert len(traces) == 1
    with pytest.raises(TypeError, match="f closes over arrays, and is differentiated more than 2 times"):
        jax.grad(lambda x: jnp.sum(jax.jacfwd(jax.jacfwd(jax.grad(traced(f_of(TABLE)))))(x)))(X)


def test_a_rule_that_calls_its_function_is_read_once() -> None:
    read = []

    @jax.custom_jvp
    def f(x):
        return jnp.exp(x)

    @f.defjvp
    def rule(primals, tangents):
        read.append(primals)
        return f(*primals), f(*primals) * tangents[0]

    program = traced(lambda x: jnp.sum(f(f(x))))
    assert len(read) == 1
    close(jax.hessian(program)(X), jax.hessian(lambda x: jnp.sum(jnp.exp(jnp.exp(x))))(X))


def test_a_rule_is_read_with_the_function() -> None:
    scale = {"by": 2.0}

    @jax.custom_jvp
    def f(x):
        return x * 1.0

    f.defjvp(lambda p, t: (f(*p), t[0] * scale["by"]))
    before = traced(lambda x: jnp.sum(f(x)))
    scale["by"] = 7.0
    close(jax.grad(before)(X), jnp.full(3, 2.0))
    close(jax.grad(traced(lambda x: jnp.sum(f(x))))(X), jnp.full(3, 7.0))
    assert not same(before, lambda x: jnp.sum(f(x)))


def test_a_rule_that_holds_an_intermediate_value() -> None:
    """It has a derivative only while the function runs: in a program of the derivative, not after it."""

    def loss(w):
        noise = jnp.sin(jnp.arange(3.0))
        f = jax.custom_vjp(lambda w: w * noise.sum())
        f.defvjp(lambda w: (f(w), None), lambda _, g: (g * noise.sum(),))
        return jnp.sum(f(w) ** 2)

    program = traced(loss)
    assert not program.structure.differentiable
    close(program(X), loss(X))
    with pytest.raises(TypeError, match=r"custom_vjp_call cannot be differentiated here: CustomVJPExc"):
        jax.grad(program)(X)
    slope = traced(jax.grad(loss))
    close(slope(X), jax.grad(loss)(X))
    assert traced(jnp.sin).structure.differentiable


def test_rules_still_fire_in_it() -> None:
    """An activation before a pool is recognised by its derivative, and a layer by its mark."""

    def model(x):
        x = relu(jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID"))
        return fp.layers.dense(x.reshape(2, -1), jnp.ones((8, 3)))

    x = jnp.ones((2, 4, 4, 2))
    program = traced(model, x)

    def found(f):
        return [(match.operator, match.reason) for match in fp.matches(f, fp.rules.handwritten)(x)]

    assert found(jax.jit(program)) == found(jax.jit(model)) != []


# --- messages ---------------------------------------------------------------------------------


def test_messages() -> None:
    program = Program.of(named_one, X)
    assert repr(program) == "Program(named_one: 1 equations, 0 constants)"
    with pytest.raises(TypeError, match=r"named_one was traced for .*, not for"):
        program([X])
    with pytest.raises(jax.errors.ConcretizationTypeError) as raised:
        Program.of(lambda x: x if x > 0 else -x, 1.0)
    assert any("python control flow" in note for note in raised.value.__notes__)
    with pytest.raises(TypeError, match="is int, not a function"):
        Program.of(3, X)


def test_other_types() -> None:
    program = Program.again(lambda x: x * TABLE[0], X)
    assert program.takes(X)
    assert program.takes(jax.ShapeDtypeStruct((3,), float))
    assert not program.takes(X[:2])
    assert program.at(-X) is program
    close(program.at(MATRIX)(MATRIX), MATRIX * TABLE[0])
    assert (program.arguments, program.results) == (
        (jax.ShapeDtypeStruct((3,), float),),
        jax.ShapeDtypeStruct((3,), float),
    )
    through: Any = jax.tree.map(lambda x: x, program)
    with pytest.raises(TypeError, match=r"was traced for arguments of the types .*3.* inside of `jit`"):
        through.at(MATRIX)
