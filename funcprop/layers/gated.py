"""Gated linear units: two products of one input, of which one opens or closes the other.

    z = x w_gate,    u = x w_up,    h = φ(z) ⊙ u,    y = h w_down  (or h itself)

    w̄_down = Σ hᵀ ȳ,    h̄ = ȳ w_downᵀ,    z̄ = h̄ ⊙ u ⊙ φ′(z),    ū = h̄ ⊙ φ(z)
    w̄_gate = Σ xᵀ z̄,    w̄_up = Σ xᵀ ū,    x̄ = z̄ w_gateᵀ + ū w_upᵀ

Autodiff keeps about six arrays of `z`'s size. As one layer, what is kept is a choice:

| `save`            | keeps                             | computed again                             |
|-------------------|-----------------------------------|--------------------------------------------|
| `"input"`         | `x`                               | `z` and `u` by two products, and the rest  |
| `"preactivation"` | `x`, `z`, `u`                     | `φ(z)`, `φ′(z)` and `h`: the default       |
| `"all"`           | `x`, `φ(z)`, `u ⊙ φ′(z)`, and `h` | nothing                                    |

Reference: Shazeer, "GLU variants improve transformer", 2020.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, TypeAlias

import jax
from jaxtyping import Array, Float, PRNGKeyArray

from funcprop.layers.linear_layers import LinearOperands, dense, init_dense
from funcprop.rules.equations import Equations, OperatorSymbols, apply
from funcprop.rules.layer import layer
from funcprop.rules.patterns.activation import ACTIVATIONS, Activation
from funcprop.rules.rule import Rule

Save: TypeAlias = Literal["input", "preactivation", "all"]
POLICIES = ("input", "preactivation", "all")


class GatedResiduals(NamedTuple):
    """`x` and the weights; of the intermediates those that `save` says."""

    x: Any
    w_gate: Any
    w_up: Any
    w_down: Any
    z: Any
    u: Any
    gate: Any
    slope: Any
    h: Any


def init_gated(
    key: PRNGKeyArray,
    inputs: int,
    hidden: int,
    outputs: int | None = None,
    *,
    down: bool = True,
    dtype: Any = None,
) -> dict[str, Any]:
    """He-normal `w_gate`, `w_up` and, with `down`, `w_down` to as many outputs as inputs by default.

    Example:
        >>> import jax, funcprop as fp
        >>> sorted(fp.layers.swiglu.init(jax.random.key(0), 2, 8))
        ['w_down', 'w_gate', 'w_up']
    """
    keys = jax.random.split(key, 3)
    sizes = {"w_gate": (inputs, hidden), "w_up": (inputs, hidden)}
    if down:
        sizes["w_down"] = (hidden, inputs if outputs is None else outputs)
    return {
        name: init_dense(k, *size, bias=False, dtype=dtype)["w"]
        for k, (name, size) in zip(keys, sizes.items(), strict=False)
    }


def _value(phi: Activation, x: Any, w_gate: Any, w_up: Any, w_down: Any, **static: Any) -> Any:
    h = phi.function(x @ w_gate, **static) * (x @ w_up)
    return h if w_down is None else h @ w_down


def _rule(phi: Activation, name: str) -> Rule:
    """The rule of the unit with this activation; static arguments but `save` are the activation's."""

    def forward(
        x: Any, w_gate: Any, w_up: Any, w_down: Any, *, save: Save, **static: Any
    ) -> tuple[Any, GatedResiduals]:
        z, u = x @ w_gate, x @ w_up
        gate = phi.function(z, **static)
        h = gate * u
        kept: dict[str, Any] = {}
        if save == "preactivation":
            kept = {"z": z, "u": u}
        elif save == "all":
            kept = {"gate": gate, "slope": u * phi.of_input(z, **static), "h": h}
        names = ("z", "u", "gate", "slope", "h")
        y = h if w_down is None else h @ w_down
        return y, GatedResiduals(x, w_gate, w_up, w_down, *map(kept.get, names))

    def backward(
        residuals: GatedResiduals, g: Any, needs: Any, *, save: Save, **static: Any
    ) -> tuple[Any, ...]:
        x, w_gate, w_up, w_down, z, u, gate, slope, h = residuals
        need_x, need_gate, need_up, need_down = needs
        if save == "input":
            z, u = x @ w_gate, x @ w_up
        if save != "all":
            gate = phi.function(z, **static)
            slope, h = u * phi.of_input(z, **static), gate * u
        product: Any = dense.rule.backward
        down = None
        if w_down is not None:
            needed = (any((need_x, need_gate, need_up)), need_down, None)
            g, down, _ = product(LinearOperands(h, w_down, None), g, needed)
        by_gate: Any = None
        by_up: Any = None
        of_gate = of_up = None
        if need_x or need_gate:
            by_gate, of_gate, _ = product(
                LinearOperands(x, w_gate, None), g * slope, (need_x, need_gate, None)
            )
        if need_x or need_up:
            by_up, of_up, _ = product(LinearOperands(x, w_up, None), g * gate, (need_x, need_up, None))
        return by_gate + by_up if need_x else None, of_gate, of_up, down

    def equations(op: OperatorSymbols) -> Equations:
        x, w_gate, w_up, w_down = op.args
        static = {k: v for k, v in op.static.items() if k != "save"}
        z, u = x @ w_gate, x @ w_up
        gate = apply(name, lambda v: phi.function(v, **static), z)
        product: Any = dense.rule.equations
        pulled, value, down = op.cotangent, gate * u, None
        if w_down is not None:
            value, (pulled, down, _) = product(op._replace(args=(value, w_down, None)))
        slope = apply(f"{name}′", lambda v: phi.of_input(v, **static), z)
        of_gate = product(op._replace(args=(x, w_gate, None), cotangent=pulled * u * slope)).backward
        of_up = product(op._replace(args=(x, w_up, None), cotangent=pulled * gate)).backward
        return Equations(value, (of_gate[0] + of_up[0], of_gate[1], of_up[1], down))

    return Rule(forward, backward, equations, pure=True)


