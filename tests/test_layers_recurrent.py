"""Recurrent layers: against Flax's cells, under every option, and against the rule of `scan`."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import compiled
from flax import linen as nn
from hypothesis import given, settings
from hypothesis import strategies as st

import funcprop as fp

L = fp.layers
RNG = np.random.default_rng(0)
RULES = fp.rules.handwritten
GATES = {"rnn": 1, "gru": 3, "lstm": 4}


def numbers(*shape):
    return jax.device_put(RNG.standard_normal(shape))


def arguments(cell, inputs=3, units=4, batch=(2,), with_bias=True, with_state=True):
    """Input-independent arguments: weights, biases, and the initial state."""
    width = GATES[cell] * units
    biases = [numbers(width) if with_bias else None for _ in range(2 if cell == "gru" else 1)]
    states = tuple(numbers(*batch, units) for _ in range(2 if cell == "lstm" else 1))
    return numbers(inputs, width), numbers(units, width), *biases, states if with_state else None


def assert_same(actual, expected, rtol=1e-12):
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert (a.shape, a.dtype) == (e.shape, e.dtype)
        np.testing.assert_allclose(a, e, rtol=rtol, atol=rtol * np.max(np.abs(e), initial=1.0))


def values_and_cotangents(function, *args):
    results, pullback = jax.vjp(function, *args)
    g = jax.tree.map(lambda y: jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape), results)
    return results, pullback(g)


def flax_cell(cell, units):
    return {"rnn": nn.SimpleCell, "gru": nn.GRUCell, "lstm": nn.OptimizedLSTMCell}[cell](
        units, param_dtype=float
    )


def from_flax(cell, params):
    """Our parameters from those of Flax's cell."""
    gate_names = {"rnn": ("",), "gru": ("r", "z", "n"), "lstm": ("i", "f", "g", "o")}[cell]
    inputs = [params["i" + name] for name in gate_names]
    hidden = [params["h" + name] for name in gate_names]
    w, u = (jnp.concatenate([p["kernel"] for p in ps], -1) for ps in (inputs, hidden))
    if cell == "gru":
        b = jnp.concatenate([p["bias"] for p in inputs])
        only_n = jnp.zeros_like(b).at[-hidden[2]["bias"].size :].set(hidden[2]["bias"])
        return w, u, b, only_n
    return w, u, jnp.concatenate([p["bias"] for p in (inputs if cell == "rnn" else hidden)])


@pytest.mark.parametrize("cell", GATES)
def test_the_same_network_as_in_flax(cell):
    model = nn.RNN(flax_cell(cell, 4), time_major=True, return_carry=True)
    x = numbers(5, 2, 3)
    params = jax.tree.map(
        lambda a: numbers(*a.shape), jax.eval_shape(model.init, jax.random.key(0), x)["params"]["cell"]
    )

    def theirs(params, x):
        carry, outputs = model.apply({"params": {"cell": params}}, x)
        return outputs, carry if cell == "lstm" else (carry,)

    def ours(params, x):
        return getattr(L, cell)(x, *from_flax(cell, params), return_state=True)

    @compiled
    def both(*args):
        functions = fp.with_rules(ours, RULES), theirs
        return [values_and_cotangents(function, *args) for function in functions]

    assert_same(*both(params, x))


@settings(max_examples=7)
@given(st.data())
def test_every_option_against_autodiff(data):
    cell = data.draw(st.sampled_from(sorted(GATES)))
    options = {
        "save": data.draw(st.sampled_from(["all", "output"])),
        "reverse": data.draw(st.booleans()),
        "return_state": data.draw(st.booleans()),
    }
    batch = data.draw(st.sampled_from([(), (1,), (2, 3), (0,)]))
    steps = data.draw(st.sampled_from([0, 1, 4]))
    args = arguments(
        cell, batch=batch, with_bias=data.draw(st.booleans()), with_state=data.draw(st.booleans())
    )
    function = partial(getattr(L, cell), **options)

    @compiled
    def both(*args):
        rule_sets = RULES, fp.rules.autodiff
        return [values_and_cotangents(fp.with_rules(function, rules), *args) for rules in rule_sets]

    assert_same(*both(numbers(steps, *batch, 3), *args))


