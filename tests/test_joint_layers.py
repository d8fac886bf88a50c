"""A matrix and its bias as one Kronecker block, where that is exact, against Hessians of both."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.flatten_util import ravel_pytree

import funcprop as fp

RNG = np.random.default_rng(0)


def normal(*shape: int) -> jax.Array:
    return jax.device_put(RNG.standard_normal(shape))


def squared(output: Any, y: Any) -> Any:
    return jnp.sum((output - y) ** 2) / 2


def block_of_both(model: Callable[..., Any], params: Any, x: Any, y: Any, chosen: tuple[int, ...]) -> Any:
    """The Hessian by some leaves alone, in which the model is linear: their Gauss-Newton block."""
    leaves, tree = jax.tree.flatten(params)
    flat, unravel = ravel_pytree([leaves[i] for i in chosen])

    def mean(flat: Any) -> Any:
        moved = list(leaves)
        for i, leaf in zip(chosen, unravel(flat), strict=True):
            moved[i] = leaf
        outputs = jax.vmap(model, (None, 0))(jax.tree.unflatten(tree, moved), x)
        return jnp.mean(jax.vmap(squared)(outputs, y))

    return jax.jit(jax.hessian(mean))(flat)


def assert_exact(model: Callable[..., Any], params: Any, x: Any, joined: set[tuple[int, ...]]) -> None:
    """KFAC and EKFAC of a model that is linear in every layer."""
    y = jax.tree.map(jnp.cos, jax.jit(jax.vmap(model, (None, 0)))(params, x))
    for of in (fp.kfac, fp.ekfac):
        operator = of(model, squared, kind="exact", bias="joint")(params, x, y)
        assert {group for group in operator.groups if len(group) > 1} == joined
        names, dense = operator.parameters, operator.dense()
        for group in operator.groups:
            at = np.concatenate([np.arange(names.size)[names.slices[i]] for i in group])
            expected = block_of_both(model, params, x, y, group)
            floor = 1e-10 * float(jnp.abs(expected).max())
            np.testing.assert_allclose(dense[np.ix_(at, at)], expected, rtol=0, atol=floor)


def test_dense_layers() -> None:
    p = {"a": normal(3, 4), "b": normal(4), "c": normal(4, 2), "d": normal(2)}
    layers = lambda p, x: (x @ p["a"] + p["b"]) @ p["c"] + p["d"]  # noqa: E731
    assert_exact(layers, p, normal(5, 3), {(0, 1), (2, 3)})
    A, G = fp.kfac(layers, squared, kind="exact", bias="joint")(p, x := normal(5, 3), normal(5, 2)).factors[
        "a"
    ]
    with_one = jnp.concatenate([x, jnp.ones((5, 1))], 1)
    np.testing.assert_allclose(A, with_one.T @ with_one / 5, atol=1e-12)
    np.testing.assert_allclose(G, p["c"] @ p["c"].T, atol=1e-12)


@pytest.mark.nightly
def test_scales_signs_and_views() -> None:
    """A bias that is subtracted, doubled, or seen through a reshape; a product that is negated or moved."""
    p = {"w": normal(3, 4), "b": normal(4)}
    x = normal(5, 3)
    for model in (
        lambda p, x: x @ p["w"] - p["b"],
        lambda p, x: p["b"] - 3.0 * (x @ p["w"]),
        lambda p, x: -(x @ (p["w"] / 2)) + 5 * p["b"],
        lambda p, x: (x[None] @ p["w"]).reshape(2, 2) + p["b"].reshape(2, 2),
        lambda p, x: (p["w"].T @ x)[:, None] + p["b"][:, None],
    ):
        assert_exact(model, p, x, {(1, 0)})


@pytest.mark.nightly
def test_modules() -> None:
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            h = nn.Conv(4, (2, 2), feature_group_count=2, padding="VALID", param_dtype=float)(x)
            return nn.DenseGeneral((2, 3), axis=-1, param_dtype=float)(h)

    net = Net()
    x = normal(3, 3, 3, 2)
    params = jax.tree.map(lambda leaf: normal(*leaf.shape), net.init(jax.random.key(0), x[0]))
    # In the second layer of a convolution positions would be approximated: each layer by itself.
    for part in ("Conv_0", "DenseGeneral_0"):
        rest = {k: v for k, v in params["params"].items() if k != part}
        one = lambda p, x, part=part, rest=rest: net.apply({"params": {part: p, **rest}}, x)  # noqa: E731
        if part == "Conv_0":
            one = lambda p, x: nn.Conv(4, (2, 2), feature_group_count=2, padding="VALID").apply(  # noqa: E731
                {"params": p}, x
            )
        assert_exact(one, params["params"][part], x, {(1, 0)})
    linear = eqx.nn.Linear(3, 2, key=jax.random.key(0))
    linear = jax.tree.map(lambda leaf: normal(*leaf.shape), linear)
    assert_exact(lambda p, x: p(x), linear, normal(4, 3), {(0, 1)})


def test_layers_that_a_loop_stacks() -> None:
    p = {"b": normal(4, 3), "w": normal(4, 3, 3) / 2}

    def deep(p: Any, x: Any) -> Any:
        return jax.lax.scan(lambda h, layer: (h @ layer["w"] + layer["b"], None), x, p)[0]

    # Each layer's own block is exact; between layers the operator is zero.
    x, y = normal(5, 3), normal(5, 3)
    operator = fp.kfac(deep, squared, kind="exact", bias="joint")(p, x, y)
    assert operator.groups == ((1, 0),)
    expected = block_of_both(deep, p, x, y, (0, 1))
    dense, of_layer = operator.dense(), np.concatenate([np.arange(12) // 3, np.arange(36) // 9])
    same = of_layer[:, None] == of_layer
    np.testing.assert_allclose(dense, np.where(same, expected, 0), atol=1e-10)


def test_what_is_not_joined_keeps_its_block() -> None:
    """A bias of two products, a product that is used twice, and a bias that is used twice."""
    p = {"a": normal(3, 2), "b": normal(2), "c": normal(3, 2), "d": normal(2)}
    x = normal(4, 3)

    def model(p: Any, x: Any) -> Any:
        z = x @ p["c"]
        return x @ p["a"] + x @ p["c"] + p["b"] + (z + p["d"]) + z

    with pytest.raises(ValueError, match="bias='joint', but no bias is added to the result of a product"):
        fp.kfac(model, squared, kind="exact", bias="joint")(p, x, normal(4, 2))
    tied = lambda p, x: jnp.stack([x @ p["a"] + p["b"], x @ p["c"] + p["b"]]) + p["d"]  # noqa: E731
    with pytest.raises(ValueError, match="bias='joint'"):
        fp.kfac(tied, squared, kind="exact", bias="joint")(p, x, normal(4, 2, 2))
    with pytest.raises(ValueError, match="bias='both' is not known; it is 'separate' or 'joint'"):
        fp.kfac(model, squared, bias="both")


def network(p: Any, x: Any) -> Any:
    return jnp.tanh(x @ p["a"] + p["b"]) @ p["c"] * p["scale"]


def test_algebra_and_all_queries() -> None:
    p = {"a": normal(3, 4), "b": normal(4), "c": normal(4, 2), "scale": normal(2)}
    x, y = normal(6, 3), normal(6, 2)
    for of in (fp.kfac, fp.ekfac):
        operator = of(network, squared, kind="exact", bias="joint")(p, x, y)
        assert operator.groups == ((0, 1), (2,), (3,))
        dense = operator.dense()
        v = jax.tree.map(jnp.sin, p)
        flat = ravel_pytree(v)[0]
        np.testing.assert_allclose(ravel_pytree(operator @ v)[0], dense @ flat, rtol=1e-10)
        damped = np.asarray(dense) + 0.3 * np.eye(len(flat))
        inverse = operator.inverse(0.3, method="eigenvalue")
        np.testing.assert_allclose(inverse.dense(), np.linalg.inv(damped), atol=1e-10)
        np.testing.assert_allclose(operator.logdet(0.3), np.linalg.slogdet(damped)[1], rtol=1e-10)
        root = operator.sqrt().dense()
        np.testing.assert_allclose(root @ root, dense, atol=1e-10)
        np.testing.assert_allclose(operator.block("a", "b"), dense[:12, 12:16], atol=1e-12)
        assert abs(float(jnp.abs(operator.block("a", "b")).max())) > 1e-3
        np.testing.assert_allclose(operator.diagonal()["b"], jnp.diagonal(dense)[12:16], atol=1e-12)
        other = of(network, squared, kind="exact", bias="joint")(p, -x, y)
        np.testing.assert_allclose(operator.update(other, 1.0).trace(), (operator.trace()), rtol=1e-10)
        with pytest.raises(ValueError, match="update: the operators are of different parameters"):
            operator.update(of(network, squared, kind="exact")(p, x, y), 0.5)
    # The eigenvalues are the Gauss-Newton matrix's own moments, so that the trace is right.
    exact = sum(jnp.trace(block_of_both(network, p, x, y, (i,))) for i in (2,))
    np.testing.assert_allclose(operator.traces()["c"], exact, rtol=1e-10)


def test_of_a_data_set_and_as_an_optimizer() -> None:
    p = {"w": normal(3, 2), "b": normal(2)}
    x, y = normal(6, 3), normal(6, 2)
    model = lambda p, x: x @ p["w"] + p["b"]  # noqa: E731
    for of in (fp.kfac, fp.ekfac):
        factory = of(model, squared, kind="exact", bias="joint")
        found = fp.curvature.over([(x[:2], y[:2]), (x[2:], y[2:])])(factory)(p)
        np.testing.assert_allclose(found.dense(), factory(p, x, y).dense(), atol=1e-12)
    optimizer = fp.training.kfac(model, squared, 1.0, (x, y), damping=0.0, kind="exact", bias="joint")
    mean = lambda p, x, y: jnp.mean(jax.vmap(lambda x, y: squared(model(p, x), y))(x, y))  # noqa: E731
    step = fp.training.make_step(mean, optimizer)
    moved, _, _ = step(jax.tree.map(jnp.copy, p), optimizer.init(p), (x, y))
    with_one = np.concatenate([x, np.ones((6, 1))], 1)
    best = np.linalg.lstsq(with_one, np.asarray(y), rcond=None)[0]
    np.testing.assert_allclose(np.concatenate([moved["w"], moved["b"][None]]), best, atol=1e-9)
