"""Normalisations: centre, divide by the standard deviation, then scale and shift.

    x̂ = (x − μ) / σ,    y = γ ⊙ x̂ + β,    σ = √(var + ε)

`μ` and `var` are means over some axes, which ones is all that distinguishes the members of the family:

| layer        | statistics over                  | one for each        | centred |
|--------------|----------------------------------|---------------------|---------|
| `layer_norm` | `axes`, by default the last      | row                 | yes     |
| `rms_norm`   | `axes`, by default the last      | row                 | no      |
| `group_norm` | `axes` and the group's channels  | example and group   | yes     |

`group_norm` has its own module. Backward, with `ĝ = ȳ ⊙ γ`:

    x̄ = (ĝ − mean(ĝ) − x̂ ⊙ mean(ĝ ⊙ x̂)) / σ        γ̄ = Σ ȳ ⊙ x̂        β̄ = Σ ȳ

and without `mean(ĝ)` where nothing is centred. What is kept besides the (small) statistics is a choice:

| `save`     | keeps | when                                                                              |
|------------|-------|-----------------------------------------------------------------------------------|
| `"input"`  | `x`   | default: in `x`'s own precision, and free where `x` is kept anyway                |
| `"output"` | `x̂`   | in the precision of the statistics; one subtraction and product less afterwards   |

Statistics are computed in float32 at least, as in Flax, whose numbers these are.

References: Ioffe and Szegedy, "Batch normalization", 2015; Ba et al., "Layer normalization", 2016; Wu and He,
"Group normalization", 2018; Zhang and Sennrich, "Root mean square layer normalization", 2019.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, TypeAlias

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from funcprop.program.dtypes import common_dtype, plus, single_at_least, times, together
from funcprop.rules.equations import Equations, OperatorSymbols, apply
from funcprop.rules.expressions import Expression
from funcprop.rules.layer import layer
from funcprop.rules.rule import Rule

Save: TypeAlias = Literal["input", "output"]


class Normalized(NamedTuple):
    """`x` or `x̂`, the statistics (no `μ` where nothing is centred), `γ`, and of `β` only its type."""

    value: Any
    mean: Any
    rstd: Any
    scale: Any
    bias: Any
    x: Any


def init_norm(features: int | Sequence[int], *, bias: bool = True, dtype: Any = None) -> dict[str, Any]:
    """Ones as `scale` and, with `bias`, zeros: the normalised values as they are.

    Example:
        >>> import funcprop as fp
        >>> sorted(fp.layers.layer_norm.init(4))
        ['bias', 'scale']
    """
    params = {"scale": jnp.ones(features, dtype or float)}
    return {**params, "bias": jnp.zeros(features, dtype or float)} if bias else params


# --- the common part --------------------------------------------------------------------------


def _wide(x: Any) -> Any:
    return x.astype(single_at_least(x))


def statistics(x: Any, axes: Sequence[int], fast: bool) -> tuple[Any, Any]:
    """Mean and variance over `axes`, which stay with size 1."""
    x = _wide(x)
    mean = x.mean(axes, keepdims=True)
    if fast:
        # One pass over x; rounding may leave less than nothing.
        return mean, jnp.maximum(0, (x * x).mean(axes, keepdims=True) - mean * mean)
    return mean, jnp.square(x - mean).mean(axes, keepdims=True)


def _moments(x: Any, axes: Sequence[int], eps: float, fast: bool | None) -> tuple[Any, Any]:
    """`μ` and `1/σ`; with `fast=None` nothing is centred: no `μ`, and σ is the root mean square."""
    if fast is None:
        return None, lax.rsqrt(jnp.square(_wide(x)).mean(axes, keepdims=True) + eps)
    mean, var = statistics(x, axes, fast)
    return mean, lax.rsqrt(var + eps)


def _standardized(x: Any, mean: Any, rstd: Any) -> Any:
    if mean is None:
        return times(_wide(x), rstd)
    x, mean, rstd = together(_wide(x), mean, rstd)
    return (x - mean) * rstd


def _scaled(normalized: Any, x: Any, scale: Any, bias: Any) -> Any:
    y = normalized
    y = y if scale is None else times(y, scale)
    y = y if bias is None else plus(y, bias)
    return y.astype(common_dtype(x, scale, bias))


def sum_to(g: Any, parameter: Any) -> Any:
    """The sum over all axes along which a parameter was broadcast."""
    shape = (1,) * (g.ndim - parameter.ndim) + parameter.shape
    stretched = tuple(i for i, n in enumerate(shape) if n != g.shape[i])
    leading = tuple(range(g.ndim - parameter.ndim))
    return g.sum((*{*stretched, *leading},)).reshape(parameter.shape).astype(parameter.dtype)


def standard_part(residuals: Normalized, save: Save) -> Any:
    """`x̂`, as kept or computed again."""
    if save == "output":
        return residuals.value
    return _standardized(residuals.value, residuals.mean, residuals.rstd)


def value_again(residuals: Normalized, save: Save) -> Any:
    """The layer's result from what it saved; for a layer that reads it backwards (`norm_dense`)."""
    return _scaled(standard_part(residuals, save), residuals.x, residuals.scale, residuals.bias)


