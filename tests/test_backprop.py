"""Both sweeps: the chapter's list, foreign models by name, loops, contributions."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import funcprop as fp

CHAPTER_VALUES = ["z", "h", "o", "L", "s", "J"]
CHAPTER_GRADIENTS = ["L", "s", "o", "W2", "h", "z", "W1"]


def close(actual, expected):
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-12, atol=1e-14), actual, expected)


@pytest.fixture
def chapter():
    params = fp.models.init_chapter(jax.random.key(0), inputs=3, hidden=4, outputs=2)
    return params, jnp.array([1.0, -2.0, 0.5]), jnp.array(1), 0.1


def closed_form(params, x, y, λ):
    """The chapter's equations, in numpy."""
    W1, W2 = np.asarray(params["W1"]), np.asarray(params["W2"])
    z = W1 @ x
    h = np.tanh(z)
    o = W2 @ h
    p = np.exp(o) / np.exp(o).sum()
    L = -np.log(p[y])
    s = λ / 2 * ((W1**2).sum() + (W2**2).sum())
    values = {"z": z, "h": h, "o": o, "L": L, "s": s, "J": L + s}
    g_o = p - np.eye(2)[y]
    g_h = W2.T @ g_o
    g_z = g_h * (1 - h**2)
    gradients = {"L": 1.0, "s": 1.0, "o": g_o, "W2": np.outer(g_o, h) + λ * W2}
    gradients |= {"h": g_h, "z": g_z, "W1": np.outer(g_z, x) + λ * W1}
    return values, gradients


@pytest.mark.parametrize("jitted", [False, True])
def test_the_chapters_list(chapter, jitted):
    run = fp.backprop(fp.models.chapter)
    p = (jax.jit(run) if jitted else run)(*chapter)
    values, gradients = closed_form(*chapter)
    assert list(p.values) == CHAPTER_VALUES
    assert list(p.gradients) == CHAPTER_GRADIENTS
    close(dict(p.values), values)
    close(dict(p.gradients), gradients)
    close(p.value, values["J"])
    close(p.gradient, {"W1": gradients["W1"], "W2": gradients["W2"]})


def test_contributions_stand_by_themselves(chapter):
    params, x, *_, λ = chapter
    p = fp.backprop(fp.models.chapter)(*chapter)
    c = p.contributions
    close(c["s", "W1"], λ * params["W1"])
    close(c["s", "W2"], λ * params["W2"])
    close(c["z", "W1"], np.outer(p.gradients["z"], x))
    assert set(c) == {
        ("J", "L"), ("J", "s"), ("L", "o"), ("o", "W2"), ("s", "W2"), ("o", "h"), ("h", "z"), ("z", "W1"),
        ("s", "W1"),
    }  # fmt: skip
    assert len(c) == 9
    for target in ("W1", "W2"):
        close(sum(value for (_, t), value in c.items() if t == target), p.gradients[target])


def test_contributions_pass_through_what_has_no_name():
    def loss(w):
        a = fp.name(jnp.sin(w * 2) + 1, "a")
        return fp.name(a * jnp.exp(w), "J")

    p = fp.backprop(loss)(0.3)
    assert list(p.contributions) == [("J", "a"), ("J", "w"), ("a", "w")]
    close(p.contributions["J", "w"], np.exp(0.3) * (np.sin(0.6) + 1))
    close(p.contributions["a", "w"], 2 * np.cos(0.6) * np.exp(0.3))
    with pytest.raises(KeyError, match="contributes nothing directly to 'a'"):
        p.contributions["w", "a"]


def test_contributions_of_an_operator_with_several_results():
    """What reaches a named result stops there; what reaches its neighbour goes on to the operator's input."""

    def by_split(w):
        first, second = jax.lax.split(w, (2, 1))
        return fp.name(jnp.sum(fp.name(first, "a") ** 2) + 3 * jnp.sum(second), "J")

    c = fp.backprop(by_split)(np.array([1.0, 4.0, 2.0])).contributions
    close(c["J", "w"], [0.0, 0.0, 3.0])
    close(c["a", "w"], [2.0, 8.0, 0.0])

    def by_loop(w, xs):
        last, ys = jax.lax.scan(lambda power, x: (power * w, power * x), 1.0, xs)
        return fp.name(fp.name(last, "last") ** 2 + jnp.sum(ys), "J")

    # last = w³ and Σ y = x₀ + w x₁ + w² x₂.
    c = fp.backprop(by_loop)(2.0, np.array([1.0, 2.0, 3.0])).contributions
    close(c["J", "w"], 2.0 + 2 * 2 * 3)
    close(c["last", "w"], 2 * 8 * 3 * 4)


