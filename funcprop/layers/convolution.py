"""Convolution with bias, over any number of spatial axes.

    y[i, o] = Σ_{k, c} x[i·s + k·d − p, c] w[k, c, o] + b[o]

    w̄[k, c, o] = Σ_i x[i·s + k·d − p, c] ȳ[i, o],    x̄ = the transposed convolution of ȳ with w,    b̄ = Σ ȳ

The layer is `lax.conv_general_dilated` and a sum; how each of the three products is computed is the business
of the primitive's rule (`funcprop.rules.primitives.convolution`).

Reference: LeCun et al., "Gradient-based learning applied to document recognition", 1998.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray

from funcprop.layers.composed import composed_rule
from funcprop.program.dtypes import common_dtype, plus
from funcprop.rules.equations import Equations, OperatorSymbols, apply
from funcprop.rules.layer import layer
from funcprop.rules.primitives.windows import Padding, each, paddings


def init_conv(
    key: PRNGKeyArray,
    kernel: Sequence[int],
    inputs: int,
    outputs: int,
    *,
    groups: int = 1,
    bias: bool = True,
    channels_last: bool = True,
    dtype: Any = None,
) -> dict[str, Any]:
    """He-normal `w` of `kernel × inputs/groups × outputs` and, with `bias`, zeros.

    Reference: He et al., "Delving deep into rectifiers", ICCV 2015.

    Example:
        >>> import jax, funcprop as fp
        >>> fp.layers.conv.init(jax.random.key(0), (3, 3), 8, 16)["w"].shape
        (3, 3, 8, 16)
    """
    shape = (*kernel, inputs // groups, outputs)
    w = jax.nn.initializers.he_normal()(key, shape, dtype or float)
    params = {"w": w if channels_last else jnp.moveaxis(w, (-1, -2), (0, 1))}
    return {**params, "b": jnp.zeros(outputs, dtype or float)} if bias else params


def _convolve(
    x: Any,
    w: Any,
    *,
    strides: int | tuple[int, ...],
    padding: Padding,
    dilation: int | tuple[int, ...],
    groups: int,
    channels_last: bool,
) -> Any:
    rank = w.ndim - 2
    lead = x.shape[: x.ndim - rank - 1]
    spatial = "".join(chr(ord("0") + i) for i in range(rank))
    layout = (
        (f"N{spatial}C", f"{spatial}IO", f"N{spatial}C")
        if channels_last
        else (f"NC{spatial}", f"OI{spatial}", f"NC{spatial}")
    )
    dtype = common_dtype(x, w)
    y = lax.conv_general_dilated(
        x.reshape(math.prod(lead), *x.shape[len(lead) :]).astype(dtype),
        w.astype(dtype),
        each(strides, rank),
        paddings(padding, rank),
        rhs_dilation=each(dilation, rank),
        dimension_numbers=layout,
        feature_group_count=groups,
    )
    return y.reshape(*lead, *y.shape[1:])


def _conv(x: Any, w: Any, b: Any = None, **static: Any) -> Any:
    y = _convolve(x, w, **static)
    if b is None:
        return y
    return plus(y, b if static["channels_last"] else b.reshape(-1, *(1,) * (w.ndim - 2)))


def _equations(op: OperatorSymbols) -> Equations:
    x, w, b = op.args
    g = op.cotangent
    convolve: Any = partial(_convolve, **op.static)
    forward = apply("conv", convolve, x, w)

    def transposed(g: Any, w: Any) -> Any:
        return jax.linear_transpose(lambda x: convolve(x, w), x.type)(g)[0]

    def correlated(x: Any, g: Any) -> Any:
        return jax.linear_transpose(lambda w: convolve(x, w), w.type)(g)[0]

    cotangents = apply("convᵀ", transposed, g, w), apply("corr", correlated, x, g)
    if b is None:
        return Equations(forward, (*cotangents, None))
    rank, channels_last = len(w.shape) - 2, op.static["channels_last"]
    channels = len(g.shape) - 1 if channels_last else len(g.shape) - 1 - rank
    over = tuple(i for i in range(len(g.shape)) if i != channels)
    shifted = forward + (b if channels_last else apply("column", lambda v: v.reshape(-1, *(1,) * rank), b))
    return Equations(shifted, (*cotangents, g.sum(over)))


@layer(rule=composed_rule(_conv, _equations), init=init_conv)
def conv(
    x: Float[Array, "..."],
    w: Float[Array, "..."],
    b: Float[Array, " outputs"] | None = None,
    *,
    strides: int | tuple[int, ...] = 1,
    padding: Padding = "SAME",
    dilation: int | tuple[int, ...] = 1,
    groups: int = 1,
    channels_last: bool = True,
) -> Float[Array, "..."]:
    """Convolution (as everywhere in deep learning, without flipping the kernel) and an optional bias.

    Args:
        x: `*batch × *spatial × inputs`; `*batch × inputs × *spatial` with `channels_last=False`.
        w: `*kernel × inputs/groups × outputs`, or `outputs × inputs/groups × *kernel`. Its rank says how many
            spatial axes there are.
        b: one number for each output channel; none is 0.
        strides: of the output over the input, for each axis or for all.
        padding: `"SAME"`, `"VALID"`, one number, or for each axis a number or a pair.
        dilation: between the taps of the kernel, for each axis or for all.
        groups: into which the channels are divided.
        channels_last: which layout.

    Raises:
        ValueError: the ranks or channels of `x` and `w` do not fit.

    Reference: LeCun et al., "Gradient-based learning applied to document recognition", 1998.

    Example:
        >>> import jax.numpy as jnp, funcprop as fp
        >>> x, w = jnp.arange(4.0).reshape(4, 1), jnp.ones((2, 1, 1))
        >>> print(fp.layers.conv(x, w, padding="VALID").ravel())
        [1. 3. 5.]
    """
    x, w = jnp.asarray(x), jnp.asarray(w)
    rank = w.ndim - 2
    if rank < 1 or x.ndim <= rank:
        raise ValueError(
            f"conv: w has shape {w.shape}, a kernel of {rank} spatial axes, but x has shape {x.shape}; w "
            "needs two axes of channels, and x one."
        )
    inputs = x.shape[-1 if channels_last else -1 - rank]
    expected = w.shape[-2 if channels_last else 1] * groups
    if inputs != expected:
        raise ValueError(
            f"conv: x has {inputs} channels, but w of shape {w.shape} with groups={groups} needs {expected}."
        )
    return _conv(
        x, w, b,
        strides=strides, padding=padding, dilation=dilation, groups=groups, channels_last=channels_last,
    )  # fmt: skip
