"""What every rule of the built-in sets owes its reader and its user: a source, bytes, and empty arrays."""

from __future__ import annotations

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import compiled
from flax import linen as nn
from jax import lax

import funcprop as fp

L = fp.layers
HANDWRITTEN, AUTODIFF = fp.rules.handwritten, fp.rules.autodiff
LAYERS = {
    name: layer
    for name, layer in ((name, getattr(L, name)) for name in dir(L))
    if isinstance(layer, fp.Layer) and layer.rule is not None
}
PRIMITIVES = [key for key in HANDWRITTEN if isinstance(key, str)]


def documentation(operator):
    """What a reader of a rule sees: its module, and the layer that has it."""
    if isinstance(operator, fp.Layer):
        return f"{inspect.getmodule(operator.function).__doc__}{operator.__doc__}"
    forward = HANDWRITTEN[operator].forward
    while isinstance(forward, functools.partial):
        forward = forward.func
    return str(inspect.getmodule(forward).__doc__)


@pytest.mark.parametrize("operator", [*PRIMITIVES, *LAYERS])
def test_every_rule_names_its_source(operator):
    found = documentation(LAYERS.get(operator, operator))
    words = "Source", "Sources", "Reference", "References"
    assert any(f"{word}: " in found for word in words), (
        f"{operator}: the docstring of its module or layer names no source; add `Reference: …`, or "
        "`Source: our own.`"
    )


# --- where nothing was measured, rules that save less -----------------------------------------


def shape(*sizes, dtype="float32"):
    return jax.ShapeDtypeStruct(sizes, dtype)


X, W, B, C, HEADS = shape(64, 32), shape(32, 64), shape(64), shape(32), shape(300, 2, 8)
UNMEASURED = {
    "attention": (L.attention, (HEADS, HEADS, HEADS)),
    "batch_norm": (L.batch_norm, (X, C, C)),
    "dropout": (lambda x: L.dropout(x, jax.random.key(0), rate=0.5, save="key"), (X,)),
    "feed_forward": (L.feed_forward, (X, W, shape(64, 32), B, C)),
    "geglu": (L.geglu, (X, W, W)),
    "swiglu": (L.swiglu, (X, W, W, shape(64, 32))),
    "group_norm": (functools.partial(L.group_norm, groups=4), (X, C, C)),
    "linear_cross_entropy": (
        lambda h, w: L.linear_cross_entropy(h, w, jnp.arange(64), reduction="none", chunk=16),
        (X, W),
    ),
    "norm_dense": (L.norm_dense, (X, W, B, C, C)),
    "layer_norm": (L.layer_norm, (X, C, C)),
    "rms_norm": (L.rms_norm, (X, C)),
    "silu": (L.silu, (X,)),
    "tanh_gelu": (L.tanh_gelu, (X,)),
    "softmax": (L.softmax, (X,)),
}


def saved_bytes(function, rules, args):
    pull = lambda *args: fp.vjp(function, *args, rules=rules)[1]  # noqa: E731
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(jax.eval_shape(pull, *args)))


RECURRENT = {"lstm", "gru", "rnn"}
COMPILED = {  # What the compilers' figures are better for: `experiments/accelerator_figures.py`.
    "gpu": ({"reduce_window_max", "reduce_window_min", "scan"}, RECURRENT | {"relu_max_pool"}),
    "tpu": ({"scan"}, RECURRENT),
}


@pytest.mark.parametrize("platform", COMPILED)
def test_on_an_accelerator_only_rules_that_save_less_or_whose_programs_are_better(platform):
    primitives, layers = COMPILED[platform]
    rules = fp.rules.default.on(platform)
    assert {p for p in PRIMITIVES if rules.find(p, platform)} == primitives
    assert {n for n, x in LAYERS.items() if rules.find(x, platform)} == {*UNMEASURED, *layers} & set(LAYERS)


def test_rules_that_no_platform_was_measured_for_save_less():
    for name, (function, args) in UNMEASURED.items():
        assert [m.operator for m in fp.matches(function)(*args) if m.reason is None] == [name]
        ours, theirs = (saved_bytes(function, rules, args) for rules in (HANDWRITTEN, AUTODIFF))
        assert ours < theirs, name


# --- empty arrays -----------------------------------------------------------------------------


def zeros(*sizes):
    return jnp.zeros(sizes)


