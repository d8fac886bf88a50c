"""Arguments that a function changes in place: the caller finds what it would find with JAX."""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from against_jax import HANDWRITTEN, JAX, OURS, X, Y, assert_same

import funcprop as fp


def changes(x, batch, log):
    scale = batch.pop("scale")
    batch["result"] = jnp.tanh(x) * scale
    batch["inner"]["list"].append("seen")
    log.append(("called", 1))
    return jnp.sum(batch["result"])


def test_changed_arguments_keep_the_change():
    def called(with_rules):
        batch, log = {"scale": 2.0, "inner": {"list": [X], "same": Y}}, []
        inner = batch["inner"]["list"]
        value = with_rules(changes)(X, batch, log=log)
        assert inner is batch["inner"]["list"]
        return value, batch, log

    assert_same(called(OURS.with_rules), called(JAX.with_rules))


def test_changed_copies_of_a_jitted_function_stay_its_own():
    def loss(params, batch):
        params["w"] = params["w"] * 2
        return jnp.sum(jnp.tanh(params["w"] * batch.pop("x")))

    params, batch = {"w": X}, {"x": Y}
    actual = jax.jit(fp.grad(loss, rules=HANDWRITTEN))(params, batch)
    assert_same(actual, jax.jit(jax.grad(loss))(params, batch))
    assert set(batch) == {"x"}


def test_an_object_keeps_its_change():
    class Cache:
        value = None

    def loss(x, cache):
        cache.value = jnp.tanh(x)
        return jnp.sum(cache.value)

    def called(with_rules):
        cache = Cache()
        return with_rules(lambda x: loss(x, cache))(X), cache.value

    assert_same(called(OURS.with_rules), called(JAX.with_rules))


def test_rematerialize_refuses_a_changed_container():
    """It is traced with copies of its arguments."""
    lean = fp.memory.rematerialize(changes, 0.5)
    batch = {"scale": 2.0, "inner": {"list": [X]}}
    with pytest.raises(TypeError, match=r"rematerialize: the function changes a container .*Return the new"):
        jax.grad(lean)(X, batch, [])


def test_equinox_state():
    """Equinox's `State` is used up by a layer that returns a new one."""
    model, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(3, "batch", mode="ema")

    def loss(x, model, state):
        y, state = jax.vmap(model, axis_name="batch", in_axes=(0, None), out_axes=(0, None))(x, state)
        return jnp.sum(jnp.tanh(y) ** 3), state

    x = jnp.arange(6.0).reshape(2, 3)
    actual, expected = (
        eqx.filter_jit(lambda x, s, t=t: t.grad(loss, has_aux=True)(x, model, s))(x, state)
        for t in (OURS, JAX)
    )
    assert_same(actual, expected)
