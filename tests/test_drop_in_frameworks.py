"""Losses of Flax linen and loops with Optax, with what these libraries keep beside the gradient."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from drop_in import assert_as_jax
from flax import linen as nn
from flax.training.train_state import TrainState

X, LABELS = jnp.arange(12.0).reshape(4, 3) / 5 - 1, jnp.array([0, 1, 2, 1])


def cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


# --- Flax linen -------------------------------------------------------------------------------


class Linen(nn.Module):
    """Batch statistics, dropout, a sown value, and python that looks at the module."""

    note: Callable[..., None] | None = None

    @nn.compact
    def __call__(self, x, training=True):
        dense = functools.partial(nn.Dense, param_dtype=float)
        x = nn.BatchNorm(use_running_average=not training, param_dtype=float)(dense(5)(x))
        self.sow("intermediates", "hidden", x)
        if self.note is not None:
            self.note((x.shape, self.has_rng("dropout"), sorted(self.variables)))
        x = nn.Dropout(0.5, deterministic=not training)(nn.relu(x))
        return dense(3)(nn.remat(nn.Dense)(4, param_dtype=float)(x))


@functools.cache
def linen_variables():
    model = Linen()
    variables = jax.jit(model.init)({"params": jax.random.key(0), "dropout": jax.random.key(1)}, X)
    return jax.tree.map(lambda x: x.astype(float), {k: variables[k] for k in ("params", "batch_stats")})


def linen_mutable(t):
    notes = []
    variables = linen_variables()

    def loss(params, stats, key):
        logits, updated = Linen(notes.append).apply(
            {"params": params, "batch_stats": stats},
            X,
            mutable=["batch_stats", "intermediates"],
            rngs={"dropout": key},
        )
        return cross_entropy(logits, LABELS), updated

    gradient = t.value_and_grad(loss, has_aux=True)
    return gradient(variables["params"], variables["batch_stats"], jax.random.key(2)), notes


def linen_bound(t):
    """A bound module, which is no pytree, as another argument and in a closure."""
    variables = linen_variables()
    bound = Linen().bind(variables)

    def loss(x, bound):
        logits, bias = bound(x, training=False), bound.variables["params"]["Dense_0"]["bias"]
        return cross_entropy(logits, LABELS) if jnp.all(bias == 0) else x

    return t.grad(loss)(X, bound), t.grad(lambda x: loss(x, bound))(X)


def linen_gradient_of_inputs_and_method(t):
    class TwoHeads(nn.Module):
        def setup(self):
            self.body = nn.Dense(4, param_dtype=float)
            self.head = nn.Dense(1, param_dtype=float, kernel_init=nn.initializers.ones)

        def __call__(self, x):
            return self.head(nn.gelu(self.body(x)))

        def penalty(self, x):
            return jnp.sum(nn.softmax(self.body(x)) ** 2)

    model = TwoHeads()
    params = jax.jit(model.init)(jax.random.key(0), X)

    def loss(params, x):
        slope = t.grad(lambda x: jnp.sum(model.apply(params, x)))(x)
        return jnp.mean((jnp.linalg.norm(slope, axis=-1) - 1) ** 2) + model.apply(params, x, method="penalty")

    return jax.jit(t.value_and_grad(loss))(params, X)


def linen_lifted(t):
    """Lifted transformations: scan over layers with split random streams, and a jitted module."""

    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            x = nn.jit(nn.Dense)(3, param_dtype=float)(jnp.tanh(x))
            return nn.Dropout(0.2, deterministic=False)(x), None

    layers = nn.scan(
        Layer, variable_axes={"params": 0}, split_rngs={"params": True, "dropout": True}, length=3
    )()
    keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    params = layers.init(keys, X, None)
    return t.grad(lambda p: jnp.sum(layers.apply(p, X, None, rngs=keys)[0] ** 2))(params)


# --- Optax ------------------------------------------------------------------------------------


def train_state_steps(t):
    model = nn.Sequential([nn.Dense(4, param_dtype=float), nn.relu, nn.Dense(3, param_dtype=float)])
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(1e-2, momentum=0.9))
    state = TrainState.create(apply_fn=model.apply, params=jax.jit(model.init)(jax.random.key(0), X), tx=tx)

    def step(state, x, y):
        loss = lambda params: cross_entropy(state.apply_fn(params, x), y)  # noqa: E731
        value, gradient = t.value_and_grad(loss)(state.params)
        return state.apply_gradients(grads=gradient), value

    values, jitted = [], jax.jit(step)
    for run in (step, jitted):
        state, value = run(state, X, LABELS)
        values.append(value)
    return values, state.params, state.step


def optax_line_search(t):
    """A line search that evaluates the loss and its gradient, and keeps both in its state."""
    loss = t.with_rules(lambda w: jnp.sum((jnp.tanh(w) - X[0]) ** 2))
    search = optax.scale_by_backtracking_linesearch(max_backtracking_steps=3, store_grad=True)
    tx = optax.chain(optax.sgd(1.0), search)
    w, values = jnp.ones(3) * 0.1, []
    state = tx.init(w)
    for _ in range(2):
        value, gradient = optax.value_and_grad_from_state(loss)(w, state=state)
        updates, state = tx.update(gradient, state, w, value=value, grad=gradient, value_fn=loss)
        w = optax.apply_updates(w, updates)
        values.append(value)
    return values, w


def assertions_of_a_test_library(t):
    """A check that takes arrays and refuses tracers, as `chex` has them, on what is not differentiated."""

    def assert_all_finite(tree):
        for leaf in jax.tree.leaves(tree):
            if isinstance(leaf, jax.core.Tracer):
                raise RuntimeError("value assertions need concrete arrays")
            assert np.all(np.isfinite(leaf))

    def loss(x, y):
        assert_all_finite({"y": 2 * y, "mean": jnp.mean(y), "table": jnp.arange(3)})
        np.testing.assert_allclose(jax.nn.softmax(y).sum(), 1.0)
        return jnp.sum(jnp.tanh(x * y))

    return t.grad(loss)(X[0], X[1]), t.grad(jax.checkpoint(lambda x: jnp.sum(jnp.tanh(x))))(X[0])


PROGRAMS = [
    linen_mutable,
    linen_bound,
    linen_gradient_of_inputs_and_method,
    linen_lifted,
    train_state_steps,
    optax_line_search,
    assertions_of_a_test_library,
]


@pytest.mark.sampled(4)
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
def test_frameworks(program):
    assert_as_jax(program)
