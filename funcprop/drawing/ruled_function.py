"""A function prepared for being differentiated and seen: it carries its rules, and its names survive.

A layer that is differentiated becomes its derivative's operators; here they keep the layer's name as their
scope. A named value `z` passes its name on to its cotangent, `∂J/∂z`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from funcprop import _jax
from funcprop.program.call import Call, is_array, traced
from funcprop.program.facts import CALLS
from funcprop.program.layer_calls import layer_call
from funcprop.rules.rewrite import Rewriter
from funcprop.rules.rule_set import RuleSet

COTANGENT = "∂J/∂"


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _named(x: Any, label: str) -> Any:
    return checkpoint_name(x, label)


def _named_forward(x: Any, label: str) -> tuple[Any, None]:
    return checkpoint_name(x, label), None


def _named_backward(label: str, _: None, cotangent: Any) -> tuple[Any]:
    return (checkpoint_name(cotangent, COTANGENT + label),)


_named.defvjp(_named_forward, _named_backward)


class Marked(NamedTuple):
    """A function of the arrays to differentiate, `function(*chosen) -> results`, and these arrays."""

    function: Callable[..., list[Any]]
    chosen: tuple[Any, ...]


def marked(
    fun: Callable[..., Any],
    positions: Sequence[int],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    rules: RuleSet,
) -> Marked:
    """The function at traced arguments, as one of the arrays at these positions among all of them."""
    call = Call.of(args, kwargs, lambda leaf: isinstance(leaf, jax.core.Tracer))

    def flat(*values: Any) -> Any:
        call_args, call_kwargs = call.arguments(call.filled(values))
        return jax.tree.leaves(fun(*call_args, **call_kwargs))

    jaxpr = traced(flat, call.values, fun)
    scoped = _jax.retrace(partial(_with_names, jaxpr), jaxpr)

    def function(*chosen: Any) -> list[Any]:
        values = list(call.values)
        for i, value in zip(positions, chosen, strict=True):
            values[i] = value
        return list(Rewriter(rules).run(scoped, values))

    return Marked(function, tuple(call.values[i] for i in positions))


def differentiated(
    fun: Callable[..., Any],
    argnums: int | Sequence[int],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> list[tuple[int, Any]]:
    """The arrays at `argnums` that have a derivative: the position among all arrays, and the array.

    Raises:
        TypeError: there is no such argument, or none of them has a derivative.
    """
    call = Call.of(args, kwargs, is_array)
    numbers = (argnums,) if isinstance(argnums, int) else tuple(argnums)
    label = getattr(fun, "__name__", type(fun).__name__)
    for n in numbers:
        if not -len(args) <= n < len(args):
            raise TypeError(
                f"argnums={argnums} names argument {n}, but {label} was called with {len(args)} positional "
                "arguments; keyword arguments are not differentiated."
            )
    wanted = {n % len(args) for n in numbers}
    of_argument = [n for n, arg in enumerate(args) for _ in jax.tree.leaves(arg)]
    found = [
        (i, call.leaves[leaf])
        for i, leaf in enumerate(call.variables)
        if leaf < len(of_argument)
        and of_argument[leaf] in wanted
        and jnp.issubdtype(jnp.result_type(call.leaves[leaf]), jnp.inexact)
    ]
    if not found:
        raise TypeError(
            f"no array with a derivative is in the arguments of {label} at argnums={argnums}; pass floats."
        )
    return found


def shape_of(x: Any) -> jax.ShapeDtypeStruct:
    """The type of an array, a python number or a type, to trace with."""
    aval = x if hasattr(x, "dtype") and not isinstance(x, jax.Array) else jax.typeof(x)
    weak_type = bool(getattr(aval, "weak_type", False))
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype, weak_type=weak_type)


def _with_names(closed: Any, *args: Any) -> list[Any]:
    """Evaluate a jaxpr; layers are in a scope of their name, names are passed on to cotangents.

    Nested jits stay what they are, because they decide what is saved.
    """
    jaxpr = _jax.open_jaxpr(closed)
    values: dict[Any, Any] = dict(zip(jaxpr.constvars, _jax.constants(closed), strict=True))
    values.update(zip(jaxpr.invars, args, strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, _jax.Literal) else values[atom]

    for eqn in jaxpr.eqns:
        operands = [read(a) for a in eqn.invars]
        call = layer_call(eqn)
        if call is not None:
            with _jax.context_of(eqn), jax.named_scope(call.layer.name):
                results = _jax.one_equation(_jax.without_scope(eqn))(*operands)
        elif _is_named(eqn):
            with _jax.context_of(eqn):
                results = [_named(operands[0], eqn.params["name"])]
        elif _enters(eqn):
            results = _jax.one_equation(eqn.replace(params=_jax.map_jaxprs(eqn.params, _body)))(*operands)
        else:
            results = _jax.one_equation(eqn)(*operands)
        values.update(zip(eqn.outvars, results, strict=True))
    return [read(a) for a in jaxpr.outvars]


def _body(body: Any) -> Any:
    return _jax.retrace(partial(_with_names, body), body)


def _is_named(eqn: Any) -> bool:
    return eqn.primitive.name == "name" and _jax.is_differentiable(eqn.outvars[0].aval)


def _enters(eqn: Any) -> bool:
    """Whether an equation is a nested jit in which there is something to mark."""
    if eqn.primitive.name not in CALLS or layer_call(eqn) is not None:
        return False
    inner = [e for _, body in _jax.sub_jaxprs(eqn) for e in _jax.open_jaxpr(body).eqns]
    return any(layer_call(e) is not None or _is_named(e) or _enters(e) for e in inner)
