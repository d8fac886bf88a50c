"""Rules fire where the function runs: after a branch of python, in every body, inside of every framework.

A rule set whose `tanh` has twice its derivative tells: a gradient through one `tanh` is twice JAX's.
"""

from __future__ import annotations

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from drop_in import JAX, ours
from flax import linen as nn
from flax import nnx
from flax.training.train_state import TrainState
from jax import lax

import funcprop as fp

S, X = jnp.array(0.7), jnp.array([0.3, -1.2, 2.0])
TANH = fp.rules.handwritten["tanh"]
DOUBLED = fp.rules.handwritten.replace(
    {"tanh": fp.Rule(TANH.forward, lambda *args, **static: (2 * TANH.backward(*args, **static)[0],))}
)


def beside_a_custom_rule(x):
    by = jnp.sin(jnp.arange(3.0)).sum()
    f = jax.custom_vjp(lambda x: x * by)
    f.defvjp(lambda x: (x * by, None), lambda _, g: (g * by,))
    return f(jnp.tanh(x))


def newton(x):
    y = x
    while abs(lax.stop_gradient(y * y - 2)) > 1e-6:
        y = lax.stop_gradient((y + 2 / y) / 2)
    return jnp.tanh(x) * y


def in_threes(step):
    return lambda x: lax.scan(lambda c, i: (jnp.where(i == 1, step(c), c), None), x, jnp.arange(3))[0]


FUNCTIONS = {
    "plain": jnp.tanh,
    "after a branch": lambda x: jnp.tanh(x) if x > 0 else x,
    "in a loop of python": lambda x: sum(jnp.tanh(x) * i for i in range(int(x) + 3)),
    "after item": lambda x: jnp.tanh(x * x.item()),
    "of a mask": lambda x: jnp.sum(jnp.tanh((x * X)[X > 0])),
    "after a loop of python": newton,
    "beside a custom rule": beside_a_custom_rule,
    "in jit": jax.jit(jnp.tanh),
    "in a jit in a jit": jax.jit(lambda x: jax.jit(jnp.tanh)(x * 2)),
    "in vmap": lambda x: jnp.sum(jax.vmap(jnp.tanh)(x * X)),
    "in a scan": in_threes(jnp.tanh),
    "in map": lambda x: jnp.sum(lax.map(jnp.tanh, x * X)),
    "in fori_loop": lambda x: lax.fori_loop(0, 1, lambda _, c: jnp.tanh(c), x),
    "in cond": lambda x: lax.cond(x > 0, jnp.tanh, lambda x: x, x),
    "in switch": lambda x: lax.switch(1, [lambda x: x, jnp.tanh], x),
    "in checkpoint": jax.checkpoint(jnp.tanh),
    "in a checkpoint in a scan": in_threes(jax.checkpoint(jnp.tanh)),
    "with a changed container": lambda x: {"y": jnp.tanh(x)}.popitem()[1],
    "of a reference": lambda x: jax.new_ref(jnp.tanh(x))[...],
    "in associative_scan": lambda x: jnp.tanh(lax.associative_scan(jnp.add, x * X)[2]),
    "in jax.nn": lambda x: jax.nn.tanh(x) * 2,
}
WAYS = {
    "grad": lambda t, f: t.grad(f)(S),
    "jit of grad": lambda t, f: jax.jit(t.grad(f))(S),
    "vjp": lambda t, f: t.vjp(f, S)[1](jnp.ones(()))[0],
    "jacobian": lambda t, f: t.jacobian(f)(S),
    "grad of with_rules": lambda t, f: jax.grad(t.with_rules(f))(S),
}
CONCRETE = ("after a branch", "in a loop of python", "after item", "after a loop of python", "of a mask")


@pytest.mark.parametrize("fun", FUNCTIONS.values(), ids=FUNCTIONS)
def test_rules_fire(fun):
    np.testing.assert_allclose(ours(DOUBLED).grad(fun)(S), 2 * jax.grad(fun)(S), rtol=1e-12)


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name not in CONCRETE])
def test_rules_fire_under_jit(name):
    actual, expected = (WAYS["jit of grad"](t, FUNCTIONS[name]) for t in (ours(DOUBLED), JAX))
    np.testing.assert_allclose(actual, 2 * expected, rtol=1e-12)


