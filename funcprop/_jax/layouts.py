"""Operators on types that carry an explicit sharding, and the same operators where XLA chooses the layout."""

from __future__ import annotations

from typing import Any

import jax

from funcprop import _jax
from funcprop._jax.surrounding import equation_of

# Parameters that only say how a result is laid out.
_LAYOUTS = frozenset({"sharding", "out_sharding"})

# What asks for a layout itself, or was traced for one where nothing can be put in its place.
_BOUND_TO_LAYOUTS = frozenset(
    {"reshard", "mesh_cast", "sharding_constraint", "shard_map", "custom_jvp_call", "custom_vjp_call"}
)


def bound_to_layouts(eqn: Any) -> str | None:
    """The first operator in the bodies of an equation that cannot do without their explicit shardings."""
    names = (e.primitive.name for _, body in _jax.sub_jaxprs(eqn) for e in _jax.equations(body))
    return next((name for name in names if name in _BOUND_TO_LAYOUTS), None)


def without_layouts(eqn: Any, avals: Any) -> Any:
    """The equation on operands of these types, in whose bodies no type carries a sharding either."""
    params = {key: None if key in _LAYOUTS else value for key, value in eqn.params.items()}
    invars = [
        operand if isinstance(operand, _jax.Literal) else _jax.Var(aval)
        for operand, aval in zip(eqn.invars, avals, strict=True)
    ]
    return equation_of(eqn.primitive, invars, _jax.map_jaxprs(params, _body_without_layouts))


def _body_without_layouts(body: Any) -> Any:
    opened = _jax.open_jaxpr(body)

    def run(*arguments: Any) -> list[Any]:
        values = dict(zip(opened.invars, arguments, strict=True))
        values.update(zip(opened.constvars, _jax.array_constants(body), strict=True))
        read = lambda v: v.val if isinstance(v, _jax.Literal) else values[v]  # noqa: E731
        for eqn in opened.eqns:
            operands = [read(v) for v in eqn.invars]
            avals = [
                v.aval if isinstance(v, _jax.Literal) else jax.typeof(x)
                for v, x in zip(eqn.invars, operands, strict=True)
            ]
            results = _jax.one_equation(without_layouts(eqn, avals))(*operands)
            values.update(zip(eqn.outvars, results, strict=True))
        return [read(v) for v in opened.outvars]

    types = [
        jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype, weak_type=bool(getattr(v.aval, "weak_type", False)))
        for v in opened.invars
    ]
    return jax.make_jaxpr(run)(*types)