@pytest.mark.parametrize("cell", GATES)
def test_the_rule_of_scan_derives_the_same(cell):
    x, args = numbers(4, 2, 3), arguments(cell)
    loss = lambda x, *args: jnp.sum(jnp.square(getattr(L, cell)(x, *args)))  # noqa: E731
    by_scan = fp.rules.autodiff.replace({"scan": RULES["scan"]})

    @compiled
    def gradients(*args):
        argnums = tuple(range(len(args)))
        return [fp.grad(loss, argnums, rules=rules)(*args) for rules in (RULES, by_scan)]

    assert_same(*gradients(x, *args))


@pytest.mark.parametrize("batch", [(), (3,)])
def test_a_large_recurrent_matrix(batch):
    """More than 3 MB: backwards it is the left operand of the loop's product."""
    x, args = numbers(2, *batch, 1), arguments("rnn", 1, 640, batch)

    @compiled
    def both(*args):
        rule_sets = RULES, fp.rules.autodiff
        return [values_and_cotangents(fp.with_rules(L.rnn, rules), *args) for rules in rule_sets]

    assert_same(*both(x, args[0], args[1] / 30, *args[2:]))


def test_halves_of_a_sequence_are_joined_by_the_state():
    x, (w, u, b, _) = numbers(6, 2, 3), arguments("lstm")
    whole, last = L.lstm(x, w, u, b, return_state=True)
    first, state = L.lstm(x[:3], w, u, b, return_state=True)
    second, again = L.lstm(x[3:], w, u, b, state, return_state=True)
    assert_same((jnp.concatenate([first, second]), again), (whole, last))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_lower_precision_is_as_accurate_as_autodiff(dtype):
    x, args = numbers(8, 2, 3), arguments("lstm", with_state=False)
    loss = lambda rules: lambda x, *args: jnp.sum(fp.with_rules(L.lstm, rules)(x, *args).astype(float) ** 2)  # noqa: E731
    low = jax.tree.map(lambda a: a.astype(dtype), (x, *args))
    exact = jax.grad(loss(fp.rules.autodiff), 2)(*jax.tree.map(lambda a: a.astype(float), low))
    found = [jax.grad(loss(rules), 2)(*low) for rules in (RULES, fp.rules.autodiff)]
    errors = [float(jnp.max(jnp.abs(g.astype(float) - exact))) for g in found]
    assert found[0].dtype == dtype
    assert errors[0] <= 1.5 * errors[1]


@pytest.mark.parametrize("cell", GATES)
def test_what_is_kept(cell):
    """Of all steps: the gates and states with "all", the states alone with "output"."""

    def entries(save):
        layer = partial(getattr(L, cell), save=save)
        pullback = jax.eval_shape(
            lambda *a: jax.vjp(fp.with_rules(layer, RULES), *a)[1], numbers(7, 2, 3), *arguments(cell)
        )
        return sum(leaf.size for leaf in jax.tree.leaves(pullback) if leaf.shape == (7, 2, 4)) // (7 * 2 * 4)

    assert (entries("all"), entries("output")) == {"rnn": (1, 1), "gru": (6, 1), "lstm": (6, 2)}[cell]


@pytest.mark.parametrize("cell", GATES)
def test_equations(cell):
    x, args = numbers(3, 2, 3), arguments(cell)
    loss = lambda x, args: fp.name(L.mean_squared_error(getattr(L, cell)(x, *args), 0 * y), "J")  # noqa: E731
    y = getattr(L, cell)(x, *args)
    derivation = fp.derive(loss, (0, 1))(x, args)
    derivation.verify()
    assert f"= {cell}(" in derivation.text()


def test_initialisers():
    params = L.lstm.init(jax.random.key(0), 3, 4)
    assert {k: v.shape for k, v in params.items()} == {"w": (3, 16), "u": (4, 16), "b": (16,)}
    np.testing.assert_allclose(params["u"][:, 4:8].T @ params["u"][:, 4:8], np.eye(4), atol=1e-12)
    assert set(L.gru.init(jax.random.key(0), 3, 4)) == {"w", "u", "b", "b_recurrent"}
    assert L.rnn(numbers(5, 3), **L.rnn.init(jax.random.key(0), 3, 4, bias=False)).shape == (5, 4)


def test_errors():
    x, (w, u, _, _) = numbers(5, 3), arguments("lstm")
    with pytest.raises(ValueError, match=r"lstm: w has shape \(2, 16\), but \(3, 16\) belongs to x with 3"):
        L.lstm(x, w[:2], u)
    with pytest.raises(ValueError, match=r"gru: u has shape \(4, 16\), but \(4, 12\) belongs"):
        L.gru(x, w[:, :12], u)
    with pytest.raises(ValueError, match=r"save='input' is not a saving policy"):
        L.lstm(x, w, u, save="input")
