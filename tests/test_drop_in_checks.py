"""JAX's own checks, of NaNs, leaks and errors, and its settings, around a gradient and inside of one."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drop_in import assert_as_jax
from jax import lax
from jax.experimental import checkify

S, X = jnp.array(2.5), jnp.linspace(-1.0, 2.0, 12).reshape(3, 4)
IMAGE, KERNEL = jnp.sin(jnp.arange(72.0)).reshape(1, 6, 6, 2), jnp.cos(jnp.arange(54.0)).reshape(3, 3, 2, 3)
WEIGHTS = jnp.cos(jnp.arange(16.0)).reshape(4, 4) / 2


def pooled(x):
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")


def recurrent(x):
    return lax.scan(lambda c, v: (jnp.tanh(c @ WEIGHTS + v), c), x[0], x)[0]


# --- checks -----------------------------------------------------------------------------------


def within(context, fun, *args):
    def program(t):
        with context():
            return t.value_and_grad(fun)(*args)

    return program


def checked(x):
    checkify.check(x < 1, "x is too large: {x}", x=x)
    return jnp.tanh(x)


def known_at_trace_time(x):
    with jax.ensure_compile_time_eval():
        table = jnp.arange(3.0) * 2
        n = int(table.sum())
        if table[1] > 0:
            n += 1
        assert isinstance(table, jax.Array)
        assert not isinstance(table, jax.core.Tracer)
    return jnp.tanh(x) * n


def differentiated_at_trace_time(x):
    with jax.ensure_compile_time_eval():
        y = jnp.tanh(x)
    return y * 2


def error_of(checking, fun, *args):
    """The text of the first error that `checkify` finds, and the result beside it."""
    error, value = checkify.checkify(fun, errors=checking)(*args)
    return error.get() or "", value


CHECKS = {
    "debug_nans finds none": within(lambda: jax.debug_nans(True), jnp.tanh, S),
    "debug_infs finds none": within(lambda: jax.debug_infs(True), jnp.tanh, S),
    "checking_leaks finds none": within(jax.checking_leaks, lambda x: jnp.tanh(x) * jnp.exp(x), S),
    "checking_leaks finds none under jit": lambda t: within(
        jax.checking_leaks, lambda x: jax.jit(lambda x: jnp.tanh(x) * jnp.exp(x))(x), S
    )(t),
    "checkify": lambda t: error_of(checkify.user_checks, t.grad(checked), S),
    "checkify of a jitted gradient": lambda t: error_of(checkify.user_checks, jax.jit(t.grad(checked)), S),
    "checkify passes": lambda t: error_of(checkify.user_checks, t.value_and_grad(checked), S / 5),
    "checkify of NaNs": lambda t: error_of(
        checkify.nan_checks, jax.jit(t.grad(lambda x: jnp.tanh(jnp.log(x)))), -S
    )[0],
    "checkify of indices": lambda t: error_of(
        checkify.index_checks, t.grad(lambda x, i: jnp.tanh(x)[i]), X[0], 7
    )[0][:20],
    "checkify inside": lambda t: t.grad(lambda x: checkify.checkify(checked)(x)[1])(S),
    "ensure_compile_time_eval": lambda t: t.grad(known_at_trace_time)(S),
    "ensure_compile_time_eval under jit": lambda t: jax.jit(t.grad(known_at_trace_time))(S),
    "ensure_compile_time_eval of a differentiated value": lambda t: t.grad(differentiated_at_trace_time)(S),
    "ensure_compile_time_eval outside": within(jax.ensure_compile_time_eval, jnp.tanh, S),
}


@pytest.mark.sampled(7)
@pytest.mark.parametrize("program", CHECKS.values(), ids=CHECKS)
@pytest.mark.usefixtures("small_heap")
def test_checks(program):
    assert_as_jax(program)


FOUND = {
    "NaN": (within(lambda: jax.debug_nans(True), lambda x: jnp.log(x - 3), S), FloatingPointError),
    "NaN of the backward sweep": (
        within(lambda: jax.debug_nans(True), lambda x: jnp.sqrt(x * 0) * 0, S),
        FloatingPointError,
    ),
    "NaN of a rule": (
        within(lambda: jax.debug_nans(True), lambda x: jnp.tanh(x * jnp.nan), S),
        FloatingPointError,
    ),
    "infinity": (within(lambda: jax.debug_infs(True), lambda x: jnp.exp(x * 1e5), S), FloatingPointError),
}


@pytest.mark.parametrize(("program", "error"), FOUND.values(), ids=FOUND)
def test_checks_that_find_something(program, error):
    assert_as_jax(program, raises=error)


# --- settings ---------------------------------------------------------------------------------

HALF = {"x": IMAGE.astype(jnp.bfloat16), "w": KERNEL.astype(jnp.bfloat16)}


def half_precision(x, kernel):
    x = lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return jnp.sum(x)


def strict():
    return jax.numpy_dtype_promotion("strict")


SETTINGS = {
    "strict promotion, convolution in bfloat16": (strict, lambda x: half_precision(x, HALF["w"]), HALF["x"]),
    "strict promotion, its kernel": (strict, lambda w: half_precision(HALF["x"], w), HALF["w"]),
    "strict promotion, image of ones": (
        strict,
        lambda x: lax.conv(x, jnp.ones((1, 1, 2, 2), jnp.bfloat16), (1, 1), "SAME").sum(),
        jnp.ones((1, 1, 3, 3), jnp.bfloat16),
    ),
    "strict promotion, pool": (strict, lambda x: jnp.sum(pooled(x)), IMAGE),
    "strict promotion, scan": (strict, lambda x: jnp.sum(recurrent(x)), X),
    "strict promotion, softmax": (strict, lambda x: jnp.sum(jax.nn.softmax(x) * x), X),
    "rank promotion": (
        lambda: jax.numpy_rank_promotion("raise"),
        lambda x: jnp.sum(jnp.tanh(x @ WEIGHTS) * jax.nn.softmax(x)),
        X,
    ),
    "precision": (lambda: jax.default_matmul_precision("highest"), lambda x: jnp.sum((x @ WEIGHTS) ** 2), X),
    "device": (lambda: jax.default_device(jax.devices()[3]), lambda x: jnp.sum(jnp.tanh(x)), np.ones(3)),
    "named scope": (lambda: jax.named_scope("outer"), jax.named_call(jnp.tanh, name="inner"), S),
}


def test_a_jitted_gradient_transfers_nothing():
    def program(t):
        gradient = jax.jit(t.grad(lambda x: jnp.sum(jax.nn.softmax(x @ WEIGHTS) * pooled(IMAGE)[0, 0, 0, 0])))
        gradient(X)
        with jax.transfer_guard("disallow"):
            return gradient(X)

    assert_as_jax(program)


@pytest.mark.sampled(6)
@pytest.mark.parametrize("row", SETTINGS.values(), ids=SETTINGS)
def test_settings(row):
    context, fun, x = row
    assert_as_jax(within(context, fun, x), rtol=max(1e-12, 16 * float(jnp.finfo(x.dtype).eps)))
