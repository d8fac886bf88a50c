"""Elementwise activations, `y = φ(x)`, with `x̄ = ȳ ⊙ φ′(x)`.

What the backward reads is a choice: the output where `φ′` follows from it (relu, tanh, sigmoid, softplus),
the input otherwise (gelu, silu).

| layer      | φ(x)                          | φ′                               | saves  |
|------------|-------------------------------|----------------------------------|--------|
| `relu`     | `max(x, 0)`                   | `1` where `y > 0`                | output |
| `tanh`     | `tanh x`                      | `1 − y²`                         | output |
| `sigmoid`  | `1 / (1 + e⁻ˣ)`               | `y (1 − y)`                      | output |
| `softplus` | `log(1 + eˣ)`                 | `1 − e⁻ʸ`                        | output |
| `silu`     | `x σ(x)`                      | `σ(x) (1 + x (1 − σ(x)))`        | input  |
| `gelu`     | `x Φ(x)`, or its tanh formula | `Φ(x) + x Φ′(x)`                 | input  |
| `tanh_gelu`| its tanh formula              |                                  | input  |
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Inexact

from funcprop.primitives.elementwise import Saved, elementwise_rule
from funcprop.recognition import Known, Pattern
from funcprop.registry import Rule, layer


def _relu(x: Any) -> Any:
    return jax.nn.relu(x)


def _relu_backward(residuals: Saved, g: Any, needs: Any) -> tuple[Any]:
    # Selected, not multiplied: a cotangent that is not finite does not pass where the slope is 0.
    return (jnp.where(residuals.value > 0, g, 0),)


_relu_rule = elementwise_rule(_relu, lambda y: jnp.where(y > 0, 1, 0).astype(y.dtype), saves="output")


@layer(rule=replace(_relu_rule, backward=_relu_backward))
def relu(x: Inexact[Array, "*shape"]) -> Inexact[Array, "*shape"]:
    """Rectified linear unit, `max(x, 0)`; its derivative at 0 is 0, as `jax.nn.relu`'s.

    Example:
        >>> import jax.numpy as jnp, funcprop as fp
        >>> print(fp.layers.relu(jnp.array([-1.0, 2.0])))
        [0. 2.]
    """
    return _relu(x)


@layer(rule=elementwise_rule(jnp.tanh, lambda y: (1 - y) * (1 + y), saves="output"))
def tanh(x: Inexact[Array, "*shape"]) -> Inexact[Array, "*shape"]:
    """Hyperbolic tangent.

    Example:
        >>> import funcprop as fp
        >>> print(fp.layers.tanh(0.0))
        0.0
    """
    return jnp.tanh(x)


@layer(rule=elementwise_rule(jax.nn.sigmoid, lambda y: y * (1 - y), saves="output"))
def sigmoid(x: Inexact[Array, "*shape"]) -> Inexact[Array, "*shape"]:
    """Logistic function, `σ(x) = 1 / (1 + e⁻ˣ)`.

    Example:
        >>> import funcprop as fp
        >>> print(fp.layers.sigmoid(0.0))
        0.5
    """
    return jax.nn.sigmoid(x)


@layer(rule=elementwise_rule(jax.nn.softplus, lambda y: -jnp.expm1(-y), saves="output"))
def softplus(x: Inexact[Array, "*shape"]) -> Inexact[Array, "*shape"]:
    """`log(1 + eˣ)`, a smooth relu.

    Example:
        >>> import funcprop as fp
        >>> print(f"{fp.layers.softplus(0.0):.4f}")
        0.6931
    """
    return jax.nn.softplus(x)


def _on_cpu(rule: Rule) -> Rule:
    """The rule, measured to win on the CPU: under `scan` only the input is stacked, elsewhere all is equal.

    Eight products of 512 × 512, each with the activation, under `scan` (time / bytes over autodiff's): gelu
    in its tanh formula 0.69 / 0.38, silu 0.81 / 0.56; unrolled 0.99 / 1.00 and 1.01 / 1.00. The others lose
    in one of the two: gelu 1.08 / 1.21 unrolled, relu 1.04 / 1.43 and softplus 1.05 / 0.62 under `scan`.
    """
    return replace(rule, platforms=frozenset({"cpu"}))


def _silu_derivative(x: Any) -> Any:
    sigma = jax.nn.sigmoid(x)
    return sigma * (1 + x * (1 - sigma))


@layer(rule=_on_cpu(elementwise_rule(jax.nn.silu, _silu_derivative, saves="input")))
def silu(x: Inexact[Array, "*shape"]) -> Inexact[Array, "*shape"]:
    """Sigmoid linear unit, `x σ(x)` (Elfwing et al. 2018; "swish").

    Example:
        >>> import funcprop as fp
        >>> print(fp.layers.silu(0.0))
        0.0
    """
    return jax.nn.silu(x)


def _gelu(x: Any, approximate: bool = True) -> Any:
    return jax.nn.gelu(x, approximate=approximate)


def _gelu_derivative(x: Any, approximate: bool = True) -> Any:
    if not approximate:
        density = jnp.exp(-x * x / 2) / math.sqrt(2 * math.pi)
        return 0.5 * jax.lax.erfc(-x * math.sqrt(0.5)) + x * density
    scale = math.sqrt(2 / math.pi)
    t = jnp.tanh(scale * (x + 0.044715 * x**3))
    return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * scale * (1 + 3 * 0.044715 * x * x)


@layer(rule=elementwise_rule(_gelu, _gelu_derivative, saves="input"))
def gelu(x: Inexact[Array, "*shape"], *, approximate: bool = True) -> Inexact[Array, "*shape"]:
    """Gaussian error linear unit, `x Φ(x)`, by default in its tanh approximation.

    Reference: Hendrycks and Gimpel, "Gaussian error linear units", 2016.

    Example:
        >>> import funcprop as fp
        >>> print(f"{fp.layers.gelu(1.0, approximate=False):.4f}")
        0.8413
    """
    return _gelu(x, approximate)


@layer(rule=_on_cpu(elementwise_rule(_gelu, _gelu_derivative, saves="input")))
def tanh_gelu(x: Inexact[Array, "*shape"]) -> Inexact[Array, "*shape"]:
    """`gelu` in its tanh approximation, which is what `jax.nn.gelu` computes unless told otherwise.

    An operator of its own because its rule wins where that of the exact form does not.

    Example:
        >>> import funcprop as fp
        >>> print(f"{fp.layers.tanh_gelu(1.0):.4f}")
        0.8412
    """
    return _gelu(x)


# `jax.nn.tanh` and `jax.nn.sigmoid` are primitives, which have rules of their own.
PATTERNS: list[Pattern] = [
    Known(jax.nn.relu, relu),
    Known(jax.nn.softplus, softplus),
    Known(jax.nn.silu, silu),
    Known(jax.nn.gelu, tanh_gelu),
    Known(partial(jax.nn.gelu, approximate=False), gelu, (("approximate", False),)),
]
