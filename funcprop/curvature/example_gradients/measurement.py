"""One forward sweep, one backward sweep of all columns, part of a batch at a time; their contractions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from funcprop.curvature.example_gradients import contractions
from funcprop.curvature.example_gradients.contractions import NORMS, SQUARES, SUM, Group, WeightedColumns
from funcprop.curvature.example_gradients.entering_parameters import Study
from funcprop.curvature.example_gradients.gradient_forms import GradientForm
from funcprop.curvature.example_gradients.loss_roots import Loss, LossRoot, SharesGradient, signs
from funcprop.curvature.example_gradients.quantities import (
    EACH,
    EXACT,
    EXPAND,
    GRADIENT,
    GRAM,
    OUTPUTS,
    REDUCE,
    ROTATED,
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
    root: LossRoot | None
    parts: frozenset[Part]
    limit: int
    bases: Sequence[Any] = ()

    @property
    def groups(self) -> list[str]:
        """The groups of columns that are swept, in their order.

        The sampled column is a combination of the exact ones; where these are swept, so are their cotangents.
        """
        wanted = {part.group for part in self.parts}
        return [
            group
            for group in (GRADIENT, EXACT, SAMPLED, OUTPUTS)
            if group in wanted and not (group == SAMPLED and EXACT in wanted)
        ]

    @property
    def samples(self) -> bool:
        """Whether random signs are drawn."""
        return any(part.group == SAMPLED for part in self.parts)

    @property
    def shares_gradient(self) -> bool:
        """Whether the gradient's column also counts as one of the exact columns."""
        return {GRADIENT, EXACT} <= set(self.groups) and isinstance(self.root, SharesGradient)

    def count(self, group: str) -> int:
        """How many columns are swept for a group."""
        if group == EXACT:
            assert self.root is not None
            return self.root.columns - self.shares_gradient
        if group == OUTPUTS:
            return sum(leaf.size for leaf in jax.tree.leaves(self.study.output))
        return 1

    def members(self, first_weight: Any) -> dict[str, Group]:
        """Where each group's columns stand among all, and what the examples' squares count."""
        found: dict[str, Group] = {}
        start = 0
        for group in self.groups:
            found[group] = Group((WeightedColumns(slice(start, start + self.count(group))),))
            start += self.count(group)
        if self.shares_gradient:
            shared = found[GRADIENT].members[0]._replace(weight=first_weight)
            others = (found[EXACT].members[0],) if self.count(EXACT) else ()
            found[EXACT] = Group((shared, *others))
        return found

    def __call__(self, leaves: Sequence[Any], x: Any, y: Any, key: Any, size: int) -> tuple[Any, list[Any]]:
        """The examples' losses, and for each leaf what is wanted: sums over examples, or a row for each."""
        columns = sum(map(self.count, self.groups))
        most = self.limit // max(1, self.study.bytes_of_example(columns))
        if any(part.kind in WHOLE for part in self.parts):
            most = size
        keys = jax.random.split(key, size) if self.samples else None
        count = contractions.part_size(size, most)
        if count == size:
            return self._part(leaves, (x, y, keys), size)
        whole = size - size % count
        parted = jax.tree.map(lambda a: a[:whole].reshape(-1, count, *a.shape[1:]), (x, y, keys))

        def step(sums: list[Any], batch: Any) -> tuple[list[Any], Any]:
            values, found = self._part(leaves, batch, count)
            now, rows = _split(found)
            return jax.tree.map(jnp.add, sums, now), (values, rows)

        shapes = jax.eval_shape(
            lambda: _split(self._part(leaves, jax.tree.map(lambda a: a[0], parted), count)[1])[0]
        )
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        sums, stacked = lax.scan(step, zeros, parted)
        values, rows = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), stacked)
        if whole < size:
            more, found = self._part(leaves, jax.tree.map(lambda a: a[whole:], (x, y, keys)), size - whole)
            now, last = _split(found)
            sums = jax.tree.map(jnp.add, sums, now)
            values, rows = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), (values, rows), (more, last))
        return values, [a | _rows_last(b) for a, b in zip(sums, rows, strict=True)]

    def _part(self, leaves: Sequence[Any], batch: tuple[Any, Any, Any], size: int) -> tuple[Any, list[Any]]:
        x, y, keys = batch
        output, pull, activations = self.study.forward(leaves, x, size)
        values, columns, first_weight = self._columns(output, y, keys)
        total = sum(map(self.count, self.groups))
        if total == 1:
            (one,) = pull(jax.tree.map(lambda c: c[0], columns))
            cotangents = {n: g[None] for n, g in one.items()}
        elif total:
            (cotangents,) = jax.vmap(pull)(columns)
        else:
            return values, [{} for _ in leaves]
        forms = self.study.forms(activations, cotangents, size, self.limit)
        members = self.members(first_weight)
        found = [self._contracted(i, form, members) for i, form in enumerate(forms)]
        if self.samples and SAMPLED not in self.groups:
            sampled = self._combined(cotangents, keys, members[EXACT])
            others = self.study.forms(activations, sampled, size, self.limit)
            one = {SAMPLED: Group((WeightedColumns(slice(0, 1)),))}
            found = [found[i] | self._contracted(i, form, one) for i, form in enumerate(others)]
        return values, found

    def _combined(self, cotangents: Any, keys: Any, exact: Group) -> Any:
        """The sampled column's cotangents, from the exact ones."""
        assert self.root is not None
        root, dtype = self.root, jax.tree.leaves(self.study.output)[0].dtype
        factors = list(jax.vmap(lambda key: signs(root, key, dtype), out_axes=1)(keys))
        at = [c for member in exact.members for c in range(member.at.start, member.at.stop)]
        if self.shares_gradient:
            factors[0] = factors[0] * jnp.sqrt(exact.members[0].weight)
        return jax.tree.map(lambda g: contractions.combination(g, at, factors)[None], cotangents)

    def _columns(self, output: Any, y: Any, keys: Any) -> tuple[Any, Any, Any]:
        """The losses, the cotangents of the output, columns first, and the weight of a shared gradient."""
        if GRADIENT in self.groups:
            values, gradient = jax.vmap(jax.value_and_grad(self.loss))(output, y)
        else:
            values, gradient = jax.vmap(self.loss)(output, y), None
        found: list[Any] = []
        weight = None
        for group in self.groups:
            if group == GRADIENT:
                found.append(jax.tree.map(lambda g: g[None], gradient))
            elif group == SAMPLED:
                assert self.root is not None
                sampled = jax.vmap(self.root.sampled)(output, y, keys)
                found.append(jax.tree.map(lambda g: g[None], sampled))
            elif group == EXACT:
                assert self.root is not None
                columns = self.root.all
                if self.shares_gradient:
                    assert isinstance(self.root, SharesGradient)
                    columns, weight = self.root.others, jax.vmap(self.root.first_weight)(output, y)
                found.append(jax.vmap(columns, out_axes=1)(output, y))
            else:
                found.append(_entries(output, self.count(OUTPUTS)))
        return values, jax.tree.map(lambda *c: jnp.concatenate(c), *found) if found else None, weight

    def _contracted(self, leaf: int, form: GradientForm, members: dict[str, Group]) -> dict[Part, Any]:
        found: dict[Part, Any] = {}
        wanted: dict[str, Group] = {}
        for name, group in members.items():
            kinds = {part.kind for part in self.parts if part.group == name}
            if moments := kinds & {SUM, SQUARES, NORMS}:
                wanted[name] = group._replace(what=frozenset(moments))
            if EACH in kinds:
                found[Part(name, EACH)] = form.each(group.members[0].at)
            if GRAM in kinds:
                found[Part(name, GRAM)] = form.gram(group.members[0].at)
            for kind in kinds & {EXPAND, REDUCE}:
                found[Part(name, kind)] = form.factors(group, kind == REDUCE)
            if ROTATED in kinds:
                found[Part(name, ROTATED)] = form.squares_in(self.bases[leaf], group)
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
    """Split results into sums over examples, and arrays with a row for each example."""
    sums = [{k: v for k, v in leaf.items() if k.kind not in ROWS} for leaf in found]
    rows = [{k: v for k, v in leaf.items() if k.kind in ROWS} for leaf in found]
    return sums, [
        {k: jnp.moveaxis(v, 1, 0) if k.kind == EACH else v for k, v in leaf.items()} for leaf in rows
    ]


def _rows_last(found: dict[Part, Any]) -> dict[Part, Any]:
    return {k: jnp.moveaxis(v, 0, 1) if k.kind == EACH else v for k, v in found.items()}
