"""Affine maps: `dense` for rows of a batch (`x @ w + b`), `linear` for one column vector (`W x + b`).

Reference: Zhang et al., *Dive into Deep Learning*, section 5.3.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Inexact, PRNGKeyArray

from funcprop.program.dtypes import plus
from funcprop.rules.equations import Equations, OperatorSymbols, outer
from funcprop.rules.layer import layer
from funcprop.rules.primitives.row_products import contraction
from funcprop.rules.rule import Rule


class LinearOperands(NamedTuple):
    """The operands of a product: each is read by the other's cotangent, of the bias only its dtype."""

    x: Any
    w: Any
    b: Any


def _check_matrix(layer: str, w: Any, axes: str) -> tuple[int, int]:
    """The two sizes of a matrix."""
    if jnp.ndim(w) != 2:
        raise ValueError(
            f"{layer}: w has shape {jnp.shape(w)}, but it is a matrix, {axes}; reshape it, or contract "
            "tensors of other shapes with `jnp.einsum`."
        )
    first, second = jnp.shape(w)
    return first, second


def _check_bias(layer: str, b: Any, outputs: int) -> None:
    if b is not None and jnp.shape(b) != (outputs,):
        raise ValueError(
            f"{layer}: b has shape {jnp.shape(b)} but w has {outputs} outputs; give it shape ({outputs},), "
            "or add a bias of another shape to the result."
        )


def _affine_symbol(x: Any, w: Any, b: Any = None) -> str:
    return "×" if b is None else "× +"


# --- dense ------------------------------------------------------------------------------------


def init_dense(
    key: PRNGKeyArray, inputs: int, outputs: int, *, bias: bool = True, dtype: Any = None
) -> dict[str, Any]:
    """He-normal weights `w: inputs × outputs` and, with `bias`, zeros `b: outputs`.

    Reference: He et al., "Delving deep into rectifiers", ICCV 2015.
    """
    params = {"w": jax.nn.initializers.he_normal()(key, (inputs, outputs), dtype or float)}
    return {**params, "b": jnp.zeros(outputs, dtype or float)} if bias else params


def _dense_forward(x: Any, w: Any, b: Any = None) -> tuple[Any, LinearOperands]:
    return _affine(x, w, b), LinearOperands(x, w, b)


def _dense_backward(residuals: LinearOperands, g: Any, needs: Any) -> tuple[Any, Any, Any]:
    x, w, b = residuals
    need_x, need_w, need_b = needs
    batch = tuple(range(g.ndim - 1))
    return (
        (g @ w.T).astype(x.dtype) if need_x else None,
        contraction(x, g).astype(w.dtype) if need_w else None,
        g.sum(batch).astype(b.dtype) if need_b else None,
    )


def _dense_equations(op: OperatorSymbols) -> Equations:
    x, w, b = op.args
    g = op.cotangent
    batch = tuple(range(len(g.shape) - 1))
    forward = x @ w if b is None else x @ w + b
    if not batch:
        return Equations(forward, (g @ w.T, outer(x, g), None if b is None else g))
    w_cotangent = x.T @ g if len(batch) == 1 else None
    return Equations(forward, (g @ w.T, w_cotangent, None if b is None else g.sum(batch)))


def _affine(x: Any, w: Any, b: Any) -> Any:
    return x @ w if b is None else plus(x @ w, b)


