"""The diagonal of the Hessian at one node, column by column.

With `L(Z)` the loss as a function of the node (`funcprop.curvature.nodes`) and `H = ∂²L/∂Z²`, an entry is

    diagonal[q, i, r] = Σ_{s, m, m'} a[s, m, i] a[s, m', i] H[(s, m, q, r), (s, m', q, r)].

Three forms compute it. Two make products with `H`, which is linearised once:

* *units*: one product for every `(m, q)`, all `s` and `r` at once, for they do not mix;
* *directions*: one product for every `(i, q)`, in the direction `a[:, :, i]`.

The third, *outputs*, sweeps backwards from outputs up to which the loss is piecewise affine, once for every
entry of an independent slice of them (`funcprop.curvature.cuts`).

A leaf that is its own node has `a = 1` and as many columns as entries that mix.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from funcprop import _compat
from funcprop.curvature.cuts import Cut, column_terms, eigensystem, find_cut, functions_of
from funcprop.curvature.nodes import Node
from funcprop.flops import of_jaxpr
from funcprop.memory.rows import peak_bytes
from funcprop.registry import RuleSet
from funcprop.rewrite import with_rules

# Measured on two x86 cores: smaller blocks leave them idle, larger ones leave their caches.
_CACHE_BYTES = 20 << 20
_FEWEST, _MOST = 8, 128
# The eigenvectors of larger matrices, one for every example, cost more than they save.
_LARGEST_SLICE = 256
_EIGENVECTORS = 25  # operations for the eigenvectors of an n × n matrix, divided by n³


@dataclass(frozen=True, eq=False)
class Columns:
    """How a node's diagonal is computed: `form`, how many products with the Hessian, and what one costs."""

    node: Node
    form: str
    count: int
    block: int
    flops: int
    nbytes: int
    product: Callable[[Any], Any]
    cut: Cut | None = None
    eigensystem: Callable[[], tuple[Any, Any]] | None = None

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
    node: Node,
    read: Callable[[Any], Any],
    rules: RuleSet | None,
    byte_limit: int,
    block: int | None,
) -> Columns:
    """The cheapest of the forms, by the floating-point operations of the linearised programs.

    `read` gives the values of variables.
    """
    value = node.from_variable(read(node.variable))
    found = list(_by_products(node, read, value, rules))
    found += _by_outputs(node, read, value, rules, 2 * min(c.count for c in found))
    fitting = [c for c in found if c.nbytes <= byte_limit] or found
    best = min(fitting, key=lambda c: c.count * c.flops)
    longest = node.sizes()[2] if best.form == "units" else best.count
    if block is None:
        most = min(_MOST, max(1, byte_limit // max(best.nbytes, 1)))
        block = min(max(_FEWEST, _CACHE_BYTES // max(best.nbytes, 1)), most)
    block = min(block, longest)
    # Of equal length, so that little is computed in vain.
    return replace(best, block=-(-longest // -(-longest // block)))


def _by_products(
    node: Node, read: Callable[[Any], Any], value: Any, rules: RuleSet | None
) -> Iterator[Columns]:
    S, M, Q, R = node.sizes()
    product = hessian_of(node, [read(v) for v in node.free], value, rules)
    flops, nbytes = _cost(product, value)
    pairs, itemsize = S * M * R, value.dtype.itemsize
    along = 3 * pairs if node.activations is not None else 0
    yield Columns(node, "directions", node.inputs * Q, 1, flops + along, nbytes, product)
    if node.activations is not None:
        flops, nbytes = flops + 2 * pairs * node.inputs, nbytes + itemsize * pairs * min(M, 2)
        yield Columns(node, "units", M * Q, 1, flops, nbytes, product)


def _by_outputs(
    node: Node, read: Callable[[Any], Any], value: Any, rules: RuleSet | None, most: int
) -> Iterator[Columns]:
    """If it takes at most so many columns; one is a sweep backwards, about half a product."""
    cut = find_cut(node)
    if cut is None or cut.size > min(most, _LARGEST_SLICE):
        return
    S, M, Q, R = node.sizes()
    pull, product, outputs = functions_of(cut, read, value, rules)
    flops, nbytes = _cost(pull, outputs)
    of_loss, loss_bytes = _cost(product, outputs)
    terms = S * Q * R * node.inputs
    flops += 3 * S * M * Q * R + (2 * terms * (M + 1) if M > 1 else 2 * terms // cut.size)
    flops += of_loss + _EIGENVECTORS * cut.size * outputs.size
    nbytes += value.dtype.itemsize * terms if M > 1 else 0
    at_once = max(1, _CACHE_BYTES // max(loss_bytes, 1))
    yield Columns(
        node, "outputs", cut.size, 1, flops, nbytes, pull, cut, lambda: eigensystem(product, outputs, at_once)
    )


def _cost(linear: Callable[[Any], Any], like: Any) -> tuple[int, int]:
    """Floating-point operations and bytes of one column."""
    jaxpr = jax.make_jaxpr(linear)(jax.ShapeDtypeStruct(like.shape, like.dtype))
    return of_jaxpr(jaxpr), peak_bytes(jaxpr)


def diagonal_of(columns: Columns, data: Any, dtype: Any, done: Callable[[Any], None] | None) -> Any:
    """`diagonal[q, i, r]`, block after block; `done(block)` is called with the number of each."""
    _, _, Q, R = columns.node.sizes()
    a = columns.node.canonical_activations(data)
    form = {"units": _units, "directions": _directions}.get(columns.form)
    if form is None:
        assert columns.eigensystem is not None
        form = functools.partial(_outputs, columns.eigensystem())

    def step(accumulated: Any, number: Any) -> tuple[Any, None]:
        at, found = form(number, columns, a, dtype)
        if done is not None:
            done(number)
        # Indices past the end are those of an incomplete block.
        return accumulated.at[at].add(found, mode="drop"), None

    empty = jnp.zeros((Q, columns.node.inputs, R), dtype)
    return jax.lax.scan(step, empty, jnp.arange(columns.blocks))[0]


def _units(number: Any, columns: Columns, a: Any, dtype: Any) -> tuple[Any, Any]:
    """Columns of the units `(m, q)`, of one `m` and a run of `q`: where to add, and `[q, i, r]`."""
    (S, M, Q, R), B = columns.node.sizes(), columns.block
    m, run = number // -(-Q // B), number % -(-Q // B)
    q = run * B + jnp.arange(B)

    def column(q: Any) -> Any:
        unit = jnp.zeros((M, Q), dtype).at[m, q].set(1, mode="drop")
        response = columns.product(jnp.broadcast_to(unit[None, :, :, None], (S, M, Q, R)))
        return jax.lax.dynamic_index_in_dim(response, q, 2, keepdims=False)

    responses = jax.vmap(column)(q)  # [q, s, m, r]
    weight = jax.lax.dynamic_index_in_dim(a, m, 1) * a  # [s, m, i]
    return (q,), jnp.einsum("smi,qsmr->qir", weight, responses)


def _directions(number: Any, columns: Columns, a: Any, dtype: Any) -> tuple[Any, Any]:
    """Columns of the directions `(i, q)`: where to add, and `[(i, q), r]`."""
    (S, M, Q, R), inputs, B = columns.node.sizes(), columns.node.inputs, columns.block
    flat = number * B + jnp.arange(B)
    i, q = flat % inputs, flat // inputs

    def column(i: Any, q: Any) -> Any:
        along = jax.lax.dynamic_index_in_dim(a, i, 2, keepdims=False).astype(dtype)
        unit = (jnp.arange(Q) == q).astype(dtype)
        direction = along[:, :, None, None] * unit[:, None]
        response = columns.product(jnp.broadcast_to(direction, (S, M, Q, R)))
        taken = jax.lax.dynamic_index_in_dim(response, q, 2, keepdims=False)
        return jnp.sum(along[:, :, None] * taken, axis=(0, 1))

    return (q, i), jax.vmap(column)(i, q)


def _outputs(eigen: tuple[Any, Any], number: Any, columns: Columns, a: Any, dtype: Any) -> tuple[Any, Any]:
    """Columns of the outputs' Hessians: to be added everywhere, `[q, i, r]`."""
    assert columns.cut is not None
    S, _, _, R = sizes = columns.node.sizes()
    eigenvalues, eigenvectors = eigen
    at = number * columns.block + jnp.arange(columns.block)
    vectors = jnp.take(eigenvectors, at, axis=2, mode="fill", fill_value=0)  # [s r, c, columns]
    cotangents = jax.vmap(columns.product, in_axes=2)(vectors)
    weights = jnp.take(eigenvalues, at, axis=1, mode="fill", fill_value=0).T.reshape(-1, S, R)
    return (), column_terms(columns.cut, cotangents, weights, a, sizes)