def pool(x):
    return nn.max_pool(nn.relu(x), (2, 2), (2, 2)), nn.avg_pool(x, (3, 3), (2, 2))


def image_convolution(x, w):
    return lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


E, P = zeros(0, 4), jnp.ones((4, 6))
EMPTY = {
    "activations": (lambda x: [f(x) for f in (L.relu, L.tanh, L.sigmoid, L.softplus, L.silu, L.gelu)], E),
    "elementwise": (lambda x: [f(x) for f in (jnp.exp, jnp.sqrt, lax.rsqrt, lax.logistic)], E),
    "softmax": (lambda x: (jax.nn.softmax(x), jax.nn.log_softmax(x, 0), L.log_softmax(x)), E),
    "product, no rows": (lambda x, w: x @ w, zeros(2, 0, 4), P),
    "product, no inputs": (lambda x, w: x @ w, zeros(2, 3, 0), zeros(0, 6)),
    "product, no outputs": (lambda x, w: x @ w, zeros(2, 3, 4), zeros(4, 0)),
    "dense and linear": (lambda x, w, b: (L.dense(x, w, b), L.linear(w.T, b[:4], b)), E, P, jnp.ones(6)),
    "pools, no examples": (pool, zeros(0, 4, 4, 16)),
    "pools, no channels": (pool, zeros(2, 4, 4, 0)),
    "convolution, no examples": (image_convolution, zeros(0, 4, 4, 3), jnp.ones((3, 3, 3, 2))),
    "convolution, no channels": (image_convolution, zeros(2, 4, 4, 0), zeros(3, 3, 0, 2)),
    "cumulative": (lambda x: (lax.cumlogsumexp(x, 0), lax.cumlogsumexp(x, 1)), E),
    "extrema of none": (lambda x: (x.max(1), x.min(1)), E),
    "indices": (lambda x: (x[jnp.zeros(0, int)], lax.top_k(x, 2)[0], x[:, :2]), P),
    "added to none": (lambda x, u: x.at[jnp.zeros(0, int)].add(u), P, zeros(0, 6)),
    "embedding": (lambda t: L.embedding(jnp.zeros((2, 0), int), t), P),
    "dropout": (lambda x: L.dropout(x, jax.random.key(0), rate=0.5, save="key"), E),
    "rotary": (lambda x: L.rotary(x, zeros(0, 2)), E),
    "gated": (lambda x, w, v: (L.swiglu(x, w, v), L.geglu(x, w, v)), E, P, P),
    "feed-forward": (lambda x, w, v: L.feed_forward(x, w, v), E, P, P.T),
    "norm and dense": (lambda x, w: L.norm_dense(x, w, jnp.ones(6), jnp.ones(4)), E, P),
    "cross-entropy": (lambda z: L.softmax_cross_entropy(z, jnp.zeros(0, int)), E),
    "squared error": (lambda p, t: L.mean_squared_error(p, t) * 0 + p.sum(), E, E),
    "pointwise losses": (lambda x: (L.huber_loss(x, x), L.focal_loss(x, x)), E),
    "penalty": (lambda w: L.l2_penalty(0.3, w), E),
    "convolution layer": (lambda x, w: L.conv(x, w), zeros(0, 5, 4), jnp.ones((3, 4, 2))),
    "pooling layers": (lambda x: (L.max_pool(x, window=(2,)), L.avg_pool(x, window=(2,))), zeros(0, 4, 3)),
}  # fmt: skip


@pytest.mark.sampled(14)
@pytest.mark.parametrize("case", EMPTY)
@pytest.mark.filterwarnings("ignore:invalid value")
def test_empty_arrays(case):
    function, *args = EMPTY[case]

    def total(*args):
        results = jax.tree.leaves(function(*args))
        return sum(jnp.sum(y * y) for y in results if jnp.issubdtype(y.dtype, jnp.floating))

    every = tuple(range(len(args)))
    both = compiled(lambda *args: [g(total, every)(*args) for g in (
        functools.partial(fp.value_and_grad, rules=HANDWRITTEN), jax.value_and_grad,
    )])  # fmt: skip
    actual, expected = both(*args)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert (a.shape, a.dtype) == (e.shape, e.dtype)
        np.testing.assert_allclose(a, e, rtol=1e-12)