@layer(
    rule=Rule(_dense_forward, _dense_backward, _dense_equations, platforms=frozenset(), pure=True),
    init=init_dense,
    symbol=_affine_symbol,
)
def dense(
    x: Inexact[Array, "*batch inputs"],
    w: Inexact[Array, "inputs outputs"],
    b: Inexact[Array, " outputs"] | None = None,
) -> Inexact[Array, "*batch outputs"]:
    """The affine map `y = x w + b` of every row; `b` is optional.

    Backward: `x̄ = ȳ wᵀ`, `w̄ = Σ xᵀ ȳ`, `b̄ = Σ ȳ`, summed over the batch axes. Saves `x` and `w`.

    Raises:
        ValueError: a shape is not one of these; nothing is broadcast.

    Example:
        >>> import jax.numpy as jnp, funcprop as fp
        >>> print(fp.layers.dense(jnp.ones((1, 2)), jnp.eye(2), jnp.array([0.0, 1.0])))
        [[1. 2.]]
    """
    inputs, outputs = _check_matrix("dense", w, "inputs × outputs")
    if jnp.shape(x)[-1:] != (inputs,):
        raise ValueError(
            f"dense: x has shape {jnp.shape(x)} but w has {jnp.shape(w)}; the last axis of x must have the "
            f"{inputs} entries of the first axis of w. Transpose w if its outputs come first."
        )
    _check_bias("dense", b, outputs)
    return _affine(x, w, b)


# --- linear -----------------------------------------------------------------------------------


def init_linear(
    key: PRNGKeyArray, outputs: int, inputs: int, *, bias: bool = False, dtype: Any = None
) -> dict[str, Any]:
    """He-normal weights `w: outputs × inputs` (weights multiply from the left) and optional zeros `b`."""
    he_normal = jax.nn.initializers.he_normal(in_axis=-1, out_axis=-2)
    params = {"w": he_normal(key, (outputs, inputs), dtype or float)}
    return {**params, "b": jnp.zeros(outputs, dtype or float)} if bias else params


def _linear_forward(w: Any, x: Any, b: Any = None) -> tuple[Any, LinearOperands]:
    return _affine(w, x, b), LinearOperands(x, w, b)


def _linear_backward(residuals: LinearOperands, g: Any, needs: Any) -> tuple[Any, Any, Any]:
    x, w, b = residuals
    need_w, need_x, need_b = needs
    return (
        # Not `jnp.outer`: its transpose under vmap has a weight matrix for every example.
        jnp.tensordot(g, x, 0).astype(w.dtype) if need_w else None,
        (w.T @ g).astype(x.dtype) if need_x else None,
        g.astype(b.dtype) if need_b else None,
    )


def _linear_equations(op: OperatorSymbols) -> Equations:
    w, x, b = op.args
    g = op.cotangent
    forward = w @ x if b is None else w @ x + b
    return Equations(forward, (outer(g, x), w.T @ g, None if b is None else g))


@layer(
    rule=Rule(_linear_forward, _linear_backward, _linear_equations, platforms=frozenset(), pure=True),
    init=init_linear,
    symbol=_affine_symbol,
)
def linear(
    w: Inexact[Array, "outputs inputs"],
    x: Inexact[Array, " inputs"],
    b: Inexact[Array, " outputs"] | None = None,
) -> Inexact[Array, " outputs"]:
    """The chapter's affine map of one column vector, `y = w x + b`; `b` is optional.

    Its arguments stand in the order of the formula, from which the chapter's list of gradients follows: the
    weights' before the vector's.

    Backward: `w̄ = ȳ xᵀ`, `x̄ = wᵀ ȳ`, `b̄ = ȳ`. Saves `x` and `w`.

    Raises:
        ValueError: a shape is not one of these; nothing is broadcast.

    Example:
        >>> import jax.numpy as jnp, funcprop as fp
        >>> print(fp.layers.linear(jnp.array([[1.0, 2.0]]), jnp.array([3.0, 4.0])))
        [11.]
    """
    outputs, inputs = _check_matrix("linear", w, "outputs × inputs")
    if jnp.shape(x) != (inputs,):
        raise ValueError(
            f"linear: x has shape {jnp.shape(x)} but w has {jnp.shape(w)}; x is one vector of {inputs} "
            "entries. Map a batch with `jax.vmap`, or use `fp.layers.dense`."
        )
    _check_bias("linear", b, outputs)
    return _affine(w, x, b)
