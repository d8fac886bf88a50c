"""What is not differentiated reaches the function as it is, and what the function changes stays changed."""

from __future__ import annotations

import dataclasses
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drop_in import assert_as_jax
from jax.sharding import PartitionSpec as P

X, S = jnp.array([0.3, -0.5, 1.0]), jnp.array(0.7)


class Plain:
    """An object that JAX knows nothing of."""

    def __init__(self, **attributes):
        self.__dict__.update(attributes)


@jax.tree_util.register_pytree_node_class
class Config:
    """A pytree that registers one attribute and forgets the others; it counts how it is taken apart."""

    calls: list[str] = []  # noqa: RUF012

    def __init__(self, value):
        self.value, self.scale = value, 1.0

    def tree_flatten(self):
        self.calls.append("flatten")
        return (self.value,), None

    @classmethod
    def tree_unflatten(cls, _, children):
        cls.calls.append("unflatten")
        return cls(*children)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class State:
    """A pytree of a dataclass, which may be changed."""

    total: jax.Array
    name: str = dataclasses.field(default="state", metadata={"static": True})


def config(value=3.0, scale=5.0):
    c = Config(value)
    c.scale = scale
    Config.calls = []
    return c


def forgotten_attribute(t):
    c = config()
    gradient = t.grad(lambda x, c: jnp.tanh(x) * c.value * c.scale)(S, c)
    return gradient, Config.calls


def forgotten_attribute_of_an_array(t):
    c = config(jnp.array(3.0))
    results = [
        t.grad(lambda x, c: jnp.tanh(x) * c.value * c.scale)(S, c),
        t.grad(lambda x, *, c: jnp.tanh(x) * c.value * c.scale)(S, c=c),
        t.value_and_grad(lambda x, cs: jnp.tanh(x) * cs["a"][0].scale)(S, {"a": [c]}),
        t.vjp(lambda x: jnp.tanh(x) * c.value * c.scale, S)[1](1.0),
    ]
    return results, Config.calls, c.scale


def identity(t):
    """By position and by keyword the function is given the caller's own objects."""
    default = object()
    c, array, numpy, table = config(), jnp.arange(2.0), np.arange(2.0), {"k": [X]}
    given = [c, array, numpy, table, table["k"], default, io.StringIO(), Plain(), len, None, "text", 1 << 70]

    def loss(x, *args, **kwargs):
        seen.append([a is b for a, b in zip(args, given, strict=True)])
        seen.append([kwargs[f"k{i}"] is b for i, b in enumerate(given)])
        return jnp.tanh(x)

    seen, keywords = [], {f"k{i}": a for i, a in enumerate(given)}
    t.grad(loss)(S, *given, **keywords)
    t.value_and_grad(loss)(S, *given, **keywords)
    t.jacobian(loss)(S, *given, **keywords)
    t.with_rules(loss)(S, *given, **keywords)
    return seen, all(all(s) for s in seen)