def test_gradients_of_what_was_not_asked_for_are_computed_on_demand(chapter):
    p = fp.backprop(fp.models.chapter)(*chapter)
    expected = jax.grad(fp.models.chapter, (1, 3))(*chapter)
    close((p.gradients["x"], p.gradients["λ"]), expected)
    assert "x" not in list(p.gradients)
    everything = fp.backprop(fp.models.chapter, argnums=None)(*chapter)
    assert everything.gradient[2] is None
    close((everything.gradient[1], everything.gradient[3]), expected)


# --- loops ------------------------------------------------------------------------------------


def recurrent(w, xs):
    def step(h, x):
        z = fp.name(w["U"] @ h + w["V"] @ x, "z")
        h = fp.name(jnp.tanh(z), "h")
        return h, h.sum()

    last, sums = jax.lax.scan(step, jnp.zeros(4), xs)
    return fp.name(jnp.sum(last**2) + sums.sum(), "J")


def test_values_in_a_loop_have_a_leading_time_axis():
    rng = np.random.default_rng(0)
    w = {"U": rng.normal(size=(4, 4)), "V": rng.normal(size=(4, 3))}
    xs = rng.normal(size=(5, 3))
    p = fp.backprop(recurrent)(w, xs)
    assert p.values["z"].shape == p.gradients["z"].shape == (5, 4)

    # The same loop unrolled, perturbed at every z: an oracle for the cotangents inside of it.
    def unrolled(perturbation):
        h, total, stored = jnp.zeros(4), 0.0, []
        for x, dz in zip(xs, perturbation, strict=True):
            stored.append(w["U"] @ h + w["V"] @ x + dz)
            h = jnp.tanh(stored[-1])
            total += h.sum()
        return jnp.sum(h**2) + total, jnp.stack(stored)

    gradient, stored = jax.grad(unrolled, has_aux=True)(jnp.zeros((5, 4)))
    close(p.values["z"], stored)
    close(p.gradients["z"], gradient)
    close(p.gradient, jax.grad(recurrent)(w, xs))
    close(p.gradients["xs"], jax.grad(recurrent, 1)(w, xs))


def test_loops_inside_loops_and_reversed_ones():
    def inner(c, x):
        return fp.name(jnp.tanh(c * x), "inner"), c

    def outer(c, xs):
        c, ys = jax.lax.scan(inner, c, xs, reverse=True)
        return fp.name(c + ys.sum(), "outer"), None

    def loss(c, xs):
        return jax.lax.scan(outer, c, xs)[0]

    xs = np.random.default_rng(0).normal(size=(3, 4))
    p = fp.backprop(loss, (0, 1))(0.5, xs)
    assert p.values["inner"].shape == p.gradients["inner"].shape == (3, 4)
    assert p.gradients["outer"].shape == (3,)
    close(p.gradient, jax.grad(loss, (0, 1))(0.5, xs))


# --- a foreign model --------------------------------------------------------------------------


