"""The fused output layer: against its formula and against autodiff, at its edges, and what it holds."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compiling import compiled
from holding import largest_intermediate, shapes
from hypothesis import example, given, settings
from hypothesis import strategies as st

import funcprop as fp
from funcprop.layers import linear_cross_entropy


def numbers(*shape, seed=0):
    return jax.device_put(np.random.default_rng(seed).standard_normal(shape))


H, W, B = numbers(6, 3), numbers(3, 5, seed=1), numbers(5, seed=2)
LABELS = jnp.array([0, 4, -100, 2, 2, 1])
WEIGHTS = jnp.array([0.5, 1.0, 2.0, 0.1, 3.0])


def gradients(transformation, args, labels=LABELS, **static):
    """Value and gradients of a weighted sum of the results in `h, w, b, weights`."""

    def loss(h, w, *rest):
        y = linear_cross_entropy(h, w, labels, *rest, **static)
        return jnp.sum(y * numbers(*y.shape, seed=9).astype(y.dtype))

    return compiled(transformation(loss, tuple(range(len(args)))))(*args)


by_rule = partial(gradients, partial(fp.value_and_grad, rules=fp.rules.handwritten))
by_autodiff = partial(gradients, jax.value_and_grad)


def assert_same(actual, expected):
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == e.dtype
        largest = np.max(np.abs(e), initial=1.0, where=np.isfinite(e))
        np.testing.assert_allclose(a, e, rtol=0, atol=1e-12 * largest)


def by_hand(z, labels, weights, smoothing, z_loss, ignore):
    """Losses of all tokens and the mean as PyTorch's documentation defines them, token by token."""
    losses, total = [], 0.0
    for row, label in zip(np.asarray(z), np.asarray(labels), strict=True):
        normalizer = np.log(np.sum(np.exp(row)))
        if label == ignore:
            losses.append(0.0)
            continue
        target = smoothing * weights / len(row)
        target[label] += (1 - smoothing) * weights[label]
        losses.append(np.sum(target * (normalizer - row)) + z_loss * normalizer**2)
        total += weights[label]
    return np.array(losses), np.sum(losses) / total


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_value_is_the_formula(smoothing, weights):
    static = {"label_smoothing": smoothing, "z_loss": 0.3}
    losses, mean = by_hand(
        H @ W + B, LABELS, np.ones(5) if weights is None else np.asarray(weights), smoothing, 0.3, -100
    )
    for rules in (fp.rules.autodiff, fp.rules.handwritten):
        of = fp.with_rules(partial(linear_cross_entropy, chunk=4), rules)
        np.testing.assert_allclose(
            of(H, W, LABELS, B, weights, reduction="none", **static), losses, rtol=1e-12
        )
        np.testing.assert_allclose(
            of(H, W, LABELS, B, weights, reduction="sum", **static), losses.sum(), rtol=1e-12
        )
        np.testing.assert_allclose(of(H, W, LABELS, B, weights, **static), mean, rtol=1e-12)


def test_value_is_optax_s():
    expected = optax.softmax_cross_entropy_with_integer_labels(H @ W, LABELS % 5)
    np.testing.assert_allclose(
        linear_cross_entropy(H, W.T, LABELS % 5, transposed=True, reduction="none"), expected, rtol=1e-12
    )


@st.composite
def cases(draw):
    tokens, d, vocabulary = draw(st.integers(1, 7)), draw(st.integers(1, 4)), draw(st.integers(1, 6))
    h, w = numbers(tokens, d), numbers(d, vocabulary, seed=1)
    transposed, reduction = draw(st.booleans()), draw(st.sampled_from(["none", "sum", "mean"]))
    rest = draw(st.sampled_from([(), (numbers(vocabulary, seed=2),)]))
    if rest and draw(st.booleans()):
        rest = (*rest, jnp.abs(numbers(vocabulary, seed=3)) + 0.1)
    labels = np.random.default_rng(4).integers(-vocabulary, vocabulary, tokens)
    labels[1:2] = 77  # the ignored one; the first token always counts
    static = {
        "transposed": transposed,
        "reduction": reduction,
        "ignore_index": 77,
        "label_smoothing": draw(st.sampled_from([0.0, 0.3])),
        "z_loss": draw(st.sampled_from([0.0, 0.1])),
        "save": draw(
            st.sampled_from([None, "normalizer"] if reduction == "none" else ["gradient", "normalizer"])
        ),
        "chunk": draw(st.integers(1, 4)),
    }
    return (h, w.T if transposed else w, *rest), jnp.asarray(labels), static


@settings(max_examples=10)
@given(cases())
# A vocabulary of one word; one token; a chunk larger than all; no token that counts.
@pytest.mark.nightly
@example(((numbers(3, 2), numbers(2, 1)), jnp.zeros(3, int), {"chunk": 2}))
@example(((numbers(1, 2), numbers(2, 4)), jnp.array([3]), {"chunk": 9, "label_smoothing": 0.3}))
@example(((numbers(4, 2), numbers(2, 3)), jnp.full(4, -100), {"chunk": 3, "reduction": "sum", "z_loss": 0.1}))
def test_gradients_are_autodiff_s(case):
    args, labels, static = case
    assert_same(by_rule(args, labels, **static), by_autodiff(args, labels, **static))


@pytest.mark.parametrize("save", ["gradient", "normalizer"])
def test_a_vocabulary_of_several_pieces(save):
    args = numbers(5, 2), numbers(2, 2 * 2048 + 3, seed=1)
    labels = jnp.array([0, 2047, 2048, 4096, 4098])
    assert_same(by_rule(args, labels, chunk=2, save=save), by_autodiff(args, labels))


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("weights", [(), (WEIGHTS,)])
def test_labels_out_of_range_are_as_in_the_plain_function(reduction, weights):
    labels = jnp.array([0, 5, -1, -6, 99, 2])
    args = (H, W, B, *weights)
    actual, expected = (f(args, labels, reduction=reduction, chunk=4) for f in (by_rule, by_autodiff))
    assert np.isnan(expected[0])
    assert_same(actual, expected)