@pytest.mark.parametrize("name", ["plain", "in jit", "in a scan", "in cond", "in checkpoint", "of a mask"])
def test_rules_fire_without_jit(name):
    with jax.disable_jit():
        actual, expected = (t.grad(FUNCTIONS[name])(S) for t in (ours(DOUBLED), JAX))
    np.testing.assert_allclose(actual, 2 * expected, rtol=1e-12)


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_rules_fire_in_every_transformation(way):
    np.testing.assert_allclose(way(ours(DOUBLED), jnp.tanh), 2 * way(JAX, jnp.tanh), rtol=1e-12)


def test_rules_are_not_asked_where_nothing_is_differentiated():
    """What does not depend on a differentiated argument is computed as without rules."""

    def never(*_, **__):
        raise AssertionError("the rule was asked")

    rules = fp.rules.handwritten.replace({"tanh": fp.Rule(never, never, applies=never)})
    assert fp.grad(lambda x, y: x * jnp.tanh(y), rules=rules)(S, X[0]) == jnp.tanh(X[0])
    assert fp.grad(lambda x: x * jax.jit(jnp.tanh)(X[0]), rules=rules)(S) == jnp.tanh(X[0])
    assert fp.grad(lambda x: x * jnp.tanh(lax.stop_gradient(x)), rules=rules)(S) == jnp.tanh(S)


def test_second_derivatives_are_of_the_rule():
    """Of twice a derivative, the derivative is twice the second: no rule is lost or applied again."""
    actual, expected = (t.hvp(lambda x: jnp.sum(jnp.tanh(x)))(X, X) for t in (ours(DOUBLED), JAX))
    np.testing.assert_allclose(actual, 2 * expected, rtol=1e-12)


@pytest.mark.parametrize("inner", [fp.rules.autodiff, fp.rules.handwritten, DOUBLED])
def test_rule_sets_inside_of_each_other(inner):
    """An operator has one derivative: that of the innermost rule set that has a rule for it."""
    nested = fp.grad(fp.with_rules(jnp.tanh, inner), rules=DOUBLED)(S) / jax.grad(jnp.tanh)(S)
    np.testing.assert_allclose(nested, 1.0 if inner is fp.rules.handwritten else 2.0, rtol=1e-12)


def of_linen(t):
    model = nn.Sequential([nn.Dense(2, param_dtype=float), nn.tanh])
    params = jax.jit(model.init)(jax.random.key(0), X)
    return t.grad(lambda params: jnp.sum(model.apply(params, X)))(params)


def of_train_state(t):
    model = nn.Sequential([nn.Dense(2, param_dtype=float), nn.tanh])
    state = TrainState.create(
        apply_fn=model.apply, params=jax.jit(model.init)(jax.random.key(0), X), tx=optax.sgd(1.0)
    )
    gradient = t.grad(lambda params: jnp.sum(state.apply_fn(params, X)))(state.params)
    new = state.apply_gradients(grads=gradient)
    return jax.tree.map(jnp.subtract, new.params, state.params)


def of_nnx(t):
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0), param_dtype=float)

    def loss(model):
        model.called = True
        return jnp.sum(jnp.tanh(model(X)))

    return jax.tree.leaves(nnx.grad(t.with_rules(loss))(model))


def of_equinox(t):
    model = eqx.nn.Sequential(
        [eqx.nn.Linear(3, 2, key=jax.random.key(0), dtype=float), eqx.nn.Lambda(jnp.tanh)]
    )
    return eqx.filter(eqx.filter_grad(t.with_rules(lambda m: jnp.sum(m(X))))(model), eqx.is_array)


def of_haiku(t):
    model = hk.without_apply_rng(hk.transform(lambda x: jnp.tanh(hk.Linear(2)(x))))
    params = jax.jit(model.init)(jax.random.key(0), X)
    return t.grad(lambda params: jnp.sum(model.apply(params, X)))(params)


@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("program", [of_linen, of_train_state, of_nnx, of_equinox, of_haiku])
def test_rules_fire_in_frameworks(program, jitted):
    def both():
        return program(ours(DOUBLED)), program(JAX)

    actual, expected = jax.jit(both)() if jitted else both()
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, 2 * e, rtol=1e-12), actual, expected)
