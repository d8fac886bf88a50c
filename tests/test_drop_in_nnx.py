"""nnx models in a differentiated function: what it changes in them is changed, as under nnx's own."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
import pytest
from drop_in import assert_as_jax
from flax import nnx
from flax.errors import TraceContextError

X = jnp.arange(6.0).reshape(2, 3) / 3


class Net(nnx.Module):
    """Plain attributes beside a parameter."""

    def __init__(self):
        self.w = nnx.Param(jnp.array(0.5))
        self.calls, self.mode, self.history = 0, "new", nnx.List([])


class Model(nnx.Module):
    """Batch statistics, a random stream, a counter, and plain attributes."""

    def __init__(self, rngs):
        self.linear = nnx.Linear(3, 4, rngs=rngs, param_dtype=jnp.float64)
        self.norm = nnx.BatchNorm(4, rngs=rngs, param_dtype=jnp.float64, dtype=jnp.float64)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.count = nnx.Variable(jnp.array(0))
        self.calls, self.shape = 0, None

    def __call__(self, x):
        self.calls += 1
        self.count[...] += 1
        hidden = self.norm(self.linear(x))
        self.shape = hidden.shape
        return self.dropout(jnp.tanh(hidden))


def double(model):
    """The same model with all numbers in float64."""
    state = nnx.state(model)
    nnx.update(model, jax.tree.map(lambda x: x.astype(float) if x.dtype == jnp.float32 else x, state))
    return model


def numbers(tree):
    """The arrays of a state or gradient; of keys their data."""
    leaves = jax.tree.leaves(tree)
    return [
        jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x[...] for x in leaves
    ]


def seen(model):
    return numbers(nnx.state(model)), model.calls, model.shape, model.dropout.deterministic


def model_loss(model, x):
    return jnp.sum(model(x) ** 2)


def plain_loss(m):
    m.calls += 1
    m.mode = "used"
    m.history.append(m.calls)
    return jnp.tanh(m.w[...])


TRANSFORMATIONS = {
    "value_and_grad": nnx.value_and_grad,
    "grad": nnx.grad,
    "jit of grad": lambda f: nnx.jit(nnx.grad(f)),
    "grad of jit": lambda f: nnx.grad(nnx.jit(f)),
    "remat": lambda f: nnx.grad(nnx.remat(f)),
    "jit": nnx.jit,
    "none": lambda f: f,
}


@pytest.mark.parametrize("transformation", TRANSFORMATIONS.values(), ids=TRANSFORMATIONS)
def test_plain_attributes(transformation):
    def program(t):
        m = Net()
        found = [numbers(transformation(t.with_rules(plain_loss))(m)) for _ in range(2)]
        return found, m.calls, m.mode, list(m.history)

    assert_as_jax(program)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", ["value_and_grad", "grad of jit", "jit of grad", "remat"])
def test_two_steps_of_a_model(name):
    def program(t):
        model = double(Model(nnx.Rngs(0)))
        step = TRANSFORMATIONS[name](t.with_rules(model_loss))
        return [numbers(step(model, X)) for _ in range(2)], seen(model)

    assert_as_jax(program)


def with_rules_inside_of_jit(t):
    model = double(Model(nnx.Rngs(0)))

    @nnx.jit
    def step(model, x):
        value, gradient = nnx.value_and_grad(t.with_rules(model_loss))(model, x)
        return value, gradient

    return [numbers(step(model, X)) for _ in range(2)], seen(model)


def optimizer_steps(t):
    model = double(Model(nnx.Rngs(0)))
    optimizer = nnx.Optimizer(model, optax.sgd(1e-2, momentum=0.9), wrt=nnx.Param)
    values = []
    for i in range(2):
        value, gradient = nnx.value_and_grad(t.with_rules(model_loss))(model, X + i)
        optimizer.update(model, gradient)
        values.append(value)
    return values, seen(model)


def eval_and_train(t):
    """The mode of a model decided in python, between and inside of calls."""
    model = double(Model(nnx.Rngs(0)))

    def loss(model, x, training):
        (model.train if training else model.eval)()
        return jnp.sum(model(x) ** 2) if model.norm.use_running_average != training else x

    gradients = [
        numbers(nnx.grad(t.with_rules(lambda m, x, flag=flag: loss(m, x, flag)))(model, X))
        for flag in (True, False)
    ]
    return gradients, seen(model), model.norm.use_running_average


def python_control_flow(t):
    model = Net()

    def loss(m, x):
        if m.w[...] > 0:
            m.mode = f"positive, call {m.calls}"
        for _ in range(int(jnp.sum(x > 0.5))):
            m.calls += 1
        return jnp.tanh(m.w[...]) * float(x[0, 1]) * m.calls

    return numbers(nnx.grad(t.with_rules(loss))(model, X)), model.mode, model.calls


def streams(t):
    """Random streams drawn from inside: as an argument, as an attribute of the model."""

    def loss(w, rngs):
        return jnp.sum(jnp.tanh(w) * jax.random.normal(rngs.params(), (3,)) + jax.random.uniform(rngs()))

    rngs = nnx.Rngs(0, params=1)
    found = [nnx.grad(t.with_rules(loss))(X[1], rngs) for _ in range(2)]
    return found, numbers(nnx.state(rngs))


def jax_transformations_of_a_state(t):
    """The functional way: split, differentiate in the parameters, merge inside, return the rest as `aux`."""
    graph, params, rest = nnx.split(double(Model(nnx.Rngs(0))), nnx.Param, ...)

    def loss(params, rest, x):
        model = nnx.merge(graph, params, jax.tree.map(lambda x: x, rest))
        value = model_loss(model, x)
        return value, nnx.state(model, nnx.Not(nnx.Param))

    found = []
    for _ in range(2):
        (value, rest), gradient = t.value_and_grad(loss, has_aux=True)(params, rest, X)
        found.append((value, numbers(gradient)))
    return found, numbers(rest)


def model_as_another_argument(t):
    model = double(nnx.Linear(3, 4, rngs=nnx.Rngs(0), param_dtype=jnp.float64))
    seen = []

    def loss(x, other):
        seen.append(other is model)
        seen.append(float(jnp.sum(other.kernel[...])))
        return jnp.sum(jnp.tanh(other(x)))

    return t.grad(loss)(X, model), seen


def model_of_a_closure(t):
    """A captured model that serves, and whose values python looks at."""
    model = Net()

    def loss(w):
        return jnp.tanh(w) * model.w[...] if model.w[...] > 0 and model.mode == "new" else w

    return [t.grad(loss)(X[0, 1]) for _ in range(2)]


def aux_and_argnums(t):
    one, other = Net(), Net()

    def loss(m, x, n):
        m.calls += 1
        n.mode = "aux"
        return jnp.sum(jnp.tanh(m.w[...] * x) * n.w[...]), {"note": "text", "calls": m.calls + n.calls}

    gradient, aux = nnx.grad(t.with_rules(loss), argnums=(0, 2), has_aux=True)(one, X, other)
    return numbers(gradient), aux, one.calls, other.mode


def new_variables(t):
    class Sower(Net):
        def __call__(self, x):
            self.hidden = nnx.Intermediate(jnp.tanh(self.w[...] * x))
            return jnp.sum(self.hidden[...] ** 2)

    model = Sower()
    gradient = nnx.grad(t.with_rules(lambda m: m(X[1])), argnums=nnx.DiffState(0, nnx.Param))(model)
    return numbers(gradient), numbers(nnx.pop(model, nnx.Intermediate))


def custom_rule_with_diff_state(t):
    """`nnx.custom_vjp` of a model in which only one attribute is differentiated."""
    attribute = nnx.DiffState(0, nnx.PathContains("w"))

    class Two(Net):
        def __init__(self):
            super().__init__()
            self.other = nnx.Param(jnp.array(3.0))

    @nnx.custom_vjp(nondiff_argnums=(attribute,), graph_updates=True)
    def f(m):
        return jnp.tanh(m.w[...]) * m.other[...]

    def forward(m):
        m.other[...] += 1
        return f(m), (jnp.cos(m.w[...]), m)

    def backward(residuals, g):
        (updates,), out = g
        cos, m = residuals
        gradient = jax.tree.map(lambda x: x, updates)
        gradient["w"][...] = 2 * cos * out * m.other[...]
        del gradient["other"]
        return (gradient,)

    f.defvjp(forward, backward)
    model = Two()
    gradient = nnx.grad(t.with_rules(f), argnums=nnx.DiffState(0, nnx.PathContains("w")))(model)
    return numbers(gradient), model.other[...]


def scan_over_layers(t):
    @nnx.vmap(in_axes=(0,), out_axes=0)
    def layers(key):
        return nnx.Linear(3, 3, rngs=nnx.Rngs(key), param_dtype=jnp.float64)

    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    def forward(x, layer):
        return jnp.tanh(layer(x))

    model = layers(jax.random.split(jax.random.key(0), 3))
    return numbers(nnx.grad(t.with_rules(lambda m, x: jnp.sum(forward(x, m) ** 2)))(model, X))


PROGRAMS = [
    with_rules_inside_of_jit,
    optimizer_steps,
    eval_and_train,
    python_control_flow,
    streams,
    jax_transformations_of_a_state,
    model_as_another_argument,
    model_of_a_closure,
    aux_and_argnums,
    new_variables,
    custom_rule_with_diff_state,
    scan_over_layers,
]


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
def test_models(program):
    assert_as_jax(program)


def captured(t, way=lambda gradient: gradient):
    model = Net()
    return way(t.grad(lambda x: plain_loss(model) * x))(X[0, 1])


def captured_count(t):
    count = nnx.Variable(jnp.array(0))

    def loss(w):
        count[...] += 1
        return jnp.tanh(w)

    return t.grad(loss)(X[0, 1])


# To change a model that belongs to the world outside of a transformation is nnx's error.
REFUSED = {
    "attribute of an argument": lambda t: t.grad(lambda x, m: plain_loss(m) * x)(X[0, 1], Net()),
    "captured model": captured,
    "captured model, jit": lambda t: captured(t, jax.jit),
    "captured count": captured_count,
}


@pytest.mark.parametrize("program", REFUSED.values(), ids=REFUSED)
def test_what_nnx_refuses(program):
    assert_as_jax(program, raises=TraceContextError)
