"""Functions that equations call by their name, however they are spelled, and those that are not called so."""

from __future__ import annotations

import re

import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import optax
import pytest
from equation_lines import texts

import funcprop as fp
from funcprop.equations.elementwise import ELEMENTWISE

KEY = jax.random.key(0)


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


@pytest.mark.parametrize(("padding", "labels"), [(-1, [2, -1, 1]), (-100, [-100]), (0, [0, 2, 3])])
def test_a_cross_entropy_that_leaves_out_labels_is_written_with_its_mask(padding, labels):
    """With labels of the classes alone it is the mean or the sum of all rows, for which it was taken."""
    entropy = optax.softmax_cross_entropy_with_integer_labels
    z, y = jnp.linspace(-1.0, 2.0, 4 * len(labels)).reshape(-1, 4) ** 2, jnp.array(labels)

    def loss(z, y):
        if len(labels) == 1:
            return jnp.sum((y != padding) * entropy(z, jnp.where(y == padding, 1, y)))
        return jnp.sum(jnp.where(y != padding, entropy(z, jnp.maximum(y, 0)), 0.0)) / jnp.sum(y != padding)

    found = fp.derive(loss)(z, y)
    assert f"y ≠ {padding}".replace("-", "−") in found.text()
    assert max(found.verify().errors.values()) < 1e-12


def _masked_rows(z, t):
    return jnp.where(t.sum(-1) > 0, optax.softmax_cross_entropy(z, t), 0.0).mean()


def _known_targets(z, t):
    return jnp.where(t >= 0, optax.sigmoid_binary_cross_entropy(z, t), 0.0).mean()


def _without_minus_one(z, t):
    return jnp.sum((t != -1) * optax.sigmoid_binary_cross_entropy(z, t))


MASKED = {
    _masked_rows: "mean(where(sum(t, axis 1) > 0, −(t · log softmax(z)), 0))",
    _known_targets: "mean(where(t ≥ 0, −(t ⊙ log σ(z) + (1 − t) ⊙ log σ(−z)), 0))",
    _without_minus_one: "sum([t ≠ −1] ⊙ (−(t ⊙ log σ(z) + (1 − t) ⊙ log σ(−z))))",
}


@pytest.mark.parametrize("loss", MASKED)
def test_a_loss_of_targets_that_leaves_some_out_is_written_with_its_mask(loss):
    z = jnp.linspace(-1.0, 2.0, 6).reshape(2, 3) ** 2
    t = jnp.array([[0.0, 0, 0], [0, 1, 0]]) if loss is _masked_rows else jnp.array([[1.0, 0, -1], [-1, 1, 0]])
    found = fp.derive(loss)(z, t)
    assert texts(found.forward)[-1].startswith(f"J = {MASKED[loss]}")
    assert max(found.verify().errors.values()) < 1e-12


def test_a_negative_label_counts_from_the_last_class():
    z, y = jnp.linspace(-1.0, 2.0, 8).reshape(2, 4) ** 2, jnp.array([-1, 1])
    found = fp.derive(LOSSES["optax with labels"])(z, y)
    assert "1/2 (softmax(z) − onehot(y))" in found.text()
    assert max(found.verify().errors.values()) < 1e-12


def test_a_cross_entropy_with_another_sign_or_scale_is_not_called_one():
    x, y = jax.random.normal(KEY, (4, 3)), jnp.array([0, 1, 2, 2])
    for factor in (1.0, -2.0):

        def loss(z, factor=factor):
            return factor * jnp.take_along_axis(jax.nn.log_softmax(z), y[:, None], 1).mean()

        found = fp.derive(loss)(x)
        assert "−log softmax" not in found.text()
        found.verify()


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
        (of_one, (w,), ["u₁ = w[1]", "u₂ = sum(w²)", "J = −log softmax(u₁)[2] + 2 u₂"]),
    ):
        derivation = fp.derive(loss)(*arguments)
        assert texts(derivation.forward) == lines
        assert max(derivation.verify().errors.values()) < 1e-12


# Slopes that have a name of their own.
SLOPES = {"softplus": "σ(z₁)", "log σ": "σ(−z₁)", "log cosh": "tanh(z₁)"}


