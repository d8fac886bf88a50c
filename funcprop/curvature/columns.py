"""The diagonal of the Hessian at one node, column by column.

With `L(Z)` the loss as a function of the node (`funcprop.curvature.nodes`) and `H = ∂²L/∂Z²`, an entry is

    diagonal[q, i, r] = Σ_{s, m, m'} a[s, m, i] a[s, m', i] H[(s, m, q, r), (s, m', q, r)].

Two forms compute it by products with `H`, which is linearised once:

* *units*: one product for every `(m, q)`, all `s` and `r` at once, for they do not mix;
* *directions*: one product for every `(i, q)`, in the direction `a[:, :, i]`.

A leaf that is its own node has `a = 1` and as many columns as entries that mix.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from funcprop import _compat
from funcprop.curvature.nodes import Node
from funcprop.flops import of_jaxpr
from funcprop.registry import RuleSet
from funcprop.rewrite import with_rules

# Measured on two x86 cores: smaller blocks leave them idle, larger ones leave their caches.
_CACHE_BYTES = 8 << 20
_FEWEST, _MOST = 8, 128


@dataclass(frozen=True, eq=False)
class Columns:
    """How a node's diagonal is computed: `form`, how many products with the Hessian, and what one costs."""

    node: Node
    form: str
    count: int
    block: int
    flops: int
    nbytes: int

    @property
    def blocks(self) -> int:
        """How many blocks; the last one of a row may be partly empty."""
        _, M, Q, _ = self.node.sizes()
        return M * -(-Q // self.block) if self.form == "units" else -(-self.count // self.block)


def hessian_of(node: Node, free: Sequence[Any], value: Any, rules: RuleSet | None) -> Callable[[Any], Any]:
    """`V ↦ H V` in the node's coordinates, linearised at its value."""

    def loss(z: Any) -> Any:
        return _compat.evaluate(node.tail, (), [z, *free])[0]

    gradient = jax.grad(with_rules(loss, rules))
    _, product = jax.linearize(lambda Z: node.from_variable(gradient(node.to_variable(Z))), value)
    return product


def choose(
    node: Node, product: Callable[[Any], Any], like: Any, byte_limit: int, block: int | None
) -> Columns:
    """The cheaper of the two forms, by the floating-point operations of the linearised program."""
    S, M, Q, R = node.sizes()
    jaxpr = jax.make_jaxpr(product)(jax.ShapeDtypeStruct(like.shape, like.dtype))
    one, nbytes = of_jaxpr(jaxpr), peak_bytes(jaxpr)
    pairs = S * M * R
    forms = {"directions": (node.inputs * Q, one + (3 * pairs if node.activations else 0))}
    if node.activations is not None:
        forms["units"] = M * Q, one + 2 * pairs * node.inputs
    form = min(forms, key=lambda name: math.prod(forms[name]))
    count, flops = forms[form]
    if form == "units":
        nbytes += like.dtype.itemsize * (pairs if M == 1 else 2 * pairs)
    longest = Q if form == "units" else count
    if block is None:
        block = min(max(_FEWEST, _CACHE_BYTES // max(nbytes, 1)), _MOST, max(1, byte_limit // max(nbytes, 1)))
    block = min(block, longest)
    block = -(-longest // -(-longest // block))  # of equal length, so that little is computed in vain
    return Columns(node, form, count, block, flops, nbytes)


def peak_bytes(jaxpr: Any) -> int:
    """The most bytes that intermediates of a jaxpr hold at once, each from its equation to its last use."""
    jaxpr = _compat.open_jaxpr(jaxpr)
    last: dict[Any, int] = {}
    for i, eqn in enumerate(jaxpr.eqns):
        last.update({v: i for v in [*eqn.invars, *eqn.outvars] if not isinstance(v, _compat.Literal)})
    last.update({v: len(jaxpr.eqns) for v in jaxpr.outvars if not isinstance(v, _compat.Literal)})
    held = {v: _nbytes(v) for v in jaxpr.invars}
    peak = sum(held.values())
    for i, eqn in enumerate(jaxpr.eqns):
        held.update({v: _nbytes(v) for v in eqn.outvars})
        inside = max((peak_bytes(body) for _, body in _compat.sub_jaxprs(eqn)), default=0)
        peak = max(peak, sum(held.values()) + inside)
        for v in [v for v in held if last.get(v, -1) <= i]:
            del held[v]
    return peak


def _nbytes(v: Any) -> int:
    dtype = getattr(v.aval, "dtype", None)
    return math.prod(getattr(v.aval, "shape", ())) * getattr(dtype, "itemsize", 0)


def diagonal_of(
    columns: Columns,
    product: Callable[[Any], Any],
    a: Any,
    dtype: Any,
    done: Callable[[Any], None] | None,
) -> Any:
    """`diagonal[q, i, r]`, block after block; `done(block)` is called with the number of each."""
    S, M, Q, R = columns.node.sizes()
    I, B = columns.node.inputs, columns.block
    form = _units if columns.form == "units" else _directions

    def step(accumulated: Any, number: Any) -> tuple[Any, None]:
        at, found = form(number, product, a, (S, M, Q, R, I, B), dtype)
        if done is not None:
            done(number)
        # Indices past the end are those of an incomplete block.
        return accumulated.at[at].add(found, mode="drop"), None

    empty = jnp.zeros((Q, I, R), dtype)
    return jax.lax.scan(step, empty, jnp.arange(columns.blocks))[0]


def _units(number: Any, product: Any, a: Any, sizes: Sequence[int], dtype: Any) -> tuple[Any, Any]:
    """Columns of the units `(m, q)`, of one `m` and a run of `q`: where to add, and `[q, i, r]`."""
    S, M, Q, R, _, B = sizes
    m, run = number // -(-Q // B), number % -(-Q // B)
    q = run * B + jnp.arange(B)

    def column(q: Any) -> Any:
        unit = jnp.zeros((M, Q), dtype).at[m, q].set(1, mode="drop")
        response = product(jnp.broadcast_to(unit[None, :, :, None], (S, M, Q, R)))
        return jax.lax.dynamic_index_in_dim(response, q, 2, keepdims=False)

    responses = jax.vmap(column)(q)  # [q, s, m, r]
    weight = jax.lax.dynamic_index_in_dim(a, m, 1) * a  # [s, m, i]
    return (q,), jnp.einsum("smi,qsmr->qir", weight, responses)


def _directions(number: Any, product: Any, a: Any, sizes: Sequence[int], dtype: Any) -> tuple[Any, Any]:
    """Columns of the directions `(i, q)`: where to add, and `[(i, q), r]`."""
    S, M, Q, R, I, B = sizes
    flat = number * B + jnp.arange(B)
    i, q = flat % I, flat // I

    def column(i: Any, q: Any) -> Any:
        along = jax.lax.dynamic_index_in_dim(a, i, 2, keepdims=False).astype(dtype)
        unit = (jnp.arange(Q) == q).astype(dtype)
        direction = along[:, :, None, None] * unit[:, None]
        response = product(jnp.broadcast_to(direction, (S, M, Q, R)))
        taken = jax.lax.dynamic_index_in_dim(response, q, 2, keepdims=False)
        return jnp.sum(along[:, :, None] * taken, axis=(0, 1))

    return (q, i), jax.vmap(column)(i, q)