def normalized_forward(
    x: Any, scale: Any, bias: Any, axes: Sequence[int], eps: float, fast: bool | None, save: Save
) -> tuple[Any, Normalized]:
    """The value, and what its pullback reads."""
    return normalize(x, scale, bias, *_moments(x, axes, eps, fast), save)


def normalize(x: Any, scale: Any, bias: Any, mean: Any, rstd: Any, save: Save) -> tuple[Any, Normalized]:
    """The value from given statistics, and what its pullback reads."""
    normalized = _standardized(x, mean, rstd)
    kept = normalized if save == "output" else x
    return _scaled(normalized, x, scale, bias), Normalized(kept, mean, rstd, scale, bias, x)


def pull_back(
    residuals: Normalized,
    g: Any,
    needs: Any,
    axes: Sequence[int],
    save: Save,
    statistics_cotangents: tuple[Any, Any] | None = None,
) -> tuple[Any, Any, Any]:
    """`x̄`, `γ̄` and `β̄`, where needed; `statistics_cotangents` are those of the mean and variance."""
    need_x, need_scale, need_bias = needs
    normalized, g, rstd = standard_part(residuals, save), _wide(g), residuals.rstd
    x_cotangent = None
    if need_x:
        pulled = g if residuals.scale is None else times(g, residuals.scale)
        slope = (pulled * normalized).mean(axes, keepdims=True)
        shift = None if residuals.mean is None else pulled.mean(axes, keepdims=True)
        if statistics_cotangents is not None:
            # μ and var are results too: ∂μ/∂x = 1/n and ∂var/∂x = 2 (x − μ) / n.
            of_mean, of_var = statistics_cotangents
            n = math.prod(g.shape[axis] for axis in axes)
            slope = slope - 2 * of_var / (n * jnp.square(rstd))
            shift = shift - of_mean / (n * rstd)
        rest = pulled - normalized * slope if shift is None else pulled - shift - normalized * slope
        x_cotangent = (rest * rstd).astype(residuals.x.dtype)
    return (
        x_cotangent,
        sum_to(g * normalized, residuals.scale) if need_scale else None,
        sum_to(g, residuals.bias) if need_bias else None,
    )


def normalization_equations(
    op: OperatorSymbols, axes: Sequence[int], eps: float, fast: bool | None
) -> Equations:
    """Both sweeps; `fast` as in `statistics`, None where nothing is centred."""
    x, scale, bias = op.args[:3]
    g = op.cotangent
    deviation = apply("σ", lambda v: 1 / _moments(v, axes, eps, fast)[1], x)
    normalized = apply("normalize", lambda v: _standardized(v, *_moments(v, axes, eps, fast)), x)
    mean = partial(apply, "mean", lambda v: jnp.mean(v, axes, keepdims=True))
    pulled = g if scale is None else g * scale
    centred = pulled if fast is None else pulled - mean(pulled)
    forward = normalized if scale is None else normalized * scale

    def summed(g: Expression, parameter: Expression | None) -> Expression | None:
        if parameter is None:
            return None
        leading = len(g.shape) - len(parameter.shape)
        if g.shape[leading:] == parameter.shape:
            return g.sum(tuple(range(leading)))
        return apply("sum", lambda v: sum_to(v, jnp.zeros(parameter.shape, v.dtype)), g)

    return Equations(
        forward if bias is None else forward + bias,
        (
            (centred - normalized * mean(pulled * normalized)) / deviation,
            summed(g * normalized, scale),
            summed(g, bias),
        ),
    )


def checked(name: str, x: Any, save: str, axes: Sequence[int]) -> tuple[int, ...]:
    """The axes counted from the front.

    Raises:
        ValueError: `save` is no policy, or an axis is not one of `x`'s or is named twice.
    """
    if save not in ("input", "output"):
        raise ValueError(f"{name}: save={save!r} is not a saving policy; use 'input' or 'output'.")
    ndim = jnp.ndim(x)
    counted = tuple(sorted(axis % ndim if -ndim <= axis < ndim else ndim for axis in axes))
    if ndim in counted or len(set(counted)) < len(counted):
        raise ValueError(f"{name}: axes={tuple(axes)} are not different axes of x, which has {ndim}.")
    return counted


# --- layer norm -------------------------------------------------------------------------------


def _layer_norm_forward(
    x: Any, scale: Any, bias: Any, *, axes: Any, eps: float, use_fast_variance: bool, save: Save
) -> tuple[Any, Normalized]:
    return normalized_forward(
        x, scale, bias, checked("layer_norm", x, save, axes), eps, use_fast_variance, save
    )