@pytest.mark.sampled(6)
@pytest.mark.parametrize("name", ELEMENTWISE)
def test_activations_are_called_by_their_name(name):
    for function in ELEMENTWISE[name]:
        w, x = jnp.array([[0.3, -1.2], [0.7, 2.0]]), jnp.array([[1.5, 0.4], [-2.2, 0.9]])
        derivation = fp.derive(lambda w, x, f=function: jnp.sum((f(x @ w) @ w) ** 2))(w, x)
        assert texts(derivation.forward)[1] == f"h = {name}(z₁)"
        slope = SLOPES.get(name, f"{name}′(z₁)")
        assert any(f"∂J/∂h ⊙ {slope}" in line for line in texts(derivation.backward))
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


def test_logsumexp_over_an_axis_or_all_is_one_function_and_its_slope_the_softmax():
    z = jnp.linspace(-1.0, 2.0, 12).reshape(3, 4)
    for axis, forward, slope in (
        (1, "logsumexp(z, axis 1)", "1/3 softmax(z)"),
        (0, "logsumexp(z, axis 0)", "1/4 softmax(z)"),
        (None, "logsumexp(z)", "softmax(z)"),
    ):
        found = fp.derive(lambda z, axis=axis: jnp.mean(jax.nn.logsumexp(z, axis)))(z)
        assert forward in found.text()
        assert slope in texts(found.backward)[-1]
        assert max(found.verify().errors.values()) < 1e-10
    # Two functions of the same values are found beside each other.
    both = fp.derive(lambda z: jnp.sum(jnp.exp(jax.nn.log_softmax(z)) * jax.nn.log_softmax(z)))(z)
    assert texts(both.forward)[:2] == ["ℓ = log softmax(z)", "p = softmax(z)"]
    both.verify()


def test_the_target_of_a_value_is_a_formula_and_a_chosen_entry_an_index():
    """Deep Q-learning: what has no derivative is written as well, and draws have lines of their own."""

    def loss(w, x, a, r, key):
        e = jax.random.uniform(key, (3, 1))
        goal = r + 0.99 * (1 - jnp.isfinite(r)) * jnp.max(jax.lax.stop_gradient(x @ w), -1)
        return optax.huber_loss((x @ w)[jnp.arange(3), a], goal).mean() + jnp.mean(
            ((e * x + (1 - e) * x**2) @ w) ** 2
        )

    x = jnp.linspace(-1.0, 2.0, 12).reshape(3, 4)
    found = fp.derive(loss)(jnp.ones((4, 2)), x, jnp.array([0, 1, 1]), jnp.ones(3), KEY)
    text = found.text()
    assert "[arange(3), a]" in text
    assert "= r + 99/100 (1 − " in text
    assert "uniform(key)" in text
    assert "random(" not in text
    assert max(found.verify().errors.values()) < 1e-10


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
    params = jax.jit(layer.init)(KEY, x @ w)

    def loss(p, x):
        return jnp.mean(jnp.sin(layer.apply(p["norm"], fp.name(x @ p["w"], "z"))))

    derivation = fp.derive(loss)({"w": w, "norm": params}, x)
    assert any(line.endswith(f"= {expected}") for line in texts(derivation.forward))
    derivation.verify(tolerance=1e-5)


def test_batch_norm_of_haiku_is_a_norm():
    """Its variance is the mean of squares minus the square of the mean, its parameters have all axes."""

    def net(x):
        return hk.BatchNorm(True, True, 0.9)(hk.Linear(4)(x), True)

    transformed = hk.transform_with_state(net)
    x = jnp.linspace(-1.0, 2.0, 30).reshape(5, 6)
    params, state = jax.jit(transformed.init)(KEY, x)
    derivation = fp.derive(lambda p, x: jnp.mean(jnp.sin(transformed.apply(p, state, None, x)[0])))(params, x)
    assert any("norm(z, axis 0) ⊙ γ + β" in line for line in texts(derivation.forward))
    derivation.verify(tolerance=1e-5)


def test_attention_of_flax_is_written_as_in_the_papers():
    layer = nn.MultiHeadDotProductAttention(num_heads=2, param_dtype=jnp.float64)
    x = jax.random.normal(KEY, (2, 5, 8))
    params = jax.jit(layer.init)(KEY, x)
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
    assert "p = softmax(u₁)" in lines
    assert "log(p + 10⁻⁸)" in derivation.text()
    derivation.verify()


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
    assert any("tril(z₂)" in line for line in lines)
    derivation.verify()
