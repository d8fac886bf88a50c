"""A normalisation and the affine map after it, as one layer that keeps the normalisation's input alone.

    y = norm(x; γ, β),    z = y w + b

Apart, the two keep `x` for the norm and `y` for `w̄ = Σ yᵀ z̄`. Together they keep `x` and the statistics of
each row, and `y` is computed again: one pass over the rows beside three products. So blocks `x + f(norm(x))`
(pre-norm transformers) keep one activation each.

Reference: Chen et al., "Training deep nets with sublinear memory cost", 2016 (recomputing what is cheap).
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, TypeAlias

import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from funcprop.layers.linear_layers import LinearOperands, dense, init_dense
from funcprop.layers.normalization import Normalized, init_norm, layer_norm, rms_norm, value_again
from funcprop.rules.equations import Equations, OperatorSymbols, apply
from funcprop.rules.layer import layer
from funcprop.rules.rule import Rule

Norm: TypeAlias = Literal["layer", "rms"]
Save: TypeAlias = Literal["input", "all"]


class NormalizedAndOperands(NamedTuple):
    """The normalisation's residuals, `w`, `b` for its type, and with `save="all"` the normalised rows."""

    normalized: Normalized
    w: Any
    b: Any
    y: Any


def init_norm_dense(
    key: PRNGKeyArray,
    inputs: int,
    outputs: int,
    *,
    norm: Norm = "layer",
    bias: bool = True,
    dtype: Any = None,
) -> dict[str, Any]:
    """Parameters of both: `w` and `b` as of `dense`, `scale` of ones, and `bias` of zeros for a layer norm.

    Example:
        >>> import jax, funcprop as fp
        >>> sorted(fp.layers.norm_dense.init(jax.random.key(0), 3, 2))
        ['b', 'bias', 'scale', 'w']
    """
    return {
        **init_dense(key, inputs, outputs, bias=bias, dtype=dtype),
        **init_norm(inputs, bias=norm == "layer", dtype=dtype),
    }


def _normalization(norm: Norm, eps: float) -> tuple[Any, dict[str, Any]]:
    """The layer and its static arguments."""
    if norm == "rms":
        return rms_norm, {"axes": (-1,), "eps": eps, "save": "input"}
    return layer_norm, {"axes": (-1,), "eps": eps, "use_fast_variance": True, "save": "input"}


def _parameters(norm: Norm, scale: Any, bias: Any) -> tuple[Any, ...]:
    return (scale,) if norm == "rms" else (scale, bias)


def _forward(
    x: Any, w: Any, b: Any, scale: Any, bias: Any, *, norm: Norm, eps: float, save: Save
) -> tuple[Any, NormalizedAndOperands]:
    normalization, static = _normalization(norm, eps)
    y, residuals = normalization.rule.forward(x, *_parameters(norm, scale, bias), **static)
    kept = y if save == "all" else None
    return dense.function(y, w, b), NormalizedAndOperands(residuals, w, b, kept)


def _backward(
    residuals: NormalizedAndOperands, g: Any, needs: Any, *, norm: Norm, eps: float, save: Save
) -> tuple[Any, ...]:
    need_x, need_w, need_b, need_scale, need_bias = needs
    normalization, static = _normalization(norm, eps)
    kept = residuals.normalized
    y = value_again(kept, "input") if residuals.y is None else residuals.y
    need_y = any((need_x, need_scale, need_bias))
    pulled, w, b = dense.rule.backward(
        LinearOperands(y, residuals.w, residuals.b), g, (need_y, need_w, need_b)
    )
    if not need_y:
        return None, w, b, None, None
    wanted = (need_x, *_parameters(norm, need_scale, need_bias))
    x, *parameters = normalization.rule.backward(kept, pulled, wanted, **static)
    return (x, w, b, *parameters, *(None for _ in range(2 - len(parameters))))


def _equations(op: OperatorSymbols) -> Equations:
    x, w, b, scale, bias = op.args
    norm, eps = op.static["norm"], op.static["eps"]
    normalization, static = _normalization(norm, eps)
    parameters = _parameters(norm, scale, bias)
    given = [a for a in parameters if a is not None]

    def value(x: Any, *values: Any) -> Any:
        remaining = iter(values)
        return normalization.function(
            x, *(None if a is None else next(remaining) for a in parameters), **static
        )

    y = apply("norm", value, x, *given)
    product = dense.rule.equations(op._replace(args=(y, w, b)))
    y_cotangent, w_cotangent, b_cotangent = product.backward
    inner = normalization.rule.equations(
        op._replace(args=(x, *parameters), cotangent=y_cotangent, static=static)
    )
    x_cotangent, *others = inner.backward
    found = (*others, *(None for _ in range(2 - len(others))))
    return Equations(product.forward, (x_cotangent, w_cotangent, b_cotangent, *found))


@layer(rule=Rule(_forward, _backward, _equations, pure=True), init=init_norm_dense)
def norm_dense(
    x: Float[Array, "*batch inputs"],
    w: Float[Array, "inputs outputs"],
    b: Float[Array, " outputs"] | None = None,
    scale: Float[Array, " inputs"] | None = None,
    bias: Float[Array, " inputs"] | None = None,
    *,
    norm: Norm = "layer",
    eps: float = 1e-6,
    save: Save = "input",
) -> Float[Array, "*batch outputs"]:
    """The affine map of normalised rows, `norm(x) w + b`, keeping `x` alone.

    Backward, with `y = norm(x)` computed again: `ȳ = z̄ wᵀ`, `w̄ = Σ yᵀ z̄`, `b̄ = Σ z̄`, and `x̄`, `γ̄`, `β̄` from
    `ȳ` as in `layer_norm` or `rms_norm`.

    Args:
        x: rows.
        w: weights.
        b: bias of the affine map; none is 0.
        scale: `γ`; none is 1.
        bias: `β` of a layer norm; none is 0.
        norm: `"layer"` or `"rms"`.
        eps: `ε`.
        save: `"input"` keeps `x` and the statistics, `"all"` also the normalised rows.

    Raises:
        ValueError: `norm` or `save` is wrong, or `norm="rms"` is given a `bias`.

    Reference: Ba et al., "Layer normalization", 2016; Chen et al., "Training deep nets with sublinear memory
    cost", 2016.

    Example:
        >>> import jax.numpy as jnp, funcprop as fp
        >>> print(fp.layers.norm_dense(jnp.array([1.0, 3.0]), jnp.array([[1.0], [2.0]])).round(3))
        [1.]
    """
    if save not in ("input", "all"):
        raise ValueError(f"norm_dense: save={save!r} is not a saving policy; use 'input' or 'all'.")
    if norm not in ("layer", "rms"):
        raise ValueError(f"norm_dense: norm={norm!r} is not a normalisation; use 'layer' or 'rms'.")
    if norm == "rms" and bias is not None:
        raise ValueError("norm_dense: norm='rms' has no bias; leave it out or use norm='layer'.")
    return _forward(jnp.asarray(x), jnp.asarray(w), b, scale, bias, norm=norm, eps=eps, save=save)[0]
