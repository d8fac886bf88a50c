"""The platform of a program: of arrays and shardings, of the trace around, and of what is lowered."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.core import Trace, Tracer
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
    while isinstance(value, Tracer):
        value = getattr(value, "primal", getattr(value, "val", None))
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


def lowered_for(choose: Callable[[str], Callable[..., Any]]) -> Any:
    """Make a lowering rule of the functions that `choose` gives for the platforms.

    Where one program is lowered for several, each has its own.
    """

    def lower(context: Any, *operands: Any, **params: Any) -> Any:
        platforms = context.platforms or context.module_context.platforms
        functions = {name: choose(_NAMES.get(name, name)) for name in platforms}
        if len(set(functions.values())) == 1:
            fun = next(iter(functions.values()))
            called = lambda *xs: fun(*xs, **params)  # noqa: E731
        else:
            each = {name: (lambda *xs, f=f: f(*xs, **params)) for name, f in functions.items()}
            called = lambda *xs: jax.lax.platform_dependent(*xs, **each)  # noqa: E731
        return mlir.lower_fun(called, multiple_results=True)(context, *operands)

    return lower
