"""Layers into models. A model is a pair of pure functions; parameters are a pytree that you own.

init(key)        -> params
apply(params, x) -> y
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Inexact, PRNGKeyArray

from funcprop import layers


class Model(NamedTuple):
    """`init(key) -> params` and `apply(params, x) -> y`, both pure."""

    init: Callable[[PRNGKeyArray], Any]
    apply: Callable[[Any, Any], Any]


def dense(inputs: int, outputs: int, *, bias: bool = True, dtype: Any = None) -> Model:
    """`x ↦ x w + b`, with He-normal weights; parameters `{"w": inputs × outputs, "b": outputs}`.

    Example:
        >>> import jax, jax.numpy as jnp, funcprop as fp
        >>> model = fp.models.dense(3, 2)
        >>> model.apply(model.init(jax.random.key(0)), jnp.ones((5, 3))).shape
        (5, 2)
    """

    def apply(params: Any, x: Inexact[Array, "*batch inputs"]) -> Inexact[Array, "*batch outputs"]:
        return layers.dense(x, params["w"], params.get("b"))

    return Model(lambda key: layers.dense.init(key, inputs, outputs, bias=bias, dtype=dtype), apply)


def elementwise(function: Callable[[Any], Any]) -> Model:
    """A function without parameters, such as an activation; its parameters are `None`.

    Example:
        >>> import jax.numpy as jnp, funcprop as fp
        >>> print(fp.models.elementwise(jnp.square).apply(None, jnp.array([1.0, 3.0])))
        [1. 9.]
    """
    return Model(lambda key: None, lambda params, x: function(x))


def sequential(*models: Model) -> Model:
    """One model after the other, `x ↦ fₙ(… f₁(x))`; parameters are the tuple of theirs.

    Example:
        >>> import jax, jax.numpy as jnp, funcprop as fp
        >>> net = fp.models.sequential(fp.models.dense(3, 4), fp.models.elementwise(fp.layers.tanh))
        >>> net.apply(net.init(jax.random.key(0)), jnp.ones(3)).shape
        (4,)
    """

    def init(key: PRNGKeyArray) -> tuple[Any, ...]:
        keys = jax.random.split(key, len(models))
        return tuple(model.init(k) for model, k in zip(models, keys, strict=True))

    def apply(params: Sequence[Any], x: Any) -> Any:
        for model, p in zip(models, params, strict=True):
            x = model.apply(p, x)
        return x

    return Model(init, apply)


def residual(model: Model) -> Model:
    """A skip connection, `x ↦ x + f(x)`; parameters are those of `f`.

    Reference: He et al., "Deep residual learning for image recognition", CVPR 2016.

    Raises:
        ValueError: `f(x)` does not have the shape of `x`.

    Example:
        >>> import jax.numpy as jnp, funcprop as fp
        >>> double = fp.models.residual(fp.models.elementwise(lambda x: x))
        >>> print(double.apply(None, jnp.array([1.0, 3.0])))
        [2. 6.]
    """

    def apply(params: Any, x: Any) -> Any:
        y = model.apply(params, x)
        if y.shape != x.shape:
            raise ValueError(
                f"residual: the model maps shape {x.shape} to {y.shape}; a skip connection needs equal "
                "shapes. Project with `fp.models.dense` outside of it."
            )
        return x + y

    return Model(model.init, apply)


def mlp(sizes: Sequence[int], activation: Callable[[Any], Any] = layers.relu, *, bias: bool = True) -> Model:
    """A multilayer perceptron: dense layers with an activation between them.

    Args:
        sizes: widths of input, hidden layers and output; at least two.
        activation: applied after every dense layer but the last.
        bias: whether the dense layers have one.

    Raises:
        ValueError: fewer than two sizes.

    Example:
        >>> import jax, jax.numpy as jnp, funcprop as fp
        >>> net = fp.models.mlp([64, 32, 10])
        >>> net.apply(net.init(jax.random.key(0)), jnp.ones((8, 64))).shape
        (8, 10)
    """
    if len(sizes) < 2:
        raise ValueError(f"mlp: sizes={list(sizes)!r}; give at least the input's and the output's width.")
    parts: list[Model] = []
    for inputs, outputs in itertools.pairwise(sizes):
        parts += [dense(inputs, outputs, bias=bias), elementwise(activation)]
    return sequential(*parts[:-1])
