"""Equations a person reads: the same lines for the same network in every framework, each of them true."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import funcprop as fp
from funcprop.equations.elementwise import ELEMENTWISE
from funcprop.reporting.mathml import mathml

KEY = jax.random.key(0)
SIZES = [4, 5, 6, 3]
X, LABEL = jnp.array([0.3, -1.0, 0.7, 2.0]), jnp.array(1)


def own(z: Any) -> Any:
    """An activation that has no name."""
    return 0.5 * z * (1 + jnp.tanh(0.8 * z))


def plain() -> tuple[Callable[..., Any], Any]:
    keys = jax.random.split(KEY, 3)
    params = [
        (jax.random.normal(key, shape), jnp.full(shape[1], 0.1))
        for key, shape in zip(keys, pairwise(SIZES), strict=True)
    ]

    def net(params, x):
        for w, b in params[:-1]:
            x = own(x @ w + b)
        w, b = params[-1]
        return x @ w + b

    return net, params


def linen() -> tuple[Callable[..., Any], Any]:
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            for size in SIZES[1:-1]:
                x = own(nn.Dense(size, param_dtype=jnp.float64)(x))
            return nn.Dense(SIZES[-1], param_dtype=jnp.float64)(x)

    return Net().apply, Net().init(KEY, X)


def flax_nnx() -> tuple[Callable[..., Any], Any]:
    class Net(nnx.Module):
        def __init__(self):
            rngs = nnx.Rngs(0)
            pairs = pairwise(SIZES)
            self.layers = nnx.List([nnx.Linear(a, b, rngs=rngs, param_dtype=jnp.float64) for a, b in pairs])

        def __call__(self, x):
            for layer in self.layers[:-1]:
                x = own(layer(x))
            return self.layers[-1](x)

    return lambda net, x: net(x), Net()


def equinox() -> tuple[Callable[..., Any], Any]:
    class Net(eqx.Module):
        layers: list[eqx.nn.Linear]

        def __call__(self, x):
            for layer in self.layers[:-1]:
                x = own(layer(x))
            return self.layers[-1](x)

    return lambda net, x: net(x), Net([eqx.nn.Linear(a, b, key=KEY) for a, b in pairwise(SIZES)])


def haiku() -> tuple[Callable[..., Any], Any]:
    def net(x):
        return hk.Sequential([hk.Linear(5), own, hk.Linear(6), own, hk.Linear(3)])(x)

    transformed = hk.without_apply_rng(hk.transform(net))
    return transformed.apply, transformed.init(KEY, X)


NETS = {f.__name__: f for f in (plain, linen, flax_nnx, equinox, haiku)}
FORWARD = ["z₁ = x W₁ + b₁", "h₁ = φ(z₁)", "z₂ = h₁ W₂ + b₂", "h₂ = φ(z₂)", "z₃ = h₂ W₃ + b₃"]
BACKWARD = {
    "∂J/∂z₃ = softmax(z₃) − onehot(y)",
    "∂J/∂W₃ = prod(∂J/∂z₃, ∂z₃/∂W₃) = h₂ ∂J/∂z₃ᵀ",
    "∂J/∂b₃ = prod(∂J/∂z₃, ∂z₃/∂b₃) = ∂J/∂z₃",
    "∂J/∂h₂ = prod(∂J/∂z₃, ∂z₃/∂h₂) = W₃ ∂J/∂z₃",
    "∂J/∂z₂ = prod(∂J/∂h₂, ∂h₂/∂z₂) = ∂J/∂h₂ ⊙ φ′(z₂)",
    "∂J/∂W₂ = prod(∂J/∂z₂, ∂z₂/∂W₂) = h₁ ∂J/∂z₂ᵀ",
    "∂J/∂b₂ = prod(∂J/∂z₂, ∂z₂/∂b₂) = ∂J/∂z₂",
    "∂J/∂h₁ = prod(∂J/∂z₂, ∂z₂/∂h₁) = W₂ ∂J/∂z₂",
    "∂J/∂z₁ = prod(∂J/∂h₁, ∂h₁/∂z₁) = ∂J/∂h₁ ⊙ φ′(z₁)",
    "∂J/∂W₁ = prod(∂J/∂z₁, ∂z₁/∂W₁) = x ∂J/∂z₁ᵀ",
    "∂J/∂b₁ = prod(∂J/∂z₁, ∂z₁/∂b₁) = ∂J/∂z₁",
}


def texts(lines: Any) -> list[str]:
    return [line.text() for line in lines]


@pytest.mark.parametrize("framework", NETS)
def test_a_three_layer_net_has_the_same_equations_in_every_framework(framework):
    net, params = NETS[framework]()

    def loss(P, x, y):
        return -jax.nn.log_softmax(net(P, x))[y]

    derivation = fp.derive(loss)(params, X, LABEL)
    # Equinox keeps a weight as outputs × inputs, so it stands on the left.
    transposed = framework == "equinox"
    expected = [re.sub(r"= (\w+|x) (W.)", r"= \2 \1", line) if transposed else line for line in FORWARD]
    assert texts(derivation.forward) == [*expected, "J = −log softmax(z₃)[y]"]
    backward = set(texts(derivation.backward))
    if transposed:
        assert {line for line in backward if "W" not in line.split(" = ")[-1]} >= {
            line for line in BACKWARD if "∂J/∂b" in line or "φ" in line
        }
        assert len(backward) == len(BACKWARD)
    else:
        assert backward == BACKWARD
    assert "φ(z) = 1/2 z ⊙ (1 + tanh(4/5 z))" in derivation.text() or "tanh(0.8" in derivation.text()
    assert max(map(len, derivation.text().splitlines())) <= 100
    assert set(derivation.legend) == {"W₁", "b₁", "W₂", "b₂", "W₃", "b₃"}
    assert max(derivation.verify().errors.values()) < 1e-7


LOSSES = {
    "log_softmax": lambda z, y: -jnp.take_along_axis(jax.nn.log_softmax(z), y[:, None], 1).mean(),
    "optax with labels": lambda z, y: optax.softmax_cross_entropy_with_integer_labels(z, y).mean(),
    "logsumexp": lambda z, y: jnp.mean(jax.nn.logsumexp(z, -1) - jnp.take_along_axis(z, y[:, None], 1)[:, 0]),
    "log of softmax": lambda z, y: -jnp.mean(jnp.log(jax.nn.softmax(z))[jnp.arange(4), y]),
    "one at a time": lambda z, y: jax.vmap(lambda z, y: -jax.nn.log_softmax(z)[y])(z, y).mean(),
}  # fmt: skip


@pytest.mark.parametrize("loss", LOSSES)
def test_a_cross_entropy_is_recognised_however_it_is_spelled(loss):
    w = jax.random.normal(KEY, (3, 5))
    x, y = jax.random.normal(KEY, (4, 3)), jnp.array([0, 4, 2, 2])
    derivation = fp.derive(lambda w: LOSSES[loss](fp.name(x @ w, "z"), y))(w)
    assert texts(derivation.forward)[-1].startswith("J = mean(−log softmax(z)[")
    assert texts(derivation.backward)[0].startswith("∂J/∂z = 1/4 (softmax(z) − onehot(")
    derivation.verify()


def test_a_cross_entropy_with_another_sign_or_scale_is_not_called_one():
    x, y = jax.random.normal(KEY, (4, 3)), jnp.array([0, 1, 2, 2])
    for factor in (1.0, -2.0):

        def loss(z, factor=factor):
            return factor * jnp.take_along_axis(jax.nn.log_softmax(z), y[:, None], 1).mean()

        found = fp.derive(loss)(x)
        assert "−log softmax" not in found.text()
        found.verify()


@pytest.mark.sampled(6)
@pytest.mark.parametrize("name", ELEMENTWISE)
def test_activations_are_called_by_their_name(name):
    for function in ELEMENTWISE[name]:
        w, x = jnp.array([[0.3, -1.2], [0.7, 2.0]]), jnp.array([[1.5, 0.4], [-2.2, 0.9]])
        derivation = fp.derive(lambda w, x, f=function: jnp.sum((f(x @ w) @ w) ** 2))(w, x)
        assert texts(derivation.forward)[1] == f"h = {name}(z₁)"
        assert any(f"∂J/∂h ⊙ {name}′(z₁)" in line for line in texts(derivation.backward))
        assert not derivation.functions
        derivation.verify()


def test_the_derivative_that_a_user_gave_a_known_function_is_not_hidden_by_its_name():
    @jax.custom_jvp
    def through(z):
        return jax.nn.relu(z)

    through.defjvp(lambda primals, tangents: (through(*primals), tangents[0]))
    w, x = jnp.array([[0.3, -1.2], [0.7, 2.0]]), jnp.array([[1.5, 0.4], [-2.2, 0.9]])
    derivation = fp.derive(lambda w: jnp.sum(through(x @ w) ** 2))(w)
    assert "relu(" not in derivation.text()
    derivation.verify()


NORMS = {
    "LayerNorm": (lambda: nn.LayerNorm(param_dtype=jnp.float64), "norm(z) ⊙ γ + β"),
    "RMSNorm": (lambda: nn.RMSNorm(param_dtype=jnp.float64), "rms_norm(z) ⊙ γ"),
    "GroupNorm": (lambda: nn.GroupNorm(2, param_dtype=jnp.float64), "norm(z) ⊙ γ + β"),
    "no parameters": (lambda: nn.LayerNorm(use_bias=False, use_scale=False), "norm(z)"),
}


@pytest.mark.parametrize("norm", NORMS)
def test_normalisations_of_flax(norm):
    make, expected = NORMS[norm]
    layer, w = make(), jax.random.normal(KEY, (3, 4))
    x = jax.random.normal(KEY, (2, 5, 3))
    params = layer.init(KEY, x @ w)

    def loss(p, x):
        return jnp.mean(jnp.sin(layer.apply(p["norm"], fp.name(x @ p["w"], "z"))))

    derivation = fp.derive(loss)({"w": w, "norm": params}, x)
    assert any(line.endswith(f"= {expected}") for line in texts(derivation.forward))
    derivation.verify(tolerance=1e-5)


def test_attention_of_flax_is_written_as_in_the_papers():
    layer = nn.MultiHeadDotProductAttention(num_heads=2, param_dtype=jnp.float64)
    x = jax.random.normal(KEY, (2, 5, 8))
    params = layer.init(KEY, x)
    mask = nn.make_causal_mask(jnp.ones((2, 5)))

    def loss(p, x):
        return jnp.mean(layer.apply(p, x, mask=mask) ** 2)

    derivation = fp.derive(loss)(params, x)
    lines = texts(derivation.forward)
    assert any(re.fullmatch(r"p = softmax\(u.?\)", line) for line in lines)
    assert any(re.fullmatch(r"z₄ = z. z.ᵀ", line) for line in lines)
    assert any("where(" in line for line in lines)
    assert "dot_general" not in derivation.text()
    assert "convert" not in derivation.text()
    assert max(map(len, derivation.text().splitlines())) <= 100
    derivation.verify(tolerance=1e-5)


def test_draws_and_masks_are_lines_by_their_names():
    def loss(w, x, key):
        kept, noise = jax.random.split(key)
        mask = jax.random.bernoulli(kept, 0.75, (4, 2))
        h = jnp.where(mask, (x @ w) / 0.75, 0) + jax.random.normal(noise, (4, 2))
        return jnp.sum(jnp.where(jnp.tri(4, dtype=bool), h @ h.T, 0) ** 2)

    derivation = fp.derive(loss)(jnp.ones((3, 2)), jnp.ones((4, 3)), jax.random.key(1))
    lines = texts(derivation.forward)
    assert any(line.endswith("= bernoulli(key)") for line in lines)
    assert any(line.endswith("= normal(key)") for line in lines)
    assert any(line.endswith("= causal mask") for line in lines)
    derivation.verify()


def test_what_is_unnamed_is_written_where_it_is_read():
    def loss(x, y):
        h = fp.name(jnp.tanh(x) * 2.0, "h")
        return jnp.mean((h.reshape(2, 2).astype(jnp.float32).reshape(-1) - y) ** 2)

    derivation = fp.derive(loss)(jnp.arange(4.0, dtype=jnp.float32), jnp.ones(4, jnp.float32))
    assert texts(derivation.forward) == ["h = 2 tanh(x)", "J = mean((h − y)²)"]
    assert texts(derivation.backward) == [
        "∂J/∂h = 1/2 (h − y)",
        "∂J/∂x = prod(∂J/∂h, ∂h/∂x) = 2 ∂J/∂h ⊙ tanh′(x)",
    ]
    derivation.verify()


def test_an_elementwise_layer_of_the_users_has_its_symbol_and_its_derivative():
    act = fp.layer(own, symbol="ψ")
    derivation = fp.derive(lambda w, x: jnp.sum(act(x @ w) ** 2))(jnp.ones((4, 2)), X)
    assert texts(derivation.forward)[1] == "h = ψ(z)"
    assert "∂J/∂z = prod(∂J/∂h, ∂h/∂z) = ∂J/∂h ⊙ ψ′(z)" in texts(derivation.backward)
    derivation.verify()


def test_infinity_and_small_numbers_are_written_as_in_books():
    def loss(x):
        return jnp.sum(jax.nn.softmax(jnp.where(x > 0, x, -jnp.inf)) * 1e-7)

    derivation = fp.derive(loss)(jnp.array([1.0, -1.0, 2.0]))
    assert "−∞" in derivation.text()
    assert "\\infty" in derivation.latex()
    assert "1 \\cdot 10^{-7}" in derivation.latex()
    assert "inf" not in derivation.latex().replace("\\infty", "")


def test_latex_balances_and_has_no_character_that_tex_does_not_know():
    net, params = linen()
    latex = fp.derive(lambda p, x: jnp.sum(net(p, x) ** 2))(params, X).latex()
    assert latex.count("{") == latex.count("}")
    assert latex.count("\\left") == latex.count("\\right")
    assert not re.search(r"[^\x00-\x7f]", latex)
    assert "where $" in latex


@pytest.mark.parametrize(("axis", "text"), [(0, "axis 0"), ((0, 2), "axes 0, 2"), (None, "")])
def test_sums_and_means_name_their_axes_in_every_notation(axis, text):
    x = jnp.arange(24.0).reshape(2, 3, 4)
    for name, reduce in (("sum", jnp.sum), ("mean", jnp.mean)):
        derivation = fp.derive(lambda w, reduce=reduce: jnp.sum(reduce(jnp.tanh(w), axis) ** 2))(x)
        assert f"{name}(tanh(w){', ' if text else ''}{text})" in derivation.text()
        assert (f"_{{\\text{{{text}}}}}" in derivation.latex()) == bool(text)
        derivation.verify()


def test_a_long_sum_is_broken_into_rows():
    def loss(w, xs):
        h = [fp.name(jnp.tanh(x @ w), f"hidden_state_{i}") for i, x in enumerate(xs)]
        return sum(jnp.sum(v**2) for v in h)

    derivation = fp.derive(loss)(jnp.ones((2, 2)), [jnp.ones((3, 2)) * i for i in range(6)])
    assert max(map(len, derivation.text().splitlines())) <= 100
    assert max(map(len, derivation.text(width=70).splitlines())) <= 70
    derivation.verify()


def test_detail_is_checked():
    with pytest.raises(ValueError, match="detail='blocks' is none of 'layers', 'operators'"):
        fp.derive(lambda x: x, detail="blocks")


@pytest.mark.sampled(3)
@pytest.mark.parametrize("seed", range(6))
def test_drawn_functions_hold_line_by_line(seed):
    random = np.random.default_rng(seed)
    functions = [jnp.tanh, jax.nn.relu, jax.nn.gelu, own, jnp.sin, lambda v: v / (1 + v**2), jax.nn.softmax]
    steps = [functions[i] for i in random.integers(0, len(functions), 5)]
    skips = random.random(5) < 0.4

    def loss(ws, x):
        for w, step, skip in zip(ws, steps, skips, strict=True):
            z = x @ w
            x = step(z) + x if skip else step(z * 0.5 - 0.1)
        return jnp.mean((x - jnp.roll(x, 1)) ** 2) + 0.01 * sum(jnp.sum(w**2) for w in ws)

    ws = [jax.random.normal(k, (4, 4)) for k in jax.random.split(jax.random.key(seed), 5)]
    derivation = fp.derive(loss)(ws, jax.random.normal(KEY, (3, 4)))
    assert max(derivation.verify().errors.values()) < 1e-9
    assert max(map(len, derivation.text().splitlines())) <= 110


def test_labels_may_be_computed_or_known():
    """Labels of a language model are tokens, those of a contrastive loss positions; one may be a number."""
    w, t = jnp.linspace(-1.0, 2.0, 20).reshape(4, 5), jnp.arange(12).reshape(2, 6) % 4
    entropy = optax.softmax_cross_entropy_with_integer_labels
    of_tokens = lambda w, t: entropy(w[t[:, :-1]], t[:, 1:]).mean()  # noqa: E731
    of_rows = lambda w: entropy(w, jnp.arange(4)).mean()  # noqa: E731
    of_one = lambda w: -jax.nn.log_softmax(w[1])[2] + sum(jnp.sum(v * v) for v in (w, w))  # noqa: E731
    for loss, arguments, lines in (
        (of_tokens, (w, t), ["u = w[t[:, :5]]", "J = mean(−log softmax(u)[t[:, 1:]])"]),
        (of_rows, (w,), ["J = mean(−log softmax(w)[arange(4)])"]),
        (of_one, (w,), ["u₁ = w[1]", "u₂ = 2 sum(w²)", "J = −log softmax(u₁)[2] + u₂"]),
    ):
        derivation = fp.derive(loss)(*arguments)
        assert texts(derivation.forward) == lines
        assert max(derivation.verify().errors.values()) < 1e-12


def test_parts_of_an_array_are_written_as_indices():
    """Gates of an LSTM in one product: each is a range of columns, whose cotangent is put there."""

    def loss(w, x, h):
        i, f = jnp.split(jnp.concatenate([x, h], -1) @ w, 2, -1)
        return jnp.sum(jax.nn.sigmoid(i) * f)

    args = jnp.linspace(-1.0, 1.0, 30).reshape(5, 6), jnp.ones((2, 3)), jnp.full((2, 2), 0.1)
    derivation = fp.derive(loss, argnums=(0, 2))(*args)
    text = derivation.text()
    assert "u₂ = z[:, :3]" in text
    assert "= pad(∂J/∂u₂, [:, :3]) + pad(∂J/∂u₃, [:, 3:])" in text
    assert "∂J/∂h = " in text
    assert "[:, 3:]" in text.split("∂J/∂h = ")[1].splitlines()[0]
    assert max(derivation.verify().errors.values()) < 1e-12
    # A number in every entry of an array stands for the array.
    constant = fp.derive(lambda w: jnp.sum(w @ (jnp.zeros(3) + 0.1)))(jnp.ones((2, 3)))
    assert max(constant.verify().errors.values()) < 1e-12


def test_settings_of_a_module_are_no_parameters():
    """A pool of Equinox holds its initial value, a python float, beside functions."""
    layers = [eqx.nn.Conv1d(1, 2, 3, key=KEY), eqx.nn.MaxPool1d(2, 2), eqx.nn.Lambda(jnp.tanh)]
    net = eqx.nn.Sequential(layers)
    derivation = fp.derive(lambda net, x: jnp.sum(net(x)))(net, jnp.linspace(-1.0, 2.0, 8)[None])
    assert any("= maxpool(z" in line for line in texts(derivation.forward))
    assert max(derivation.verify().errors.values()) < 1e-12


def test_the_softmax_of_jax_attention_is_one():
    """It is taken of the scores with their axes in another order than the maximum that is subtracted."""
    x = jnp.linspace(-1.0, 2.0, 24).reshape(1, 3, 2, 4)
    derivation = fp.derive(lambda q: jnp.sum(jax.nn.dot_product_attention(q, x, x) ** 2))(x)
    assert sum("softmax(" in line for line in texts(derivation.forward)) == 1
    assert "exp" not in derivation.text()
    assert max(derivation.verify().errors.values()) < 1e-7  # it adds up in float32


def test_what_is_done_after_a_function_with_a_name_is_not_hidden_by_it():
    """Dropout divides what is kept, and a small number keeps a logarithm finite."""
    w, x = jnp.linspace(-1.0, 2.0, 12).reshape(3, 4), jnp.ones((2, 3))

    def loss(w, x, key):
        kept = jax.random.bernoulli(key, 0.7, (2, 4))
        h = jnp.where(kept, jax.nn.elu(x @ w) / 0.7, 0)
        return -jnp.sum(jnp.log(jax.nn.softmax(h) + 1e-8)[:, 1])

    derivation = fp.derive(loss)(w.astype(jnp.float32), x.astype(jnp.float32), jax.random.key(1))
    lines = texts(derivation.forward)
    assert "elu(z) / 0.7" in lines[2]
    assert "p = softmax(u₂)" in lines
    assert "log(p + 1e−08)" in derivation.text()
    derivation.verify()


def test_numbers_and_small_functions_are_written_as_in_books():
    def loss(z, y):
        d = jnp.abs(z - y)
        nll = 0.5 * jnp.exp(-2 * z) + jnp.log(z * z) + 0.5 * jnp.log(2 * jnp.pi)
        return jnp.sum(jnp.where(d > 1, d / np.sqrt(8), 0)) + jnp.sum(nll)

    found = fp.derive(loss)(jnp.array([0.5, -2.0, 1.5]), jnp.ones(3))
    text = found.text()
    assert "h = |z − y|" in text
    assert "φ(z) = where(z > 1, z / √8, 0)" in text
    assert "1/2 log 2π" in text
    assert "sign(z − y)" in text
    assert "exp′" not in text
    assert "\\sqrt{8}" in found.latex()
    assert all(mathml(form.latex(), form.text()) for line in found.forward for form in line.forms)
    assert max(found.verify().errors.values()) < 1e-10


def test_a_product_with_a_constant_is_no_multiple():
    """The ones of a second derivative times a matrix, times a number."""
    found = fp.derive(lambda w: jnp.sum(jnp.sin(3.0 * (jnp.ones(1) @ w))))(jnp.ones((1, 4)))
    assert "3 1 w" in found.text()
    assert max(found.verify().errors.values()) < 1e-10


def test_products_over_several_axes_are_written_in_the_order_of_what_is_read():
    """Heads are split from columns, keys are moved twice, and an einsum has the weight first."""
    x, q, k = jnp.linspace(-1.0, 1.0, 60).reshape(2, 5, 6), jnp.ones((6, 6)), jnp.eye(6)

    def loss(q, k):
        q, k = ((x @ w).reshape(2, 5, 3, 2).transpose(0, 2, 1, 3) for w in (q, k))
        return jnp.sum(jax.nn.softmax(q @ k.transpose(0, 1, 3, 2) / jnp.sqrt(2)) ** 2)

    found = fp.derive(loss, argnums=(0, 1))(q, k)
    lines = texts(found.forward)
    assert any(re.fullmatch(r"z₃ = \(z₁ z₂ᵀ\) / √2", line) for line in lines)
    assert "∂J/∂z₁ = prod(∂J/∂z₃, ∂z₃/∂z₁) = (∂J/∂z₃ / √2) z₂" in texts(found.backward)
    found.verify()

    def of_einsum(w):
        a, b = jnp.einsum("btd,dcke->cbtke", x, w)
        return jnp.sum(jnp.tanh(a * b))

    found = fp.derive(of_einsum)(jnp.ones((6, 2, 3, 2)))
    assert texts(found.forward)[:3] == ["z = constant w", "u₁ = z[0]", "u₂ = z[1]"]
    assert "slice" not in found.text()
    found.verify()


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
    (loop,) = derivation.loops
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
    (loop,) = derivation.loops
    assert loop.title == "Scan for t = 3 … 1, h[4] = x, u = h[1]"
    assert texts(loop.forward)[0] == "z[t] = h[t+1] W[t]"
    assert any(line.startswith("∂J/∂W[t] = ") for line in texts(loop.backward))
    assert max(derivation.verify().errors.values()) < 1e-10
    cell = eqx.nn.GRUCell(2, 3, key=KEY)
    run = lambda cell, xs: jax.lax.scan(lambda h, x: (cell(x, h), None), jnp.zeros(3), xs)[0]  # noqa: E731
    derivation = fp.derive(lambda cell, xs: jnp.sum(run(cell, xs) ** 2))(cell, jnp.ones((4, 2)))
    assert len(derivation.loops[0].forward) > 8
    assert max(derivation.verify().errors.values()) < 1e-10


def test_batch_norm_of_haiku_is_a_norm():
    """Its variance is the mean of squares minus the square of the mean, its parameters have all axes."""

    def net(x):
        return hk.BatchNorm(True, True, 0.9)(hk.Linear(4)(x), True)

    transformed = hk.transform_with_state(net)
    x = jnp.linspace(-1.0, 2.0, 30).reshape(5, 6)
    params, state = transformed.init(KEY, x)
    derivation = fp.derive(lambda p, x: jnp.mean(jnp.sin(transformed.apply(p, state, None, x)[0])))(params, x)
    assert any("norm(z) ⊙ γ + β" in line for line in texts(derivation.forward))
    derivation.verify(tolerance=1e-5)
