"""Normalisations against Flax's, at random shapes and where rules go wrong: statistics, axes, dtypes."""

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
AUTODIFF, HANDWRITTEN = fp.rules.autodiff, fp.rules.handwritten


def numbers(*shape):
    return jax.device_put(RNG.standard_normal(shape))


X = numbers(3, 4, 6)
SCALE, BIAS = numbers(6), numbers(6)
PARAMS = {"params": {"scale": SCALE, "bias": BIAS}}
AGAINST_FLAX = {
    "layer": (nn.LayerNorm(), PARAMS, partial(L.layer_norm, save="output")),
    "layer, slow variance": (
        nn.LayerNorm(use_fast_variance=False, epsilon=1e-3),
        PARAMS,
        partial(L.layer_norm, use_fast_variance=False, eps=1e-3),
    ),
    "layer over two axes": (
        nn.LayerNorm(reduction_axes=(1, 2), feature_axes=-1), PARAMS, partial(L.layer_norm, axes=(1, -1))
    ),
    "rms": (nn.RMSNorm(), {"params": {"scale": SCALE}}, lambda x, scale, bias: L.rms_norm(x, scale)),
    "group": (nn.GroupNorm(3), PARAMS, partial(L.group_norm, groups=3)),
    "group, each position": (
        nn.GroupNorm(2, reduction_axes=-1), PARAMS, partial(L.group_norm, groups=2, axes=(), save="output")
    ),
    "instance": (nn.InstanceNorm(), PARAMS, partial(L.group_norm, groups=6)),
}  # fmt: skip


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
@pytest.mark.parametrize("case", AGAINST_FLAX)
def test_the_same_numbers_as_flax(case, dtype):
    module, variables, layer = AGAINST_FLAX[case]
    x, variables = jax.tree.map(lambda a: a.astype(dtype), (X, variables))
    scale, bias = (variables["params"].get(k, BIAS.astype(dtype)) for k in ("scale", "bias"))
    g = numbers(*X.shape).astype(dtype)

    @compiled
    def both(x, params):
        flax, pull_flax = jax.vjp(lambda x, params: module.apply({"params": params}, x), x, params)
        ours, pull_ours = jax.vjp(fp.with_rules(layer, HANDWRITTEN), x, scale, bias)
        return flax, pull_flax(g), ours, dict(zip(("x", "scale", "bias"), pull_ours(g), strict=True))

    expected, (x_expected, params_expected), actual, found = both(x, variables["params"])
    eps = max(float(jnp.finfo(dtype).eps), 1e-13)
    assert actual.dtype == expected.dtype == dtype
    np.testing.assert_allclose(actual, expected, rtol=4 * eps, atol=4 * eps)
    for name, value in {"x": x_expected, **params_expected}.items():
        assert found[name].dtype == dtype
        np.testing.assert_allclose(found[name], value, rtol=0, atol=16 * eps * np.max(np.abs(value)))


@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_is_that_of_flax(training):
    stats = {"mean": numbers(6), "var": numbers(6) ** 2 + 0.1}
    module = nn.BatchNorm(use_running_average=not training, momentum=0.0)
    apply = partial(module.apply, mutable=["batch_stats"])
    g = numbers(*X.shape)

    def of_flax(x, params, stats):
        y, changed = apply({"params": params, "batch_stats": stats}, x)
        return y, changed["batch_stats"] if training else stats

    def of_ours(x, params, stats):
        given = None if training else L.BatchStatistics(**stats)
        y, found = L.batch_norm(x, **params, statistics=given, eps=module.epsilon)
        return y, found._asdict()

    args = X, PARAMS["params"], stats
    cotangents = g, {"mean": numbers(6), "var": numbers(6)}

    @partial(compiled, static_argnums=0)
    def results_and_cotangents(function, *args):
        return function(*args), jax.vjp(function, *args)[1](cotangents)

    jax.tree.map(
        partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-12),
        results_and_cotangents(fp.with_rules(of_ours, HANDWRITTEN), *args),
        results_and_cotangents(of_flax, *args),
    )


def gradients(layer, rules, g, *args):
    function = fp.with_rules(layer, rules)
    return function(*args), jax.vjp(function, *args)[1](g)


def assert_as_autodiff(layer, g, *args, rtol=1e-12):
    both = compiled(lambda *a: [gradients(layer, rules, g, *a) for rules in (HANDWRITTEN, AUTODIFF)])
    actual, expected = both(*args)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert (a.shape, a.dtype) == (e.shape, e.dtype)
        largest = np.max(np.abs(e), initial=1.0, where=np.isfinite(e))
        np.testing.assert_allclose(a, e, rtol=rtol, atol=rtol * largest)


