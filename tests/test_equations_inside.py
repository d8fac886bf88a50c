"""The equations of one step of a loop, and of the branches of a `cond`."""

from __future__ import annotations

import re

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from equation_lines import texts

import funcprop as fp
from funcprop.equations.verification import DerivationError
from funcprop.reporting.mathml import mathml
from funcprop.rules.equations import Equations, apply

KEY = jax.random.key(0)


def test_one_step_of_a_loop_is_written_and_verified():
    """A recurrent network: what is carried, what is read by every step, and what is a slice for each."""
    params = {"W": jnp.full((2, 3), 0.3), "U": 0.5 * jnp.eye(3), "b": jnp.ones(3), "V": jnp.ones((3, 2))}

    def loss(P, xs, y):
        def step(h, x):
            h = jnp.tanh(x @ P["W"] + h @ P["U"] + P["b"])
            return h, h @ P["V"]

        last, os = jax.lax.scan(step, jnp.zeros(3), xs)
        return jnp.sum((os - y) ** 2) + jnp.sum(last**2)

    derivation = fp.derive(loss)(params, jnp.linspace(-1.0, 1.0, 8).reshape(4, 2), jnp.ones(2))
    (loop,) = derivation.insides
    assert loop.title == "Scan for t = 1 … 4, h[0] = 0, u₁ = h[4]"
    assert texts(loop.forward) == [
        "z[t] = xs[t] W + h[t−1] U + b",
        "h[t] = tanh(z[t])",
        "u₂[t] = h[t] V",
    ]
    assert loop.back == "Back for t = 4 … 1, ∂J/∂h[4] = ∂J/∂u₁"
    assert set(texts(loop.backward)) == {
        "∂J/∂h[t] += prod(∂J/∂u₂[t], ∂u₂[t]/∂h[t]) = V ∂J/∂u₂[t]",
        "∂J/∂V += prod(∂J/∂u₂[t], ∂u₂[t]/∂V) = h[t] ∂J/∂u₂[t]ᵀ",
        "∂J/∂z[t] = prod(∂J/∂h[t], ∂h[t]/∂z[t]) = ∂J/∂h[t] ⊙ tanh′(z[t])",
        "∂J/∂W += prod(∂J/∂z[t], ∂z[t]/∂W) = xs[t] ∂J/∂z[t]ᵀ",
        "∂J/∂h[t−1] = prod(∂J/∂z[t], ∂z[t]/∂h[t−1]) = U ∂J/∂z[t]",
        "∂J/∂U += prod(∂J/∂z[t], ∂z[t]/∂U) = h[t−1] ∂J/∂z[t]ᵀ",
        "∂J/∂b += prod(∂J/∂z[t], ∂z[t]/∂b) = ∂J/∂z[t]",
    }
    found = derivation.verify().errors
    assert "∂J/∂h[t−1]" in found
    assert max(found.values()) < 1e-10
    assert derivation.latex().count("{") == derivation.latex().count("}")
    assert "\\begin{align*}\n{z[t]}" in derivation.latex()
    assert not re.search(r"[^\x00-\x7f]", derivation.latex())
    for line in (*loop.forward, *loop.backward):
        assert all(mathml(form.latex(), form.text()) for form in line.forms)


def test_loops_backwards_over_layers_and_of_frameworks_hold_line_by_line():
    def of_layers(W, x):
        return jnp.sum(jax.lax.scan(lambda h, w: (jnp.tanh(h @ w) + h, None), x, W, reverse=True)[0] ** 2)

    derivation = fp.derive(of_layers)(jnp.full((3, 2, 2), 0.2), jnp.ones((4, 2)))
    (loop,) = derivation.insides
    assert loop.title == "Scan for t = 3 … 1, h[4] = x, u = h[1]"
    assert texts(loop.forward)[0] == "z[t] = h[t+1] W[t]"
    assert any(line.startswith("∂J/∂W[t] = ") for line in texts(loop.backward))
    assert max(derivation.verify().errors.values()) < 1e-10
    cell = eqx.nn.GRUCell(2, 3, key=KEY)
    run = lambda cell, xs: jax.lax.scan(lambda h, x: (cell(x, h), None), jnp.zeros(3), xs)[0]  # noqa: E731
    derivation = fp.derive(lambda cell, xs: jnp.sum(run(cell, xs) ** 2))(cell, jnp.ones((4, 2)))
    assert 5 < len(derivation.insides[0].forward) < 9
    assert max(derivation.verify().errors.values()) < 1e-10


