"""KFAC where it is exact, and its algebra against dense matrices."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from curvature_models import EXAMPLES, LOSSES, MODELS, batched, mean

import funcprop as fp

SQUARED = LOSSES["squared error"].of_one
RNG = np.random.default_rng(0)


def normal(*shape):
    return jax.device_put(RNG.standard_normal(shape))


def ggn_blocks(model, loss, params, x, y):
    """Each parameter's own block of the Gauss-Newton matrix, in `ravel_pytree` order."""
    operator = fp.ggn(
        lambda p, x: jax.vmap(model, (None, 0))(p, x),
        lambda o, y: jnp.mean(jax.vmap(loss)(o, y)),
        batched=True,
    )(params, x, y)
    return {path: operator.block(path) for path in operator.parameters.paths}


def assert_blocks(operator, expected, only=None):
    for path, block in expected.items():
        if only is None or path in only:
            floor = 1e-10 * max(float(jnp.abs(block).max()), 1e-4)
            np.testing.assert_allclose(operator.block(path), block, rtol=0, atol=floor, err_msg=path)


DEEP = {"a": normal(4, 3), "b": {"w": normal(3, 5)}, "c": normal(5, 2)}


def deep(p, x):
    return x @ p["a"] @ p["b"]["w"] @ p["c"]


def test_deep_linear_network_with_squared_error():
    x, y = normal(6, 4), normal(6, 2)
    expected = ggn_blocks(deep, SQUARED, DEEP, x, y)
    operator = fp.kfac(deep, SQUARED, kind="exact")(DEEP, x, y)
    assert_blocks(operator, expected)
    a, g = operator.factors["a"]
    np.testing.assert_allclose(a, x.T @ x / 6, atol=1e-12)
    back = DEEP["b"]["w"] @ DEEP["c"]
    np.testing.assert_allclose(g, back @ back.T, atol=1e-12)
    assert_blocks(fp.ekfac(deep, SQUARED, kind="exact")(DEEP, x, y), expected)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("make", [fp.kfac, fp.ekfac])
def test_half_precision(make, dtype):
    """Parameters and data in half precision, whose factors LAPACK does not take as they are."""
    params = {"a": normal(4, 3), "bias": normal(3)}
    x, y = normal(6, 4), normal(6, 3)

    def step(dtype):
        p = jax.tree.map(lambda w: w.astype(dtype), params)
        made = make(lambda p, x: x @ p["a"] + p["bias"], SQUARED, kind="exact")
        return made(p, x.astype(dtype), y.astype(dtype)).inverse(damping=1.0) @ p

    for found, expected in zip(*map(jax.tree.leaves, (step(dtype), step("float32"))), strict=True):
        assert found.dtype == dtype
        scale = float(jnp.abs(expected).max())
        np.testing.assert_allclose(found.astype("float32"), expected, rtol=0, atol=0.03 * scale)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("name", ["mlp", "residual", "equinox"])
def test_one_example(name):
    """One example whose weights are used once: the block is a Kronecker product. Biases are always exact."""
    model, loss = MODELS[name](), LOSSES["softmax cross-entropy"]
    x, y = model.x[:1], loss.targets(1, model.outputs)
    operator = fp.ggn(batched(model), mean(loss), batched=True)(model.params, x, y)
    kfac = fp.kfac(model.apply, loss.of_one, kind="exact")(model.params, x, y)
    paths = [p for p in operator.parameters.paths if name != "equinox" or not p.startswith("layers/0")]
    assert_blocks(kfac, {path: operator.block(path) for path in paths})


def test_shared_weights():
    """Expand: a loss for every position of a linear network. Reduce: one loss of the positions' sum."""
    params, x, y = {"w": normal(3, 2), "v": normal(2, 2)}, normal(5, 4, 3), normal(5, 4, 2)
    every = lambda p, x: x @ p["w"] @ p["v"]  # noqa: E731
    summed = lambda p, x: (x @ p["w"] @ p["v"]).sum(0)  # noqa: E731
    assert_blocks(
        fp.kfac(every, SQUARED, kind="exact")(params, x, y), ggn_blocks(every, SQUARED, params, x, y)
    )
    reduced = fp.kfac(summed, SQUARED, kind="exact", sharing="reduce")(params, x, y[:, 0])
    assert_blocks(reduced, ggn_blocks(summed, SQUARED, params, x, y[:, 0]))


