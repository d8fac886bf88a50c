"""The variable through which a parameter leaf acts on a loss, and what of the loss comes after it.

A weight that enters one product `z = a w` (a `dot_general` or a convolution) acts through `z`, the bias that
is added to `z` likewise; every other leaf acts through itself. In the coordinates of this module `z` is
`Z[s, m, q, r]`: positions `s` that the loss keeps apart (examples), positions `m` that it mixes (tokens under
attention), features `q` that it mixes and `r` that it keeps apart; and `a` is `a[s, m, i]`, so that
`∂Z[s, m, q, r] / ∂w[i, q', r'] = a[s, m, i] δ_qq' δ_rr'`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from funcprop import _compat
from funcprop.curvature.dependence import propagate
from funcprop.curvature.separability import Separability, is_separable

_VIEWS = frozenset(
    {"reshape", "transpose", "squeeze", "expand_dims", "convert_element_type", "copy", "copy_p"}
)


@dataclass(frozen=True, eq=False)
class Node:
    """Where one or two leaves act, and the rest of the loss.

    `tail` is a jaxpr from `variable` and then `free` to the loss. `positions` and `features` are the axes of
    the variable, `apart` says of each axis whether the loss is a sum over its slices. `data` is the other
    operand of the product and `activations` makes `a[*positions, i]` of it; without a product both are None
    and `a` is 1.
    `assign` takes the diagonal `[i, *features]` apart: `{leaf: its diagonal}`.
    """

    leaves: tuple[int, ...]
    variable: Any
    tail: Any
    free: tuple[Any, ...]
    positions: tuple[int, ...]
    features: tuple[int, ...]
    apart: tuple[bool, ...]
    inputs: int
    data: Any
    activations: Callable[[Any], Any] | None
    assign: Callable[[Any], dict[int, Any]]

    def sizes(self) -> tuple[int, int, int, int]:
        """`S, M, Q, R`."""
        shape = self.variable.aval.shape

        def size(axes: Sequence[int], apart: bool) -> int:
            return math.prod(shape[d] for d in axes if self.apart[d] == apart)

        at, of = self.positions, self.features
        return size(at, True), size(at, False), size(of, False), size(of, True)

    def order(self) -> list[int]:
        """The axes of the variable in the order `s, m, q, r`."""
        groups = [(self.positions, True), (self.positions, False), (self.features, False)]
        return [d for axes, apart in [*groups, (self.features, True)] for d in axes if self.apart[d] == apart]

    def to_variable(self, Z: Any) -> Any:
        """From `Z[s, m, q, r]` to the variable's own axes."""
        order, shape = self.order(), self.variable.aval.shape
        return jnp.transpose(Z.reshape([shape[d] for d in order]), np.argsort(order).tolist())

    def from_variable(self, z: Any) -> Any:
        """From the variable's own axes to `Z[s, m, q, r]`."""
        return jnp.transpose(z, self.order()).reshape(self.sizes())

    def canonical_activations(self, data: Any) -> Any:
        """`a[s, m, i]`."""
        S, M, _, _ = self.sizes()
        if self.activations is None:
            return jnp.ones((1, 1, 1), self.variable.aval.dtype)
        a = self.activations(data)  # axes: positions, i
        kept = [p for p in self.order() if p in self.positions]
        return jnp.transpose(a, [*[self.positions.index(p) for p in kept], a.ndim - 1]).reshape(S, M, -1)

    def split(self, diagonal: Any) -> dict[int, Any]:
        """The leaves' diagonals from `diagonal[q, i, r]`."""
        shape = self.variable.aval.shape
        mixed = [d for d in self.features if not self.apart[d]]
        kept = [d for d in self.features if self.apart[d]]
        parts = diagonal.reshape([*[shape[d] for d in mixed], self.inputs, *[shape[d] for d in kept]])
        order = [len(mixed)] + [
            mixed.index(d) if d in mixed else len(mixed) + 1 + kept.index(d) for d in self.features
        ]
        return self.assign(jnp.transpose(parts, order))


def find_nodes(jaxpr: Any, leaves: Sequence[int]) -> list[Node]:
    """The nodes of the leaves (positions among the inputs), from which the one result depends on them."""
    uses = Counter(v for eqn in jaxpr.eqns for v in eqn.invars if not isinstance(v, _compat.Literal))
    uses.update(v for v in jaxpr.outvars if not isinstance(v, _compat.Literal))
    products: list[tuple[int, Node]] = []
    plain: list[int] = []
    for leaf in leaves:
        found = _product(jaxpr, leaf, uses)
        if found is None:
            plain.append(leaf)
        else:
            products.append((leaf, found))
    taken: set[int] = set()
    nodes: list[Node] = []
    for _, entry in products:
        bias = _bias(jaxpr, entry, [leaf for leaf in plain if leaf not in taken], uses)
        if bias is not None:
            taken.add(bias[0])
        nodes.append(_with_bias(entry, bias))
    nodes += [_itself(jaxpr, leaf) for leaf in plain if leaf not in taken]
    completed = [_completed(jaxpr, node) for node in nodes]
    return [node for node in completed if node is not None]


