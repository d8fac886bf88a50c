"""A function traced to a jaxpr and emitted again, equation by equation, as a function of the same arguments.

What happens to the equations on the way is the business of `emit`. Here is the rest: arguments that are not
traced stay what they are, results come back in their structure, and what the function changes in its
arguments (containers, nnx models) is changed in the caller's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from funcprop import _compat, _mutation, _nnx
from funcprop.calls import Call, traced

Emit = Callable[[Any, Sequence[Any]], Sequence[Any]]


def emitted_again(fun: Callable[..., Any], emit: Emit) -> Callable[..., Any]:
    """The function whose traced arguments `values` go through `emit(jaxpr, values)`.

    Only tracers are abstract inside; where there is none, nothing is traced and the jaxpr is empty.
    """

    @functools.wraps(fun)
    def emitted(*args: Any, **kwargs: Any) -> Any:
        if _nnx.has_models((args, kwargs)):
            return _nnx.call(run, fun, args, kwargs)
        return run(fun, args, kwargs)

    run = functools.partial(_emitted, emit=emit)
    return emitted


def _emitted(fun: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], *, emit: Emit) -> Any:
    call = Call.of(args, kwargs, lambda leaf: isinstance(leaf, jax.core.Tracer))
    structure: list[Any] = []

    def flat(*values: Any) -> list[Any]:
        leaves = call.filled(values)
        call_args, call_kwargs = call.arguments(leaves)
        result = fun(*call_args, **call_kwargs)
        changed = _mutation.changed((call_args, call_kwargs), leaves, call.tree)
        results, result_tree = jax.tree.flatten((result, changed))
        staged = [isinstance(x, jax.core.Tracer) for x in results]
        concrete = [None if is_staged else (x,) for x, is_staged in zip(results, staged, strict=True)]
        structure.append((result_tree, concrete))
        return [x for x, is_staged in zip(results, staged, strict=True) if is_staged]

    jaxpr = traced(flat, call.values, fun, "a differentiated argument")
    outputs = iter(_arrays(emit(jaxpr, call.values), jaxpr))
    result_tree, concrete = structure[-1]
    values = [next(outputs) if c is None else c[0] for c in concrete]
    result, changed = jax.tree.unflatten(result_tree, values)
    if changed is not None:
        _mutation.write_back(args, changed[0], "args")
        _mutation.write_back(kwargs, changed[1], "kwargs")
    return result


def _arrays(results: Sequence[Any], jaxpr: Any) -> Iterator[Any]:
    """The results as JAX returns them; a constant result is a plain number in the jaxpr."""
    for value, var in zip(results, _compat.open_jaxpr(jaxpr).outvars, strict=True):
        if isinstance(value, jax.Array):
            yield value
        else:
            array = jax.numpy.asarray(value, var.aval.dtype)
            yield _compat.with_weak_type(array, bool(getattr(var.aval, "weak_type", False)))