def used_twice(p, x):
    """As `y = x₁ W + x₂ W`, for two linear uses of a matrix of more than 1024 entries."""
    return (x[0] @ p["w"] + x[1] @ p["w"]) @ p["v"]


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_a_large_leaf_that_is_used_twice(sharing):
    """All its uses are one set of positions (Eschenhagen 2023): the same as of one product with two rows."""
    params, x, y = {"w": normal(33, 32), "v": normal(32, 2)}, normal(3, 2, 33), normal(3, 2)
    at_once = lambda p, x: (x @ p["w"]).sum(0) @ p["v"]  # noqa: E731
    for build in (fp.kfac, fp.ekfac):
        twice, once = (
            build(f, SQUARED, kind="exact", sharing=sharing)(params, x, y) for f in (used_twice, at_once)
        )
        v = normal(33 * 32 + 64)
        np.testing.assert_allclose(twice @ v, once @ v, rtol=1e-9)
    if sharing == "reduce":  # exact, for the loss is of the positions' sum
        v = jax.tree.map(jnp.sin, params)
        operator = fp.ggn(
            jax.vmap(used_twice, (None, 0)), lambda o, y: jnp.mean(jax.vmap(SQUARED)(o, y)), batched=True
        )
        kfac = fp.kfac(used_twice, SQUARED, kind="exact", sharing="reduce")(params, x, y)
        for path in ("w", "v"):
            only = {k: jnp.zeros_like(u) if k != path else u for k, u in v.items()}
            expected = (operator(params, x, y) @ only)[path]
            np.testing.assert_allclose((kfac @ only)[path], expected, rtol=1e-9, atol=1e-12)


def test_weights_in_reverse():
    """A flip moves entries as a transpose does; a leaf used both ways has the block of both."""
    params, x, y = {"w": normal(4, 3), "v": normal(3, 2)}, normal(4, 4), normal(4, 2)
    linear = lambda p, x: x @ p["w"][::-1, ::-1] @ p["v"][::-1]  # noqa: E731
    operator = fp.kfac(linear, SQUARED, kind="exact")(params, x, y)
    assert_blocks(operator, ggn_blocks(linear, SQUARED, params, x, y))
    np.testing.assert_allclose(operator.factors["w"][0], x.T @ x / 4, atol=1e-12)
    params = {"w": normal(3, 3)}
    tied = lambda p, x: jnp.tanh(x @ p["w"]) @ p["w"][::-1]  # noqa: E731
    data = normal(2, 3), normal(2, 3)
    operator = fp.kfac(tied, SQUARED, kind="exact")(params, *data)
    assert_blocks(operator, ggn_blocks(tied, SQUARED, params, *data))


def test_factors_among_the_quantities_of_one_pass():
    """What `fp.per_example` calls them is what `fp.kfac` has, of both kinds of sharing and all columns."""
    params, x, y = {"w": normal(3, 2), "b": normal(2)}, normal(5, 4, 3), normal(5, 2)
    model, key = lambda p, x: jnp.tanh(x @ p["w"] + p["b"]).sum(0), jax.random.key(0)
    kinds = {"kfac": "mc", "kflr": "exact", "kfac_empirical": "empirical"}
    names = [f"{name}{end}" for name in kinds for end in ("", "_reduce")]
    found = fp.per_example(model, SQUARED)(params, x, y, names, key)
    for name in names:
        sharing, kind = (
            "reduce" if name.endswith("_reduce") else "expand",
            kinds[name.removesuffix("_reduce")],
        )
        operator = fp.kfac(model, SQUARED, kind=kind, sharing=sharing)(params, x, y, key)
        for path, factors in operator.factors.items():
            for ours, theirs in zip(found[name][path], factors, strict=True):
                np.testing.assert_allclose(ours, theirs, rtol=1e-10, atol=1e-14, err_msg=f"{name}, {path}")
    # A bias has the cotangents of its product, and so the same second factor.
    for name in names:
        np.testing.assert_allclose(found[name]["b"][1], found[name]["w"][1], rtol=1e-10, atol=1e-14)


def test_stacked_and_grouped_blocks():
    """Layers stacked by a loop have a factor each; so have the groups of a convolution."""
    stacked, loss = MODELS["stacked"](), LOSSES["squared error"]
    x, y = stacked.x[:1], loss.targets(1, stacked.outputs)
    kfac = fp.kfac(stacked.apply, loss.of_one, kind="exact")(stacked.params, x, y)
    a, g = kfac.factors["layers/w"]
    assert a.shape == g.shape == (3, 4, 4)
    block = fp.ggn(batched(stacked), mean(loss), batched=True)(stacked.params, x, y).block("layers/w")
    for k in range(3):
        own = slice(16 * k, 16 * (k + 1))
        np.testing.assert_allclose(kfac.block("layers/w")[own, own], block[own, own], atol=1e-10)
    cnn = MODELS["cnn"]()
    y = loss.targets(EXAMPLES, cnn.outputs)
    factors = fp.kfac(cnn.apply, loss.of_one, kind="exact")(cnn.params, cnn.x, y).factors
    assert factors["grouped/w"][0].shape == (2, 8, 8)
    assert factors["conv/w"][0].shape == (18, 18)


