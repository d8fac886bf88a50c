"""Losses of Equinox and Haiku, with their states, keys and run-time errors."""

from __future__ import annotations

import functools

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from drop_in import JAX, assert_as_jax, outcome

S, X, LABELS = jnp.array(0.5), jnp.arange(12.0).reshape(4, 3) / 5 - 1, jnp.array([0, 1, 2, 1])


def cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


# --- Equinox ----------------------------------------------------------------------------------


class Net(eqx.Module):
    """Batch norm with its state, dropout, and fields that are no arrays."""

    first: eqx.nn.Linear
    norm: eqx.nn.BatchNorm
    dropout: eqx.nn.Dropout
    activation: object
    name: str = eqx.field(static=True)

    def __init__(self, key):
        self.first = eqx.nn.Linear(3, 3, key=key, dtype=float)
        self.norm = eqx.nn.BatchNorm(3, "batch", mode="ema", dtype=float)
        self.dropout = eqx.nn.Dropout(0.5)
        self.activation, self.name = jax.nn.silu, "net"

    def __call__(self, x, state, key):
        x, state = self.norm(self.first(x), state)
        return self.dropout(self.activation(x), key=key), state


def equinox_state(t):
    model, state = eqx.nn.make_with_state(Net)(jax.random.key(0))
    names = []

    @functools.partial(eqx.filter_value_and_grad, has_aux=True)
    @t.with_rules
    def loss(model, state, keys):
        names.append((model.name, model.dropout.inference))
        mapped = jax.vmap(model, axis_name="batch", in_axes=(0, None, 0), out_axes=(0, None))
        logits, state = mapped(X, state, keys)
        return cross_entropy(logits, LABELS), state

    (value, state), gradient = loss(model, state, jax.random.split(jax.random.key(1), 4))
    statistics = eqx.filter(state.get(model.norm.ema_state_index), eqx.is_array)
    return value, eqx.filter(gradient, eqx.is_array), statistics, names


def equinox_transformations(t):
    """`filter_grad` with and under `filter_jit`, of part of a model, with a python branch on a flag."""
    model = eqx.nn.MLP(3, 3, 4, 1, key=jax.random.key(0), dtype=float)
    where = jax.tree.map(lambda _: False, model)
    where = eqx.tree_at(lambda m: m.layers[-1].bias, where, replace=True)
    chosen, rest = eqx.partition(model, where)

    def loss(model, x, flag):
        y = jax.vmap(model)(x)
        return jnp.sum(jnp.tanh(y) ** 2) if flag > 0 else cross_entropy(y, LABELS)

    def loss_of_part(chosen):
        return loss(eqx.combine(chosen, rest), X, 0)

    grad = eqx.filter_grad(t.with_rules(loss))
    return (
        eqx.filter(grad(model, X, jnp.array(1)), eqx.is_array),
        eqx.filter(eqx.filter_jit(grad)(model, X, 1), eqx.is_array),
        eqx.filter(eqx.filter_grad(t.with_rules(eqx.filter_jit(loss)))(model, X, 0), eqx.is_array),
        eqx.filter(eqx.filter_value_and_grad(t.with_rules(loss_of_part))(chosen), eqx.is_array),
    )


def equinox_without_an_error(t):
    def loss(x, y):
        y = eqx.error_if(y, y < 0, "negative")
        x = eqx.error_if(x, x > 1e3, "large")
        return jnp.tanh(x) * (2 if y > 1 else 1)

    def loss_of_x(x):
        return jnp.tanh(eqx.error_if(x, x < 0, "negative"))

    return t.grad(loss)(jnp.array(0.5), jnp.array(2.0)), t.grad(jax.jit(loss_of_x))(0.5)


def equinox_custom_rule(t):
    scale = jnp.sum(jnp.arange(3.0))

    @eqx.filter_custom_vjp
    def f(x, note):
        return jnp.tanh(x) * scale

    f.def_fwd(lambda perturbed, x, note: (jnp.tanh(x) * scale, None))
    f.def_bwd(lambda residuals, g, perturbed, x, note: g * 2 * len(note) * scale)
    return eqx.filter_grad(t.with_rules(lambda x: f(x, "note")))(jnp.array(0.5))


# --- Haiku ------------------------------------------------------------------------------------


def haiku_keys(t):
    keys, w = hk.PRNGSequence(0), jnp.ones(2)
    for _ in range(3):
        w = w - 0.1 * t.grad(lambda w: jnp.sum(jnp.tanh(w) * jax.random.normal(next(keys), (2,))))(w)
    return w, np.asarray(next(keys))


def haiku_state(t):
    def forward(x, training):
        x = hk.BatchNorm(True, True, 0.9)(hk.Linear(4)(x), is_training=training)
        x = hk.dropout(hk.next_rng_key(), 0.5, x)
        hk.set_state("calls", hk.get_state("calls", (), int, jnp.zeros) + 1)
        return hk.Linear(3)(jnp.tanh(x))

    model = hk.transform_with_state(forward)
    params, state = model.init(jax.random.key(0), X, True)

    def loss(params, state, key):
        logits, state = model.apply(params, state, key, X, True)
        return cross_entropy(logits, LABELS), state

    return t.value_and_grad(loss, has_aux=True)(params, state, jax.random.key(1))


def haiku_gradient_inside(t):
    """A gradient taken inside of a transformed function, by Haiku's own transformation."""

    def forward(x):
        linear = hk.Linear(3)
        scale = jnp.mean(linear(x))
        value, gradient = hk.value_and_grad(t.with_rules(lambda x: jnp.sum(jnp.tanh(linear(x)) ** 2)))(x)
        return value * scale, gradient, hk.next_rng_key()

    model = hk.transform(forward)
    key = jax.random.key(0)
    value, gradient, last = model.apply(model.init(key, X), key, X)
    return value, gradient, jax.random.key_data(last)


PROGRAMS = [
    equinox_state,
    equinox_transformations,
    equinox_custom_rule,
    equinox_without_an_error,
    haiku_keys,
    haiku_state,
    haiku_gradient_inside,
]


@pytest.mark.sampled(4)
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
def test_equinox_and_haiku(program):
    assert_as_jax(program)


ERRORS = {
    "of the differentiated argument": lambda t: t.grad(lambda x: eqx.error_if(x, x < 0, "bad"))(X[0, 0]),
    "of an intermediate": lambda t: t.grad(lambda x: eqx.error_if(jnp.tanh(x), x < 0, "bad") * 2)(X[0, 0]),
    "of another argument": lambda t: t.grad(lambda x, y: x * eqx.error_if(y, y > 0, "bad"))(X[0, 0], S),
}


@pytest.mark.parametrize("program", ERRORS.values(), ids=ERRORS)
def test_errors_of_equinox(program):
    """At run time its own class, not that of a failed callback; at once where the condition is known."""
    assert_as_jax(program, raises=type(outcome(program, JAX)))
    assert isinstance(outcome(program, JAX), eqx.EquinoxRuntimeError | eqx.EquinoxTracetimeError)
