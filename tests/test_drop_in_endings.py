"""What is left when a function with rules has returned, or has raised: nothing."""

from __future__ import annotations

import gc

import jax
import jax.numpy as jnp
import pytest

import funcprop as fp

BLOCKS = {
    "plain": lambda f: f,
    "jit": jax.jit,
    "checkpoint": jax.checkpoint,
    "cond": lambda f: lambda y: jax.lax.cond(True, f, f, y),
    "scan": lambda f: lambda y: jax.lax.scan(lambda c, _: (f(c), None), y, None, length=2)[0],
}


def live_bytes() -> int:
    gc.collect()
    return sum(x.nbytes for x in jax.live_arrays())


@pytest.mark.sampled(1)
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("rules", [fp.rules.default, fp.rules.handwritten], ids=lambda rules: rules.name)
@pytest.mark.usefixtures("small_heap")
def test_no_activation_stays(block, rules):
    """A traced body that JAX keeps holds the trace that was around it, which has to forget its values."""
    inside = BLOCKS[block](lambda y: jax.nn.relu(y))

    def loss(x):
        y = jnp.sin(2 * x)
        return jnp.sum(inside(y) * y)

    before = live_bytes()
    fp.grad(loss, rules=rules)(jnp.ones(4096)).block_until_ready()
    assert live_bytes() - before < 4096  # small constants at most, no array of the function's


@pytest.mark.usefixtures("small_heap")
def test_no_tracer_leaks():
    body = jax.checkpoint(lambda x: jax.nn.relu(1.0 * x))
    with jax.check_tracer_leaks():
        jax.jit(lambda x: fp.vjp(body, x)[0])(1.0)


class BrokenError(Exception):
    """Raised by the function itself."""


def test_an_exception_ends_the_trace():
    def broken(x):
        jnp.tanh(x)
        raise BrokenError

    for transformed in (fp.grad(broken), jax.jit(fp.grad(broken)), fp.with_rules(broken)):
        with pytest.raises(BrokenError):
            transformed(1.0)
        # The current trace is the one before: what is computed now has a value, and no rule looks at it.
        assert float(jnp.tanh(0.0)) == 0.0
        assert jax.grad(jnp.sin)(0.0) == 1.0


def test_an_exception_in_a_body_ends_the_trace():
    def broken(c, _):
        raise BrokenError

    with pytest.raises(BrokenError):
        fp.grad(lambda x: jax.lax.scan(broken, x, None, length=2)[0])(1.0)
    assert float(fp.grad(jnp.sin)(0.0)) == 1.0


def test_a_jit_that_counts_its_calls_in_a_scalar_reference():
    @jax.jit
    def counted(x, count):
        count[...] += 1
        return x * x

    for kind in (0, 0.0):
        count = jax.new_ref(jnp.asarray(kind))
        assert fp.grad(counted)(2.0, count) == 4.0
        assert count[...] == 1


def test_a_number_that_was_given_away_before_a_function_with_a_rule_ends():
    increment = jax.jit(lambda step: step + 1, donate_argnums=0)

    def loss(x):
        step = jnp.ones(()) + 0
        y = x + step
        increment(step)
        return jax.nn.softmax(y)[0]

    x = jnp.array([0.1, 0.5, 2.0])
    assert jnp.allclose(fp.grad(loss)(x), jax.grad(loss)(x), rtol=1e-12)
