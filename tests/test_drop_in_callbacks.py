"""Calls back to python and prints happen as often, and in the order, as under `jax.grad`."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drop_in import assert_as_jax, printed
from jax import lax
from jax.experimental import io_callback


def callbacks_in_order(t):
    seen = []

    def note(name):
        return lambda value: seen.append((name, np.asarray(value).tolist()))

    def loss(x, y):
        jax.debug.callback(note("x"), x)
        jax.debug.callback(note("y"), y)
        z = x * 2 if jnp.any(y > 0) else x
        jax.debug.callback(note("z"), z, ordered=True)
        jax.debug.callback(note("tanh"), jnp.tanh(z), ordered=True)
        return jnp.sum(jnp.tanh(z))

    gradient = t.grad(loss)(1.0, 5.0)
    jax.effects_barrier()
    return gradient, seen


def prints_in_order(t):
    def loss(x, y):
        print("python sees", y)
        jax.debug.print("x = {}", x)
        jax.debug.print("y = {y:.1f}", y=y)
        x = jnp.tanh(x)
        print("positive" if x > 0 else "negative")
        jax.debug.print("tanh = {:.3f}", x, ordered=True)
        return x * y

    with printed() as lines:
        value = t.value_and_grad(loss)(jnp.array(0.5), jnp.array(2.0))
    return value, lines


def io_callbacks(t):
    seen = []

    def note(x):
        seen.append(x.tolist())
        return np.float64(len(seen))

    def loss(x, y):
        y = io_callback(note, jax.ShapeDtypeStruct((), "float64"), y, ordered=True) + y
        y = y + io_callback(note, jax.ShapeDtypeStruct((), "float64"), lax.stop_gradient(x))
        return jnp.tanh(x) * y if y > 0 else x

    return t.value_and_grad(loss)(jnp.array(0.5), jnp.array(2.0)), seen


def pure_callbacks(t):
    calls = []

    def host(x):
        calls.append(1)
        return np.sin(x)

    def loss(x, y):
        at_once = jax.pure_callback(host, jax.ShapeDtypeStruct((), "float64"), y)
        return jnp.tanh(x) * at_once * (2 if at_once > 0 else 1)

    return t.grad(loss)(jnp.array(0.5), jnp.array(2.0)), len(calls)


def prints_of_a_body(t):
    def loss(x):
        def body(c, i):
            jax.debug.print("step {} {:.4f}", i, c, ordered=True)
            return jnp.tanh(c), None

        return lax.scan(body, x, jnp.arange(3))[0]

    with printed() as lines:
        gradient = t.grad(loss)(jnp.array(2.5)), jax.jit(t.grad(loss))(jnp.array(2.5))
    return gradient, lines


PROGRAMS = [callbacks_in_order, prints_in_order, io_callbacks, pure_callbacks, prints_of_a_body]


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
def test_callbacks(program):
    assert_as_jax(program)


def test_callbacks_without_jit():
    def disabled(t):
        with jax.disable_jit():
            return callbacks_in_order(t)

    assert_as_jax(disabled)