class TransformerBlock(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = x + nn.MultiHeadDotProductAttention(2, name="attention")(nn.LayerNorm()(x))
        hidden = nn.gelu(nn.Dense(16, name="up")(nn.LayerNorm()(x)))
        return x + nn.Dense(8, name="down")(hidden)


class Transformer(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(11, 8, name="embed")(tokens)
        for i in range(2):
            x = TransformerBlock(name=f"block_{i}")(x)
        return nn.Dense(11, name="head")(x)


@pytest.fixture(scope="module")
def transformer():
    model = Transformer()
    tokens = jnp.arange(10).reshape(2, 5)
    params = jax.jit(model.init)(jax.random.key(0), tokens)
    params = jax.tree.map(lambda a: a.astype(float) + 0.1, params)

    def loss(params, tokens):
        logits = model.apply(params, tokens)
        return -jnp.mean(jax.nn.log_softmax(logits)[..., 0])

    return model, loss, params, tokens


def test_a_flax_transformer_by_its_scopes(transformer):
    model, loss, params, tokens = transformer
    p = jax.jit(fp.backprop(loss))(params, tokens)
    close(p.gradient, jax.jit(jax.grad(loss))(params, tokens))

    _, state = jax.jit(functools.partial(model.apply, capture_intermediates=True))(params, tokens)
    captured = state["intermediates"]
    for scope in ("block_0/attention", "block_1/up", "block_1", "head"):
        inner = captured
        for part in scope.split("/"):
            inner = inner[part]
        close(p.values[f"Transformer/{scope}"], inner["__call__"][0])
        assert p.gradients[scope].shape == inner["__call__"][0].shape
    # The gradient of a block's output is the cotangent that the rest of the network sends back.
    embed = captured["embed"]["__call__"][0]
    assert np.any(np.asarray(p.gradients["embed"]) != 0)
    assert p.gradients["embed"].shape == embed.shape


class ScannedTransformer(nn.Module):
    """The same blocks as one scanned, rematerialised layer with stacked parameters."""

    @nn.compact
    def __call__(self, x):
        class Layer(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                return TransformerBlock(name="block")(x), None

        layers = nn.scan(nn.remat(Layer), {"params": 0}, length=3, split_rngs={"params": True})
        return nn.Dense(1, name="head")(layers(name="layers")(x, None)[0])


def test_scanned_layers_by_their_scopes():
    model = ScannedTransformer()
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 8)))
    params = jax.tree.map(lambda a: a.astype(float) + 0.1, jax.jit(model.init)(jax.random.key(0), x))

    def loss(params, x):
        return jnp.sum(model.apply(params, x) ** 2)

    p = jax.jit(fp.backprop(loss))(params, x)
    close(p.gradient, jax.jit(jax.grad(loss))(params, x))
    # Every layer's output, with the layers as leading axis: the last one is what the head receives.
    block = p.values["layers/block"]
    assert block.shape == p.gradients["layers/block"].shape == (3, 2, 5, 8)
    head = params["params"]["head"]
    close(p.values["head"], block[-1] @ head["kernel"] + head["bias"])
    assert p.gradients["block/up"].shape == (3, 2, 5, 16)


def test_rematerialised_and_jitted_parts_are_opened():
    @jax.checkpoint
    def block(x):
        return fp.name(jnp.sin(jax.jit(lambda v: fp.name(jnp.cos(v), "c"))(x)), "s")

    p = fp.backprop(lambda x: block(x) ** 2)(0.7)
    assert {"c", "s"} <= set(p.values)
    close(p.gradients["c"], 2 * np.sin(np.cos(0.7)) * np.cos(np.cos(0.7)))


# --- rules ------------------------------------------------------------------------------------


def test_the_rule_of_an_operator_is_what_runs():
    calls = []

    def backward(residuals, g, needs):
        calls.append(needs)
        return (g * 3,)

    rules = fp.rules.autodiff.replace(
        {"sin": fp.Rule(lambda x, **_: (jnp.sin(x), ()), lambda *a, **_: backward(*a))}
    )
    assert fp.backprop(jnp.sin, rules=rules)(0.1).gradient == 3
    assert calls == [(True,)]
    close(fp.backprop(jnp.sin, rules=fp.rules.autodiff)(0.1).gradient, np.cos(0.1))


# --- errors -----------------------------------------------------------------------------------


def test_errors_name_the_remedy(chapter):
    with pytest.raises(TypeError, match=r"returns \(float64\[2\]\), but gradients are of one real scalar"):
        fp.backprop(lambda x: x)(jnp.ones(2))
    with pytest.raises(TypeError, match=r"argnums=2 holds .* which has no derivative; choose arguments with"):
        fp.backprop(fp.models.chapter, 2)(*chapter)
    with pytest.raises(ValueError, match="argnums=7, but the function was called with 4 positional"):
        fp.backprop(fp.models.chapter, 7)(*chapter)
    p = fp.backprop(fp.models.chapter)(*chapter)
    with pytest.raises(KeyError, match="no value named 'W3'; did you mean"):
        p.values["W3"]
    with pytest.raises(KeyError, match="'w' is ambiguous: a/w, b/w; use a longer name"):
        fp.backprop(lambda ps: ps["a"]["w"] * ps["b"]["w"])({"a": {"w": 1.0}, "b": {"w": 2.0}}).values["w"]
    with pytest.raises(KeyError, match="no cotangent reaches"):
        p.contributions["y", "o"]