def test_table_has_a_diagonal_factor():
    table, ids = normal(5, 3), jnp.array([[0, 1], [4, 1], [2, 3]])
    model = lambda p, ids: p["t"][ids]  # noqa: E731
    y = normal(3, 2, 3)
    operator = fp.kfac(model, SQUARED, kind="exact")({"t": table}, ids, y)
    a, g = operator.factors["t"]
    assert a.shape == (5,)
    pi = np.sqrt((np.sum(a) / 5) / (np.trace(g) / 3))
    left, right = np.diag(1 / (a + pi * np.sqrt(0.3))), np.linalg.inv(g + np.sqrt(0.3) / pi * np.eye(3))
    np.testing.assert_allclose(operator.inverse(0.3).dense(), np.kron(left, right), atol=1e-10)
    assert_blocks(operator, ggn_blocks(model, SQUARED, {"t": table}, ids, y))


def operators():
    model, loss = MODELS["mlp"](), LOSSES["softmax cross-entropy"]
    arguments = model.params, model.x, loss.targets(EXAMPLES, model.outputs)
    kfac = fp.kfac(model.apply, loss.of_one)(*arguments, key=jax.random.key(0))
    return {"kfac": kfac, "ekfac": fp.ekfac(model.apply, loss.of_one, kind="exact")(*arguments)}


@pytest.mark.sampled(1)
@pytest.mark.parametrize("name", ["kfac", "ekfac"])
def test_algebra(name):
    operator, damping = operators()[name], 0.3
    dense = np.asarray(operator.dense())
    eye = np.eye(len(dense))
    np.testing.assert_allclose(dense, dense.T, atol=1e-12)
    v = normal(len(dense))
    np.testing.assert_allclose(operator @ v, dense @ v, atol=1e-10)
    np.testing.assert_allclose(operator @ (operator @ v), dense @ dense @ v, atol=1e-10)
    inverse = operator.inverse(damping, method="eigenvalue")
    np.testing.assert_allclose(inverse.dense() @ (dense + damping * eye), eye, atol=1e-9)
    root = operator.sqrt().dense()
    np.testing.assert_allclose(root @ root, dense, atol=1e-9)
    np.testing.assert_allclose(
        operator.logdet(damping), np.linalg.slogdet(dense + damping * eye)[1], atol=1e-9
    )
    np.testing.assert_allclose(operator.trace(), np.trace(dense), atol=1e-10)
    assert jax.jit(lambda a, v: a @ v)(operator, v).shape == v.shape


def test_pi_damping():
    """Martens and Grosse 2015, section 6.3: π² = (tr A / dim A) / (tr G / dim G)."""
    operator, damping = operators()["kfac"], 0.3
    a, g = operator.factors["out/w"]
    pi = np.sqrt((np.trace(a) / len(a)) / (np.trace(g) / len(g)))
    left = np.linalg.inv(a + pi * np.sqrt(damping) * np.eye(len(a)))
    right = np.linalg.inv(g + np.sqrt(damping) / pi * np.eye(len(g)))
    np.testing.assert_allclose(operator.inverse(damping).block("out/w"), np.kron(left, right), atol=1e-10)


def test_ekfac_has_the_best_eigenvalues():
    """In KFAC's eigenbasis the diagonal of the true block; nearer to it in the Frobenius norm than KFAC."""
    model, loss = MODELS["mlp"](), LOSSES["softmax cross-entropy"]
    arguments = model.params, model.x, loss.targets(EXAMPLES, model.outputs)
    blocks = fp.ggn(batched(model), mean(loss), batched=True)(*arguments)
    kfac, ekfac = (f(model.apply, loss.of_one, kind="exact")(*arguments) for f in (fp.kfac, fp.ekfac))
    for path in ("hidden/0/w", "hidden/1/w", "out/w"):
        a, g = kfac.factors[path]
        basis = np.kron(np.linalg.eigh(a)[1], np.linalg.eigh(g)[1])
        true = np.asarray(blocks.block(path))
        best = basis @ np.diag(np.diag(basis.T @ true @ basis)) @ basis.T
        np.testing.assert_allclose(ekfac.block(path), best, atol=1e-10)
        error = lambda operator, path=path, true=true: np.linalg.norm(operator.block(path) - true)  # noqa: E731
        assert error(ekfac) <= error(kfac)


