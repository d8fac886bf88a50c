"""Softmax and its logarithm, whose cotangents follow from the result.

    p = softmax(x)          x̄ = p ⊙ (p̄ − Σ p̄ ⊙ p)
    y = log softmax(x)      x̄ = ȳ − eʸ Σ ȳ

Autodiff of `jax.nn.softmax` keeps the exponentials and their sum beside the result, and multiplies by the
reciprocal square of the sum; that of `jax.nn.log_softmax` keeps the exponentials. These rules keep the result
alone, which whatever reads it often keeps anyway. Measured on two x86 cores, float32 (time and temporary
bytes over autodiff's, medians of 5 to 25 turns; quartiles ± 0.05):

| softmax attention, d 64 |             | `jax.nn.log_softmax`                |             |
|-------------------------|-------------|-------------------------------------|-------------|
| 64 heads × 128²         | 0.89 / 0.50 | cross-entropy, 4096 × 32k logits    | 0.57 / 0.50 |
| 32 heads × 256²         | 0.59 / 0.50 | linear and cross-entropy, 2048 × 8k | 0.92 / 1.00 |
| 16 heads × 512²         | 0.75 / 0.50 | one-hot labels, 4096 × 32k          | 0.92 / 1.00 |
| 16 heads × 512², causal | 0.81 / 0.67 | alone, 64 × 1024 × 128              | 0.80 / 0.99 |
| 16 heads × 1024²        | 0.80 / 0.50 | linear and cross-entropy, 256 × 1k  | 1.10 / 1.00 |
| 16 heads × 64²          | 0.98 / 0.49 | linear and cross-entropy, 1k × 10   | 1.03 / 0.96 |

So the rule of `log_softmax`, which computes the exponentials twice, is for what the cache does not hold. To
keep `x` and the sums in place of the result took longer (softmax attention 0.67 to 0.94, 0.75 of the bytes).
`jax.nn.logsumexp` has no rule: `x̄ = ȳ e^(x − y)` took 1.02 to 1.18 of autodiff's time alone, and 1.02 in the
cross-entropy of 4096 × 32k logits.

Source: Bridle, "Probabilistic interpretation of feedforward classification network outputs", 1990.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from funcprop.rules.equations import Equations, OperatorSymbols, apply
from funcprop.rules.layer import Layer, layer
from funcprop.rules.machine import Machine, cached_entries, host
from funcprop.rules.patterns.recognition import Pattern, Producer, Replacement, equal_to, layer_equation
from funcprop.rules.rule import Rule

Axes = int | tuple[int, ...]


class Result(NamedTuple):
    """The result, from which the probabilities follow."""

    y: Any


def _applies(x: Any, **_: Any) -> bool | str:
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return f"its operand is {x.dtype}"
    return True


# --- softmax ----------------------------------------------------------------------------------


def _softmax_forward(x: Any, *, axis: Axes) -> tuple[Any, Result]:
    y = jax.nn.softmax(x, axis)
    return y, Result(y)


def _centred(y: Any, g: Any, axis: Axes) -> Any:
    """The derivative of softmax, a symmetric matrix, times a vector."""
    return y * (g - (g * y).sum(axis, keepdims=True))


def _softmax_backward(residuals: Result, g: Any, needs: Any, *, axis: Axes) -> tuple[Any]:
    return (_centred(residuals.y, g, axis),)


def _softmax_jvp(residuals: Result, tangents: Any, *, axis: Axes) -> Any:
    return _centred(residuals.y, tangents[0], axis)


def _softmax_equations(op: OperatorSymbols) -> Equations:
    (x,) = op.args
    axis = op.static["axis"]
    p = apply("softmax", partial(jax.nn.softmax, axis=axis), x, latex="\\mathrm{softmax}")
    g = op.cotangent
    return Equations(p, (p * (g - (g * p).sum(axis, keepdims=True)),))


@layer(
    rule=Rule(
        _softmax_forward, _softmax_backward, _softmax_equations, jvp=_softmax_jvp, applies=_applies, pure=True
    )
)
def softmax(x: Float[Array, "*shape"], *, axis: Axes = -1) -> Float[Array, "*shape"]:
    """Softmax along an axis or several, `p = eˣ / Σ eˣ`; `x̄ = p ⊙ (p̄ − Σ p̄ ⊙ p)`.

    Recognised in any function as `jax.nn.softmax` without `where`.

    Example:
        >>> import jax.numpy as jnp, funcprop as fp
        >>> print(fp.layers.softmax(jnp.zeros(2)))
        [0.5 0.5]
    """
    return jax.nn.softmax(x, axis)


# --- its logarithm ----------------------------------------------------------------------------


def _log_forward(x: Any, *, axis: Axes, machine: Machine | None = None) -> tuple[Any, Result]:
    y = jax.nn.log_softmax(x, axis)
    return y, Result(y)


def _log_backward(
    residuals: Result, g: Any, needs: Any, *, axis: Axes, machine: Machine | None = None
) -> tuple[Any]:
    return (g - jnp.exp(residuals.y) * g.sum(axis, keepdims=True),)


def _log_jvp(residuals: Result, tangents: Any, *, axis: Axes, machine: Machine | None = None) -> Any:
    return tangents[0] - (jnp.exp(residuals.y) * tangents[0]).sum(axis, keepdims=True)


def _log_equations(op: OperatorSymbols) -> Equations:
    (x,) = op.args
    axis = op.static["axis"]
    y = apply("log_softmax", partial(jax.nn.log_softmax, axis=axis), x)
    p = apply("softmax", partial(jax.nn.softmax, axis=axis), x, latex="\\mathrm{softmax}")
    return Equations(y, (op.cotangent - p * op.cotangent.sum(axis, keepdims=True),))


def _log_applies(everywhere: bool, x: Any, *, machine: Machine | None = None, **_: Any) -> bool | str:
    if (reason := _applies(x)) is not True:
        return reason
    if jnp.finfo(x.dtype).bits < 32:
        return f"the exponential of a result of {x.dtype} is less accurate than autodiff's"
    if not everywhere and x.size < cached_entries(machine or host()):
        return f"the exponentials of {x.size} entries stay in the cache, and need not be computed again"
    return True


def log_rule(*, everywhere: bool = False) -> Rule:
    """The rule of `log_softmax`, where the caches do not hold it (`cached_entries`), or everywhere."""
    return Rule(
        _log_forward,
        _log_backward,
        _log_equations,
        platforms=frozenset({"cpu"}),
        jvp=_log_jvp,
        applies=partial(_log_applies, everywhere),
        pure=True,
        sized=True,
        ways=None if everywhere else _ways,
    )


@functools.cache
def _ways() -> dict[str, Rule]:
    return {"also for few entries": log_rule(everywhere=True)}


@layer(rule=log_rule())
def log_softmax(x: Float[Array, "*shape"], *, axis: Axes = -1) -> Float[Array, "*shape"]:
    """Logarithm of the softmax along an axis or several, `y = x − log Σ eˣ`; `x̄ = ȳ − eʸ Σ ȳ`.

    Recognised in any function as `jax.nn.log_softmax` without `where`.

    Example:
        >>> import jax.numpy as jnp, funcprop as fp
        >>> print(fp.layers.log_softmax(jnp.zeros(2)))
        [-0.6931472 -0.6931472]
    """
    return jax.nn.log_softmax(x, axis)


# --- in other functions -----------------------------------------------------------------------


# What stands between the last operator and the sum, and between it and the difference from the largest.
_ABOVE_THE_SUM = frozenset({"log", "broadcast_in_dim", "reshape", "convert_element_type"})


@dataclass(frozen=True)
class AlongAxes:
    """The pattern of `function(x, axis=…)`, which ends with `last`: `e^(x − m) / Σ` or `(x − m) − log Σ`."""

    function: Callable[..., Any]
    layer: Layer
    last: str

    @property
    def operators(self) -> Collection[str]:
        """The primitives that `find` begins with."""
        return ("sub", "exp", "reduce_sum", self.last)

    def find(self, eqn: Any, producer: Producer) -> Replacement | None:
        """The function's equations, if they end with `eqn`."""
        difference, total = map(producer, eqn.invars)
        while total is not None and total.primitive.name in _ABOVE_THE_SUM:
            total = producer(total.invars[0])
        if difference is not None and difference.primitive.name == "exp":
            difference = producer(difference.invars[0])
        names = [None if e is None else e.primitive.name for e in (difference, total)]
        if names != ["sub", "reduce_sum"]:
            return None
        axes = tuple(map(int, total.params["axes"]))
        axis = axes[0] if len(axes) == 1 else axes
        x = difference.invars[0]
        function = partial(self.function, axis=axis)
        found = equal_to(function, eqn, producer)
        moved = producer(x)
        if found is None and moved is not None and moved.primitive.name == "transpose":
            # `vmap` brings its axis to the front after it has taken the largest entries.
            batch = int(moved.params["permutation"][0])
            inner = tuple(a - 1 for a in axes)
            mapped = jax.vmap(partial(self.function, axis=inner), in_axes=batch)
            found = None if -1 in inner else equal_to(mapped, eqn, producer, moved.invars[0].aval)
        if found is None:
            return None
        old = [e for e in found[1] if e is not moved]
        return Replacement(old, [layer_equation(self.layer, {"axis": axis}, [x], eqn)])


PATTERNS: list[Pattern] = [
    AlongAxes(jax.nn.softmax, softmax, last="div"),
    # It is jitted, and what is recognised is the body.
    AlongAxes(inspect.unwrap(jax.nn.log_softmax), log_softmax, last="sub"),
]
