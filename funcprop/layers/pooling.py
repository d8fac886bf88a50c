"""Pooling: the maximum or the mean of every window.

    max:  y[i] = x[k(i)],        x̄[j] = Σ {ȳ[i] : k(i) = j}              k(i) the first maximum of window i
    mean: y[i] = Σ x[j] / n,     x̄[j] = Σ {ȳ[i] / n : j in window i}

The layers are `lax.reduce_window`; what is kept of a maximum, and how its cotangent finds its way back, is
the business of the primitive's rule (`funcprop.rules.primitives.pooling`).

Reference: Scherer et al., "Evaluation of pooling operations in convolutional architectures for object
recognition", 2010.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from funcprop.layers.composed import composed_rule
from funcprop.rules.equations import Equations, OperatorSymbols, apply
from funcprop.rules.layer import layer
from funcprop.rules.primitives.windows import Padding, pool_window


def _max(x: Any, **window: Any) -> Any:
    # Concrete, so that JAX knows the maximum with its neutral element and can differentiate it.
    lowest = np.array(-np.inf, x.dtype)
    return lax.reduce_window(x, lowest, lax.max, **pool_window(x.shape, **window))


def _sum(x: Any, window: dict[str, Any]) -> Any:
    return lax.reduce_window(x, np.zeros((), x.dtype), lax.add, **pool_window(x.shape, **window))


def _mean(x: Any, *, count_padding: bool, **window: Any) -> Any:
    if count_padding:
        return _sum(x, window) / math.prod(window["window"])
    return _sum(x, window) / _sum(jnp.ones_like(x), window)


def _equations(function: Callable[..., Any], name: str, op: OperatorSymbols) -> Equations:
    (x,) = op.args
    pool = partial(function, **op.static)

    def back(x: Any, g: Any) -> Any:
        return jax.vjp(pool, x)[1](g)[0]

    return Equations(apply(name, pool, x), (apply(f"un{name}", back, x, op.cotangent),))


@layer(rule=composed_rule(_max, partial(_equations, _max, "maxpool")))
def max_pool(
    x: Float[Array, "..."],
    *,
    window: tuple[int, ...],
    strides: int | tuple[int, ...] | None = None,
    padding: Padding = "VALID",
    channels_last: bool = True,
) -> Float[Array, "..."]:
    """The maximum of every window; the first one receives the cotangent.

    Args:
        x: `*batch × *spatial × channels`; `… × *spatial` with `channels_last=False`.
        window: its size along each spatial axis; how many there are says which axes they are.
        strides: of the windows, for each axis or for all; none is the window itself.
        padding: `"SAME"`, `"VALID"`, one number, or for each axis a number or a pair; of `−∞`.
        channels_last: which layout.

    Raises:
        ValueError: the window has more axes than `x`.

    Reference: Scherer et al., "Evaluation of pooling operations in convolutional architectures for object
    recognition", 2010.

    Example:
        >>> import jax.numpy as jnp, funcprop as fp
        >>> print(fp.layers.max_pool(jnp.array([[1.0], [3.0], [2.0], [0.0]]), window=(2,)).ravel())
        [3. 2.]
    """
    return _max(jnp.asarray(x), window=window, strides=strides, padding=padding, channels_last=channels_last)


@layer(rule=composed_rule(_mean, partial(_equations, _mean, "avgpool")))
def avg_pool(
    x: Float[Array, "..."],
    *,
    window: tuple[int, ...],
    strides: int | tuple[int, ...] | None = None,
    padding: Padding = "VALID",
    channels_last: bool = True,
    count_padding: bool = True,
) -> Float[Array, "..."]:
    """The mean of every window; arguments as of `max_pool`.

    With `count_padding=False` the mean is over the entries of `x` alone, not over the zeros of the padding.

    Raises:
        ValueError: the window has more axes than `x`.

    Reference: LeCun et al., "Gradient-based learning applied to document recognition", 1998 (subsampling).

    Example:
        >>> import jax.numpy as jnp, funcprop as fp
        >>> print(fp.layers.avg_pool(jnp.array([[1.0], [3.0], [2.0], [0.0]]), window=(2,)).ravel())
        [2. 1.]
    """
    return _mean(
        jnp.asarray(x),
        window=window,
        strides=strides,
        padding=padding,
        channels_last=channels_last,
        count_padding=count_padding,
    )