def kinds(t):
    """Arrays that are not differentiated are arrays, with a device and a sharding; types are the caller's."""
    mesh = jax.make_mesh((3,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = jax.device_put(X, jax.NamedSharding(mesh, P("i")))
    committed = jax.device_put(X, jax.devices()[1])

    def loss(x, y, n, f, spread, committed):
        seen.append([type(v).__name__ for v in (y, n, f)])
        seen.append([isinstance(v, jax.core.Tracer) for v in (x, y, y * 2, x * 2)])
        seen.append(
            (str(spread.sharding), [d.id for d in committed.devices()], len(spread.addressable_shards))
        )
        seen.append((y.weak_type, y.is_fully_addressable, (y * 2).nbytes))
        return jnp.tanh(x) * n

    seen = []
    gradient = t.grad(loss)(S, X, np.float32(2), 0.5, spread, committed)
    return gradient, seen


def popped(t):
    batch = {"x": X, "scale": 2.0, "inner": {"list": []}}

    def loss(w, batch):
        x, scale = batch.pop("x"), batch.pop("scale")
        batch["inner"]["list"].append("seen")
        batch["result"] = float(jnp.sum(x * scale))
        return jnp.sum(jnp.tanh(w * x)) * scale

    return t.grad(loss)(S, batch), batch


def popped_keyword(t):
    batch, log = {"x": X, "y": X * 2}, []

    def loss(w, *, batch, log):
        log.append(sorted(batch))
        del batch["y"]
        return jnp.sum(jnp.tanh(w * batch["x"]))

    return t.value_and_grad(loss)(S, batch=batch, log=log), batch, log


def attributes(t):
    holder = Plain(step=0, seen=None, history=[])

    def loss(w, holder, scale):
        holder.step += 1
        holder.seen = scale * 2
        holder.history.append(float(jnp.sum(holder.seen)))
        return jnp.sum(jnp.tanh(w * scale))

    gradients = [t.grad(loss)(S, holder, X * i) for i in range(2)]
    return gradients, holder.step, holder.seen * 1, holder.history


def dataclass_changed(t):
    state = State(jnp.zeros(()))

    def loss(w, state, x):
        state.total = state.total + jnp.sum(x)
        state.name = "used"
        return jnp.sum(jnp.tanh(w * x)) + state.total

    return t.grad(loss)(S, state, X), t.grad(loss)(S, state, X), state.total * 1, state.name


def container_changed(t):
    """A pytree of the user's own class, changed in place by `with_rules` alone."""
    c = config(jnp.array(3.0))

    def loss(x, holder):
        holder["c"].value = jnp.tanh(holder["c"].value)
        holder["c"].scale += 1
        return x * holder["c"].value

    return t.with_rules(loss)(S, {"c": c}), c.value, c.scale


def container_of_traced_values(t):
    """What is changed while a transformation around `with_rules` traces is seen by that transformation."""

    def outer(w):
        batch, log = {"x": w * X, "n": 2}, []
        value = t.with_rules(inner)(w, batch, log)
        return value + jnp.sum(batch["y"]) * log[0] + ("x" in batch)

    def inner(w, batch, log):
        batch["y"] = jnp.tanh(batch.pop("x"))
        log.append(batch["n"])
        return jnp.sum(batch["y"] * w)

    return jax.value_and_grad(outer)(S), jax.jit(jax.grad(outer))(S)


def numpy_changed(t):
    buffer = np.zeros(3)

    def loss(w, buffer):
        buffer += np.arange(3.0)
        buffer[0] = 7
        return jnp.sum(jnp.tanh(w * buffer))

    return t.grad(loss)(S, buffer), t.grad(loss)(S, buffer), buffer


def reference(t):
    ref = jax.new_ref(jnp.zeros(()))

    def loss(x, ref):
        ref[...] = jax.lax.stop_gradient(2 * x)
        return jnp.tanh(x) * (2 if ref[...] > 1 else 1)

    return t.grad(loss)(S, ref), ref[...]


@jax.tree_util.register_pytree_node_class
class Table(dict):
    """A container of JAX that nobody may go through."""

    def tree_flatten(self):
        raise AssertionError("the container was gone through")

    @classmethod
    def tree_unflatten(cls, _, children):
        raise AssertionError("the container was made again")


def many_numbers(t):
    """A large container beside the parameters costs nothing: it is not looked at."""
    table = Table({str(i): i for i in range(100)})
    return [
        t.grad(lambda x, table: jnp.tanh(x) * table["3"])(S, table),
        t.value_and_grad(lambda x, *, table: jnp.tanh(x) * table["3"])(S, table=table),
        t.jacobian(lambda x, table: jnp.tanh(x) * table["3"])(S, table),
        t.hvp(lambda x, table: jnp.tanh(x) * table["3"])(S, S, table),
        t.with_rules(lambda x, table: jnp.tanh(x) * table["3"])(S, table),
    ]


def unordered_keys(t):
    """A dictionary whose keys JAX could not sort, and one with keys of any kind."""
    table = {1: X, "a": 2.0, None: [3.0], (1, 2): "text"}
    return t.grad(lambda x, table: jnp.sum(jnp.tanh(x * table[1])) * table["a"])(S, table)


def differentiated_containers(t):
    """The differentiated argument has its own class, order and structure inside, as under `jax.grad`."""
    seen = []

    def loss(params):
        seen.append([type(params).__name__, list(params), params["b"].name])
        params["extra"] = 1
        return jnp.tanh(params["a"]) + jnp.sum(params["b"].total)

    params = {"b": State(X, "mine"), "a": S}
    return t.grad(loss)(params), seen, "extra" in params


def auxiliary_data(t):
    """What a function returns beside its value is returned as it is, of any type, and the same object."""
    given, table = Plain(), {"k": [X]}

    def loss(x, y):
        aux = {"int": 3, "float": 0.5, "none": None, "numpy": np.float32(2), "array": y, "text": "text"}
        return jnp.tanh(x), (aux, [y * 2, jnp.exp(x)], table, loss)

    def same(aux):
        return aux[2] is table, aux[2]["k"] is table["k"], aux[3] is loss, aux[0]["array"] is X, aux[:2]

    gradient, aux = t.grad(loss, has_aux=True)(S, X)
    (value, again), _ = t.value_and_grad(loss, has_aux=True)(S, X)
    direct = t.with_rules(lambda x: (x, given, table))(X)
    return gradient, value, same(aux), same(again), direct[0] is X, direct[1] is given, direct[2] is table


def equal_arguments(t):
    """One array given twice is the same object twice, and a differentiated one is one tracer."""

    def loss(x, y, pair):
        seen.append((y is pair[0], pair[0] is pair[1], x is x))
        return jnp.sum(jnp.tanh(x * y))

    seen = []
    return t.grad(loss)(X, X, (X, X)), seen


PROGRAMS = [
    forgotten_attribute,
    forgotten_attribute_of_an_array,
    identity,
    kinds,
    popped,
    popped_keyword,
    attributes,
    dataclass_changed,
    container_changed,
    container_of_traced_values,
    numpy_changed,
    reference,
    many_numbers,
    unordered_keys,
    differentiated_containers,
    auxiliary_data,
    equal_arguments,
]


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
def test_arguments(program):
    assert_as_jax(program)
