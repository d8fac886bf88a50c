"""Custom derivative rules made inside of the function, which hold values of it, work as under `jax.grad`."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drop_in import RULE_SETS, WAYS, assert_as_jax, assert_differentiates_as_jax
from jax import lax

import funcprop as fp

S, X, T = jnp.array(0.7), jnp.array([0.3, -1.2, 2.0]), jnp.array(1.5)


def scaled(w, by):
    """A `custom_vjp` whose functions all hold `by`."""
    f = jax.custom_vjp(lambda w: jnp.tanh(w) * by)
    f.defvjp(lambda w: (f(w), w), lambda w, g: (3 * g * by * jnp.cos(w),))
    return f(w)


def scaled_forward(w, by):
    """The same as a `custom_jvp`."""

    @jax.custom_jvp
    def f(w):
        return jnp.tanh(w) * by

    @f.defjvp
    def _(primals, tangents):
        return f(*primals), 3 * tangents[0] * by * jnp.cos(primals[0])

    return f(w)


def holds_noise(w):
    return scaled(w, jnp.sin(jnp.arange(3.0)).sum())


def holds_intermediate_of_other(w, t):
    return scaled(jnp.exp(w), jnp.tanh(t * 2))


def holds_key(w):
    key = jax.random.split(jax.random.key(3))[1]
    return scaled(w, jax.random.normal(key))


def key_in_the_backward(w):
    key = jax.random.fold_in(jax.random.key(0), 7)
    f = jax.custom_vjp(jnp.tanh)
    f.defvjp(lambda w: (jnp.tanh(w), None), lambda _, g: (g * jax.random.uniform(key),))
    return f(w)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 2, 3))
def sample(key, concentration, shape, dtype):
    """As samplers have it: reparametrised, the key and what is static not differentiated."""
    noise = jax.random.uniform(key, shape, dtype)
    return jnp.where(noise < concentration, jnp.tanh(noise * concentration), noise)


@sample.defjvp
def _(key, shape, dtype, primals, tangents):
    noise = jax.random.uniform(key, shape, dtype)
    return sample(key, *primals, shape, dtype), tangents[0] * noise * jnp.cos(primals[0])


def sampled(w):
    key = jax.random.split(jax.random.key(1))[0]
    return jnp.sum(sample(key, w, (3,), jnp.float64))


def held_by_a_method(w):
    class Scale:
        def __init__(self, by):
            self.by = by

        @functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
        def __call__(self, w):
            return w * self.by

        def forward(self, w):
            return w * self.by, jnp.tanh(w)

        def backward(self, residual, g):
            return (g * residual * self.by,)

    Scale.__call__.defvjp(Scale.forward, Scale.backward)
    return Scale.__call__(Scale(jnp.cos(jnp.arange(2.0)).sum()), w)


def function_as_static_argument(w):
    @functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
    def apply(f, w):
        return f(w)

    apply.defvjp(lambda f, w: (f(w), w), lambda f, w, g: (2 * g * f(w),))
    offset = jnp.arange(3.0)[1]
    return apply(lambda w: jnp.tanh(w) + offset, w)


def python_control_flow(w):
    @jax.custom_jvp
    def f(w):
        return jnp.sin(w) if w > 0 else jnp.cos(w)

    @f.defjvp
    def _(primals, tangents):
        (w,), (t,) = primals, tangents
        return f(w), 2 * t if w > 0 else 3 * t

    return f(w)


def custom_gradient(w):
    @jax.custom_gradient
    def f(w):
        by = jnp.sum(jnp.arange(3.0))
        return jnp.tanh(w), lambda g: g * by

    return f(w) * 2


def numpy_constant(w):
    """A `custom_jvp` that returns a constant of NumPy."""

    @jax.custom_jvp
    def f(w):
        return jnp.tanh(w)

    @f.defjvp
    def _(primals, tangents):
        return np.array(2.0), tangents[0] * 5

    return f(w)


def symbolic_zeros(w, t):
    scale = jnp.exp(jnp.array(0.5))

    @jax.custom_vjp
    def f(w, t):
        return jnp.tanh(w) * t

    def forward(w, t):
        perturbed = (w.perturbed, t.perturbed)
        return f(w.value, t.value), (w.value, t.value, sum(perturbed))

    def backward(residuals, g):
        w, t, count = residuals
        return g * t * scale * count, g * w

    f.defvjp(forward, backward, symbolic_zeros=True)
    return f(w, t)


def in_a_scan(w):
    by = jnp.cumsum(jnp.arange(3.0))
    return lax.scan(lambda c, i: (scaled(c, by[i]) + w, None), w, jnp.arange(3))[0]


def in_jit_and_checkpoint(w):
    by = jnp.tanh(jnp.array(0.5))
    return jax.jit(lambda w: scaled(w, 2.0))(w) + jax.checkpoint(lambda w: jnp.tanh(scaled(w, by)))(w)


def closes_over_a_differentiated_value(w):
    by = w * 2
    f = jax.custom_vjp(lambda v: v * by)
    f.defvjp(lambda v: (v * by, None), lambda _, g: (g * by,))
    return f(w)


def of_a_root(w):
    """An implicit derivative whose function holds intermediates, of both kinds."""
    shift = jnp.arange(3.0)[1]
    by = w * 3
    return lax.custom_root(
        lambda v: v * by - w - shift,
        jnp.array(1.0),
        lambda f, v: (shift + w) / by,
        lambda g, y: y / g(1.0),
    )


def of_a_linear_solve(w):
    matrix = jnp.diag(jnp.arange(1.0, 4.0))
    return jnp.sum(
        lax.custom_linear_solve(
            lambda v: matrix @ v, w * X, lambda _, b: jnp.linalg.solve(matrix, b), symmetric=True
        )
    )


def of_a_conjugate_gradient(w):
    matrix = jnp.diag(jnp.arange(1.0, 4.0))
    return jnp.sum(jax.scipy.sparse.linalg.cg(lambda v: matrix @ v, w * X)[0] ** 2)


def stops_halfway(w):
    by = lax.stop_gradient(w) * 2
    return scaled(w, by)


def straight_through(w):
    hard = jnp.round(w)
    return jnp.tanh(w + lax.stop_gradient(hard - w))


def closure_converted(w):
    by = jnp.tanh(w)

    def f(v):
        return v * by

    converted, constants = jax.closure_convert(f, w)
    g = jax.custom_vjp(lambda v, *cs: converted(v, *cs), nondiff_argnums=())
    g.defvjp(
        lambda v, *cs: (converted(v, *cs), (v, cs)),
        lambda r, ct: (ct * 2, *(ct * 3 for _ in r[1])),
    )
    return g(w, *constants)


ROWS = {
    "custom_vjp holds noise": (holds_noise, S),
    "custom_jvp holds noise": (lambda w: scaled_forward(w, jnp.sin(jnp.arange(3.0)).sum()), S),
    "custom_vjp holds another's intermediate": (holds_intermediate_of_other, S, T),
    "custom_jvp holds another's intermediate": (lambda w, t: scaled_forward(w, jnp.tanh(t * 2)), S, T),
    "custom_vjp holds a key": (holds_key, S),
    "key in the backward": (key_in_the_backward, S),
    "nondiff_argnums with a key": (sampled, S),
    "method": (held_by_a_method, S),
    "function as a static argument": (function_as_static_argument, S),
    "python control flow": (python_control_flow, S),
    "custom_gradient": (custom_gradient, S),
    "constant of NumPy": (numpy_constant, S),
    "symbolic zeros": (symbolic_zeros, S, T),
    "in jit and checkpoint": (in_jit_and_checkpoint, S),
    "custom_root": (of_a_root, S),
    "custom_linear_solve": (of_a_linear_solve, S),
    "conjugate gradients": (of_a_conjugate_gradient, S),
    "holds a stopped gradient": (stops_halfway, S),
    "straight through": (straight_through, S),
    "closure_convert": (closure_converted, S),
    "vmap inside": (lambda w: jnp.sum(jax.vmap(lambda x: scaled(x * w, jnp.tanh(T)))(X)), S),
}


@pytest.mark.sampled(15)
@pytest.mark.parametrize("way", ["eager", "jit", "vmap"])
@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_custom_rules(row, way):
    assert_differentiates_as_jax(way, *row)


@pytest.mark.parametrize("way", [way for way in WAYS if way not in ("eager", "jit", "vmap")])
@pytest.mark.parametrize("name", ["custom_vjp holds noise", "custom_jvp holds noise", "custom_root"])
def test_every_transformation(name, way):
    assert_differentiates_as_jax(way, *ROWS[name])


# What the rules must not hold is refused as JAX refuses it.
REFUSED = {
    "a differentiated value": closes_over_a_differentiated_value,
    "a value of the scan around it": in_a_scan,
    "a value of the vmap around it": lambda w: jnp.sum(jax.vmap(lambda n: scaled(w, n * 2))(jnp.arange(3.0))),
}


@pytest.mark.parametrize("fun", REFUSED.values(), ids=REFUSED)
def test_what_jax_refuses(fun):
    assert_as_jax(lambda t: t.grad(fun)(S), raises=jax.errors.UnexpectedTracerError)


def test_rules_are_the_users():
    """A custom derivative of a function that has a rule here stays what the user wrote."""

    @jax.custom_jvp
    def tripled(x):
        return jnp.tanh(x)

    tripled.defjvp(lambda primals, tangents: (jnp.tanh(*primals), 3 * tangents[0]))
    for rules in RULE_SETS:
        assert fp.grad(lambda x: tripled(x) * 2, rules=rules)(S) == 6


def test_residuals_of_any_kind():
    """What the forward keeps reaches the backward as it is: functions, dictionaries, python numbers."""

    def loss(w):
        table = {"power": 2, "f": jax.tree_util.Partial(jnp.cos)}
        f = jax.custom_vjp(lambda w: w**2)
        f.defvjp(
            lambda w: (w**2, (w, dict(table, power=jnp.array(2.0)))),
            lambda r, g: (g * r[1]["f"](r[0]) ** r[1]["power"],),
        )
        return f(w)

    assert_as_jax(lambda t: t.value_and_grad(loss)(S))


def test_calls_of_a_custom_rule_are_as_many_as_jaxs():
    """The user's python functions run as often as under `jax.grad`, and see values of the same kind."""

    def program(t):
        calls = []

        def loss(w):
            @jax.custom_vjp
            def f(w):
                calls.append(("value", isinstance(w, jax.core.Tracer)))
                return jnp.tanh(w)

            def forward(w):
                calls.append(("forward", isinstance(w, jax.core.Tracer)))
                return jnp.tanh(w), w

            def backward(w, g):
                calls.append(("backward", isinstance(g, jax.core.Tracer)))
                return (g * w,)

            f.defvjp(forward, backward)
            return f(w) * 2

        return t.grad(loss)(S), calls, jax.jit(t.grad(loss))(S), calls

    assert_as_jax(program)