def test_branches_are_cases_under_their_conditions():
    """A branch that is not taken is verified too; an operand that is read elsewhere collects its gradient."""

    def loss(p, x):
        z = fp.name(x @ p["W"], "z")
        square = lambda z: (z**2 / 2, z)  # noqa: E731
        a, b = jax.lax.cond(jnp.sum(z) > 0, lambda z: (p["s"] * jnp.tanh(z), p["s"] * z), square, z)
        return jnp.sum(a * b + z)

    derivation = fp.derive(loss)({"W": jnp.full((3, 2), 0.3), "s": jnp.array(2.0)}, jnp.ones((2, 3)))
    then, otherwise = derivation.insides
    assert then.title == "If sum(z) > 0"
    assert texts(then.forward) == ["u₁ = s tanh(z)", "u₂ = s z"]
    assert then.back == "Back, if sum(z) > 0"
    assert set(texts(then.backward)) == {
        "∂J/∂s = prod(∂J/∂u₁, ∂u₁/∂s) + prod(∂J/∂u₂, ∂u₂/∂s) = sum(∂J/∂u₁ ⊙ tanh(z)) + sum(∂J/∂u₂ ⊙ z)",
        "∂J/∂z += prod(∂J/∂u₁, ∂u₁/∂z) + prod(∂J/∂u₂, ∂u₂/∂z) = s ∂J/∂u₁ ⊙ tanh′(z) + s ∂J/∂u₂",
    }
    assert otherwise.title == "Otherwise"
    assert texts(otherwise.forward) == ["u₁ = z² / 2", "u₂ = z"]
    assert texts(otherwise.backward)[0].endswith(" = ∂J/∂u₁ ⊙ z + ∂J/∂u₂")
    assert max(derivation.verify().errors.values()) < 1e-10
    assert "\\begin{align*}" in derivation.latex()


def test_a_branch_that_is_known_stands_in_the_place_of_the_cond():
    branches = [jnp.tanh, jax.nn.relu, lambda z: z * 3]
    for loss in (lambda w: jnp.sum(jax.lax.switch(1, branches, w)), lambda w: jnp.sum(jax.nn.relu(w))):
        assert texts(fp.derive(loss)(jnp.ones(3)).forward) == ["J = sum(relu(w))"]
    diagonal = fp.derive(lambda w: jnp.sum(jnp.diag(w) ** 2))(jnp.ones((3, 3)))
    assert texts(diagonal.forward) == ["u = w[arange(3), arange(3)]", "J = sum(u²)"]
    diagonal.verify()


def test_the_cases_of_a_switch_are_numbered_and_the_ends_are_for_all_beyond():
    def loss(w, k):
        return jax.lax.switch(k, [jnp.sum, lambda w: jnp.sum(w**2), lambda w: jnp.sum(jnp.log(w))], w)

    derivation = fp.derive(loss)(jnp.array([1.0, -2.0]), jnp.array(1))
    assert [inside.title for inside in derivation.insides] == ["If k ≤ 0", "If k = 1", "If k ≥ 2"]
    assert [texts(inside.backward) for inside in derivation.insides] == [
        ["∂J/∂w = 1"], ["∂J/∂w = 2 w"], ["∂J/∂w = 1 / w"],
    ]  # fmt: skip
    derivation.verify()


def test_a_wrong_line_of_a_branch_that_is_not_taken_is_caught():
    def equations(op):
        return Equations(apply("f", jnp.sin, op.args[0]), (1.001 * op.cotangent * op.args[0],))

    rule = fp.Rule(lambda x: (jnp.sin(x), x), lambda x, g, needs: (g * jnp.cos(x),), equations)
    layer = fp.layer(rule=rule)(jnp.sin)
    derivation = fp.derive(lambda x, t: jnp.sum(jax.lax.cond(t, layer, jnp.cos, x)))(
        jnp.ones(2), jnp.array(False)
    )
    with pytest.raises(DerivationError, match="deviates from autodiff"):
        derivation.verify()