def test_when_all_tokens_are_ignored():
    nothing = jnp.full(6, -100)
    value, cotangents = by_rule((H, W, B), nothing, reduction="sum", chunk=4)
    assert value == 0
    assert not any(np.any(x) for x in cotangents)
    assert np.isnan(linear_cross_entropy(H, W, nothing))


def test_extreme_logits_and_masked_classes():
    bias = jnp.array([1e4, -1e4, -jnp.inf, 0.0, 1.0])
    labels = jnp.array([0, 1, 3, 4, 0, 1])
    assert_same(by_rule((H, W, bias), labels, chunk=4), by_autodiff((H, W, bias), labels))
    h = H.at[1, 1].set(jnp.nan)
    assert_same(by_rule((h, W, B), labels, chunk=4), by_autodiff((h, W, B), labels))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_bfloat16_is_as_accurate_as_autodiff(reduction):
    args = [x.astype(jnp.bfloat16) for x in (numbers(40, 8), numbers(8, 50, seed=1), numbers(50, seed=2))]
    labels = jnp.arange(40)
    static = {"reduction": reduction, "label_smoothing": 0.1, "chunk": 16}
    exact = by_autodiff([x.astype(float) for x in args], labels, **static)
    actual, autodiff = (f(args, labels, **static) for f in (by_rule, by_autodiff))
    for a, b, e in zip(*(jax.tree.leaves(x)[1:] for x in (actual, autodiff, exact)), strict=True):
        error, of_autodiff = (np.linalg.norm(np.asarray(x, float) - e) for x in (a, b))
        assert a.dtype == jnp.bfloat16
        assert error <= 1.05 * of_autodiff


@pytest.mark.parametrize("save", ["gradient", "normalizer"])
def test_a_last_chunk_that_is_not_full_is_finite_where_the_bias_overflows(save):
    args = H[:5], W, jnp.array([800.0, 0.0, 799.0, 1.0, 2.0])
    actual, expected = (
        f(args, LABELS[:5], save=save, chunk=chunk) for f, chunk in ((by_rule, 2), (by_autodiff, None))
    )
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(actual))
    assert_same(actual, expected)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_nothing_of_the_size_of_tokens_times_vocabulary_is_held(reduction):
    h, w, labels = numbers(1024, 2), numbers(2, 256), jnp.arange(1024) % 256
    loss = lambda h, w: jnp.sum(linear_cross_entropy(h, w, labels, reduction=reduction, chunk=64) ** 2)  # noqa: E731
    assert largest_intermediate(jax.grad(loss, (0, 1)), h, w) == 1024 * 256
    chunk = 64 * 256
    assert largest_intermediate(fp.with_rules(loss), h, w) == chunk
    assert largest_intermediate(fp.grad(loss, (0, 1)), h, w) == chunk
    assert largest_intermediate(lambda *a: fp.hvp(loss, (0, 1))(a, a), h, w) == chunk


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_an_embedding_table_is_tied_and_never_turned(reduction):
    table, tokens, labels = numbers(300, 2), jnp.arange(128), jnp.arange(128) + 172

    def loss(table):
        h = jnp.tanh(fp.layers.embedding(tokens, table))
        y = linear_cross_entropy(h, table, labels, transposed=True, reduction=reduction, chunk=32)
        return jnp.sum(y**2)

    by_rule = fp.grad(loss)
    assert_same(compiled(by_rule)(table), compiled(jax.grad(loss))(table))
    assert (2, 300) in shapes(jax.grad(loss), table)
    assert (2, 300) not in shapes(by_rule, table)


def test_what_is_left_to_autodiff():
    small = fp.matches(linear_cross_entropy)(H, W, LABELS)[0]
    assert small.reason == "6 × 5 logits are few; pass `chunk` or `save` for less memory"
    shapes = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((2**10, 4), (4, 2**15)))
    large = fp.matches(linear_cross_entropy)(*shapes, jax.ShapeDtypeStruct((2**10,), jnp.int32))[0]
    assert large.reason is None
    empty = fp.matches(partial(linear_cross_entropy, chunk=1))(H[:0], W, LABELS[:0])[0]
    assert empty.reason == "there are no tokens"
    assert_same(
        by_rule((H[:0], W), LABELS[:0], reduction="sum"), by_autodiff((H[:0], W), LABELS[:0], reduction="sum")
    )


@pytest.mark.parametrize(
    ("args", "static", "message"),
    [
        ((H, W.T, LABELS), {}, r"w \(5, 3\), labels \(6,\), b None, weights None do not fit"),
        ((H, W, LABELS[:2]), {}, "do not fit"),
        ((H, W, LABELS, B[:2]), {}, "do not fit"),
        ((H, W, LABELS), {"reduction": "max"}, "reduction='max'; pass 'none', 'sum' or 'mean'"),
        ((H, W, LABELS), {"reduction": "none", "save": "gradient"}, "save='gradient' with reduction='none'"),
        ((H, W, LABELS), {"chunk": 0}, "chunk=0; a chunk has at least one token"),
    ],
)
def test_errors(args, static, message):
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(*args, **static)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_equations_are_true(reduction):
    static = {"label_smoothing": 0.1, "z_loss": 0.2, "reduction": reduction}
    loss = lambda h, w, b, c: jnp.sum(linear_cross_entropy(h, w, LABELS, b, c, **static))  # noqa: E731
    fp.derive(loss, (0, 1, 2))(H, W, B, WEIGHTS).verify()
