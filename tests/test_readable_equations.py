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
import pytest
from equation_lines import own, texts
from flax import nnx

import funcprop as fp

KEY = jax.random.key(0)


SIZES = [4, 5, 6, 3]


X, LABEL = jnp.array([0.3, -1.0, 0.7, 2.0]), jnp.array(1)


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

    return Net().apply, jax.jit(Net().init)(KEY, X)


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
    return transformed.apply, jax.jit(transformed.init)(KEY, X)


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


def test_of_what_is_not_differentiated_loops_have_lines_and_activations_have_none():
    def loss(w, x):
        last = jax.lax.scan(lambda c, t: (jnp.sin(c) * t, None), x[0], x)[0]
        return jnp.sum(w * jax.nn.relu(x)) * last

    forward = [line.text() for line in fp.derive(loss)(jnp.ones(3), jnp.array([1.0, -2.0, 3.0])).forward]
    assert forward == ["u = scan(x[0], x)", "J = sum(w ⊙ relu(x)) u"]


def test_an_elementwise_layer_of_the_users_has_its_symbol_and_its_derivative():
    act = fp.layer(own, symbol="ψ")
    derivation = fp.derive(lambda w, x: jnp.sum(act(x @ w) ** 2))(jnp.ones((4, 2)), X)
    assert texts(derivation.forward)[1] == "h = ψ(z)"
    assert "∂J/∂z = prod(∂J/∂h, ∂h/∂z) = ∂J/∂h ⊙ ψ′(z)" in texts(derivation.backward)
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


def test_parts_of_an_array_are_written_as_indices():
    """Gates of an LSTM in one product: each is a range of columns, whose cotangent is put there."""

    def loss(w, x, h):
        i, f = jnp.split(jnp.concatenate([x, h], -1) @ w, 2, -1)
        return jnp.sum(jax.nn.sigmoid(i) * f)

    args = jnp.linspace(-1.0, 1.0, 30).reshape(5, 6), jnp.ones((2, 3)), jnp.full((2, 2), 0.1)
    derivation = fp.derive(loss, argnums=(0, 2))(*args)
    text = derivation.text()
    assert "u₂ = z[:, :3]" in text
    assert "= pad(∂J/∂u₂, [:, :3]) + pad(σ(u₂), [:, 3:])" in text
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


def test_products_over_several_axes_are_written_in_the_order_of_what_is_read():
    """Heads are split from columns, keys are moved twice, and an einsum has the weight first."""
    x, q, k = jnp.linspace(-1.0, 1.0, 60).reshape(2, 5, 6), jnp.ones((6, 6)), jnp.eye(6)

    def loss(q, k):
        q, k = ((x @ w).reshape(2, 5, 3, 2).transpose(0, 2, 1, 3) for w in (q, k))
        return jnp.sum(jax.nn.softmax(q @ k.transpose(0, 1, 3, 2) / jnp.sqrt(2)) ** 2)

    found = fp.derive(loss, argnums=(0, 1))(q, k)
    lines = texts(found.forward)
    assert any(re.fullmatch(r"z₃ = z₁ z₂ᵀ / √2", line) for line in lines)
    assert "∂J/∂z₁ = prod(∂J/∂z₃, ∂z₃/∂z₁) = ∂J/∂z₃ z₂ / √2" in texts(found.backward)
    found.verify()

    def of_einsum(w):
        a, b = jnp.einsum("btd,dcke->cbtke", x, w)
        return jnp.sum(jnp.tanh(a * b))

    found = fp.derive(of_einsum)(jnp.ones((6, 2, 3, 2)))
    assert texts(found.forward)[:2] == ["z = constant w", "u = z[0] ⊙ z[1]"]
    assert "slice" not in found.text()
    found.verify()

    def of_both_transposed(a, b):
        return jnp.sum(jnp.sin(jnp.einsum("bki,bjk->bij", a, b)))

    found = fp.derive(of_both_transposed, argnums=(0, 1))(
        jnp.sin(jnp.arange(24.0)).reshape(2, 3, 4), jnp.cos(jnp.arange(30.0)).reshape(2, 5, 3)
    )
    assert texts(found.forward)[0] == "z = b a"
    assert texts(found.backward)[1:] == [
        "∂J/∂a = prod(∂J/∂z, ∂z/∂a) = bᵀ ∂J/∂z",
        "∂J/∂b = prod(∂J/∂z, ∂z/∂b) = ∂J/∂z aᵀ",
    ]
    found.verify()


def test_a_norm_begins_behind_a_factor():
    """`rms_norm(4 u)` is `rms_norm(u)` but for ε."""

    def loss(u, w):
        v = 4 * u
        return jnp.sum((v / jnp.sqrt(jnp.mean(v**2, -1, keepdims=True) + 1e-6)) @ w * v)

    found = fp.derive(loss)(1e-3 * jax.random.normal(KEY, (3, 8)), jnp.eye(8))
    found.verify()
    assert texts(found.forward)[:2] == ["r = 4 u", "n = rms_norm(r)"]


def test_lengths_that_a_mask_is_made_of_are_read_on_the_way():
    """The mask of a speech model, whose number of frames is computed from a mask of samples."""

    def loss(w, x):
        h = jnp.tanh(x[..., None] * w)[:, ::2]
        frames = jnp.ones(x.shape, int).cumsum(-1)[:, -1] // 2 - 1
        last = jnp.zeros(h.shape[:2], int).at[jnp.arange(len(x)), frames].set(1)
        mask = jnp.flip(jnp.flip(last, -1).cumsum(-1), -1).astype(bool)
        return jnp.mean(jnp.where(mask[..., None], h, 0) ** 2)

    found = fp.derive(loss)(jnp.ones(3), jax.random.normal(KEY, (4, 16)))
    found.verify()
    assert "J = mean(u₄²)" in texts(found.forward)


def test_a_path_that_is_too_long_has_a_row_of_its_own():
    path = "/".join(["encoder"] * 10 + ["h"])
    params = {path: {"kernel": jnp.eye(3), "b": jnp.ones(3)}}
    shown = fp.derive(lambda p, x: jnp.sum(jnp.tanh(x @ p[path]["kernel"] + p[path]["b"])))(
        params, jnp.eye(3)
    )
    assert str(shown).splitlines()[-2:] == ["  W, b", f"    = {path}/{{kernel, b}}"]
    assert max(map(len, str(shown).splitlines())) <= 100
