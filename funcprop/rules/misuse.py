"""What is wrong with a call of a transformed function, in one line: asked after JAX has refused it.

The line begins with JAX's own words, by which programs that were written for `jax.grad` know an error.
"""

from __future__ import annotations

import functools
import inspect
import reprlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from funcprop import _jax
from funcprop.program.call import has_values, name_of


class _NotScalarError(TypeError):
    """The result of a function has no gradient; raised inside of JAX's transformation."""


def explained(
    transform: Callable[[Callable[..., Any]], Callable[..., Any]],
    fun: Callable[..., Any],
    ruled: Callable[..., Any],
    argnums: int | Sequence[int],
    has_aux: bool,
    of_integers: bool,
) -> Callable[..., Any]:
    """`transform(ruled)` of a scalar function, whose refusals name the argument, its value and the remedy.

    `ruled` is `fun` with rules; `of_integers` says that arguments may be integers.
    """
    name = name_of(fun)

    @functools.wraps(ruled)
    def checked(*args: Any, **kwargs: Any) -> Any:
        result = ruled(*args, **kwargs)
        if (fault := _fault_of_result(name, result, has_aux)) is not None:
            raise _NotScalarError(_words_on(result, has_aux) + fault)
        return result

    transformed = transform(checked)

    @functools.wraps(transformed)
    def called(*args: Any, **kwargs: Any) -> Any:
        try:
            return transformed(*args, **kwargs)
        except _NotScalarError as error:
            raise TypeError(str(error)) from None
        except TypeError as error:
            if (fault := _fault_of_arguments(name, argnums, of_integers, args, kwargs)) is not None:
                raise TypeError(_words(error) + fault) from None
            if (fault := _fault_of_signature(name, fun, args, kwargs)) is not None:
                raise TypeError(fault) from None
            raise

    return called


def _words(error: TypeError) -> str:
    """JAX's words, to be followed by ours."""
    first = str(error).partition("\n")[0].rstrip(". ")
    return f"{first}. " if first else ""


def _words_on(result: Any, has_aux: bool) -> str:
    """JAX's words on a result, which it is given by another function: this one's name is ours to tell."""
    try:
        jax.grad(lambda _: result, has_aux=has_aux)(0.0)
    except TypeError as error:
        return _words(error)
    return ""


def _fault_of_result(name: str, result: Any, has_aux: bool) -> str | None:
    if has_aux:
        if not (isinstance(result, tuple | list) and len(result) == 2):
            return (
                f"has_aux=True, but {name} returns {_kind(result)}; return the pair (scalar, auxiliary data)."
            )
        result = result[0]
    if _jax.is_traced(result) and result.shape == () and jnp.issubdtype(result.dtype, jnp.inexact):
        return None  # Asked at every eager call.
    if isinstance(result, tuple | list | dict) or result is None:
        return (
            f"{name} returns {_kind(result)}, but a gradient is of one scalar; return the loss alone, or the "
            "pair (loss, auxiliary data) with has_aux=True."
        )
    try:
        aval: Any = jax.typeof(result)
    except TypeError:
        return None  # Of no type of JAX's: JAX says which.
    if getattr(aval, "shape", ()) != ():
        return (
            f"{name} returns {_kind(result)}, but a gradient is of one scalar; take its mean or its sum, or "
            "fp.jacobian for the derivatives of all its entries."
        )
    if jnp.issubdtype(aval.dtype, jnp.integer) or aval.dtype == bool:
        return f"{name} returns {_kind(result)}, which has no derivative; return a floating-point number."
    return None


def _fault_of_arguments(
    name: str,
    argnums: int | Sequence[int],
    of_integers: bool,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> str | None:
    if not has_values((args, kwargs)):
        return (
            f"{name} is called with shapes (jax.ShapeDtypeStruct), but a gradient needs arrays; "
            "jax.eval_shape of the gradient gives the types of its results."
        )
    count = len(args)
    several = (argnums,) if isinstance(argnums, int) else tuple(argnums)
    for position in several:
        if not -count <= position < count:
            given = f"{count} positional argument{'' if count == 1 else 's'}"
            also = f" and {', '.join(kwargs)} by keyword" if kwargs else ""
            return (
                f"argnums={argnums}, but {name} is called with {given}{also}; pass what is differentiated by "
                "position, or choose another argnums."
            )
        for path, leaf in jax.tree.leaves_with_path(args[position]):
            where = f"argument {position % count}{jax.tree_util.keystr(path)} of {name}"
            try:
                dtype = jax.typeof(leaf).dtype
            except (TypeError, AttributeError):
                return f"{where} is {_kind(leaf)}, no array; close over it, or choose argnums without it."
            if not of_integers and not jnp.issubdtype(dtype, jnp.inexact):
                shown = f"{leaf!r} ({dtype})" if isinstance(leaf, bool | int) else _kind(leaf)
                return (
                    f"{where} is {shown}, which has no derivative; pass floating-point numbers, or choose "
                    "argnums without it."
                )
    return None


def _fault_of_signature(
    name: str, fun: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> str | None:
    try:
        signature = inspect.signature(fun)
    except (TypeError, ValueError):
        return None  # Not every callable has one.
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        return f"{name}{signature} cannot be called with these arguments: {error}."
    return None


def _kind(value: Any) -> str:
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {len(value)}"
    try:
        aval: Any = jax.typeof(value)
    except TypeError:
        if isinstance(value, str | bytes):
            return f"the text {reprlib.repr(value)}"
        return "None" if value is None else f"a {type(value).__name__}"
    return f"{aval.dtype}{list(aval.shape)}"
