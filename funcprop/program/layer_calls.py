"""How the call of a layer stands in a jaxpr, and how it is found there.

A layer is a jit whose body ends in an identity primitive that records the call. Types, effects, axis names,
closures and every transformation are JAX's own, and nothing has to be imitated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax

from funcprop import _jax


@dataclass(frozen=True)
class MappedAxis:
    """One `vmap` around a layer call: its size, its names, and where it lies in arguments and results."""

    size: int
    name: Any
    spmd_name: Any
    in_axes: tuple[int | None, ...]
    out_axes: tuple[int | None, ...]


@dataclass(frozen=True)
class LayerCall:
    """A call of a layer (an `fp.Layer`) without its arrays; the jaxpr keeps it at the layer's boundary."""

    layer: Any
    static: tuple[tuple[str, Any], ...]
    tree: Any
    axes: tuple[MappedAxis, ...] = ()

    def unflatten(self, leaves: Any) -> tuple[Any, ...]:
        """The positional arguments of the layer from their arrays."""
        return jax.tree.unflatten(self.tree, leaves)

    def unbatched(self, arguments: Sequence[Any]) -> list[jax.ShapeDtypeStruct]:
        """The types of one example's arguments, from the types of the mapped call; `axes` go outwards."""
        shapes = [list(aval.shape) for aval in arguments]
        for mapped in reversed(self.axes):
            for shape, axis in zip(shapes, mapped.in_axes, strict=True):
                if axis is not None:
                    del shape[axis]
        return [
            jax.ShapeDtypeStruct(tuple(shape), aval.dtype)
            for shape, aval in zip(shapes, arguments, strict=True)
        ]

    def argument_names(self) -> tuple[str, ...]:
        """The name of every array argument, with its path inside a pytree argument."""
        names = self.layer.positional_names
        numbered = self.unflatten(range(self.tree.num_leaves))
        flat: list[str] = []
        for i, argument in enumerate(numbered):
            name = names[i] if i < len(names) else f"{names[-1]}[{i - len(names) + 1}]"
            flat += [name + jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(argument)]
        return tuple(flat)

    def plain(self, *leaves: Any) -> Any:
        """The layer's own function on the array arguments, without batching."""
        return self.layer.function(*self.unflatten(leaves), **dict(self.static))

    def symbol(self) -> str:
        """The text in the layer's circle: its symbol, or its name."""
        symbol = self.layer.symbol
        if callable(symbol):
            arguments = self.unflatten(range(self.tree.num_leaves))
            return str(symbol(*arguments, **dict(self.static)))
        return str(self.layer.name if symbol is None else symbol)

    def __repr__(self) -> str:
        static = "".join(f", {k}={v!r}" for k, v in self.static)
        return f"{self.layer.name}({', '.join(self.argument_names())}{static})"


def _boundary_call(*operands: Any, call: LayerCall) -> list[Any]:
    return list(operands[call.tree.num_leaves :])


def _boundary_jvp(primals: Any, tangents: Any, *, call: LayerCall) -> tuple[list[Any], list[Any]]:
    # A differentiated layer is its derivative's operators; nothing of the boundary remains to be saved.
    inputs = call.tree.num_leaves
    return list(primals[inputs:]), list(tangents[inputs:])


def _boundary_transpose(cotangents: Any, *operands: Any, call: LayerCall) -> list[Any]:
    return [None] * call.tree.num_leaves + list(cotangents)


def _boundary_batch(axis: Any, operands: Any, dims: Any, *, call: LayerCall) -> tuple[Any, Any]:
    inputs = call.tree.num_leaves
    mapped = MappedAxis(axis.size, axis.name, axis.spmd_name, tuple(dims[:inputs]), tuple(dims[inputs:]))
    return boundary_p.bind(*operands, call=replace(call, axes=(*call.axes, mapped))), dims[inputs:]


# The identity on a layer's results; it stands last in the layer's jitted body.
boundary_p = _jax.define_primitive(
    "funcprop_layer",
    call=_boundary_call,
    abstract=_boundary_call,
    jvp=_boundary_jvp,
    transpose=_boundary_transpose,
    batch=_boundary_batch,
)


def layer_call(eqn: Any) -> LayerCall | None:
    """The layer call that an equation of a jaxpr is, or None.

    An equation counts as the call only if it computes exactly what the boundary records: the same
    operands in the same order, and all results. A jit that also returns residuals or tangents, or that
    closes over a traced value, is not the layer any more and is treated as what it is.
    """
    boundary = _boundary(eqn)
    return None if boundary is None or _why_not_whole(eqn, boundary) else boundary.params["call"]


def broken_layer_call(eqn: Any) -> tuple[Any, str] | None:
    """The layer whose call an equation was before it was changed, and why it is not treated as its call."""
    boundary = _boundary(eqn)
    if boundary is None or (reason := _why_not_whole(eqn, boundary)) is None:
        return None
    return boundary.params["call"].layer, reason


def ends_in_boundary(jaxpr: Any) -> bool:
    """Whether the body of a jit ends as a layer's does."""
    equations = _jax.open_jaxpr(jaxpr).eqns
    return bool(equations) and equations[-1].primitive is boundary_p


def _boundary(eqn: Any) -> Any | None:
    if eqn.primitive.name != _jax.JIT or not ends_in_boundary(eqn.params["jaxpr"]):
        return None
    return _jax.open_jaxpr(eqn.params["jaxpr"]).eqns[-1]


def _why_not_whole(eqn: Any, boundary: Any) -> str | None:
    body = _jax.open_jaxpr(eqn.params["jaxpr"])
    if list(boundary.invars[: boundary.params["call"].tree.num_leaves]) != list(body.invars):
        return "it closes over a traced value; pass the value as an argument"
    if list(boundary.outvars) != list(body.outvars):
        return "only some of its results are used"
    return None


def without_marks(jaxpr: Any) -> Any:
    """The jaxpr without what only marks values: the boundaries of layers, and names."""
    renamed: dict[Any, Any] = {}
    equations = []
    for eqn in jaxpr.eqns:
        operands = [v if isinstance(v, _jax.Literal) else renamed.get(v, v) for v in eqn.invars]
        if eqn.primitive is boundary_p or eqn.primitive.name == "name":
            renamed.update(zip(eqn.outvars, operands[len(operands) - len(eqn.outvars) :], strict=True))
        else:
            equations.append(eqn.replace(invars=operands))
    outvars = [v if isinstance(v, _jax.Literal) else renamed.get(v, v) for v in jaxpr.outvars]
    return jaxpr.replace(eqns=equations, outvars=outvars)
