"""Elementwise activations, `y = φ(x)`, with `x̄ = ȳ ⊙ φ′(x)`.

What the backward reads is a choice, `save`:

| `save`     | keeps   | backward                                                              |
|------------|---------|-----------------------------------------------------------------------|
| `"output"` | `y`     | `φ′` from `y`, where it follows from it; free where `y` is kept anyway |
| `"input"`  | `x`     | `φ′` from `x`, computed again; free where `x` is kept anyway           |
| `"all"`    | `φ′(x)` | one product: all that it needs is computed by the forward              |

| layer      | φ(x)                          | φ′                               | default    |
|------------|-------------------------------|----------------------------------|------------|
| `relu`     | `max(x, 0)`                   | `1` where `y > 0`                | `"output"` |
| `tanh`     | `tanh x`                      | `1 − y²`                         | `"output"` |
| `sigmoid`  | `1 / (1 + e⁻ˣ)`               | `y (1 − y)`                      | `"output"` |
| `softplus` | `log(1 + eˣ)`                 | `1 − e⁻ʸ = σ(x)`                 | `"output"` |
| `silu`     | `x σ(x)`                      | `σ(x) (1 + x (1 − σ(x)))`        | `"input"`  |
| `gelu`     | `x Φ(x)`, or its tanh formula | `Φ(x) + x Φ′(x)`                 | `"input"`  |

Autodiff of silu and gelu keeps several arrays of `x`'s size, these rules one. Measured on two x86 cores,
eight products of 512 × 512, each with the activation (time and temporary bytes over autodiff's):

|             | under `scan` | unrolled    |
|-------------|--------------|-------------|
| `tanh_gelu` | 0.69 / 0.38  | 0.99 / 1.00 |
| `silu`      | 0.81 / 0.56  | 1.01 / 1.00 |
| `exact_gelu`| 0.81 / 0.54  | 1.08 / 1.21 |
| `relu`      | 1.04 / 1.43  | 0.97 / 1.00 |
| `softplus`  | 1.01 / 1.00  | 1.05 / 0.70 |

So the first two are in the default rule set, also where `jax.nn.gelu` and `jax.nn.silu` are recognised.

Sources: Griewank and Walther, *Evaluating Derivatives*, table 2.3 (`φ′` from the output); Nair and Hinton,
"Rectified linear units improve restricted Boltzmann machines", 2010; Dugas et al., "Incorporating
second-order functional knowledge for better option pricing", 2001 (softplus); silu and gelu name theirs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Inexact

from funcprop.program.dtypes import single_at_least
from funcprop.rules.equations import Equations, OperatorSymbols
from funcprop.rules.layer import layer
from funcprop.rules.patterns.recognition import Known, Pattern
from funcprop.rules.primitives.elementwise import SavedArray, elementwise_rule
from funcprop.rules.rule import Rule

Save: TypeAlias = Literal["output", "input", "all"]


class Activation(NamedTuple):
    """`φ`, and `φ′` from the input and, where it follows from it, from the output."""

    function: Callable[..., Any]
    of_input: Callable[..., Any]
    of_output: Callable[..., Any] | None = None

    def rule(self, *, platforms: frozenset[str] | None = frozenset()) -> Rule:
        """The rule with all saving policies; `save` is a static argument."""
        rules = {
            "input": elementwise_rule(self.function, self.of_input, saves="input"),
            "all": elementwise_rule(self.function, self.of_input, saves="all"),
        }
        if self.of_output is not None:
            rules["output"] = elementwise_rule(self.function, self.of_output, saves="output")
        default: Save = "input" if self.of_output is None else "output"

        def forward(x: Any, *, save: Save = default, **static: Any) -> tuple[Any, SavedArray]:
            return rules[save].forward(x, **static)

        def backward(
            residuals: SavedArray, g: Any, needs: Any, *, save: Save = default, **static: Any
        ) -> tuple[Any]:
            if save == "input":
                return (self._pulled_back(residuals.value, g, **static),)
            return rules[save].backward(residuals, g, needs, **static)

        def equations(op: OperatorSymbols) -> Equations:
            static = dict(op.static)
            write: Any = rules[static.pop("save", default)].equations
            return write(op._replace(static=static))

        return Rule(forward, backward, equations, platforms=platforms, pure=True)

    def _pulled_back(self, x: Any, g: Any, **static: Any) -> Any:
        """`g φ′(x)` by autodiff's own operators, in single precision at least.

        Where XLA sees both sweeps it computes what they share once, and the program is autodiff's. With
        `g φ′(x)` written otherwise, residual networks held 1.01 to 1.05 of its bytes.
        """
        wide = single_at_least(x)
        (cotangent,) = jax.vjp(partial(self.function, **static), x.astype(wide))[1](g.astype(wide))
        return cotangent.astype(g.dtype)

    def __call__(self, name: str, x: Any, save: Save, **static: Any) -> Any:
        """`φ(x)`.

        Raises:
            ValueError: `save` is not a policy that the activation has.
        """
        policies = ("input", "all") if self.of_output is None else ("output", "input", "all")
        if save not in policies:
            raise ValueError(f"{name}: save={save!r} is not one of its saving policies, {policies}.")
        return self.function(x, **static)


def _tanh_derivative(x: Any) -> Any:
    y = jnp.tanh(x)
    return (1 - y) * (1 + y)


def _sigmoid_derivative(x: Any) -> Any:
    y = jax.nn.sigmoid(x)
    return y * (1 - y)


def _silu_derivative(x: Any) -> Any:
    sigma = jax.nn.sigmoid(x)
    return sigma * (1 + x * (1 - sigma))


def _gelu(x: Any, approximate: bool = True) -> Any:
    return jax.nn.gelu(x, approximate=approximate)


def _gelu_derivative(x: Any, approximate: bool = True) -> Any:
    if not approximate:
        density = jnp.exp(-x * x / 2) / math.sqrt(2 * math.pi)
        return 0.5 * jax.lax.erfc(-x * math.sqrt(0.5)) + x * density
    scale = math.sqrt(2 / math.pi)
    t = jnp.tanh(scale * (x + 0.044715 * x**3))
    return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * scale * (1 + 3 * 0.044715 * x * x)


def _positive(value: Any) -> Any:
    return jnp.where(value > 0, 1, 0).astype(value.dtype)


# By name, also for layers that have an activation inside (`feed_forward`, `swiglu`).
ACTIVATIONS = {
    "relu": Activation(jax.nn.relu, _positive, _positive),
    "tanh": Activation(jnp.tanh, _tanh_derivative, lambda y: (1 - y) * (1 + y)),
    "sigmoid": Activation(jax.nn.sigmoid, _sigmoid_derivative, lambda y: y * (1 - y)),
    "softplus": Activation(jax.nn.softplus, jax.nn.sigmoid, lambda y: -jnp.expm1(-y)),
    "silu": Activation(jax.nn.silu, _silu_derivative),
    "gelu": Activation(_gelu, _gelu_derivative),
}

_EXACT_GELU = Activation(partial(_gelu, approximate=False), partial(_gelu_derivative, approximate=False))


def _relu_backward(residuals: SavedArray, g: Any, needs: Any, **_: Any) -> tuple[Any]:
    # Selected, not multiplied: a cotangent that is not finite does not pass where the slope is 0.
    return (jnp.where(residuals.value > 0, g, 0),)


@layer(rule=replace(ACTIVATIONS["relu"].rule(), backward=_relu_backward))
def relu(x: Inexact[Array, "*shape"], *, save: Save = "output") -> Inexact[Array, "*shape"]:
    """Rectified linear unit, `max(x, 0)`; its derivative at 0 is 0, as `jax.nn.relu`'s.

    Example:
        >>> import jax.numpy as jnp, funcprop as fp
        >>> print(fp.layers.relu(jnp.array([-1.0, 2.0])))
        [0. 2.]
    """
    return ACTIVATIONS["relu"]("relu", x, save)


@layer(rule=ACTIVATIONS["tanh"].rule())
def tanh(x: Inexact[Array, "*shape"], *, save: Save = "output") -> Inexact[Array, "*shape"]:
    """Hyperbolic tangent.

    Example:
        >>> import funcprop as fp
        >>> print(fp.layers.tanh(0.0))
        0.0
    """
    return ACTIVATIONS["tanh"]("tanh", x, save)


@layer(rule=ACTIVATIONS["sigmoid"].rule())
def sigmoid(x: Inexact[Array, "*shape"], *, save: Save = "output") -> Inexact[Array, "*shape"]:
    """Logistic function, `σ(x) = 1 / (1 + e⁻ˣ)`.

    Example:
        >>> import funcprop as fp
        >>> print(fp.layers.sigmoid(0.0))
        0.5
    """
    return ACTIVATIONS["sigmoid"]("sigmoid", x, save)


@layer(rule=ACTIVATIONS["softplus"].rule())
def softplus(x: Inexact[Array, "*shape"], *, save: Save = "output") -> Inexact[Array, "*shape"]:
    """`log(1 + eˣ)`, a smooth relu.

    Example:
        >>> import funcprop as fp
        >>> print(f"{fp.layers.softplus(0.0):.4f}")
        0.6931
    """
    return ACTIVATIONS["softplus"]("softplus", x, save)


@layer(rule=ACTIVATIONS["silu"].rule(platforms=None))
def silu(x: Inexact[Array, "*shape"], *, save: Save = "input") -> Inexact[Array, "*shape"]:
    """Sigmoid linear unit, `x σ(x)` ("swish").

    Reference: Elfwing et al., "Sigmoid-weighted linear units for neural network function approximation in
    reinforcement learning", 2018.

    Example:
        >>> import funcprop as fp
        >>> print(fp.layers.silu(0.0))
        0.0
    """
    return ACTIVATIONS["silu"]("silu", x, save)


@layer(rule=ACTIVATIONS["gelu"].rule(platforms=None))
def tanh_gelu(x: Inexact[Array, "*shape"], *, save: Save = "input") -> Inexact[Array, "*shape"]:
    """`gelu` by its tanh formula, `x/2 (1 + tanh(√(2/π) (x + 0.044715 x³)))`: what `jax.nn.gelu` computes.

    Reference: Hendrycks and Gimpel, "Gaussian error linear units", 2016.

    Example:
        >>> import funcprop as fp
        >>> print(f"{fp.layers.tanh_gelu(1.0):.4f}")
        0.8412
    """
    return ACTIVATIONS["gelu"]("tanh_gelu", x, save)


@layer(rule=_EXACT_GELU.rule())
def exact_gelu(x: Inexact[Array, "*shape"], *, save: Save = "input") -> Inexact[Array, "*shape"]:
    """Gaussian error linear unit, `x Φ(x)`, by the error function.

    Reference: Hendrycks and Gimpel, "Gaussian error linear units", 2016.

    Example:
        >>> import funcprop as fp
        >>> print(f"{fp.layers.exact_gelu(1.0):.4f}")
        0.8413
    """
    return _EXACT_GELU("exact_gelu", x, save)


def gelu(
    x: Inexact[Array, "*shape"], *, approximate: bool = True, save: Save = "input"
) -> Inexact[Array, "*shape"]:
    """Gaussian error linear unit, `x Φ(x)`: `tanh_gelu`, or `exact_gelu` with `approximate=False`.

    They are two layers because the rule of the one is in the default set and that of the other is not.

    Example:
        >>> import funcprop as fp
        >>> print(f"{fp.layers.gelu(1.0, approximate=False):.4f}")
        0.8413
    """
    return (tanh_gelu if approximate else exact_gelu)(x, save=save)


# `jax.nn.tanh` and `jax.nn.sigmoid` are primitives, which have rules of their own.
PATTERNS: list[Pattern] = [
    Known(jax.nn.relu, relu),
    Known(jax.nn.softplus, softplus),
    Known(jax.nn.silu, silu),
    Known(jax.nn.gelu, tanh_gelu),
    Known(partial(jax.nn.gelu, approximate=False), exact_gelu),
]