@settings(max_examples=12)
@given(st.data())
def test_random_shapes_axes_and_policies(data):
    shape = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
    axes = tuple(data.draw(st.sets(st.integers(0, len(shape) - 1), min_size=1)))
    options = {
        "axes": axes,
        "save": data.draw(st.sampled_from(["input", "output"])),
        "eps": data.draw(st.sampled_from([1e-6, 0.1])),
    }
    kept = data.draw(st.integers(0, len(shape)))
    parameter = [n if data.draw(st.booleans()) else 1 for n in shape[kept:]]
    x, scale, bias = numbers(*shape), numbers(*parameter), numbers(*shape[kept:])
    g = numbers(*shape)
    if data.draw(st.booleans()):
        assert_as_autodiff(partial(L.rms_norm, **options), g, x, scale, rtol=1e-9)
    else:
        assert_as_autodiff(
            partial(L.layer_norm, use_fast_variance=data.draw(st.booleans()), **options),
            g,
            x,
            scale,
            bias,
            rtol=1e-9,
        )


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (1, 1), (2, 1)])
@pytest.mark.filterwarnings("ignore:invalid value")
def test_empty_and_single_axes(shape):
    g, x, p = jnp.ones(shape), numbers(*shape), numbers(shape[-1])
    assert_as_autodiff(L.layer_norm, g, x, p, p)
    assert_as_autodiff(L.rms_norm, g, x, p)
    if shape[-1]:
        assert_as_autodiff(partial(L.group_norm, groups=1), g, x, p, p)
        statistics = L.BatchStatistics(jnp.ones(shape[-1]), jnp.ones(shape[-1]))
        assert_as_autodiff(L.batch_norm, (g, statistics), x, p, p)


@pytest.mark.parametrize("save", ["input", "output"])
def test_not_a_number_and_infinity_stay_in_their_rows(save):
    x = X.at[0, 0, 1].set(jnp.nan).at[1, 0, 1].set(jnp.inf)
    assert_as_autodiff(partial(L.layer_norm, save=save, use_fast_variance=False), X, x)
    _, (x_cotangent,) = gradients(partial(L.layer_norm, save=save), HANDWRITTEN, X, x)
    assert np.isnan(x_cotangent[:2, 0]).all()
    assert np.isfinite(x_cotangent[2]).all()


def test_a_large_mean_needs_the_slow_variance():
    x = 1e8 + X
    reference = L.layer_norm(X)
    exact = L.layer_norm(x, use_fast_variance=False)
    np.testing.assert_allclose(exact, reference, atol=1e-6)
    assert np.max(np.abs(L.layer_norm(x) - reference)) > 0.1


def test_statistics_of_half_precision_are_taken_in_single():
    x = jnp.full((1, 4096), 1.0, jnp.bfloat16).at[0, 0].set(3.0)
    y, (mean, var) = L.batch_norm(x.T)
    assert (y.dtype, mean.dtype, var.dtype) == (jnp.bfloat16, jnp.float32, jnp.float32)
    np.testing.assert_allclose(mean, 1 + 2 / 4096, rtol=1e-6)


def test_parameters_decide_the_dtype_as_in_flax():
    x = X.astype(jnp.bfloat16)
    assert L.layer_norm(x, SCALE.astype(jnp.float32)).dtype == jnp.float32
    assert L.layer_norm(x, SCALE.astype(jnp.bfloat16)).dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("layer", "args"),
    [
        (L.layer_norm, (SCALE, BIAS)),
        (partial(L.layer_norm, axes=(1, 2)), (numbers(4, 1),)),
        (L.rms_norm, (SCALE,)),
        (partial(L.group_norm, groups=2), (SCALE, BIAS)),
        (L.norm_dense, (numbers(6, 2), numbers(2), SCALE, BIAS)),
        (partial(L.norm_dense, norm="rms"), (numbers(6, 2),)),
    ],
)
def test_equations(layer, args):
    def loss(x, args):
        return L.mean_squared_error(
            fp.name(layer(fp.name(x * 2, "z"), *args), "y"), jnp.ones(()) * 0 + target
        )

    x = X[0] if args[0].shape == (6, 2) else X
    target = layer(x, *args) * 0 + 1
    derivation = fp.derive(loss, (0, 1))(x, args)
    derivation.verify()
    assert "prod(∂J/∂y, ∂y/∂z) = " in derivation.text(width=1000)


def test_norm_dense_is_both_layers():
    w, b = numbers(6, 2), numbers(2)
    both = L.dense(L.layer_norm(X, SCALE, BIAS, eps=0.1), w, b)
    np.testing.assert_allclose(L.norm_dense(X, w, b, SCALE, BIAS, eps=0.1), both, rtol=1e-13)
    rms = L.norm_dense(X, w, None, SCALE, norm="rms", eps=0.1)
    np.testing.assert_allclose(rms, L.rms_norm(X, SCALE, eps=0.1) @ w, rtol=1e-13)


def test_initialisers():
    np.testing.assert_array_equal(L.layer_norm(X, **L.layer_norm.init(6)), L.layer_norm(X))
    params = L.norm_dense.init(jax.random.key(0), 6, 3)
    assert L.norm_dense(X, **params).shape == (3, 4, 3)
    assert set(L.norm_dense.init(jax.random.key(0), 6, 3, norm="rms", bias=False)) == {"w", "scale"}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: L.layer_norm(X, save="all"), r"layer_norm: save='all' is not a saving policy"),
        (lambda: L.rms_norm(X, axes=(0, -3)), r"axes=\(0, -3\) are not different axes of x, which has 3"),
        (lambda: L.layer_norm(X, axes=(3,)), r"axes=\(3,\) are not different axes of x"),
        (lambda: L.group_norm(X, groups=4), r"groups=4 does not divide the 6 channels"),
        (lambda: L.group_norm(X, groups=2, axes=(2,)), r"has the channels in it"),
        (lambda: L.norm_dense(X, SCALE[:, None], norm="batch"), r"norm='batch' is not a normalisation"),
        (lambda: L.norm_dense(X, SCALE[:, None], save="y"), r"save='y' is not a saving policy"),
        (lambda: L.norm_dense(X, SCALE[:, None], None, SCALE, BIAS, norm="rms"), r"norm='rms' has no bias"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
