"""Mutable references (`jax.Ref`) as arguments: as under `jax.grad`, or refused in one line."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import funcprop as fp

stop = lax.stop_gradient


def written(x, ref):
    ref[...] = stop(2 * x)
    return jnp.sum(x**2)


def read(x, ref):
    return jnp.sum(x * ref[...])


def read_and_written(x, ref):
    y = jnp.sin(x) * ref[...]
    ref[...] = ref[...] + stop(x)
    return jnp.sum(y * ref[...])


def partly(x, ref):
    ref[1] = stop(x[0])
    ref[0] += 2.0
    return jnp.sum(jnp.tanh(x * ref[...]))


def in_loop(x, ref):
    def step(c, r):
        ref[...] = ref[...] + 1
        return c * jnp.sin(r) + jnp.sum(ref[...] * x), None

    return lax.scan(step, 1.0, x)[0]


def counted(x, ref):
    ref[...] = ref[...] * 2
    return jnp.sum(x * lax.while_loop(lambda c: c < 9, lambda c: 2 * c, ref[0]))


def unused(x, ref):
    made = jax.new_ref(x)
    return jnp.sum(x**2) + 0 * made[0]


USES = [written, read, read_and_written, partly, in_loop, counted, unused]
use = pytest.mark.parametrize("fun", USES, ids=lambda f: f.__name__)
X, CONTENT = jnp.array([0.5, -1.5, 2.0]), jnp.array([1.0, 3.0, -2.0])


@use
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_the_gradient_and_the_content_are_those_of_jax(fun, wrap):
    theirs, ours = jax.new_ref(CONTENT), jax.new_ref(CONTENT)
    expected = wrap(jax.grad(fun))(X, theirs)
    gradient = wrap(lambda x, ref: fp.backprop(fun)(x, ref).gradient)(X, ours)
    np.testing.assert_allclose(gradient, expected, rtol=1e-12)
    np.testing.assert_array_equal(ours[...], theirs[...])


@use
def test_what_only_looks_leaves_the_content_alone(fun):
    ref = jax.new_ref(CONTENT)
    derivation = fp.derive(fun)(X, ref)
    assert derivation.text().count("∂J/∂x") >= 1
    first = derivation.verify()
    assert max(first.errors.values()) < 1e-13
    assert derivation.verify() == first
    assert "<svg" in fp.draw(fp.trace(fun)(X, ref)).svg()
    assert "<svg" in fp.draw(fp.backward_graph(fun)(X, ref)).svg()
    np.testing.assert_array_equal(ref[...], CONTENT)


def test_the_sweeps_show_what_a_reference_held_at_first():
    ref = jax.new_ref(CONTENT)
    p = fp.backprop(read_and_written)(X, ref)
    np.testing.assert_array_equal(p.values["ref"], CONTENT)
    np.testing.assert_array_equal(ref[...], CONTENT + X)
    assert "ref" in str(p)
    assert p.first_nonfinite() is None
    ref[...] = jnp.full(3, jnp.inf)
    assert fp.backprop(read)(X, ref).first_nonfinite().name == "ref"


def test_a_reference_closed_over_is_changed_once_too():
    ours, theirs = (jax.new_ref(CONTENT) for _ in range(2))
    expected = jax.grad(lambda x: read_and_written(x, theirs))(X)
    p = fp.backprop(lambda x: read_and_written(x, ours))(X)
    np.testing.assert_allclose(p.gradient, expected, rtol=1e-12)
    np.testing.assert_array_equal(ours[...], theirs[...])
    derivation = fp.derive(lambda x: read_and_written(x, ours))(X)
    derivation.verify()
    np.testing.assert_array_equal(ours[...], theirs[...])


@pytest.mark.parametrize(
    "fun",
    [
        lambda x, ref: (ref.__setitem__(..., 2 * x), jnp.sum(x**2))[1],
        lambda x, ref: (ref.__setitem__(0, x[0]), jnp.sum(x * ref[...]))[1],
    ],
)
def test_a_differentiated_value_cannot_be_written(fun):
    ref = jax.new_ref(CONTENT)
    with pytest.raises(Exception, match="differentiated value on a non-differentiated array reference"):
        jax.jit(jax.grad(fun))(X, ref)
    for way in (fp.backprop, fp.derive):
        with pytest.raises(TypeError) as raised:
            way(fun)(X, ref)
        message = str(raised.value)
        assert "is written into a mutable reference (jax.Ref) at" in message
        assert "test_references.py" in message
        assert message.endswith("write its jax.lax.stop_gradient, or return the value.")
    np.testing.assert_array_equal(ref[...], CONTENT)


def test_a_reference_has_no_gradient():
    with pytest.raises(TypeError, match=r"the argument at argnums=1 holds Ref\(.*, which has no derivative"):
        fp.backprop(read, 1)(X, jax.new_ref(CONTENT))
    gradient = fp.backprop(read, None)(X, jax.new_ref(CONTENT)).gradient
    np.testing.assert_array_equal(gradient[0], CONTENT)


@pytest.mark.parametrize(
    ("what", "ask"),
    [
        ("footprint", lambda: fp.memory.footprint(read)),
        ("batch_limit", lambda: fp.memory.batch_limit(read, 10**6)),
        ("compare", lambda: fp.compare(read)),
        ("report", lambda: fp.report(read)),
        ("second_order_cost", lambda: fp.second_order_cost(read)),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_what_takes_arrays_only_says_so(what, ask):
    ref = jax.new_ref(CONTENT)
    with pytest.raises(TypeError) as raised:
        ask()(X, ref)
    assert str(raised.value) == (
        f"{what}: ref is a mutable reference (Ref{{float64[3]}}), but {what} takes arrays only; pass the "
        "array that it holds and make the reference inside the function: "
        "lambda x, array: fun(x, jax.new_ref(array))."
    )
    np.testing.assert_array_equal(ref[...], CONTENT)
    fp.memory.footprint(lambda x, array: read(x, jax.new_ref(array)))(X, CONTENT)
