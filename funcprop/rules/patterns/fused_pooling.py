"""Max-pooling of a relu.

    y[i] = max_k relu(x[i·s + k·d − p])
    x̄[j] = Σ {ȳ[i] : j is the position of the maximum of window i, and x[j] > 0}

What is saved is one byte for each output: the position, or that no cotangent passes.

Source: Griewank and Walther, *Evaluating Derivatives*, chapter 14, for derivatives where there is a kink;
that both share a byte is our own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from funcprop.program.facts import is_move
from funcprop.program.layer_calls import layer_call
from funcprop.rules.layer import Layer, layer
from funcprop.rules.patterns.activation import relu
from funcprop.rules.patterns.recognition import Pattern, Producer, Replacement, equal_to, layer_equation
from funcprop.rules.primitives import pooling
from funcprop.rules.primitives.windows import Padding, pool_window


@layer(rule=pooling.rule(relu=True))
def relu_max_pool(
    x: Float[Array, "..."],
    *,
    window: tuple[int, ...],
    strides: int | tuple[int, ...] | None = None,
    padding: Padding = "VALID",
    dilation: int | tuple[int, ...] = 1,
    channels_last: bool = True,
) -> Float[Array, "..."]:
    """Max-pooling of `relu(x)`; arguments as of `max_pool`, and `dilation` between the taps of a window.

    `y[i] = max_k relu(x[i·s + k·d − p])`. Between relu and pool nothing is saved: neither the input, nor its
    sign, nor the relu. Recognised in any function where `lax.reduce_window` with `lax.max` follows
    `jax.nn.relu` (Flax, Equinox and Haiku pool in this way).

    Raises:
        ValueError: the window has more axes than `x`.

    Example:
        >>> import jax.numpy as jnp, funcprop as fp
        >>> x = jnp.array([1.0, 3.0, -1.0, -2.0])
        >>> print(fp.layers.relu_max_pool(x[:, None], window=(2,)).ravel())
        [3. 0.]
    """
    x = jnp.asarray(x)
    geometry = pool_window(
        x.shape,
        window=window,
        strides=strides,
        padding=padding,
        dilation=dilation,
        channels_last=channels_last,
    )
    return lax.reduce_window(jax.nn.relu(x), -jnp.inf, lax.max, **geometry)


# The layer's arguments by the parameters of `lax.reduce_window`.
_PARAMETERS = {
    "window": "window_dimensions",
    "strides": "window_strides",
    "padding": "padding",
    "dilation": "window_dilation",
}


@dataclass(frozen=True)
class ReluBeforePool:
    """A max-pool of a relu, with nothing between but operators that move entries."""

    last: str = "reduce_window_max"
    operators: tuple[str, ...] = ("reduce_window_max",)
    layer: Layer = relu_max_pool

    def find(self, eqn: Any, producer: Producer) -> Replacement | None:
        """The relu, the moves and the pool, if the pool is `eqn`."""
        between: list[Any] = []
        made = producer(eqn.invars[0])
        while made is not None and is_move(made):  # A relu may as well follow it.
            between.insert(0, made)
            made = producer(made.invars[0])
        if made is None or not _is_relu(made) or any(d != 1 for d in eqn.params["base_dilation"]):
            return None
        # The moves now act on the relu's argument.
        moved: list[Any] = []
        x = made.invars[0]
        for move in between:
            moved.append(move.replace(invars=[x], outvars=[type(move.outvars[0])(move.outvars[0].aval)]))
            (x,) = moved[-1].outvars
        # Without channels, a window is of all axes.
        static = {key: _hashable(eqn.params[parameter]) for key, parameter in _PARAMETERS.items()}
        call = layer_equation(relu_max_pool, {**static, "channels_last": False}, [x], eqn)
        return Replacement([made, *between, eqn], [*moved, call], requires=[eqn])


def _is_relu(eqn: Any) -> bool:
    call = layer_call(eqn)
    if call is not None:
        return call.layer is relu
    return eqn.primitive.name == "custom_jvp_call" and equal_to(jax.nn.relu, eqn) is not None


def _hashable(value: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(tuple(map(int, v)) if isinstance(v, Sequence) else int(v) for v in value)


PATTERNS: list[Pattern] = [ReluBeforePool()]
