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


def test_plain_attributes_and_containers_may_change():
    class Counted(nnx.Module):
        def __init__(self):
            self.w, self.calls, self.mode = nnx.Param(jnp.array(1.0)), 0, "new"

    def loss(model, holder):
        model.calls += 1
        model.mode = "used"
        holder["seen"] = model
        return jnp.sin(model.w[...])

    for wrap in (lambda f: f, fp.with_rules):
        model = Counted()
        nnx.value_and_grad(lambda m, wrap=wrap: wrap(loss)(m, {}))(model)
        assert (model.calls, model.mode) == (1, "used")
        holder = {}
        wrap(loss)(model, holder)
        assert holder["seen"] is model


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


# --- the sweeps -------------------------------------------------------------------------------


def test_backprop_does_what_nnx_does():
    """Values, gradients, and everything that two steps change in the model."""
    model, expected = new_model(), new_model()
    propagate = fp.backprop(loss)
    for _ in range(2):
        p = propagate(model, X)
        value, gradient = nnx.value_and_grad(loss)(expected, X)
        np.testing.assert_allclose(p.value, value, rtol=1e-12)
        # Autodiff's own rounding is the floor: the kernel's gradient is small differences.
        assert jax.tree.structure(p.gradient) == jax.tree.structure(gradient)
        for a, e in zip(jax.tree.leaves(p.gradient), jax.tree.leaves(gradient), strict=True):
            np.testing.assert_allclose(a, e, rtol=1e-10, atol=1e-14)
        assert_same(nnx.state(model), nnx.state(expected))
    assert model.calls[...] == 2
    assert model.dropout.rngs.count[...] == 2


def test_variables_have_the_paths_of_the_model():
    p = fp.backprop(loss)(new_model(), X)
    # The shared linear module has the first of its two names; only parameters are differentiated.
    given = {v.name for v in p.graph.inputs}
    assert given == {
        "again/bias", "again/kernel", "calls", "dropout/rngs/count", "dropout/rngs/key",
        "norm/bias", "norm/mean", "norm/scale", "norm/var", "x",
    }  # fmt: skip
    assert [n for n in p.gradients if n in given] == ["norm/bias", "norm/scale", "again/bias", "again/kernel"]
    assert_same(p.gradients["kernel"], p.gradient["again"]["kernel"][...])
    assert_same(p.gradients["x"], jax.grad(lambda x: loss(new_model(), x))(X))
    assert "norm/mean" in str(p)


def test_models_in_containers_and_keywords():
    def of_two(models, x, *, head):
        return jnp.sum(head(jnp.tanh(models["first"](x))) ** 2) + models["weight"] ** 2

    linear = lambda a, b: new_model(lambda rngs: nnx.Linear(a, b, rngs=rngs))  # noqa: E731
    models, head = {"first": linear(3, 4), "weight": jnp.array(2.0)}, linear(4, 2)
    p = fp.backprop(of_two)(models, X, head=head)
    assert [v.name for v in p.graph.inputs if v.shape == (3, 4)] == ["first/kernel"]
    assert [v.name for v in p.graph.inputs if v.shape == (4, 2)] == ["kernel"]
    expected = nnx.grad(lambda models, x: of_two(models, x, head=head))(models, X)
    assert_same(p.gradient, expected)
    assert p.gradient["weight"] == 4.0
    everything = fp.backprop(of_two, argnums=None)(models, X, head=head)
    assert_same(everything.gradient[0], expected)
    assert_same(fp.backprop(of_two, argnums=1)(models, X, head=head).gradient, everything.gradient[1])
    assert_same(p.gradients["kernel"].sum(), jax.grad(lambda s: of_two(
        models, X, head=lambda h: h @ (head.kernel[...] + s) + head.bias[...]))(0.0))  # fmt: skip


def test_a_variable_is_a_model_too():
    weight = nnx.Param(jnp.arange(3.0))
    p = fp.backprop(lambda w, x: jnp.sum(w[...] ** 2 * x))(weight, 2.0)
    assert isinstance(p.gradient, nnx.Param)
    assert_same(p.gradient[...], 4 * jnp.arange(3.0))
    assert "w" in p.gradients


def test_backprop_inside_of_nnx_jit():
    model, expected = new_model(), new_model()
    gradient = nnx.jit(lambda model, x: fp.backprop(loss)(model, x).gradient)(model, X)
    assert_same(gradient["norm"], nnx.grad(loss)(expected, X)["norm"])
    assert_same(nnx.state(model), nnx.state(expected))


def test_deriving_and_tracing_leave_the_model_alone():
    model, before = new_model(), nnx.state(new_model())
    derivation = fp.derive(loss)(model, jnp.array([[1.0, -1.0, 0.5], [0.3, 2.0, 0.0], [-1.0, 0.2, 1.0]]))
    (weight,) = (short for short, path in derivation.legend.items() if path == "again/kernel")
    lines = [line.text() for line in derivation.backward if line.left == f"∂J/∂{weight}"]
    assert [line.endswith("= xᵀ ∂J/∂z") for line in lines] == [True]
    derivation.verify()
    graph = fp.trace(loss)(model, X)
    assert [v.name for v in graph.inputs][:2] == ["again/bias", "again/kernel"]
    assert len(graph.outputs) == 1
    assert_same(nnx.state(model), before)
