"""Group normalisation: the statistics of `layer_norm` on channels that are split in two axes.

    x̂ = (x − μ) / σ,    y = γ ⊙ x̂ + β,    one μ and σ for each example and group of channels

The rule is that of the family, see `funcprop.layers.normalization`.

Reference: Wu and He, "Group normalization", 2018.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from funcprop.layers.normalization import (
    Normalized,
    Save,
    checked,
    init_norm,
    normalization_equations,
    normalized_forward,
    pull_back,
)
from funcprop.rules.equations import Equations, OperatorSymbols, apply
from funcprop.rules.layer import layer
from funcprop.rules.rule import Rule


def _split(a: Any, groups: int) -> Any:
    """The channels as two axes: the group, and the channel within it."""
    return None if a is None else a.reshape(*a.shape[:-1], groups, a.shape[-1] // groups)


def _group_axes(x: Any, groups: int, axes: Sequence[int] | None, save: str) -> tuple[int, ...]:
    """The axes of the statistics once the channels are split."""
    if groups < 1 or x.shape[-1] % groups:
        raise ValueError(
            f"group_norm: groups={groups} does not divide the {x.shape[-1]} channels of x (its last axis)."
        )
    last = len(x.shape) - 1
    spatial = checked("group_norm", x, save, range(1, last) if axes is None else axes)
    if last in spatial:
        raise ValueError(f"group_norm: axes={axes} has the channels in it; they are always normalised.")
    return (*spatial, last + 1)


def _group_norm_forward(
    x: Any, scale: Any, bias: Any, *, groups: int, axes: Any, eps: float, use_fast_variance: bool, save: Save
) -> tuple[Any, Normalized]:
    over = _group_axes(x, groups, axes, save)
    x_split, scale, bias = (_split(a, groups) for a in (x, scale, bias))
    y, residuals = normalized_forward(x_split, scale, bias, over, eps, use_fast_variance, save)
    return y.reshape(x.shape), residuals


def _group_norm_backward(
    residuals: Normalized, g: Any, needs: Any, *, groups: int, axes: Any, save: Save, **_: Any
) -> tuple[Any, ...]:
    over = _group_axes(g, groups, axes, save)
    cotangents = pull_back(residuals, _split(g, groups), needs, over, save)
    return tuple(c if c is None else c.reshape(*c.shape[:-2], g.shape[-1]) for c in cotangents)


def _group_norm_equations(op: OperatorSymbols) -> Equations:
    static = op.static
    over = _group_axes(op.args[0].type, static["groups"], static["axes"], static["save"])

    def split(a: Any) -> Any:
        return None if a is None else apply("split", partial(_split, groups=static["groups"]), a)

    def merge(a: Any) -> Any:
        return None if a is None else apply("merge", lambda v: v.reshape(*v.shape[:-2], -1), a)

    split_op = op._replace(args=tuple(map(split, op.args)), cotangent=split(op.cotangent))
    written = normalization_equations(split_op, over, static["eps"], static["use_fast_variance"])
    return Equations(merge(written.forward), tuple(map(merge, written.backward)))


@layer(rule=Rule(_group_norm_forward, _group_norm_backward, _group_norm_equations, pure=True), init=init_norm)
def group_norm(
    x: Float[Array, "*shape channels"],
    scale: Float[Array, " channels"] | None = None,
    bias: Float[Array, " channels"] | None = None,
    *,
    groups: int = 32,
    axes: tuple[int, ...] | None = None,
    eps: float = 1e-6,
    use_fast_variance: bool = True,
    save: Save = "input",
) -> Float[Array, "*shape channels"]:
    """Group normalisation: one mean and variance for each example and group of channels (the last axis).

    `axes` are normalised together with the group's channels, by default all but the first (the batch) and the
    channels'; for one example without a batch axis pass all its spatial axes. `groups=channels` is instance
    normalisation. The rule is `layer_norm`'s on the channels split in two axes; arguments as there.

    Raises:
        ValueError: `groups` does not divide the channels; `save` or `axes` is wrong.

    Reference: Wu and He, "Group normalization", 2018.

    Example:
        >>> import jax.numpy as jnp, funcprop as fp
        >>> print(fp.layers.group_norm(jnp.array([[1.0, 3.0, 5.0, 5.0]]), groups=2).round(3))
        [[-1.  1.  0.  0.]]
    """
    return _group_norm_forward(
        jnp.asarray(x),
        scale,
        bias,
        groups=groups,
        axes=axes,
        eps=eps,
        use_fast_variance=use_fast_variance,
        save=save,
    )[0]
