"""What is compared: a program by JAX, the same by funcprop, and their arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

import funcprop as fp


class Case(NamedTuple):
    """Two programs on the same arguments, and the function whose rules they differ in.

    `ruled(rules)` is the second program by another rule set.
    """

    by_jax: Callable[..., Any]
    by_rules: Callable[..., Any]
    args: tuple[Any, ...]
    function: Callable[..., Any]
    ruled: Callable[[fp.RuleSet], Callable[..., Any]]


class Row(NamedTuple):
    """A case in full and in small, and the bounds on time and temporary bytes that are sought."""

    full: Callable[[], Case]
    small: Callable[[], Case]
    time: float
    bytes: float


# Models for which no gain is promised: the rules must not lose.
NEVER_WORSE = 1.03, 1.02


def gradients(ours: Callable[..., Any], *args: Any, plain: Callable[..., Any] | None = None) -> Case:
    """Value and gradient of a function; of a pair, where `plain` is the same without our layers."""
    ruled = lambda rules: fp.value_and_grad(ours, rules=rules)  # noqa: E731
    return Case(jax.value_and_grad(plain or ours), ruled(fp.rules.default), args, ours, ruled)


def products(ours: Callable[..., Any], *args: Any, plain: Callable[..., Any] | None = None) -> Case:
    """The Hessian-vector product in the first argument, forward over reverse."""
    params, *rest = args
    tangents = jax.tree.map(jnp.cos, params)

    def by_jax(params: Any, tangents: Any, *rest: Any) -> Any:
        gradient = jax.grad(plain or ours)
        return jax.jvp(lambda p: gradient(p, *rest), (params,), (tangents,))[1]

    ruled = lambda rules: fp.hvp(ours, rules=rules)  # noqa: E731
    return Case(
        by_jax, ruled(fp.rules.default), (params, tangents, *rest), lambda p, t, *rest: ours(p, *rest), ruled
    )


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def classified(model: nn.Module, x: jax.Array, classes: int = 10) -> Case:
    """Cross-entropy of a Flax model on random data."""
    params = jax.jit(model.init)(jax.random.key(1), x)

    def loss(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(model.apply(params, x), y).mean()

    return gradients(loss, params, x, jnp.arange(len(x)) % classes)
