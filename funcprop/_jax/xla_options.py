"""Options of XLA's compiler, found by trying them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from funcprop import _jax


@functools.cache
def barrier_options(platform: str) -> dict[str, str] | None:
    """Compiler options under which XLA keeps the recomputation that `jax.checkpoint` asks for.

    Some versions of the CPU backend drop the barriers in front of it, so that common subexpressions are
    shared and nothing is recomputed; an option leaves them in. Empty where none is needed, None where none
    helps.
    """
    if platform != "cpu":
        return {}

    def layer(x: Any) -> Any:
        return jnp.tanh(x @ x)

    def products(layer: Callable[[Any], Any], options: dict[str, str]) -> int:
        shape = jax.ShapeDtypeStruct((2, 2), jnp.float32)
        gradient = jax.jit(jax.grad(lambda x: layer(layer(x)).sum()), compiler_options=options)
        return _jax.program_text(gradient.lower(shape).compile()).count(" dot(")

    without = products(layer, {})
    for options in ({}, {"xla_disable_hlo_passes": "cse_barrier_expander"}):
        try:
            if products(jax.checkpoint(layer), options) > without:
                return options
        except jax.errors.JaxRuntimeError:  # This XLA does not know the option.
            continue
    return None


@functools.cache
def accepted(options: tuple[tuple[str, Any], ...]) -> bool:
    """Whether this compiler knows some options."""
    try:
        jax.jit(jnp.negative, compiler_options=dict(options)).lower(jnp.float32(0)).compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True
