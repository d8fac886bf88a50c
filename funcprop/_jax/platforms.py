"""The platform of a program: of arrays and shardings, of the trace around, and of what is lowered."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
from jax.core import Trace, Tracer, eval_jaxpr
from jax.interpreters import mlir

# What JAX calls "cuda" and "rocm" where it lowers, it calls "gpu" where it runs.
_NAMES = {"cuda": "gpu", "rocm": "gpu"}


def default_platform() -> str:
    """The platform of JAX's default device."""
    device = jax.config.jax_default_device  # type: ignore[attr-defined]
    if device is None:
        return jax.default_backend()
    name = device if isinstance(device, str) else device.platform
    return _NAMES.get(name, name)


def platform_of(values: Sequence[Any]) -> str | None:
    """The platform of the first value that is bound to devices; None if none is."""
    device = next((d for v in values if (d := device_of(v)) is not None), None)
    return None if device is None else _NAMES.get(device.platform, device.platform)


def device_of(value: Any) -> Any:
    """A device to which an array, or a shape by its sharding, is bound; None if it is bound to none."""
    while isinstance(value, Tracer):  # What a tracer lacks is expensive to ask for.
        value = value.primal if hasattr(value, "primal") else getattr(value, "val", None)
    if isinstance(value, jax.Array) and not value.committed:
        return None
    sharding = getattr(value, "sharding", None)
    if not isinstance(sharding, jax.sharding.Sharding):
        return None
    if isinstance(getattr(sharding, "mesh", None), jax.sharding.AbstractMesh):
        return None
    devices: Any = sharding.device_set
    return min(devices, key=lambda d: d.id)


def is_staged_out(trace: Trace) -> bool:
    """Whether what runs under a trace is written down, for a platform that is known when it is lowered."""
    around: Any = trace
    while around is not None and type(around).__name__ != "DynamicJaxprTrace":
        around = getattr(around, "parent_trace", None)
    return around is not None


def lowered_by_platform(context: Any, *operands: Any, jaxpr: Any, forms: Any) -> Any:
    """Lower a program that is in one form for `forms.platforms`, `jaxpr`, and in another for others.

    Where one program is lowered for several platforms, each has its own.
    """
    platforms = context.platforms or context.module_context.platforms
    first = {name: _NAMES.get(name, name) in forms.platforms for name in platforms}
    if all(first.values()) and not jaxpr.effects:
        return _lowered_in_place(context, jaxpr, operands)
    functions = {True: lambda *xs: eval_jaxpr(jaxpr, (), *xs), False: forms.other}
    if len(set(first.values())) == 1:
        called = functions[all(first.values())]
    else:
        each = {name: functions[is_first] for name, is_first in first.items()}
        called = lambda *xs: jax.lax.platform_dependent(*xs, **each)  # noqa: E731
    return mlir.lower_fun(called, multiple_results=True)(context, *operands)


def _lowered_in_place(context: Any, jaxpr: Any, operands: Sequence[Any]) -> Any:
    """As `mlir.lower_fun` of what the jaxpr computes, which would trace it again."""
    module = context.module_context
    if context.platforms is not None:
        module = module.replace(platforms=context.platforms)
    results, tokens = mlir.jaxpr_subcomp(
        module, jaxpr, context.name_stack, context.tokens_in, (), *operands,
        dim_var_values=context.dim_var_values, const_lowering=context.const_lowering, outer_traceback=None,
    )  # fmt: skip
    context.set_tokens_out(tokens)
    return results