def test_monte_carlo_factors_are_unbiased():
    x, y = normal(3, 4), normal(3, 2)
    exact = fp.kfac(deep, SQUARED, kind="exact")(DEEP, x, y).factors["a"][1]
    sampled = jax.jit(jax.vmap(lambda key: fp.kfac(deep, SQUARED)(DEEP, x, y, key).factors["a"][1]))(
        jax.random.split(jax.random.key(0), 1000)
    )
    error = np.asarray(sampled).std(0) / 1000**0.5
    assert (np.abs(sampled.mean(0) - exact) <= 5 * error + 1e-12).all()


def test_empirical_factors_are_those_of_the_gradients():
    x, y = normal(1, 4), normal(1, 2)
    operator = fp.kfac(deep, SQUARED, kind="empirical")(DEEP, x, y)
    gradient = jax.grad(lambda p: SQUARED(deep(p, x[0]), y[0]))(DEEP)
    flat = gradient["a"].reshape(-1)
    np.testing.assert_allclose(operator.block("a"), np.outer(flat, flat), atol=1e-10)


def test_moving_average():
    x, y = normal(6, 4), normal(6, 2)
    build = fp.kfac(deep, SQUARED, kind="exact")
    first, second = build(DEEP, x[:3], y[:3]), build(DEEP, x[3:], y[3:])
    average = jax.jit(lambda a, b: a.update(b, 0.9))(first, second)
    for path, (a, g) in average.factors.items():
        np.testing.assert_allclose(a, 0.9 * first.factors[path][0] + 0.1 * second.factors[path][0])
        np.testing.assert_allclose(g, 0.9 * first.factors[path][1] + 0.1 * second.factors[path][1])


def test_moving_average_in_eigenbases():
    """In the new basis, the diagonal of the average of the dense operators."""
    x, y = normal(6, 4), normal(6, 2)
    build = fp.ekfac(deep, SQUARED, kind="exact")
    first, second = build(DEEP, x[:3], y[:3]), build(DEEP, x[3:], y[3:])
    average = first.update(second, 0.9)
    for path, block in zip(average.parameters.paths, second.blocks, strict=True):
        basis = np.kron(block.ua, block.ug)
        dense = 0.9 * first.block(path) + 0.1 * second.block(path)
        best = basis @ np.diag(np.diag(basis.T @ dense @ basis)) @ basis.T
        np.testing.assert_allclose(average.block(path), best, atol=1e-10)
    np.testing.assert_allclose(first.update(first, 0.3).dense(), first.dense(), atol=1e-10)


def test_errors():
    operator, x, y = operators(), normal(2, 4), normal(2, 2)
    singular = fp.kfac(deep, SQUARED, kind="exact")(DEEP, x, y)
    with pytest.raises(ValueError, match=r"inverse: with damping=0\.0, the blocks of 'a'.* add damping"):
        singular.inverse(0.0, method="eigenvalue")
    broken = fp.kfac(deep, SQUARED, kind="exact")({**DEEP, "a": DEEP["a"] * jnp.nan}, x, y)
    for ask in (broken.inverse, broken.logdet):
        with pytest.raises(FloatingPointError, match="not finite in the rows of 'b/w', 'c'"):
            ask(0.1)
    with pytest.raises(ValueError, match=r"update: decay=1\.5; pass the share of the past"):
        singular.update(singular, 1.5)
    with pytest.raises(ValueError, match="kind='none' is not known"):
        fp.kfac(deep, SQUARED, kind="none")
    with pytest.raises(ValueError, match="sharing='all' is not known"):
        fp.ekfac(deep, SQUARED, sharing="all")
    with pytest.raises(ValueError, match="kind='mc' draws random signs; pass key"):
        fp.kfac(deep, SQUARED)(DEEP, x, y)
    with pytest.raises(ValueError, match="damping"):
        operator["kfac"].inverse(-1.0)
    with pytest.raises(ValueError, match="method='exact' is not known"):
        operator["kfac"].inverse(1.0, method="exact")
    with pytest.raises(ValueError, match="in its eigenbasis"):
        _ = operator["ekfac"].factors
    with pytest.raises(ValueError, match="different kinds"):
        operator["kfac"].update(operator["ekfac"], 0.5)
