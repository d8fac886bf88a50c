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
from funcprop.operators.parameters import single_at_least

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
    return jnp.zeros((Q, columns.node.inputs, R), single_at_least(columns.node.variable.aval.dtype))


# --- products ---------------------------------------------------------------------------------


class _Alike:
    """Members that differ in their node's values alone, so that their entries are made by the same code.

    `a[k, s, m, i]` are the activations of member `k`, whose number in the program is `numbers[k]`. A place is
    where a column has its 1.
    """

    def __init__(self, program: ColumnLoop, activations: Sequence[Any], numbers: Sequence[int]) -> None:
        self.node, self.block = program.members[numbers[0]].node, program.block
        self.numbers, self.a = numbers, jnp.stack([activations[n] for n in numbers])

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
        """Make the vector that the Hessian is multiplied by: one in all slices."""
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
        """Make the vector that the Hessian is multiplied by: `a[:, :, i]` at `q`."""
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
    alike: dict[Any, list[int]] = {}
    for n, (m, a) in enumerate(zip(program.members, activations, strict=True)):
        key = m.form, m.node.sizes(), m.node.inputs, m.node.variable.aval.dtype, a.dtype
        alike.setdefault(key, []).append(n)
    kinds = [
        (_Units if form == UNITS else _Directions)(program, activations, numbers)
        for (form, *_), numbers in alike.items()
    ]
    # The kind of each member, and its number among those of this kind.
    found = {n: (c, k) for c, kind in enumerate(kinds) for k, n in enumerate(kind.numbers)}
    kind_of, number_in_kind = np.array([found[n] for n in range(len(found))], np.int32).T

    def added(c: int, k: Any, number: Any, totals: Any, responses: Any) -> Any:
        at, found = kinds[c].entries(k, number, responses[c])
        # Indices past the end are those of an incomplete block.
        total = totals[c].at[(k, *at)].add(found.astype(totals[c].dtype), mode="drop")
        return [*totals[:c], total, *totals[c + 1 :]]

    def advance(totals: Any, which: Any, number: Any) -> Any:
        c, k = jnp.asarray(kind_of)[which], jnp.asarray(number_in_kind)[which]

        def column(places: Sequence[Any]) -> list[Any]:
            """Compute the response to a column of `which`, of each kind as if it were this member's."""
            tangents = {
                n: jnp.where(which == n, kind.tangent(place, j), 0)
                for kind, place in zip(kinds, places, strict=True)
                for j, n in enumerate(kind.numbers)
            }
            products = program.linear([tangents[n] for n in range(len(tangents))])
            return [
                jax.lax.select_n(
                    jnp.minimum(k, len(kind.numbers) - 1),
                    *(kind.response(place, products[n], j) for j, n in enumerate(kind.numbers)),
                )
                for kind, place in zip(kinds, places, strict=True)
            ]

        responses = jax.vmap(column)([kind.places(number) for kind in kinds])
        branches = [functools.partial(added, of) for of in range(len(kinds))]
        return jax.lax.switch(c, branches, k, number, totals, responses)

    def finish(totals: Any) -> Diagonals:
        return [totals[c][k] for c, k in zip(kind_of, number_in_kind, strict=True)]

    empty = [jnp.stack([_empty(program.members[n]) for n in kind.numbers]) for kind in kinds]
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