def _check(name: str, save: str) -> None:
    if save not in POLICIES:
        raise ValueError(f"{name}: save={save!r} is not a saving policy; use one of {POLICIES}.")


@layer(rule=_rule(ACTIVATIONS["silu"], "silu"), init=init_gated)
def swiglu(
    x: Float[Array, "*batch inputs"],
    w_gate: Float[Array, "inputs hidden"],
    w_up: Float[Array, "inputs hidden"],
    w_down: Float[Array, "hidden outputs"] | None = None,
    *,
    save: Save = "preactivation",
) -> Float[Array, "*batch outputs"]:
    """`(silu(x w_gate) ⊙ (x w_up)) w_down`, the last product only with `w_down`.

    The equations and what `save` keeps are in the module.

    Raises:
        ValueError: `save` is unknown.

    Reference: Shazeer, "GLU variants improve transformer", 2020.

    Example:
        >>> import jax.numpy as jnp, funcprop as fp
        >>> w = jnp.eye(2)
        >>> print(fp.layers.swiglu(jnp.array([0.0, 20.0]), w, w))
        [  0. 400.]
    """
    _check("swiglu", save)
    return _value(ACTIVATIONS["silu"], x, w_gate, w_up, w_down)


@layer(rule=_rule(ACTIVATIONS["gelu"], "gelu"), init=init_gated)
def geglu(
    x: Float[Array, "*batch inputs"],
    w_gate: Float[Array, "inputs hidden"],
    w_up: Float[Array, "inputs hidden"],
    w_down: Float[Array, "hidden outputs"] | None = None,
    *,
    approximate: bool = True,
    save: Save = "preactivation",
) -> Float[Array, "*batch outputs"]:
    """`(gelu(x w_gate) ⊙ (x w_up)) w_down`, the last product only with `w_down`.

    The equations and what `save` keeps are in the module; `approximate` is `gelu`'s.

    Raises:
        ValueError: `save` is unknown.

    Reference: Shazeer, "GLU variants improve transformer", 2020.

    Example:
        >>> import jax.numpy as jnp, funcprop as fp
        >>> w = jnp.eye(2)
        >>> print(fp.layers.geglu(jnp.array([0.0, 20.0]), w, w))
        [  0. 400.]
    """
    _check("geglu", save)
    return _value(ACTIVATIONS["gelu"], x, w_gate, w_up, w_down, approximate=approximate)
