"""Functions of each entry: which have a name, what they are at many points, and how they are written."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from funcprop import _jax
from funcprop._jax.xla_options import jit_once
from funcprop.equations.flow import Region
from funcprop.equations.named_function import NamedFunction, Write
from funcprop.program.facts import CALLS, CUSTOM_RULES, facts_of
from funcprop.program.layer_calls import boundary_p
from funcprop.rules.equations import Equations, apply
from funcprop.rules.expressions import Expression

# Points at which functions of one number are compared: both signs, small and large.
_POINTS = np.concatenate([np.linspace(-8, 8, 223), [1e-3, -1e-3, 0.25, -0.25, 30.0, -30.0]])

ELEMENTWISE: dict[str, Sequence[Callable[[Any], Any]]] = {
    "relu": [jax.nn.relu],
    "relu6": [jax.nn.relu6],
    "tanh": [jnp.tanh],
    "σ": [jax.nn.sigmoid],
    "silu": [jax.nn.silu],
    "gelu": [partial(jax.nn.gelu, approximate=a) for a in (False, True)],
    "softplus": [jax.nn.softplus],
    "log σ": [jax.nn.log_sigmoid],
    "elu": [jax.nn.elu],
    "selu": [jax.nn.selu],
    "leaky_relu": [partial(jax.nn.leaky_relu, negative_slope=a) for a in (0.01, 0.1, 0.2)],
    "mish": [jax.nn.mish],
    "softsign": [jax.nn.soft_sign],
    "huber": [partial(optax.huber_loss, delta=a) for a in (1.0, 0.5, 0.1)],
    "log cosh": [optax.log_cosh],
    "hard_tanh": [jax.nn.hard_tanh],
    "hard_σ": [jax.nn.hard_sigmoid],
    "hard_silu": [jax.nn.hard_silu],
}


# What their slopes are called.
_SLOPES = {"softplus": "σ", "log σ": "σ", "log cosh": "tanh"}

# No function in the table is written by more operators.
_LONGEST_ACTIVATION = 20


@functools.cache
def _values(dtype: np.dtype) -> dict[tuple[str, int], np.ndarray]:
    """The values of all functions of the table at the points, each by its name and spelling."""
    functions = {(name, k): f for name, spellings in ELEMENTWISE.items() for k, f in enumerate(spellings)}
    compiled = jit_once(lambda x: [f(x) for f in functions.values()])
    values = compiled(jnp.asarray(_POINTS, dtype))
    return {key: np.asarray(y, np.float64) for key, y in zip(functions, values, strict=True)}


def elementwise(name: str) -> Write:
    """The equations of a function of each entry: `h = φ(z)`, `z̄ = h̄ ⊙ φ′(z)`."""

    def write(
        function: Callable[..., Any], operands: Sequence[Expression], g: Expression, output: Expression
    ) -> Equations:
        (x,) = operands
        if name in _SLOPES:
            of, operand = _SLOPES[name], -x if name == "log σ" else x
            # The slope of `log σ(z)` is `σ(−z)`.
            back = (lambda v: slope(function)(-v)) if name == "log σ" else slope(function)
            return Equations(apply(name, function, x), (g * apply(of, back, operand, type_=x.type),))
        derivative = g * apply(f"{name}′", slope(function), x, type_=x.type)
        return Equations(apply(name, function, x), (derivative,))

    return write


def slope(function: Callable[..., Any], i: int = 0) -> Callable[..., Any]:
    """The derivative of an entrywise function by its operand `i`, entry by entry."""

    def derivative(*values: Any) -> Any:
        y, pull = jax.vjp(lambda v: function(*values[:i], v, *values[i + 1 :]), values[i])
        return pull(jnp.ones_like(y))[0]

    return derivative


def is_elementwise(region: Region) -> bool:
    """Whether each entry of the result is the same function of one entry of the one input."""
    if len(region.inputs) != 1 or region.inputs[0].shape != region.output.shape:
        return False
    shapes = {(), region.output.shape}
    for op in region.operators:
        for eqn in _jax.equations(op.jaxpr):
            facts = facts_of(eqn)
            is_call = eqn.primitive is boundary_p or eqn.primitive.name in CALLS | CUSTOM_RULES
            is_simple = facts.elementwise or facts.identity or is_call
            is_filled = eqn.primitive.name == "broadcast_in_dim" and eqn.invars[0].aval.shape == ()
            if not (is_simple or is_filled) or any(v.aval.shape not in shapes for v in eqn.outvars):
                return False
    return True


def elementwise_functions(region: Region) -> Iterator[NamedFunction]:
    """The functions of the table that are near an elementwise region at the points."""
    # One operator with a name of its own is called by that; a long chain is no function with a name.
    is_short = len(region.operators) <= _LONGEST_ACTIVATION and len(set(region.primitives())) > 1
    if not is_short and facts_of(region.operators[-1].equation).elementwise:
        return
    found = np.asarray(jit_once(jax.vmap(region))(at_points(region)), np.float64).ravel()
    for (name, k), values in _values(np.dtype(region.inputs[0].dtype)).items():
        if np.allclose(found, np.resize(values, found.shape), rtol=0.02, atol=0.02, equal_nan=True):
            yield NamedFunction(name, "activation", ELEMENTWISE[name][k], elementwise(name))


def at_points(region: Region) -> Any:
    """The points in arrays of the shape of a region's input."""
    x = region.inputs[0]
    repeats = -(-_POINTS.size // max(1, int(np.prod(x.shape or ()))))
    return jnp.asarray(np.resize(_POINTS, (repeats, *(x.shape or ()))), x.dtype)
