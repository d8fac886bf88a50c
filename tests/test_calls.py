"""What cannot be called is refused by name, value and remedy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
import pytest

import funcprop as fp
from funcprop.equations.verification import DerivationError

SHAPE = jax.ShapeDtypeStruct((3,), "float64")
W, X, Y = jnp.ones((4, 3)), jnp.ones((5, 4)), jnp.arange(5) % 3
of_one = optax.softmax_cross_entropy_with_integer_labels


def linear(w, x):
    return x @ w


def network(params, x):
    return jnp.tanh(x @ params["hidden"]) @ params["out"]


PARAMS = {"hidden": jnp.ones((4, 2)), "out": jnp.ones((2, 3))}


def of_batch(outputs, y):
    return of_one(outputs, y).mean()


def matrix_model(w, x):
    return jax.vmap(linear, (None, 0))(w, x)


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda: fp.trace("a")(1.0), "fun='a' is str, not a function; pass the function first and its arg"),
        (lambda: fp.grad("a")(1.0), "fun='a' is str, not a function"),
        (lambda: fp.vjp("a", 1.0), "fun='a' is str, not a function"),
        (lambda: fp.jacobian(2)(1.0), "fun=2 is int, not a function"),
        (lambda: fp.hvp("a")(1.0, 1.0), "fun='a' is str, not a function"),
        (lambda: fp.backprop("a")(1.0), "fun='a' is str, not a function"),
        (lambda: fp.derive("a")(1.0), "fun='a' is str, not a function"),
        (lambda: fp.backward_graph("a")(1.0), "fun='a' is str, not a function"),
        (lambda: fp.second_order_graph("a")(1.0), "fun='a' is str, not a function"),
        (lambda: fp.memory.footprint("a")(1.0), "fun='a' is str, not a function"),
        (lambda: fp.memory.rematerialize("a", 0.5)(1.0), "fun='a' is str, not a function"),
        (lambda: fp.hessian("a")(1.0), "fun='a' is str, not a function"),
        (lambda: fp.draw("a"), "graph='a' is not a graph; pass what fp.trace"),
        (lambda: fp.hessian(jnp.sum)("p"), "params='p' is str, which has no real derivative; pass the param"),
        (
            lambda: fp.backprop(jnp.sum)(SHAPE),
            r"a is a shape \(.*float64\[3\]\), but backprop needs values; .* fp.derive about shapes",
        ),
        (
            lambda: fp.kfac(linear, of_one, kind="exact")(W, jax.ShapeDtypeStruct((5, 4), float), Y),
            r"x is a shape .* but kfac needs values; .* ask fp.per_example\(model, loss\).audit",
        ),
        (
            lambda: fp.ekfac(linear, of_one, kind="exact")({"w": SHAPE}, X, Y),
            "params/w is a shape .* but ekfac needs values",
        ),
        (
            lambda: fp.ggn(of_batch, network, batched=True)(PARAMS, X, Y),
            r"model=of_batch and loss=network are in the wrong order: .*pass the model first",
        ),
        (
            lambda: fp.per_example(matrix_model, of_one)(W, X, Y, {"norm"}),
            r"model matrix_model takes a batch and fails for ONE example, x: float64\[4\] .*itself maps them",
        ),
        (
            lambda: fp.per_example(of_one, network)(PARAMS, X, Y, {"norm"}),
            r"model=softmax_cross_entropy_with_integer_labels and loss=network are in the wrong order",
        ),
    ],
)
def test_bad_calls_are_said(ask, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        ask()


@jax.custom_vjp
def clipped(x):
    return jnp.sin(x)


clipped.defvjp(lambda x: (jnp.sin(x), x), lambda x, g: (jnp.clip(g * jnp.cos(x), -0.1, 0.1),))


@jax.custom_vjp
def guided(x):
    return jnp.sin(x)


guided.defvjp(lambda x: (jnp.sin(x), x), lambda x, g: (jax.nn.relu(g) * jnp.cos(x),))


@pytest.mark.parametrize("function", [clipped, guided])
def test_a_backward_that_is_not_linear_is_said(function) -> None:
    derivation = fp.derive(lambda x: jnp.sum(jnp.array([3.0, -2.0]) * function(x)))(jnp.array([0.3, 0.4]))
    with pytest.raises(DerivationError, match=r"custom_vjp.*is not linear in its cotangent.*Clip, scale"):
        derivation.verify()
