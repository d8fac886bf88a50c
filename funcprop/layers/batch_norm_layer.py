"""Batch normalisation, whose statistics are results (in training) or given (for predictions).

    x̂ = (x − μ) / √(var + ε),    y = γ ⊙ x̂ + β,    one μ and var for each channel, over all other axes

In training the statistics depend on `x`, and are returned because a running average of them is kept for
later. Their cotangents reach `x` too:

    x̄ = (ĝ − mean(ĝ) − x̂ ⊙ mean(ĝ ⊙ x̂)) / σ + (μ̄ + 2 (x − μ) v̄ar) / n        ĝ = ȳ ⊙ γ,  n examples

With given statistics the layer is affine in `x`:

    x̄ = ĝ / σ        μ̄ = −Σ ĝ / σ        v̄ar = −½ Σ ĝ ⊙ x̂ / σ²

Reference: Ioffe and Szegedy, "Batch normalization", ICML 2015 (the equations before section 3.1).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from funcprop.layers import normalization
from funcprop.layers.normalization import Normalized, Save, init_norm
from funcprop.program.dtypes import times
from funcprop.rules.layer import layer
from funcprop.rules.rule import Rule


class BatchStatistics(NamedTuple):
    """Mean and (biased) variance of every channel."""

    mean: Any
    var: Any


class BatchNormalized(NamedTuple):
    """The normalisation's residuals, with parameters laid along the channels' axis, and given statistics."""

    normalized: Normalized
    given: BatchStatistics | None


def _geometry(x: Any, axis: int, save: str) -> tuple[tuple[int, ...], Any]:
    """The axes of the statistics, and what lays a parameter along the channels' axis."""
    (channels,) = normalization.checked("batch_norm", x, save, (axis,))
    axes = tuple(i for i in range(len(x.shape)) if i != channels)
    shape = [x.shape[channels] if i == channels else 1 for i in range(len(x.shape))]
    return axes, lambda a: None if a is None else jnp.reshape(a, shape)


def _forward(
    x: Any,
    scale: Any,
    bias: Any,
    statistics: BatchStatistics | None,
    *,
    axis: int,
    eps: float,
    use_fast_variance: bool,
    save: Save,
) -> tuple[tuple[Any, BatchStatistics], BatchNormalized]:
    axes, along = _geometry(x, axis, save)
    if statistics is None:
        mean, var = normalization.statistics(x, axes, use_fast_variance)
        returned = BatchStatistics(mean.reshape(-1), var.reshape(-1))
    else:
        mean, var = along(statistics.mean), along(statistics.var)
        returned = statistics
    rstd = lax.rsqrt(var + eps)
    y, residuals = normalization.normalize(x, along(scale), along(bias), mean, rstd, save)
    return (y, returned), BatchNormalized(residuals, statistics)


def _backward(
    residuals: BatchNormalized, cotangents: Any, needs: Any, *, axis: int, save: Save, **_: Any
) -> tuple[Any, ...]:
    g, statistics_cotangents = cotangents
    axes, along = _geometry(g, axis, save)
    kept, given = residuals
    flat = lambda c: None if c is None else c.reshape(-1)  # noqa: E731
    if given is None:
        reached = jax.tree.map(along, statistics_cotangents)
        x, scale, bias = normalization.pull_back(kept, g, needs[:3], axes, save, tuple(reached))
        return x, flat(scale), flat(bias), None
    need_x, need_scale, need_bias, (need_mean, need_var) = needs
    _, scale, bias = normalization.pull_back(kept, g, (False, need_scale, need_bias), axes, save)
    pulled = times(g if kept.scale is None else times(g, kept.scale), kept.rstd)
    mean = var = None
    if need_mean:
        mean = statistics_cotangents.mean - pulled.sum(axes).astype(given.mean.dtype)
    if need_var:
        normalized = normalization.standard_part(kept, save)
        of_var = times(times(pulled, normalized), kept.rstd).sum(axes) / 2
        var = statistics_cotangents.var - of_var.astype(given.var.dtype)
    x_cotangent = pulled.astype(kept.x.dtype) if need_x else None
    return x_cotangent, flat(scale), flat(bias), BatchStatistics(mean, var)


@layer(rule=Rule(_forward, _backward, pure=True), init=init_norm)
def batch_norm(
    x: Float[Array, "*shape"],
    scale: Float[Array, " channels"] | None = None,
    bias: Float[Array, " channels"] | None = None,
    statistics: BatchStatistics | None = None,
    *,
    axis: int = -1,
    eps: float = 1e-6,
    use_fast_variance: bool = True,
    save: Save = "input",
) -> tuple[Float[Array, "*shape"], BatchStatistics]:
    """Batch normalisation; returns `y` and the statistics that it was normalised by.

    Without `statistics` they are computed over all axes but the channels' (training): keep a running average,
    `running = m · running + (1 − m) · statistics`, which is to be given for predictions. The rule is in the
    module; it keeps `μ`, `1/σ`, `γ` and, as `save` says, `x` ("input") or `x̂` ("output").

    Args:
        x: examples with channels.
        scale: `γ`; none is 1.
        bias: `β`; none is 0.
        statistics: `BatchStatistics(mean, var)`, to be used in place of the batch's own.
        axis: the channels.
        eps: `ε`.
        use_fast_variance: as in `layer_norm`.
        save: as in `layer_norm`.

    Raises:
        ValueError: `save` or `axis` is wrong.

    Reference: Ioffe and Szegedy, "Batch normalization", ICML 2015.

    Example:
        >>> import jax.numpy as jnp, funcprop as fp
        >>> y, statistics = fp.layers.batch_norm(jnp.array([[1.0], [5.0]]))
        >>> print(y.ravel(), statistics.mean, statistics.var)
        [-0.9999999  0.9999999] [3.] [4.]
    """
    if statistics is not None:
        statistics = BatchStatistics(*statistics)
    options: dict[str, Any] = {"axis": axis, "eps": eps, "use_fast_variance": use_fast_variance, "save": save}
    return _forward(jnp.asarray(x), scale, bias, statistics, **options)[0]
