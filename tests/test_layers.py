"""Layers against the libraries' own functions, models, and initialisers. Rules are tested in test_rules."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import funcprop as fp

X = np.random.default_rng(0).normal(size=(5, 4))
W = np.random.default_rng(1).normal(size=(4, 3))
B = np.random.default_rng(2).normal(size=3)
LABELS = np.array([0, 2, 1, 1, 0])
PROBABILITIES = np.asarray(jax.nn.softmax(X @ W))

SAME = {
    "dense": (lambda: fp.layers.dense(X, W, B), lambda: X @ W + B),
    "dense without bias": (lambda: fp.layers.dense(X, W), lambda: X @ W),
    "dense of more axes": (lambda: fp.layers.dense(X[None], W, B), lambda: X[None] @ W + B),
    "linear": (lambda: fp.layers.linear(W, B), lambda: W @ B),
    "linear with bias": (lambda: fp.layers.linear(W.T, X[0], B), lambda: W.T @ X[0] + B),
    "relu": (lambda: fp.layers.relu(X), lambda: jax.nn.relu(X)),
    "tanh": (lambda: fp.layers.tanh(X), lambda: np.tanh(X)),
    "sigmoid": (lambda: fp.layers.sigmoid(X), lambda: 1 / (1 + np.exp(-X))),
    "softplus": (lambda: fp.layers.softplus(X), lambda: np.log1p(np.exp(X))),
    "silu": (lambda: fp.layers.silu(X), lambda: jax.nn.silu(X)),
    "gelu": (lambda: fp.layers.gelu(X), lambda: jax.nn.gelu(X, approximate=True)),
    "exact gelu": (lambda: fp.layers.gelu(X, approximate=False), lambda: jax.nn.gelu(X, approximate=False)),
    "cross-entropy of indices": (
        lambda: fp.layers.softmax_cross_entropy(X, LABELS),
        lambda: optax.softmax_cross_entropy_with_integer_labels(X, LABELS),
    ),
    "cross-entropy of probabilities": (
        lambda: fp.layers.softmax_cross_entropy(X @ W, PROBABILITIES),
        lambda: optax.softmax_cross_entropy(X @ W, PROBABILITIES),
    ),
    "mean squared error": (lambda: fp.layers.mean_squared_error(X, X * 2), lambda: np.mean(X**2)),
    "l2 penalty": (
        lambda: fp.layers.l2_penalty(0.3, {"w": W, "b": [B]}),
        lambda: 0.15 * (np.sum(W**2) + np.sum(B**2)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", SAME)
def test_value(case):
    layer, reference = SAME[case]
    np.testing.assert_allclose(layer(), reference(), rtol=1e-13)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32, jnp.float64])
def test_gradients_keep_the_dtypes_of_mixed_operands(dtype):
    params = {"w": W.astype(dtype), "b": B}
    gradient = fp.grad(
        lambda p, x: fp.layers.dense(x, p["w"], p["b"]).astype(float).sum(),
        (0, 1),
        rules=fp.rules.handwritten,
    )(jax.tree.map(jnp.asarray, params), jnp.asarray(X, jnp.float32))
    assert gradient[0]["w"].dtype == dtype
    assert gradient[0]["b"].dtype == jnp.float64
    assert gradient[1].dtype == jnp.float32


def test_cross_entropy_is_finite_for_extreme_logits():
    logits = jnp.array([[1e4, -1e4], [-jnp.inf, 0.0]])
    value, gradient = fp.value_and_grad(
        lambda o: fp.layers.softmax_cross_entropy(o, jnp.array([1, 1])).sum(), rules=fp.rules.handwritten
    )(logits)
    assert value == 2e4
    np.testing.assert_array_equal(gradient, [[1.0, -1.0], [0.0, 0.0]])


def test_cross_entropy_of_labels_out_of_range_is_that_of_autodiff():
    labels = jnp.array([0, -1, 4, -5, 99])

    def found(grad):
        loss = lambda o: jnp.nansum(fp.layers.softmax_cross_entropy(o, labels) * jnp.arange(1.0, 6))  # noqa: E731
        return fp.layers.softmax_cross_entropy(X, labels), grad(loss)(jnp.asarray(X))

    actual = found(lambda loss: fp.grad(loss, rules=fp.rules.handwritten))
    expected = found(jax.grad)
    assert np.isnan(expected[0]).tolist() == [False, False, True, True, True]
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-12, atol=1e-14), actual, expected)


def test_mean_squared_error_does_not_broadcast():
    with pytest.raises(ValueError, match=r"prediction has shape \(3, 1\) but target has \(3,\); reshape one"):
        fp.layers.mean_squared_error(jnp.ones((3, 1)), jnp.ones(3))


L = fp.layers
SHAPES = {
    "dense, scalar bias": (
        L.dense,
        (X, W, B[0]),
        r"dense: b has shape \(\) but w has 3 outputs; give it shape \(3,\)",
    ),
    "dense, bias of rows": (
        L.dense,
        (X, W, np.ones((5, 3))),
        r"dense: b has shape \(5, 3\) but w has 3 outputs",
    ),
    "dense, bias of size 1": (L.dense, (X, W, B[:1]), r"dense: b has shape \(1,\).* to the result"),
    "dense, transposed": (
        L.dense,
        (X, W.T),
        r"dense: x has shape \(5, 4\) but w has \(3, 4\).* Transpose w if",
    ),
    "dense of a scalar": (L.dense, (1.0, W), r"dense: x has shape \(\) but w has \(4, 3\)"),
    "dense, vector": (
        L.dense,
        (X, W[:, 0]),
        r"dense: w has shape \(4,\), but it is a matrix, inputs × outputs; .*einsum",
    ),
    "dense, stack": (L.dense, (X, W[None]), r"dense: w has shape \(1, 4, 3\), but it is a matrix"),
    "linear of a batch": (
        L.linear,
        (W, B[:, None]),
        r"linear: x has shape \(3, 1\).*one vector of 3 .*`jax.vmap`",
    ),
    "linear, transposed": (
        L.linear,
        (W.T, B),
        r"linear: x has shape \(3,\) but w has \(3, 4\); x is one vector of 4",
    ),
    "linear, bias": (L.linear, (W.T, X[0], 1.0), r"linear: b has shape \(\) but w has 3 outputs"),
    "linear, vector": (L.linear, (B, B), r"linear: w has shape \(3,\), but it is a matrix, outputs × inputs"),
    "cross-entropy, broadcast": (
        L.softmax_cross_entropy,
        (X, LABELS[:1]),
        r"labels has shape \(1,\) but logits has \(5, 4\); class indices \(integers\) must have shape \(5,\)",
    ),
    "cross-entropy, integer one-hot": (
        L.softmax_cross_entropy,
        (X, np.eye(4, dtype=int)[LABELS]),
        r"One-hot labels must be floating point",
    ),
    "cross-entropy, floating indices": (
        L.softmax_cross_entropy,
        (X, LABELS.astype(float)),
        r"labels has shape \(5,\).*must have shape \(5, 4\).*Class indices must be integers",
    ),
    "cross-entropy, one row": (
        L.softmax_cross_entropy,
        (X, PROBABILITIES[0]),
        r"probabilities .* must have shape",
    ),
    "cross-entropy of a scalar": (
        L.softmax_cross_entropy,
        (1.0, 0),
        r"logits has shape \(\); it needs a last axis",
    ),
    "l2 penalty": (L.l2_penalty, (B, W), r"l2_penalty: strength has shape \(3,\), but it is one number"),
}


@pytest.mark.parametrize("case", SHAPES)
def test_other_shapes_are_refused_in_every_use(case):
    layer, args, message = SHAPES[case]
    uses = [
        layer,
        layer.function,
        jax.jit(layer),
        lambda *args: jax.vmap(layer)(*jax.tree.map(lambda a: jnp.stack([jnp.asarray(a)] * 2), args)),
        fp.grad(lambda *args: jnp.sum(layer(*args)), rules=fp.rules.handwritten),
        fp.trace(layer),
    ]
    for use in uses:
        with pytest.raises(ValueError, match=message):
            use(*args)


def test_initialisers_have_the_scale_of_their_source():
    params = fp.layers.dense.init(jax.random.key(0), 400, 300)
    assert (params["w"].shape, params["b"].shape) == ((400, 300), (300,))
    np.testing.assert_allclose(np.std(params["w"]), np.sqrt(2 / 400), rtol=0.02)
    assert not np.any(params["b"])
    column = fp.layers.linear.init(jax.random.key(0), 300, 400)
    assert column["w"].shape == (300, 400)
    np.testing.assert_allclose(np.std(column["w"]), np.sqrt(2 / 400), rtol=0.02)
    assert "b" not in column
    assert fp.layers.dense.init(jax.random.key(0), 4, 3, dtype=jnp.bfloat16)["w"].dtype == jnp.bfloat16


# --- models -----------------------------------------------------------------------------------


def test_mlp_is_its_formula():
    net = fp.models.mlp([4, 6, 3], activation=fp.layers.tanh)
    params = net.init(jax.random.key(0))
    (first, _, second) = params
    np.testing.assert_allclose(
        net.apply(params, X), np.tanh(X @ first["w"] + first["b"]) @ second["w"] + second["b"], rtol=1e-12
    )
    assert len(jax.tree.leaves(fp.models.mlp([4, 6, 3], bias=False).init(jax.random.key(0)))) == 2
    assert not np.allclose(first["w"][:, :3], second["w"][:4])


def test_residual_adds_its_input_and_needs_equal_shapes():
    block = fp.models.residual(fp.models.dense(4, 4))
    params = block.init(jax.random.key(0))
    np.testing.assert_allclose(block.apply(params, X), X + X @ params["w"] + params["b"], rtol=1e-12)
    wrong = fp.models.residual(fp.models.dense(4, 3))
    with pytest.raises(ValueError, match=r"maps shape \(5, 4\) to \(5, 3\); a skip connection needs equal"):
        wrong.apply(wrong.init(jax.random.key(0)), X)


def test_mlp_needs_two_sizes():
    with pytest.raises(ValueError, match=r"sizes=\[4\]; give at least the input's and the output's width"):
        fp.models.mlp([4])


def test_models_train_under_jit_vmap_and_scan():
    net = fp.models.mlp([4, 8, 3])
    params = net.init(jax.random.key(0))

    def loss(params, x, y):
        return jnp.mean(fp.layers.softmax_cross_entropy(net.apply(params, x), y))

    @jax.jit
    def train(params):
        def step(params, _):
            value, gradient = fp.value_and_grad(loss, rules=fp.rules.handwritten)(params, X, LABELS)
            return jax.tree.map(lambda p, g: p - 0.5 * g, params, gradient), value

        return jax.lax.scan(step, params, None, length=200)

    _, losses = train(params)
    assert losses[-1] < 0.01 < losses[0]


def test_tanh_is_accurate_where_it_saturates():
    x = jnp.array([6.0, 9.0, 12.0])
    expected = jax.vmap(jax.grad(jnp.tanh))(x)
    for tanh in (fp.layers.tanh, jnp.tanh):
        actual = jax.vmap(fp.grad(tanh, rules=fp.rules.handwritten))(x)
        np.testing.assert_allclose(actual, expected, rtol=1e-12)


def test_whether_a_rule_applies_is_asked_for_one_example_of_a_batch():
    def applies(x):
        return True if x.ndim == 1 else f"{x.ndim} axes"

    @fp.layer(rule=fp.Rule(lambda x: (2 * x, ()), lambda r, g, needs: (2 * g,), applies=applies))
    def double(x):
        return 2 * x

    def reason(fun, shape):
        return fp.matches(fun, fp.rules.handwritten)(jnp.ones(shape))[0].reason

    assert reason(double, (3,)) is None
    assert reason(double, (3, 4)) == "2 axes"
    assert reason(jax.vmap(double), (3, 4)) is None
    assert reason(jax.vmap(jax.vmap(double, in_axes=1)), (3, 4, 5)) is None
    assert reason(jax.vmap(double), (3, 4, 5)) == "2 axes"
