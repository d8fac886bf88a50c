"""nnx models as arguments: gradients and everything that the forward pass changes equal nnx's own."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import funcprop as fp


class Model(nnx.Module):
    """Batch statistics, a random stream, a counter, a module used under two names, new variables."""

    def __init__(self, rngs):
        self.linear = nnx.Linear(3, 4, rngs=rngs)
        self.again = self.linear
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.calls = nnx.Variable(jnp.array(0))

    def __call__(self, x):
        self.calls[...] += 1
        hidden = self.norm(self.again(x))
        self.hidden = nnx.Intermediate(hidden)
        return self.dropout(jnp.tanh(hidden))


def loss(model, x):
    return jnp.sum(model(x) ** 2)


X = jnp.arange(6.0).reshape(2, 3)


def new_model(make=Model):
    """In float64, batch statistics too."""
    model = make(nnx.Rngs(0))
    state = nnx.state(model)
    nnx.update(model, jax.tree.map(lambda x: x.astype(float) if x.dtype == jnp.float32 else x, state))
    return model


TRANSFORMATIONS = {
    "value_and_grad": nnx.value_and_grad,
    "jit of value_and_grad": lambda f: nnx.jit(nnx.value_and_grad(f)),
    "jit": nnx.jit,
    "remat": lambda f: nnx.grad(nnx.remat(f)),
    "none": lambda f: f,
}


def assert_same(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        if jnp.issubdtype(e.dtype, jax.dtypes.prng_key):
            a, e = jax.random.key_data(a), jax.random.key_data(e)
        # The floor is for the bias before the normalisation, whose gradient is zero.
        np.testing.assert_allclose(a, e, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("transformation", TRANSFORMATIONS.values(), ids=TRANSFORMATIONS)
def test_two_steps_equal_nnx(transformation):
    def two_steps(loss):
        model = new_model()
        step = transformation(loss)
        return step(model, X), step(model, X), nnx.state(model)

    actual, expected = jax.jit(
        lambda: (two_steps(fp.with_rules(loss, fp.rules.handwritten)), two_steps(loss))
    )()
    assert_same(actual, expected)
    assert actual[2]["calls"][...] == 2


def test_models_share_a_variable():
    """One variable in two arguments stays one variable."""

    def shared_loss(model, other, x):
        other.calls[...] += 10
        return loss(model, x)

    model = new_model()
    fp.with_rules(shared_loss, fp.rules.handwritten)(model, other=model, x=X)
    assert model.calls[...] == 11


def test_unchanged_model_of_an_outer_transformation():
    """A model that only serves is not touched, also where nnx would forbid to change it."""
    model = new_model(lambda rngs: nnx.Linear(3, 4, rngs=rngs))

    def of_input(x, model):
        return jnp.sum(jnp.tanh(model(x)))

    np.testing.assert_allclose(
        jax.grad(fp.with_rules(of_input, fp.rules.handwritten))(X, model),
        jax.grad(of_input)(X, model),
        rtol=1e-12,
    )


def test_other_arguments_may_change_too():
    def with_batch(model, batch):
        assert batch["name"] == "first"
        return loss(model, batch.pop("x"))

    batch = {"x": X, "name": "first"}
    nnx.grad(fp.with_rules(with_batch))(new_model(), batch)
    assert set(batch) <= {"x", "name"}
    batch = {"x": X, "name": "first"}
    fp.with_rules(with_batch)(new_model(), batch)
    assert batch == {"name": "first"}


def test_container_of_a_model_may_not_change():
    def replaces(holder):
        holder["model"] = None
        return jnp.zeros(())

    with pytest.raises(TypeError, match="container that holds an nnx model"):
        fp.with_rules(replaces)({"model": new_model()})


def test_training_with_an_optimizer():
    def trained(loss):
        model = new_model()
        optimizer = nnx.Optimizer(model, optax.sgd(1e-2), wrt=nnx.Param)

        @nnx.jit
        def step(model, optimizer):
            value, gradient = nnx.value_and_grad(loss)(model, X)
            optimizer.update(model, gradient)
            return value

        return [step(model, optimizer) for _ in range(3)]

    actual, expected = jax.jit(lambda: (trained(fp.with_rules(loss, fp.rules.handwritten)), trained(loss)))()
    np.testing.assert_allclose(actual, expected, rtol=1e-12)
    assert expected[0] != expected[2]
