"""Where the parameters enter a loss: the nodes of its jaxpr (`nodes`)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from funcprop import _jax
from funcprop.curvature.diagonal.dependence import propagate
from funcprop.curvature.diagonal.nodes import LossNode
from funcprop.curvature.diagonal.separability import Separability, is_separable
from funcprop.program.facts import SUMS, is_view


def find_nodes(jaxpr: Any, leaves: Sequence[int]) -> list[LossNode]:
    """The nodes of the leaves (positions among the inputs), from which the one result depends on them."""
    uses = Counter(v for eqn in jaxpr.eqns for v in eqn.invars if not isinstance(v, _jax.Literal))
    uses.update(v for v in jaxpr.outvars if not isinstance(v, _jax.Literal))
    products: list[LossNode] = []
    plain: list[int] = []
    for leaf in leaves:
        found = _product(jaxpr, leaf, uses)
        if found is None:
            plain.append(leaf)
        else:
            products.append(_after_transposes(jaxpr, found, uses))
    taken: set[int] = set()
    nodes: list[LossNode] = []
    for entry in products:
        bias = _bias(jaxpr, entry, [leaf for leaf in plain if leaf not in taken], uses)
        if bias is not None:
            taken.add(bias[0])
        nodes.append(_with_bias(entry, bias))
    nodes += [_itself(jaxpr, leaf) for leaf in plain if leaf not in taken]
    completed = [_completed(jaxpr, node) for node in nodes]
    return [node for node in completed if node is not None]


def _completed(jaxpr: Any, node: LossNode) -> LossNode | None:
    """With the rest of the loss, and the axes along which that is a sum; None if it does not depend on it."""
    at, dependent = [], {node.variable}
    for i, eqn in enumerate(jaxpr.eqns):
        if any(not isinstance(v, _jax.Literal) and v in dependent for v in eqn.invars):
            at.append(i)
            dependent.update(eqn.outvars)
    after = [jaxpr.eqns[i] for i in at]
    (result,) = jaxpr.outvars
    if isinstance(result, _jax.Literal) or result not in dependent:
        return None
    free = tuple(v for v in _jax.free_variables(after) if v is not node.variable)
    tail = _jax.jaxpr_of(after, [node.variable, *free], [result], "tail")
    shape = node.variable.aval.shape
    apart = tuple(size > 1 and is_separable(tail, 0, axis) for axis, size in enumerate(shape))
    return replace(node, term=jaxpr, after=tuple(at), tail=tail, free=free, apart=apart)


def _itself(jaxpr: Any, leaf: int) -> LossNode:
    variable = jaxpr.invars[leaf]
    axes = tuple(range(len(variable.aval.shape)))
    return LossNode(
        leaves=(leaf,), variable=variable, positions=(), features=axes, inputs=1,
        assign=lambda diagonal: {leaf: diagonal[0]},
    )  # fmt: skip


def _product(jaxpr: Any, leaf: int, uses: Counter[Any]) -> LossNode | None:
    """The one product that a leaf enters, after views of it."""
    variable, views = jaxpr.invars[leaf], []
    while True:
        if uses[variable] != 1 or variable in jaxpr.outvars:
            return None
        (eqn,) = [e for e in jaxpr.eqns if variable in e.invars]
        if not is_view(eqn):
            break
        views.append(eqn)
        (variable,) = eqn.outvars
    view = _jax.jaxpr_of(views, [jaxpr.invars[leaf]], [variable], "view")
    if eqn.primitive.name == "dot_general":
        return _dot(eqn, leaf, list(eqn.invars).index(variable), view)
    if eqn.primitive.name == "conv_general_dilated" and eqn.invars[1] is variable:
        return _convolution(eqn, leaf, view)
    return None


def _after_transposes(jaxpr: Any, node: LossNode, uses: Counter[Any]) -> LossNode:
    """The product with its axes where what follows has them."""
    while uses[node.variable] == 1 and node.variable not in jaxpr.outvars:
        (eqn,) = [e for e in jaxpr.eqns if node.variable in e.invars]
        if eqn.primitive.name != "transpose":
            break
        to = [list(eqn.params["permutation"]).index(d) for d in range(len(node.variable.aval.shape))]
        positions, features = (tuple(to[d] for d in axes) for axes in (node.positions, node.features))
        node = replace(node, variable=eqn.outvars[0], positions=positions, features=features)
    return node


def _through_view(view: Any, leaf: int) -> Callable[[Any], dict[int, Any]]:
    """From the layout of the operand back to that of the leaf, for a view that only moves entries."""
    aval = view.invars[0].aval
    like = jax.ShapeDtypeStruct(aval.shape, aval.dtype)
    back = jax.linear_transpose(lambda w: _jax.evaluate(view, (), [w])[0], like)
    dtype = view.outvars[0].aval.dtype if view.eqns else aval.dtype
    return lambda operand: {leaf: back(operand.astype(dtype))[0]}


def _dot(eqn: Any, leaf: int, side: int, view: Any) -> LossNode | None:
    contracted, batched = eqn.params["dimension_numbers"]
    if batched[0]:
        return None
    weight, data = eqn.invars[side].aval, eqn.invars[1 - side].aval
    summed, of_data = contracted[side], contracted[1 - side]
    outer = [d for d in range(len(weight.shape)) if d not in summed]
    inner = [d for d in range(len(data.shape)) if d not in of_data]
    first = range(len(inner) if side == 1 else len(outer))
    rest = range(len(first), len(inner) + len(outer))
    positions, features = (first, rest) if side == 1 else (rest, first)
    inputs = math.prod(weight.shape[d] for d in summed)
    back, order = _through_view(view, leaf), np.argsort([*summed, *outer]).tolist()

    def activations(a: Any) -> Any:
        return jnp.transpose(a, [*inner, *of_data]).reshape([*[data.shape[d] for d in inner], inputs])

    def assign(diagonal: Any) -> dict[int, Any]:
        split = diagonal.reshape([weight.shape[d] for d in [*summed, *outer]])
        return back(jnp.transpose(split, order))

    return LossNode(
        leaves=(leaf,), variable=eqn.outvars[0], positions=tuple(positions), features=tuple(features),
        inputs=inputs, data=eqn.invars[1 - side], activations=activations, assign=assign,
    )  # fmt: skip


def _convolution(eqn: Any, leaf: int, view: Any) -> LossNode | None:
    p, kernel = eqn.params, eqn.invars[1].aval.shape
    numbers = p["dimension_numbers"]
    if p["feature_group_count"] != 1 or p["batch_group_count"] != 1:
        return None
    taps = [numbers.rhs_spec[1], *numbers.rhs_spec[2:]]
    window = [kernel[d] for d in numbers.rhs_spec[2:]]
    out = numbers.out_spec
    positions = (out[0], *out[2:])
    order, inputs = np.argsort([*taps, numbers.rhs_spec[0]]).tolist(), math.prod(kernel[d] for d in taps)
    back = _through_view(view, leaf)

    def activations(x: Any) -> Any:
        found = jax.lax.conv_general_dilated_patches(
            x, window, p["window_strides"], p["padding"], p["lhs_dilation"], p["rhs_dilation"],
            numbers, p["precision"], p["preferred_element_type"],
        )  # fmt: skip
        return jnp.transpose(found, [*positions, out[1]])

    def assign(diagonal: Any) -> dict[int, Any]:
        split = diagonal.reshape([kernel[d] for d in [*taps, numbers.rhs_spec[0]]])
        return back(jnp.transpose(split, order))

    return LossNode(
        leaves=(leaf,), variable=eqn.outvars[0], positions=positions, features=(out[1],),
        inputs=inputs, data=eqn.invars[0], activations=activations, assign=assign,
    )  # fmt: skip


def _bias(jaxpr: Any, node: LossNode, candidates: Sequence[int], uses: Counter[Any]) -> Any:
    """`(leaf, its shape, the sum, its axes in the sum)` if a leaf is added to the product, and no more."""
    z = node.variable
    if uses[z] != 1 or z in jaxpr.outvars:
        return None
    (eqn,) = [e for e in jaxpr.eqns if z in e.invars]
    if eqn.primitive.name not in SUMS - {"sub"} or eqn.outvars[0].aval.shape != z.aval.shape:
        return None
    other = eqn.invars[1 - list(eqn.invars).index(z)]
    sizes = [z.aval.shape[d] for d in node.features]
    for leaf in candidates:
        variable = jaxpr.invars[leaf]
        chain = _chain(jaxpr, variable, other, uses)
        if chain is None or math.prod(variable.aval.shape) != math.prod(sizes):
            continue
        body = _jax.jaxpr_of(chain, [variable], [other], "view")
        shape = variable.aval.shape
        reached = [
            propagate(Separability(), body, [d])[0] if shape[d] > 1 else None for d in range(len(shape))
        ]
        places = [d for d in reached if d is not None]
        wide = [d for d, size in zip(node.features, sizes, strict=True) if size > 1]
        if sorted(places) == sorted(wide):
            return leaf, shape, eqn.outvars[0], places
    return None


def _chain(jaxpr: Any, start: Any, end: Any, uses: Counter[Any]) -> list[Any] | None:
    """The views and broadcasts that lead from one variable to another, if that is all it is used for."""
    chain: list[Any] = []
    variable = start
    while variable is not end:
        if uses[variable] != 1 or variable in jaxpr.outvars:
            return None
        (eqn,) = [e for e in jaxpr.eqns if variable in e.invars]
        if eqn.primitive.name != "broadcast_in_dim" and not is_view(eqn):
            return None
        chain.append(eqn)
        (variable,) = eqn.outvars
    return chain


def _with_bias(node: LossNode, bias: Any) -> LossNode:
    """The node after the addition; the bias is a weight whose activation is 1."""
    if bias is None or node.activations is None:
        return node
    leaf, leaf_shape, total, places = bias
    make, assign_weight, shape = node.activations, node.assign, total.aval.shape
    wide = [d for d in node.features if shape[d] > 1]

    def activations(data: Any) -> Any:
        a = make(data)
        return jnp.concatenate([a, jnp.ones_like(a[..., :1])], axis=-1)

    def assign(diagonal: Any) -> dict[int, Any]:
        own = diagonal[-1].reshape([shape[d] for d in wide])
        own = jnp.transpose(own, [wide.index(d) for d in places])
        return {**assign_weight(diagonal[:-1]), leaf: own.reshape(leaf_shape)}

    return replace(
        node, leaves=(*node.leaves, leaf), variable=total, inputs=node.inputs + 1,
        activations=activations, assign=assign,
    )  # fmt: skip
