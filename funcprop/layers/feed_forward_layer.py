"""The position-wise feed-forward network of a transformer, `φ(x w₁ + b₁) w₂ + b₂`, as one layer.

    z = x w₁ + b₁,    a = φ(z),    y = a w₂ + b₂
    z̄ = (ȳ w₂ᵀ) ⊙ φ′(z),    x̄ = z̄ w₁ᵀ,    w̄₁ = Σ xᵀ z̄,    b̄₁ = Σ z̄,    w̄₂ = Σ aᵀ ȳ,    b̄₂ = Σ ȳ

`z` and `a` are several times as large as `x`. Apart, the product by `w₂` keeps `a` and the activation `z`; as
one layer, what is kept is a choice:

| `save`            | keeps             | computed again                                             |
|-------------------|-------------------|------------------------------------------------------------|
| `"input"`         | `x`               | `z` by a product, `a` and `φ′(z)`                          |
| `"preactivation"` | `x`, `z`          | `a` and `φ′(z)`, elementwise: the default, measured fastest |
| `"all"`           | `x`, `a`, `φ′(z)` | nothing                                                    |

References: Vaswani et al., "Attention is all you need", 2017, section 3.3; Chen et al., "Training deep nets
with sublinear memory cost", 2016.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, TypeAlias

import jax
from jaxtyping import Array, Float, PRNGKeyArray

from funcprop.layers.linear_layers import LinearOperands, dense, init_dense
from funcprop.rules.expressions import Equations, OperatorSymbols, apply
from funcprop.rules.layer import layer
from funcprop.rules.patterns.activation import ACTIVATIONS
from funcprop.rules.rule import Rule

Save: TypeAlias = Literal["input", "preactivation", "all"]


class FeedForwardResiduals(NamedTuple):
    """The parameters and `x`; of `z`, `a` and `φ′(z)` those that `save` says."""

    x: Any
    w1: Any
    w2: Any
    b1: Any
    b2: Any
    z: Any
    a: Any
    slope: Any


def init_feed_forward(
    key: PRNGKeyArray,
    inputs: int,
    hidden: int,
    outputs: int | None = None,
    *,
    bias: bool = True,
    dtype: Any = None,
) -> dict[str, Any]:
    """He-normal `w1` and `w2` and, with `bias`, zeros `b1` and `b2`; as many outputs as inputs by default.

    Example:
        >>> import jax, funcprop as fp
        >>> sorted(fp.layers.feed_forward.init(jax.random.key(0), 2, 8))
        ['b1', 'b2', 'w1', 'w2']
    """
    first, second = jax.random.split(key)
    layers = (
        init_dense(first, inputs, hidden, bias=bias, dtype=dtype),
        init_dense(second, hidden, inputs if outputs is None else outputs, bias=bias, dtype=dtype),
    )
    return {f"{name}{i}": value for i, params in enumerate(layers, 1) for name, value in params.items()}


def _forward(
    x: Any, w1: Any, w2: Any, b1: Any, b2: Any, *, activation: str, save: Save
) -> tuple[Any, FeedForwardResiduals]:
    phi = ACTIVATIONS[activation]
    z = dense.function(x, w1, b1)
    a = phi.function(z)
    kept = {
        "input": (None, None, None),
        "preactivation": (z, None, None),
        "all": (None, a, phi.of_input(z) if save == "all" else None),
    }
    return dense.function(a, w2, b2), FeedForwardResiduals(x, w1, w2, b1, b2, *kept[save])


def _backward(
    residuals: FeedForwardResiduals, g: Any, needs: Any, *, activation: str, save: Save
) -> tuple[Any, ...]:
    phi = ACTIVATIONS[activation]
    x, w1, w2, b1, b2, z, a, slope = residuals
    need_x, need_w1, need_w2, need_b1, need_b2 = needs
    if save == "input":
        z = dense.function(x, w1, b1)
    if save != "all":
        a, slope = phi.function(z), phi.of_input(z)
    need_z = any((need_x, need_w1, need_b1))
    pulled, w2_cotangent, b2_cotangent = dense.rule.backward(
        LinearOperands(a, w2, b2), g, (need_z, need_w2, need_b2)
    )
    if not need_z:
        return None, None, w2_cotangent, None, b2_cotangent
    first = dense.rule.backward(LinearOperands(x, w1, b1), pulled * slope, (need_x, need_w1, need_b1))
    x_cotangent, w1_cotangent, b1_cotangent = first
    return x_cotangent, w1_cotangent, w2_cotangent, b1_cotangent, b2_cotangent


def _equations(op: OperatorSymbols) -> Equations:
    x, w1, w2, b1, b2 = op.args
    name = op.static["activation"]
    phi = ACTIVATIONS[name]
    z = x @ w1 if b1 is None else x @ w1 + b1
    write: Any = dense.rule.equations
    second = write(op._replace(args=(apply(name, phi.function, z), w2, b2)))
    z_cotangent = second.backward[0] * apply(f"{name}′", phi.of_input, z)
    first = write(op._replace(args=(x, w1, b1), cotangent=z_cotangent))
    (x_cotangent, w1_cotangent, b1_cotangent), (_, w2_cotangent, b2_cotangent) = (
        first.backward,
        second.backward,
    )
    return Equations(second.forward, (x_cotangent, w1_cotangent, w2_cotangent, b1_cotangent, b2_cotangent))


@layer(rule=Rule(_forward, _backward, _equations, pure=True), init=init_feed_forward)
def feed_forward(
    x: Float[Array, "*batch inputs"],
    w1: Float[Array, "inputs hidden"],
    w2: Float[Array, "hidden outputs"],
    b1: Float[Array, " hidden"] | None = None,
    b2: Float[Array, " outputs"] | None = None,
    *,
    activation: str = "gelu",
    save: Save = "preactivation",
) -> Float[Array, "*batch outputs"]:
    """Two affine maps with an activation between them, `φ(x w₁ + b₁) w₂ + b₂`.

    The equations and what `save` keeps are in the module. `activation` is the name of one of `fp.layers`:
    relu, tanh, sigmoid, softplus, silu or gelu.

    Raises:
        ValueError: `activation` or `save` is unknown.

    Reference: Vaswani et al., "Attention is all you need", 2017, section 3.3.

    Example:
        >>> import jax.numpy as jnp, funcprop as fp
        >>> x, w1, w2 = jnp.array([1.0, -2.0]), jnp.eye(2), jnp.ones((2, 1))
        >>> print(fp.layers.feed_forward(x, w1, w2, activation="relu"))
        [1.]
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"feed_forward: activation={activation!r} is not one of {', '.join(ACTIVATIONS)}.")
    if save not in ("input", "preactivation", "all"):
        raise ValueError(
            f"feed_forward: save={save!r} is not a saving policy; use 'input', 'preactivation' or 'all'."
        )
    return dense.function(ACTIVATIONS[activation].function(dense.function(x, w1, b1)), w2, b2)
