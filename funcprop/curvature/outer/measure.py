"""One forward sweep and one backward sweep of all columns, part of a batch at a time, and their contractions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from funcprop.curvature.outer import contractions
from funcprop.curvature.outer.contractions import NORMS, SQUARES, SUM, Wanted
from funcprop.curvature.outer.forms import Form
from funcprop.curvature.outer.roots import Loss, Root
from funcprop.curvature.outer.study import Study
from funcprop.curvature.quantities import (
    EACH,
    EXACT,
    EXPAND,
    GRADIENT,
    GRAM,
    OUTPUTS,
    REDUCE,
    SAMPLED,
    Part,
)

# Whatever takes part in inner products of examples needs them all at once.
WHOLE = frozenset({GRAM})
ROWS = frozenset({NORMS, EACH})


@dataclass(frozen=True, eq=False)
class Sweep:
    """A model, a loss, what is wanted of each leaf, and how many bytes stacked cotangents may take."""

    study: Study
    loss: Loss
    root: Root | None
    parts: frozenset[Part]
    limit: int

    @property
    def groups(self) -> list[str]:
        """The groups of columns, in their order."""
        wanted = {part.group for part in self.parts}
        return [group for group in (GRADIENT, SAMPLED, EXACT, OUTPUTS) if group in wanted]

    def count(self, group: str) -> int:
        """How many columns a group has."""
        if group == EXACT:
            assert self.root is not None
            return self.root.columns
        if group == OUTPUTS:
            return sum(leaf.size for leaf in jax.tree.leaves(self.study.output))
        return 1

    @property
    def slices(self) -> dict[str, slice]:
        """Where each group stands among all columns."""
        found, start = {}, 0
        for group in self.groups:
            found[group] = slice(start, start + self.count(group))
            start += self.count(group)
        return found

    def __call__(self, leaves: Sequence[Any], x: Any, y: Any, key: Any, size: int) -> tuple[Any, list[Any]]:
        """The examples' losses, and for each leaf what is wanted: sums over examples, or a row for each."""
        columns = sum(map(self.count, self.groups))
        most = self.limit // max(1, self.study.bytes_of_example(columns))
        if any(part.kind in WHOLE for part in self.parts):
            most = size
        keys = jax.random.split(key, size) if SAMPLED in self.groups else None
        count = contractions.part_size(size, most)
        if count == size:
            return self._part(leaves, x, y, keys, size)
        whole = size - size % count
        parted = jax.tree.map(lambda a: a[:whole].reshape(-1, count, *a.shape[1:]), (x, y, keys))

        def step(sums: list[Any], batch: Any) -> tuple[list[Any], Any]:
            values, found = self._part(leaves, *batch, count)
            now, rows = _split(found)
            return jax.tree.map(jnp.add, sums, now), (values, rows)

        shapes = jax.eval_shape(
            lambda: _split(self._part(leaves, *jax.tree.map(lambda a: a[0], parted), count)[1])[0]
        )
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        sums, stacked = lax.scan(step, zeros, parted)
        values, rows = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), stacked)
        if whole < size:
            more, found = self._part(leaves, *jax.tree.map(lambda a: a[whole:], (x, y, keys)), size - whole)
            now, last = _split(found)
            sums = jax.tree.map(jnp.add, sums, now)
            values, rows = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), (values, rows), (more, last))
        return values, [a | _rows_last(b) for a, b in zip(sums, rows, strict=True)]

    def _part(self, leaves: Sequence[Any], x: Any, y: Any, keys: Any, size: int) -> tuple[Any, list[Any]]:
        output, pull, activations = self.study.forward(leaves, x, size)
        values, columns = self._columns(output, y, keys)
        total = sum(map(self.count, self.groups))
        if total == 1:
            (one,) = pull(jax.tree.map(lambda c: c[0], columns))
            cotangents = {n: g[None] for n, g in one.items()}
        elif total:
            (cotangents,) = jax.vmap(pull)(columns)
        else:
            return values, [{} for _ in leaves]
        forms = self.study.forms(activations, cotangents, size, self.limit)
        return values, [self._contracted(form) for form in forms]

    def _columns(self, output: Any, y: Any, keys: Any) -> tuple[Any, Any]:
        """The losses, and the cotangents of the output, columns first."""
        if GRADIENT in self.groups:
            values, gradient = jax.vmap(jax.value_and_grad(self.loss))(output, y)
        else:
            values, gradient = jax.vmap(self.loss)(output, y), None
        found: list[Any] = []
        for group in self.groups:
            if group == GRADIENT:
                found.append(jax.tree.map(lambda g: g[None], gradient))
            elif group == SAMPLED:
                assert self.root is not None
                sampled = jax.vmap(self.root.sampled)(output, y, keys)
                found.append(jax.tree.map(lambda g: g[None], sampled))
            elif group == EXACT:
                assert self.root is not None
                found.append(jax.vmap(self.root.all, out_axes=1)(output, y))
            else:
                found.append(_entries(output, self.count(OUTPUTS)))
        return values, jax.tree.map(lambda *c: jnp.concatenate(c), *found) if found else None

    def _contracted(self, form: Form) -> dict[Part, Any]:
        found: dict[Part, Any] = {}
        wanted: dict[str, Wanted] = {}
        for group, columns in self.slices.items():
            kinds = {part.kind for part in self.parts if part.group == group}
            if moments := kinds & {SUM, SQUARES, NORMS}:
                wanted[group] = Wanted(columns, frozenset(moments))
            if EACH in kinds:
                found[Part(group, EACH)] = form.each(columns)
            if GRAM in kinds:
                found[Part(group, GRAM)] = form.gram(columns)
            for kind in kinds & {EXPAND, REDUCE}:
                found[Part(group, kind)] = form.factors(columns, kind == REDUCE)
        if wanted:
            found |= {Part(*key): value for key, value in form.moments(wanted).items()}
        return found


def _entries(output: Any, count: int) -> Any:
    """One column for every entry of an example's output."""
    leaves, tree = jax.tree.flatten(output)
    found, start = [], 0
    for leaf in leaves:
        here = leaf[0].size
        eye = jnp.eye(count, dtype=leaf.dtype)[:, start : start + here].reshape(count, 1, *leaf.shape[1:])
        found.append(jnp.broadcast_to(eye, (count, *leaf.shape)))
        start += here
    return jax.tree.unflatten(tree, found)


def _split(found: list[dict[Part, Any]]) -> tuple[list[Any], list[Any]]:
    """What is summed over examples, and what has a row for each, examples first."""
    sums = [{k: v for k, v in leaf.items() if k.kind not in ROWS} for leaf in found]
    rows = [{k: v for k, v in leaf.items() if k.kind in ROWS} for leaf in found]
    return sums, [{k: jnp.moveaxis(v, 1, 0) if k.kind == EACH else v for k, v in leaf.items()} for leaf in rows]


def _rows_last(found: dict[Part, Any]) -> dict[Part, Any]:
    return {k: jnp.moveaxis(v, 0, 1) if k.kind == EACH else v for k, v in found.items()}