def _layer_norm_backward(
    residuals: Normalized, g: Any, needs: Any, *, axes: Any, save: Save, **_: Any
) -> tuple[Any, Any, Any]:
    return pull_back(residuals, g, needs, checked("layer_norm", g, save, axes), save)


def _layer_norm_equations(op: OperatorSymbols) -> Equations:
    axes = checked("layer_norm", op.args[0].type, op.static["save"], op.static["axes"])
    return normalization_equations(op, axes, op.static["eps"], op.static["use_fast_variance"])


@layer(rule=Rule(_layer_norm_forward, _layer_norm_backward, _layer_norm_equations, pure=True), init=init_norm)
def layer_norm(
    x: Float[Array, "*shape"],
    scale: Float[Array, "..."] | None = None,
    bias: Float[Array, "..."] | None = None,
    *,
    axes: tuple[int, ...] = (-1,),
    eps: float = 1e-6,
    use_fast_variance: bool = True,
    save: Save = "input",
) -> Float[Array, "*shape"]:
    """Layer normalisation, `y = γ ⊙ (x − μ) / √(var + ε) + β`, with the mean and variance over `axes`.

    `x̄ = (ĝ − mean(ĝ) − x̂ ⊙ mean(ĝ ⊙ x̂)) / σ` with `ĝ = ȳ ⊙ γ`; `γ̄ = Σ ȳ ⊙ x̂`; `β̄ = Σ ȳ`. Keeps `μ`, `1/σ`,
    `γ` and, as `save` says, `x` ("input") or `x̂` ("output").

    Args:
        x: any shape.
        scale: `γ`, broadcast against `x`; none is 1.
        bias: `β`, broadcast against `x`; none is 0.
        axes: which axes of `x` the statistics are taken over.
        eps: `ε`.
        use_fast_variance: the variance as `mean(x²) − mean(x)²`, in one pass, as Flax has it; False is exact
            also where the mean is much larger than the deviation.
        save: see the module.

    Raises:
        ValueError: `save` or `axes` is wrong.

    Reference: Ba et al., "Layer normalization", 2016.

    Example:
        >>> import jax.numpy as jnp, funcprop as fp
        >>> print(fp.layers.layer_norm(jnp.array([1.0, 3.0])).round(3))
        [-1.  1.]
    """
    axes = checked("layer_norm", x, save, axes)
    return normalized_forward(jnp.asarray(x), scale, bias, axes, eps, use_fast_variance, save)[0]


# --- RMS norm ---------------------------------------------------------------------------------


def _rms_norm_forward(x: Any, scale: Any, *, axes: Any, eps: float, save: Save) -> tuple[Any, Normalized]:
    return normalized_forward(x, scale, None, checked("rms_norm", x, save, axes), eps, None, save)


def _rms_norm_backward(
    residuals: Normalized, g: Any, needs: Any, *, axes: Any, eps: float, save: Save
) -> tuple[Any, Any]:
    return pull_back(residuals, g, (*needs, None), checked("rms_norm", g, save, axes), save)[:2]


def _rms_norm_equations(op: OperatorSymbols) -> Equations:
    axes = checked("rms_norm", op.args[0].type, op.static["save"], op.static["axes"])
    written = normalization_equations(op._replace(args=(*op.args, None)), axes, op.static["eps"], None)
    return written._replace(backward=written.backward[:2])


@layer(
    rule=Rule(_rms_norm_forward, _rms_norm_backward, _rms_norm_equations, pure=True),
    init=partial(init_norm, bias=False),
)
def rms_norm(
    x: Float[Array, "*shape"],
    scale: Float[Array, "..."] | None = None,
    *,
    axes: tuple[int, ...] = (-1,),
    eps: float = 1e-6,
    save: Save = "input",
) -> Float[Array, "*shape"]:
    """Root-mean-square normalisation, `y = γ ⊙ x / √(mean(x²) + ε)`: layer norm that centres nothing.

    `x̄ = (ĝ − x̂ ⊙ mean(ĝ ⊙ x̂)) / σ` with `ĝ = ȳ ⊙ γ`; `γ̄ = Σ ȳ ⊙ x̂`. Arguments as of `layer_norm`.

    Raises:
        ValueError: `save` or `axes` is wrong.

    Reference: Zhang and Sennrich, "Root mean square layer normalization", 2019.

    Example:
        >>> import jax.numpy as jnp, funcprop as fp
        >>> print(fp.layers.rms_norm(jnp.array([3.0, -3.0])).round(3))
        [ 1. -1.]
    """
    axes = checked("rms_norm", x, save, axes)
    return normalized_forward(jnp.asarray(x), scale, None, axes, eps, None, save)[0]
