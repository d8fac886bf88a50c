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
from funcprop.rules.equations import Equations, OperatorSymbols, apply
from funcprop.rules.layer import layer
from funcprop.rules.patterns.activation import ACTIVATIONS
from funcprop.rules.rule import Rule

Save: TypeAlias = Literal["input", "preactivation", "all"]


class FeedForwardResiduals(NamedTuple):
    """The parameters and `x`; of `z`, `a` and `φ′(z)` those that `save` says."""

    x: Any
    w_up: Any
    w_down: Any
    b_up: Any
    b_down: Any
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
    """He-normal `w_up` and `w_down`, with `bias` zeros `b_up` and `b_down`; outputs are by default as inputs.

    Example:
        >>> import jax, funcprop as fp
        >>> sorted(fp.layers.feed_forward.init(jax.random.key(0), 2, 8))
        ['b_down', 'b_up', 'w_down', 'w_up']
    """
    first, second = jax.random.split(key)
    layers = {
        "up": init_dense(first, inputs, hidden, bias=bias, dtype=dtype),
        "down": init_dense(second, hidden, inputs if outputs is None else outputs, bias=bias, dtype=dtype),
    }
    return {f"{name}_{end}": value for end, params in layers.items() for name, value in params.items()}


def _forward(
    x: Any, w_up: Any, w_down: Any, b_up: Any, b_down: Any, *, activation: str, save: Save
) -> tuple[Any, FeedForwardResiduals]:
    phi = ACTIVATIONS[activation]
    z = dense.function(x, w_up, b_up)
    a = phi.function(z)
    kept = {
        "input": (None, None, None),
        "preactivation": (z, None, None),
        "all": (None, a, phi.of_input(z) if save == "all" else None),
    }
    return dense.function(a, w_down, b_down), FeedForwardResiduals(x, w_up, w_down, b_up, b_down, *kept[save])


def _backward(
    residuals: FeedForwardResiduals, g: Any, needs: Any, *, activation: str, save: Save
) -> tuple[Any, ...]:
    phi = ACTIVATIONS[activation]
    x, w_up, w_down, b_up, b_down, z, a, slope = residuals
    need_x, need_w_up, need_w_down, need_b_up, need_b_down = needs
    if save == "input":
        z = dense.function(x, w_up, b_up)
    if save != "all":
        a, slope = phi.function(z), phi.of_input(z)
    need_z = any((need_x, need_w_up, need_b_up))
    pulled, w2_cotangent, b2_cotangent = dense.rule.backward(
        LinearOperands(a, w_down, b_down), g, (need_z, need_w_down, need_b_down)
    )
    if not need_z:
        return None, None, w2_cotangent, None, b2_cotangent
    first = dense.rule.backward(LinearOperands(x, w_up, b_up), pulled * slope, (need_x, need_w_up, need_b_up))
    x_cotangent, w1_cotangent, b1_cotangent = first
    return x_cotangent, w1_cotangent, w2_cotangent, b1_cotangent, b2_cotangent


def _equations(op: OperatorSymbols) -> Equations:
    x, w_up, w_down, b_up, b_down = op.args
    name = op.static["activation"]
    phi = ACTIVATIONS[name]
    z = x @ w_up if b_up is None else x @ w_up + b_up
    write: Any = dense.rule.equations
    second = write(op._replace(args=(apply(name, phi.function, z), w_down, b_down)))
    z_cotangent = second.backward[0] * apply(f"{name}′", phi.of_input, z)
    first = write(op._replace(args=(x, w_up, b_up), cotangent=z_cotangent))
    (x_cotangent, w1_cotangent, b1_cotangent), (_, w2_cotangent, b2_cotangent) = (
        first.backward,
        second.backward,
    )
    return Equations(second.forward, (x_cotangent, w1_cotangent, w2_cotangent, b1_cotangent, b2_cotangent))


@layer(rule=Rule(_forward, _backward, _equations, pure=True), init=init_feed_forward)
def feed_forward(
    x: Float[Array, "*batch inputs"],
    w_up: Float[Array, "inputs hidden"],
    w_down: Float[Array, "hidden outputs"],
    b_up: Float[Array, " hidden"] | None = None,
    b_down: Float[Array, " outputs"] | None = None,
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
        >>> x, w_up, w_down = jnp.array([1.0, -2.0]), jnp.eye(2), jnp.ones((2, 1))
        >>> print(fp.layers.feed_forward(x, w_up, w_down, activation="relu"))
        [1.]
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"feed_forward: activation={activation!r} is not one of {', '.join(ACTIVATIONS)}.")
    if save not in ("input", "preactivation", "all"):
        raise ValueError(
            f"feed_forward: save={save!r} is not a saving policy; use 'input', 'preactivation' or 'all'."
        )
    return dense.function(ACTIVATIONS[activation].function(dense.function(x, w_up, b_up)), w_down, b_down)