def _completed(jaxpr: Any, node: Node) -> Node | None:
    """With the rest of the loss, and the axes along which that is a sum; None if it does not depend on it."""
    after, dependent = [], {node.variable}
    for eqn in jaxpr.eqns:
        if any(not isinstance(v, _compat.Literal) and v in dependent for v in eqn.invars):
            after.append(eqn)
            dependent.update(eqn.outvars)
    (result,) = jaxpr.outvars
    if isinstance(result, _compat.Literal) or result not in dependent:
        return None
    free = tuple(v for v in _compat.free_variables(after) if v is not node.variable)
    tail = _compat.jaxpr_of(after, [node.variable, *free], [result], "tail")
    shape = node.variable.aval.shape
    apart = tuple(size > 1 and is_separable(tail, 0, axis) for axis, size in enumerate(shape))
    return replace(node, tail=tail, free=free, apart=apart)


def _itself(jaxpr: Any, leaf: int) -> Node:
    variable = jaxpr.invars[leaf]
    axes = tuple(range(len(variable.aval.shape)))
    return Node(
        (leaf,), variable, None, (), (), axes, (), 1, None, None, lambda diagonal: {leaf: diagonal[0]}
    )


def _product(jaxpr: Any, leaf: int, uses: Counter[Any]) -> Node | None:
    """The one product that a leaf enters, after views of it."""
    variable, views = jaxpr.invars[leaf], []
    while True:
        if uses[variable] != 1 or variable in jaxpr.outvars:
            return None
        (eqn,) = [e for e in jaxpr.eqns if variable in e.invars]
        if eqn.primitive.name not in _VIEWS:
            break
        views.append(eqn)
        (variable,) = eqn.outvars
    view = _compat.jaxpr_of(views, [jaxpr.invars[leaf]], [variable], "view")
    if eqn.primitive.name == "dot_general":
        return _dot(eqn, leaf, list(eqn.invars).index(variable), view)
    if eqn.primitive.name == "conv_general_dilated" and eqn.invars[1] is variable:
        return _convolution(eqn, leaf, view)
    return None


def _through_view(view: Any, leaf: int) -> Callable[[Any], dict[int, Any]]:
    """From the layout of the operand back to that of the leaf, for a view that only moves entries."""
    aval = view.invars[0].aval
    like = jax.ShapeDtypeStruct(aval.shape, aval.dtype)
    back = jax.linear_transpose(lambda w: _compat.evaluate(view, (), [w])[0], like)
    dtype = view.outvars[0].aval.dtype if view.eqns else aval.dtype
    return lambda operand: {leaf: back(operand.astype(dtype))[0]}


def _dot(eqn: Any, leaf: int, side: int, view: Any) -> Node | None:
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

    return Node(
        (leaf,), eqn.outvars[0], None, (), tuple(positions), tuple(features), (), inputs,
        eqn.invars[1 - side], activations, assign,
    )  # fmt: skip


def _convolution(eqn: Any, leaf: int, view: Any) -> Node | None:
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

    return Node(
        (leaf,),
        eqn.outvars[0],
        None,
        (),
        positions,
        (out[1],),
        (),
        inputs,
        eqn.invars[0],
        activations,
        assign,
    )


def _bias(jaxpr: Any, node: Node, candidates: Sequence[int], uses: Counter[Any]) -> Any:
    """`(leaf, its shape, the sum, its axes in the sum)` if a leaf is added to the product, and no more."""
    z = node.variable
    if uses[z] != 1 or z in jaxpr.outvars:
        return None
    (eqn,) = [e for e in jaxpr.eqns if z in e.invars]
    if eqn.primitive.name not in ("add", "add_any") or eqn.outvars[0].aval.shape != z.aval.shape:
        return None
    other = eqn.invars[1 - list(eqn.invars).index(z)]
    sizes = [z.aval.shape[d] for d in node.features]
    for leaf in candidates:
        variable = jaxpr.invars[leaf]
        chain = _chain(jaxpr, variable, other, uses)
        if chain is None or math.prod(variable.aval.shape) != math.prod(sizes):
            continue
        body = _compat.jaxpr_of(chain, [variable], [other], "view")
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
        if eqn.primitive.name not in (*_VIEWS, "broadcast_in_dim"):
            return None
        chain.append(eqn)
        (variable,) = eqn.outvars
    return chain


def _with_bias(node: Node, bias: Any) -> Node:
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
