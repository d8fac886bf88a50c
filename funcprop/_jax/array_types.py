"""What the type of a value tells: references, symbolic sizes, shardings, manual axes, derivatives."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.extend.core.primitives as jex_primitives
import jax.numpy as jnp
import numpy as np

Aval = Any


def is_reference(aval: Aval) -> bool:
    """Whether values of this type are mutable references (`jax.Ref`)."""
    return hasattr(aval, "inner_aval")


def inner_type(aval: Aval) -> Aval:
    """The type of what a reference holds; of a value that is none, its own."""
    return getattr(aval, "inner_aval", aval)


def varying_axes(aval: Aval) -> frozenset[str]:
    """The manual mesh axes over which a value inside `shard_map` varies."""
    manual = getattr(aval, "mat", None)
    if manual is not None:
        return frozenset(manual.varying)
    return frozenset(getattr(aval, "vma", frozenset()))


def align_varying_axes(args: Sequence[Any]) -> list[Any]:
    """Make all arguments vary over the same manual axes; the transpose of this is a `psum`."""
    axes = [varying_axes(jax.typeof(x)) for x in args]
    union = frozenset().union(*axes)
    return [
        jax.lax.pcast(x, tuple(sorted(union - have)), to="varying") if union - have else x
        for x, have in zip(args, axes, strict=True)
    ]


def explicitly_sharded(aval: Aval) -> bool:
    """Whether the type itself says how the value is laid out over a mesh (explicit axes)."""
    sharding = getattr(aval, "sharding", None)
    spec = getattr(sharding, "spec", None)
    return spec is not None and any(part is not None for part in spec)


def with_weak_type(x: Any, weak_type: bool) -> Any:
    """Make a value weakly typed, or not."""
    if bool(getattr(jax.typeof(x), "weak_type", False)) == weak_type:
        return x
    primitive = jex_primitives.convert_element_type_p
    return primitive.bind(x, new_dtype=jax.typeof(x).dtype, weak_type=weak_type, sharding=None)


def has_symbolic_size(aval: Aval) -> bool:
    """Whether a size is an expression that stands for many, as in `jax.export`."""
    return not all(isinstance(size, int | np.integer) for size in getattr(aval, "shape", ()))


def as_array(x: Any, aval: Aval) -> Any:
    """The value as an array of a type; a constant result of a jaxpr is a plain number."""
    if isinstance(x, jax.Array):
        return x
    return with_weak_type(jnp.asarray(x, aval.dtype), bool(getattr(aval, "weak_type", False)))


def is_differentiable(aval: Aval) -> bool:
    """Whether values of this type have a non-trivial tangent."""
    dtype = None if is_reference(aval) else getattr(aval, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, jnp.inexact)


def zero_tangent(aval: Aval) -> np.ndarray:
    """The only tangent of a value without derivatives: zeros of dtype `float0`."""
    return np.zeros(aval.shape, jax.dtypes.float0)


def with_zero_tangents(smooth: Iterable[Any], avals: Iterable[Aval]) -> list[Any]:
    """Tangents, or cotangents, of all of these types, from those of the differentiable ones."""
    given = iter(smooth)
    return [next(given) if is_differentiable(aval) else zero_tangent(aval) for aval in avals]


def sharding_of(value: Any) -> Any:
    """The sharding that a value, or a description of one, asks for; None if it may lie anywhere."""
    if isinstance(value, jax.Array) and not isinstance(value, jax.core.Tracer) and not value.committed:
        return None
    return getattr(value, "sharding", None)
