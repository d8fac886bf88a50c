"""Where a loss begins, in every spelling: the Gauss-Newton product is that of its definition."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import funcprop as fp
from funcprop.cost.programs import programs
from funcprop.graph.objective import trace_objective

KEYS = jax.random.split(jax.random.key(0), 8)
B, D, H, C = 5, 4, 3, 3
PARAMS = {
    "W1": jax.random.normal(KEYS[0], (D, H)),
    "W2": jax.random.normal(KEYS[1], (H, C)),
    "b": jax.random.normal(KEYS[2], (C,)),
}
X = jax.random.normal(KEYS[3], (B, D))
LABELS = jnp.array([0, 2, 1, 1, 0])
SOFT = jax.nn.softmax(jax.random.normal(KEYS[4], (B, C)))
BITS = jax.random.bernoulli(KEYS[5], 0.5, (B, C)).astype(float)
REAL = jax.random.normal(KEYS[6], (B, C))
MASK = jnp.array([1.0, 0.0, 1.0, 1.0, 0.0])


def network(p: Any, x: Any) -> Any:
    return jnp.tanh(x @ p["W1"]) @ p["W2"] + p["b"]


def masked(o: Any, y: Any) -> Any:
    losses = optax.softmax_cross_entropy_with_integer_labels(o, y)
    return jnp.sum(losses * MASK) / jnp.sum(MASK)


def by_hand(o: Any, y: Any) -> Any:
    p = jax.nn.sigmoid(o)
    return -jnp.mean(y * jnp.log(p) + (1 - y) * jnp.log(1 - p))


def smoothed(o: Any, y: Any) -> Any:
    return optax.softmax_cross_entropy(o, optax.smooth_labels(jax.nn.one_hot(y, C), 0.1)).mean()


LOSSES: dict[str, tuple[Any, Any]] = {
    "labels": (lambda o, y: optax.softmax_cross_entropy_with_integer_labels(o, y).mean(), LABELS),
    "soft labels": (lambda o, y: optax.softmax_cross_entropy(o, y).sum(), SOFT),
    "log_softmax[y]": (lambda o, y: -jnp.mean(jax.nn.log_softmax(o)[jnp.arange(B), y]), LABELS),
    "log of softmax": (lambda o, y: -jnp.sum(jnp.log(jax.nn.softmax(o)) * jax.nn.one_hot(y, C)), LABELS),
    "one example": (lambda o, y: jax.vmap(lambda z, k: -jax.nn.log_softmax(z)[k])(o, y).mean(), LABELS),
    "masked": (masked, LABELS),
    "smoothed": (smoothed, LABELS),
    "perplexity": (
        lambda o, y: jnp.exp(optax.softmax_cross_entropy_with_integer_labels(o, y).mean()),
        LABELS,
    ),
    "squares": (lambda o, y: jnp.mean((o - y) ** 2), REAL),
    "l2_loss": (lambda o, y: optax.l2_loss(o, y).sum(-1).mean(), REAL),
    "product": (lambda o, y: jnp.vdot(o - y, o - y), REAL),
    "norm": (lambda o, y: jnp.linalg.norm(o - y), REAL),
    "huber": (lambda o, y: optax.huber_loss(o, y).mean(), REAL),
    "log_cosh": (lambda o, y: optax.log_cosh(o, y).mean(), REAL),
    "bits": (lambda o, y: optax.sigmoid_binary_cross_entropy(o, y).mean(), BITS),
    "bits by hand": (by_hand, BITS),
    "counts": (lambda o, y: jnp.sum(jnp.exp(o) - y * o), jnp.round(jnp.exp(REAL))),
    "hinge": (lambda o, y: jnp.mean(jax.nn.relu(1 - (2 * y - 1) * o) ** 2), BITS),
}


def by_definition(model: Any, loss: Any, params: Any, further: Any = None) -> Any:
    """`(Jᵀ ∇²ₒl J + ∇² further) θ`."""
    flat, unravel = ravel_pytree(params)
    outputs, back = ravel_pytree(model(params))
    jacobian = jax.jit(jax.jacobian(lambda f: ravel_pytree(model(unravel(f)))[0]))(flat)
    matrix = jacobian.T @ jax.jit(jax.hessian(lambda o: loss(back(o))))(outputs) @ jacobian
    if further is not None:
        matrix += jax.jit(jax.hessian(lambda f: further(unravel(f))))(flat)
    return matrix @ flat


def product(loss: Any, *args: Any) -> Any:
    """The Gauss-Newton product with the parameters themselves."""

    def use(objective: Any) -> Any:
        (program,) = (p for p in programs(objective, None, None)[0] if p.name == "Gauss-Newton product")
        return ravel_pytree(jax.jit(program.function)(*program.operands))[0], None

    return trace_objective(use, loss, 0, args, {})


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_is_found_in_every_spelling(name: str) -> None:
    loss, y = LOSSES[name]
    penalty = lambda p: 0.15 * optax.tree.norm(p, squared=True)  # noqa: E731
    found = product(lambda p, x, y: loss(network(p, x), y) + penalty(p), PARAMS, X, y)
    expected = by_definition(lambda p: network(p, X), lambda o: loss(o, y), PARAMS, penalty)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-11)


def test_the_output_is_past_what_is_not_convex() -> None:
    """`(tanh(z) − y)²` is convex in `tanh(z)` alone, `(relu(z) − y)²` the same in either."""
    for act in (jnp.tanh, jax.nn.sigmoid, jax.nn.relu, jax.nn.softplus):
        found = product(lambda p, x, y, act=act: jnp.mean((act(network(p, x)) - y) ** 2), PARAMS, X, BITS)
        expected = by_definition(
            lambda p, act=act: act(network(p, X)), lambda o: jnp.mean((o - BITS) ** 2), PARAMS
        )
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-11)


def autoencoder(p: Any, x: Any, key: Any) -> tuple[Any, Any, Any]:
    h = jnp.tanh(x @ p["encode"])
    mean, logvar = h @ p["mean"], h @ p["logvar"]
    z = mean + jnp.exp(logvar / 2) * jax.random.normal(key, mean.shape)
    return z @ p["decode"], mean, logvar


def test_terms_of_several_outputs() -> None:
    """A variational autoencoder: the logits, and both parameters of the code."""
    sizes = {"encode": (D, H), "mean": (H, 2), "logvar": (H, 2), "decode": (2, C)}
    params = {name: jax.random.normal(KEYS[i], size) / 2 for i, (name, size) in enumerate(sizes.items())}

    def loss(outputs: Any) -> Any:
        logits, mean, logvar = outputs
        divergence = -0.5 * jnp.sum(1 + logvar - mean**2 - jnp.exp(logvar), -1)
        return jnp.mean(optax.sigmoid_binary_cross_entropy(logits, BITS).sum(-1) + divergence)

    found = product(lambda p, x: loss(autoencoder(p, x, KEYS[7])), params, X)
    expected = by_definition(lambda p: autoencoder(p, X, KEYS[7]), loss, params)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-11)


def test_shapes_are_enough() -> None:
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), (PARAMS, X, LABELS))
    loss = lambda p, x, y: LOSSES["labels"][0](network(p, x), y)  # noqa: E731
    cost = fp.second_order_cost(loss)(*shapes)
    assert cost["Gauss-Newton product"].predicted.products > cost["gradient"].predicted.products


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    "loss",
    [
        lambda o, y: jnp.sum(jnp.cos(jnp.tanh(o))),
        lambda o, y: jnp.sum(o),  # linear
        lambda o, y: jnp.mean(REAL[:, 0] * jax.nn.log_softmax(o)[jnp.arange(B), y]),  # of both signs
        lambda o, y: jnp.sum((o[:, 0] * o[:, 1]) ** 3),
    ],
)
def test_what_is_not_convex_is_no_loss(loss: Any) -> None:
    cost = fp.second_order_cost(lambda p, x, y: loss(network(p, x), y), repeats=1)(PARAMS, X, LABELS)
    assert cost.output is None
    assert "past its last parameter convex in no value" in cost.left["Gauss-Newton product"]