def test_what_jax_cannot_differentiate_is_no_constant():
    fun = lambda x: x * jnp.nextafter(x, 2.0)  # noqa: E731
    try:
        expected = jax.grad(fun)(1.0)
    except NotImplementedError:
        with pytest.raises(NotImplementedError, match="nextafter"):
            fp.backprop(fun)(1.0)
    else:  # JAX can since 0.12.
        assert fp.backprop(fun)(1.0).gradients["x"] == expected


def test_table_lists_inputs_values_and_gradients(chapter):
    table = str(fp.backprop(fp.models.chapter)(*chapter)).splitlines()
    names = [row.split()[0] for row in table[2:]]
    assert names == ["W1", "W2", "x", "y", "λ", *CHAPTER_VALUES]
    assert [" ".join(row.split("  ")[0].split()) for row in table[7:9]] == ["z = W1 x", "h = φ(z)"]
    of_two = fp.backprop(lambda w, x: jnp.sum(jnp.tanh(x @ w) ** 2))(jnp.ones((2, 3)), jnp.ones(2))
    assert "J = sum(tanh(z)²)" in str(of_two)
    assert "  dot_general" in str(of_two)  # its name in `.values`
    stacked = jax.vmap(fp.backprop(lambda x: jnp.sum(x**2)))(jnp.ones((4, 2)))
    assert "J = sum(x²)" in str(stacked)


def with_metrics(w, x):
    z = fp.name(w * x, "z")
    return jnp.sum(z**2), {"mean": z.mean(), "same": x, "tag": "train", "count": 3}


def test_auxiliary_data():
    w, x = jnp.array(2.0), jnp.array([1.0, 3.0])
    p = fp.backprop(with_metrics, has_aux=True)(w, x)
    (value, aux), gradient = jax.value_and_grad(lambda w: with_metrics(w, x), has_aux=True)(w)
    assert (p.value, p.gradient, p.aux["mean"]) == (value, gradient, aux["mean"])
    np.testing.assert_array_equal(p.aux["same"], x)
    assert (p.aux["tag"], p.aux["count"]) == ("train", 3)
    jitted = jax.jit(lambda w: fp.backprop(lambda w: (w**2, w + 1), has_aux=True)(w))(w)
    assert (jitted.gradient, jitted.aux) == (4, 3)
    errors = fp.derive(with_metrics, has_aux=True)(w, x).verify().errors
    assert "∂J/∂z" in errors
    with pytest.raises(TypeError, match=r"has_aux=True, but <lambda> returns .*; return the pair"):
        fp.backprop(lambda w: w, has_aux=True)(w)
    with pytest.raises(
        TypeError, match=r"return a mean or a sum, and other results .* auxiliary data \(has_aux\)"
    ):
        fp.backprop(lambda w: (w, 2 * w))(w)


def test_a_gradient_of_shapes_says_what_gives_its_types() -> None:
    shape = jax.ShapeDtypeStruct((3,), float)
    gradient = fp.grad(lambda w: jnp.sum(w**2))
    with pytest.raises(TypeError, match=r"is called with shapes .* jax.eval_shape of the gradient gives"):
        gradient(shape)
    assert jax.eval_shape(gradient, shape).shape == (3,)


def test_what_is_no_rule_set_no_rule_and_no_function_is_refused_in_one_line():
    loss = lambda w: jnp.sum(w**2)  # noqa: E731
    for call in (fp.backprop, fp.with_rules, fp.backward_graph):
        with pytest.raises(fp.RuleError, match=r"rules='none' is not a rule set; pass `fp\.rules\.default`"):
            call(loss, rules="none")(jnp.ones(2))
    with pytest.raises(fp.RuleError, match=r"fp.layer: rule=3 is no rule; pass fp.Rule\("):
        fp.layer(rule=3)(loss)
    with pytest.raises(TypeError, match=r"^fun=float64\[2,3\] is ArrayImpl, not a function"):
        fp.backprop(jnp.ones((2, 3)))(jnp.ones(2))
