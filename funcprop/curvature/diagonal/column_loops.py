"""The loop of a program: blocks of columns, one after the other, added to the diagonals of its members."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from funcprop.curvature.diagonal.affine_cuts import column_terms
from funcprop.curvature.diagonal.columns import OUTPUTS, UNITS, ColumnForm, ColumnLoop

Diagonals = list[Any]


def diagonals_of(program: ColumnLoop, data: Sequence[Any], done: Callable[[Any], None] | None) -> Diagonals:
    """`diagonal[q, i, r]` of each member; `done(number)` is called with the number of each iteration.

    `data` are the other operands of the members' products.
    """
    activations = [m.node.canonical_activations(d) for m, d in zip(program.members, data, strict=True)]
    empty, advance, finish = (_by_outputs if program.form == OUTPUTS else _by_products)(program, activations)

    def iteration(totals: Any, at: tuple[Any, Any, Any]) -> tuple[Any, None]:
        number, which, block = at
        totals = advance(totals, which, block)
        if done is not None:
            done(number)
        return totals, None

    which, blocks = np.array(program.steps()).T
    numbered = jnp.arange(len(which)), jnp.asarray(which), jnp.asarray(blocks)
    return finish(jax.lax.scan(iteration, empty, numbered)[0])


def _empty(columns: ColumnForm) -> Any:
    _, _, Q, R = columns.node.sizes()
    return jnp.zeros((Q, columns.node.inputs, R), columns.node.variable.aval.dtype)


# --- products ---------------------------------------------------------------------------------


class _Alike:
    """Members that differ in their node's values alone, so that their entries are made by the same code.

    `a[k, s, m, i]` are the activations of member `k`. A place is where a column has its 1.
    """

    def __init__(self, members: Sequence[ColumnForm], activations: Sequence[Any], block: int) -> None:
        self.node, self.members, self.a, self.block = members[0].node, members, jnp.stack(activations), block

    def chosen(self, k: Any) -> Any:
        """The activations of member `k`."""
        return jax.lax.dynamic_index_in_dim(self.a, k, keepdims=False)


class _Units(_Alike):
    """The units `(m, q)`: of one `m`, and a run of `q`."""

    def places(self, number: Any) -> Any:
        """`m` and `q` of a block."""
        runs = -(-self.node.sizes()[2] // self.block)
        q = number % runs * self.block + jnp.arange(self.block)
        return jnp.broadcast_to(number // runs, q.shape), q

    def tangent(self, place: Any, k: int) -> Any:
        """What the Hessian is multiplied by: one in all slices; zeros where the place is −1."""
        _, M, Q, _ = sizes = self.node.sizes()
        m, q = place
        unit = (jnp.arange(M) == m)[:, None] & (jnp.arange(Q) == q)
        return jnp.broadcast_to(unit[None, :, :, None], sizes).astype(self.node.variable.aval.dtype)

    def response(self, place: Any, product: Any, k: int) -> Any:
        """What is needed of a product: `[s, m, r]` of the same `q`."""
        return jax.lax.dynamic_index_in_dim(product, place[1], 2, keepdims=False)

    def entries(self, k: Any, number: Any, responses: Any) -> tuple[Any, Any]:
        """Where to add, and `[q, i, r]`, of a block."""
        (m, *_), q = self.places(number)
        a = self.chosen(k)
        weight = jax.lax.dynamic_index_in_dim(a, m, 1) * a  # [s, m, i]
        return (q,), jnp.einsum("smi,qsmr->qir", weight, responses)


class _Directions(_Alike):
    """The directions `(i, q)`."""

    def places(self, number: Any) -> Any:
        """`i` and `q` of a block."""
        flat = number * self.block + jnp.arange(self.block)
        return flat % self.node.inputs, flat // self.node.inputs

    def _along(self, i: Any, k: int) -> Any:
        a = jax.lax.dynamic_index_in_dim(self.a[k], i, 2, keepdims=False)
        return a.astype(self.node.variable.aval.dtype)

    def tangent(self, place: Any, k: int) -> Any:
        """What the Hessian is multiplied by: `a[:, :, i]` at `q`; zeros where the place is −1."""
        i, q = place
        unit = (jnp.arange(self.node.sizes()[2]) == q).astype(self.node.variable.aval.dtype)
        return jnp.broadcast_to(self._along(i, k)[:, :, None, None] * unit[:, None], self.node.sizes())

    def response(self, place: Any, product: Any, k: int) -> Any:
        """What is needed of a product: its own with the direction, `[r]`."""
        i, q = place
        taken = jax.lax.dynamic_index_in_dim(product, q, 2, keepdims=False)
        return jnp.sum(self._along(i, k)[:, :, None] * taken, axis=(0, 1))

    def entries(self, k: Any, number: Any, responses: Any) -> tuple[Any, Any]:
        """Where to add, and `[(i, q), r]`, of a block."""
        i, q = self.places(number)
        return (q, i), responses


def _by_products(program: ColumnLoop, activations: Sequence[Any]) -> tuple[Any, Any, Any]:
    members = program.members
    alike: dict[Any, list[int]] = {}
    for n, m in enumerate(members):
        kind = m.form, m.node.sizes(), m.node.inputs, m.node.variable.aval.dtype, activations[n].dtype
        alike.setdefault(kind, []).append(n)
    kinds = [
        (_Units if form == UNITS else _Directions)(
            [members[n] for n in which], [activations[n] for n in which], program.block
        )
        for (form, *_), which in alike.items()
    ]
    # Of each member: its kind, and its number among those.
    of_kind, among = np.zeros((2, len(members)), int)
    for c, which in enumerate(alike.values()):
        of_kind[which], among[which] = c, np.arange(len(which))
    order = [n for which in alike.values() for n in which]

    def column(places: Sequence[Any]) -> list[Any]:
        flat = [(kind, k) for kind in kinds for k in range(len(kind.members))]
        tangents = [kind.tangent(place, k) for (kind, k), place in zip(flat, places, strict=True)]
        at = [tangents[order.index(n)] for n in range(len(members))]
        products = program.linear(at)
        found = [
            kind.response(place, products[n], k)
            for (kind, k), place, n in zip(flat, places, order, strict=True)
        ]
        responses = []
        for kind in kinds:
            mine, mine_at = found[: len(kind.members)], places[: len(kind.members)]
            found, places = found[len(kind.members) :], places[len(kind.members) :]
            response = mine[0]
            for other, place in zip(mine[1:], mine_at[1:], strict=True):
                response = jnp.where(place[0] >= 0, other, response)
            responses.append(response)
        return responses

    def added(c: int, k: Any, number: Any, totals: Any, responses: Any) -> Any:
        at, found = kinds[c].entries(k, number, responses[c])
        # Indices past the end are those of an incomplete block.
        total = totals[c].at[(k, *at)].add(found, mode="drop")
        return [*totals[:c], total, *totals[c + 1 :]]

    def advance(totals: Any, which: Any, number: Any) -> Any:
        c, k = jnp.asarray(of_kind)[which], jnp.asarray(among)[which]
        places = []
        for of, kind in enumerate(kinds):
            block = kind.places(number)
            for other in range(len(kind.members)):
                active = (c == of) & (k == other)
                places.append(jax.tree.map(lambda at, active=active: jnp.where(active, at, -1), block))
        responses = jax.vmap(column)(places)
        branches = [functools.partial(added, of) for of in range(len(kinds))]
        return jax.lax.switch(c, branches, k, number, totals, responses)

    def finish(totals: Any) -> Diagonals:
        return [totals[of_kind[n]][among[n]] for n in range(len(members))]

    empty = [jnp.stack([_empty(m) for m in kind.members]) for kind in kinds]
    return empty, advance, finish


# --- sweeps from outputs ----------------------------------------------------------------------


def _by_outputs(program: ColumnLoop, activations: Sequence[Any]) -> tuple[Any, Any, Any]:
    """Columns of the outputs' Hessians, to be added everywhere and for every member."""
    assert program.eigensystem is not None
    eigenvalues, eigenvectors = program.eigensystem()

    def advance(totals: Diagonals, _: Any, number: Any) -> Diagonals:
        at = number * program.block + jnp.arange(program.block)
        vectors = jnp.take(eigenvectors, at, axis=2, mode="fill", fill_value=0)  # [s r, c, columns]
        cotangents = jax.vmap(program.linear, in_axes=2)(vectors)
        weights = jnp.take(eigenvalues, at, axis=1, mode="fill", fill_value=0).T
        found = []
        for member, total, g, a in zip(program.members, totals, cotangents, activations, strict=True):
            S, _, _, R = sizes = member.node.sizes()
            found.append(total + column_terms(g, weights.reshape(-1, S, R), a, sizes))
        return found

    return [_empty(m) for m in program.members], advance, lambda totals: totals
