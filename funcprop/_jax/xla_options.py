"""Options of XLA's compiler, found by trying them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
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


_DISABLED = "xla_disable_hlo_passes"


def without_folding(options: Mapping[str, Any]) -> dict[str, Any]:
    """Compiler options under which XLA computes no constants, where it knows them.

    A mean over millions of examples has a cotangent of millions of equal numbers; to scatter them at compile
    time takes minutes, and changes no buffer.
    """
    passes = [name for name in str(options.get(_DISABLED, "")).split(",") if name]
    found = ",".join([*passes, "constant_folding"])
    return {**options, _DISABLED: found} if accepted(((_DISABLED, found),)) else dict(options)


def for_buffers(platform: str) -> dict[str, Any]:
    """Compiler options under which a program is compiled for its buffers alone, not to be run.

    A CPU's code is not optimised, which takes half of the time and changes no buffer.
    """
    options = {"xla_backend_optimization_level": 0}
    return options if platform == "cpu" and accepted(tuple(options.items())) else {}


# Most of the time of a program that runs once goes into compiling it.
_ONCE = {
    "xla_allow_excess_precision": False,
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
    "xla_cpu_parallel_codegen_split_count": 1,
    "xla_cpu_use_fusion_emitters": False,
}


def jit_once(fun: Callable[..., Any]) -> Callable[..., Any]:
    """`jax.jit` of a function that runs once: its code is not optimised, and there sooner.

    Unlike in other programs, every value is rounded to its type, as if each operator ran by itself.
    """
    return jax.jit(fun, compiler_options=_options(jax.default_backend()))


@functools.cache
def _options(platform: str) -> dict[str, Any]:
    """The options that the compiler of a platform knows."""
    return {name: value for name, value in _ONCE.items() if accepted(((name, value),))}


@functools.cache
def accepted(options: tuple[tuple[str, Any], ...]) -> bool:
    """Whether this compiler knows some options."""
    try:
        jax.jit(jnp.negative, compiler_options=dict(options)).lower(jnp.float32(0)).compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True
