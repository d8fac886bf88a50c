"""Two functions whose rules are right until a mistake replaces one of their cotangents."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import funcprop as fp


def numbers(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape))


class Operands(NamedTuple):
    x: jax.Array
    w: jax.Array


def affine(x: Any, w: Any, b: Any) -> Any:
    return x @ w + b


def affine_rule(**mistakes: Any) -> fp.Rule:
    cotangents = {
        "x": lambda r, g, needs: g @ r.w.T,
        "w": lambda r, g, needs: r.x.T @ g,
        "b": lambda r, g, needs: g.sum(0),
    } | mistakes
    return fp.Rule(
        lambda x, w, b: (affine(x, w, b), Operands(x, w)),
        lambda r, g, needs: tuple(cotangent(r, g, needs) for cotangent in cotangents.values()),
    )


class Output(NamedTuple):
    y: jax.Array


def bounded(x: Any) -> Any:
    return jnp.tanh(x)


def right_slope(r: Output, g: Any) -> Any:
    return g * (1 - r.y**2)


def right_value(x: Any) -> tuple[Any, Output]:
    y = jnp.tanh(x)
    return y, Output(y)


def bounded_rule(
    backward: Callable[[Any, Any], Any] = right_slope, forward: Any = right_value, **options: Any
) -> fp.Rule:
    return fp.Rule(forward, lambda r, g, needs: (backward(r, g),), **options)


def stale() -> fp.Rule:
    last: list[Any] = []

    def forward(x: Any) -> tuple[Any, Output]:
        y, residuals = right_value(x)
        last[:] = [y]
        return y, residuals

    return bounded_rule(lambda r, g: right_slope(Output(last[0]), g), forward)


def wasteful(x: Any) -> tuple[Any, Any]:
    y = jnp.tanh(x)
    return y, {"y": y, "square": y * y, "one": jnp.cosh(x) ** 2 - jnp.sinh(x) ** 2}


def product_rule() -> fp.Rule:
    """Right for matrices; as the rule of a primitive it forgets that `vmap` gives it batch dimensions."""

    def forward(x: Any, w: Any, **static: Any) -> tuple[Any, Operands]:
        return lax.dot_general(x, w, **static), Operands(x, w)

    return fp.Rule(forward, lambda r, g, needs, **static: (g @ r.w.T, r.x.T @ g))


OBLONG = numbers(4, 3, seed=1), numbers(3, 2, seed=2), numbers(2, seed=3)
SQUARE = numbers(3, 3, seed=1), numbers(3, 3, seed=2), numbers(3, seed=3)
MATRIX = numbers(4, 3) / 2
COMPLEX = numbers(3) + 1j * numbers(3, seed=1)