def test_a_while_has_its_condition_and_one_step():
    def loss(w, x):
        scale, _ = jax.lax.while_loop(lambda s: s[0] < 5.0, lambda s: (2 * s[0] + s[1], s[1]), (x[0], 1.5))
        return jnp.sum(w * x) / scale

    derivation = fp.derive(loss)(jnp.ones(2), jnp.ones(2))
    (loop,) = derivation.insides
    assert loop.title == "While h[t−1] < 5, for t = 1, 2 … T, h[0] = x[0], y = 3/2, u = h[T]"
    assert texts(loop.forward) == ["h[t] = 2 h[t−1] + y"]
    assert loop.backward == ()
    assert "h[t]" in derivation.verify().errors


def test_a_counter_is_told_only_where_a_step_reads_it():
    step = lambda i, h: jnp.tanh(h @ h)  # noqa: E731
    derivation = fp.derive(lambda w: jnp.sum(jax.lax.fori_loop(0, 3, step, w)))(jnp.ones((2, 2)))
    assert derivation.insides[0].title == "Scan for t = 1 … 3, h[0] = w, u = h[3]"
    read = fp.derive(lambda w: jax.lax.fori_loop(0, 3, lambda i, s: s + w[i] ** 2, 0.0))(jnp.ones(3))
    assert texts(read.insides[0].forward) == [
        "i[t] = i[t−1] + 1",
        "u[t] = w[i[t−1]]",
        "h[t] = h[t−1] + u[t]²",
    ]
    assert read.insides[0].back.endswith("∂J/∂h[3] = 1")
    read.verify()


def test_a_branch_in_a_step_and_a_loop_in_a_loop_have_lines_of_their_own():
    def loss(w, xs):
        def inner(g, k):
            return jax.lax.cond(k > 1, lambda g: jnp.tanh(w * g), lambda g: g, g), None

        def outer(h, x):
            return jax.lax.scan(inner, h + x, jnp.arange(3.0))[0], None

        return jnp.sum(jax.lax.scan(outer, jnp.ones(2), xs)[0])

    derivation = fp.derive(loss)(jnp.array(0.7), jnp.linspace(0.0, 1.0, 6).reshape(3, 2))
    titles = [title.split(",")[0] for title, _ in derivation.sections()][2::2]
    assert titles == ["Scan for t = 1 … 3", "Scan for τ = 1 … 3", "If arange(3)[τ] > 1", "Otherwise"]
    assert max(derivation.verify().errors.values()) < 1e-10


def test_the_levels_of_an_associative_scan_are_short_sums():
    """Its slices, and what is put between others, are written where they are read; nothing empty is."""
    combine = lambda a, b: (a[0] * b[0], b[0] * a[1] + b[1])  # noqa: E731
    loss = lambda w, x: jnp.sum(jax.lax.associative_scan(combine, (w * x, x))[1])  # noqa: E731
    derivation = fp.derive(loss)(jnp.array(0.5), jnp.linspace(-1.0, 1.0, 8))
    assert len(derivation.forward) < 20
    assert len(derivation.backward) < 20
    assert not derivation.verify().unchecked


@pytest.mark.parametrize("cell_first", [True, False])
def test_the_cell_of_an_lstm_is_c_wherever_it_is_carried(cell_first):
    """Flax carries (c, h), Equinox (h, c): the cell is what no product reads."""

    def loss(w, x):
        def step(carry, u):
            c, h = carry if cell_first else carry[::-1]
            i, f, g, o = jnp.split(w @ jnp.concatenate([u, h]), 4)
            c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            h = jax.nn.sigmoid(o) * jnp.tanh(c)
            return ((c, h) if cell_first else (h, c)), None

        carry, _ = jax.lax.scan(step, (jnp.zeros(2), jnp.zeros(2)), x)
        return jnp.sum(carry[cell_first] ** 2)

    found = fp.derive(loss)(jnp.linspace(-1, 1, 32).reshape(8, 4), jnp.ones((3, 2)))
    assert "⊙ tanh(c[t])" in found.text()
    assert "u = h[3]" in found.text()
    assert max(found.verify().errors.values()) < 1e-10
