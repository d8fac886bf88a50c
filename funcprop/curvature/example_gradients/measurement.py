"""One forward sweep, one backward sweep of all columns, part of a batch at a time; their contractions."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from funcprop.curvature.example_gradients import contractions
from funcprop.curvature.example_gradients.contractions import NORMS, SQUARES, SUM, Group, WeightedColumns
from funcprop.curvature.example_gradients.entering_parameters import Study
from funcprop.curvature.example_gradients.gradient_forms import GradientForm
from funcprop.curvature.example_gradients.loss_roots import (
    DenseRoot,
    DiagonalRoot,
    Losses,
    LossRoot,
    SharesGradient,
    signs,
)
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
# The gradient's column times the examples' weights, for sums, and times their roots, for sums of squares.
_WEIGHTED, _ROOTED = "weighted gradient", "gradient times root of weight"


class Examples(NamedTuple):
    """Of every example the loss, and whether it has no root in the output (None if every such loss has)."""

    values: Any
    rootless: Any


@dataclass(frozen=True, eq=False)
class Sweep:
    """A model, a loss, what is wanted of each leaf, and how many bytes stacked cotangents may take."""

    study: Study
    loss: Losses
    root: LossRoot | None
    parts: frozenset[Part]
    limit: int
    bases: Mapping[int, Any] = field(default_factory=dict)
    samples: int = 1
    weighted: bool = False

    @property
    def groups(self) -> list[str]:
        """The groups of columns that are swept, in their order.

        The sampled column is a combination of the exact ones; where these are swept, so are their cotangents.
        """
        wanted = {self._columns_of(part) for part in self.parts}
        return [
            group
            for group in (GRADIENT, _WEIGHTED, _ROOTED, EXACT, SAMPLED, OUTPUTS)
            if group in wanted and not (group == SAMPLED and EXACT in wanted)
        ]

    def _columns_of(self, part: Part) -> str:
        """The columns of which a part is made: of weighted sums of gradients they have weights themselves."""
        if not self.weighted or part.group != GRADIENT or part.kind in (EACH, GRAM, NORMS):
            return part.group
        return _WEIGHTED if part.kind == SUM else _ROOTED

    @property
    def draws(self) -> bool:
        """Whether random signs or targets are drawn."""
        return any(part.group == SAMPLED for part in self.parts)

    @property
    def shares_gradient(self) -> bool:
        """Whether the gradient's column also counts as one of the exact columns."""
        both = {GRADIENT, EXACT} <= set(self.groups) and not self.weighted
        return both and isinstance(self.root, SharesGradient)

    def count(self, group: str) -> int:
        """How many columns are swept for a group."""
        if group == EXACT:
            assert self.root is not None
            return self.root.columns - self.shares_gradient
        if group == OUTPUTS:
            return sum(leaf.size for leaf in jax.tree.leaves(self.study.output))
        return self.samples if group == SAMPLED else 1

    def members(self, first_weight: Any, weights: Any) -> dict[str, Group]:
        """Where each group's columns stand among all, and what the examples' squares count."""
        found: dict[str, Group] = {}
        start = 0
        for group in self.groups:
            columns = WeightedColumns(slice(start, start + self.count(group)))
            found[group] = Group((columns,), examples=weights)
            start += self.count(group)
        if self.shares_gradient:
            shared = found[GRADIENT].members[0]._replace(weight=first_weight)
            others = (found[EXACT].members[0],) if self.count(EXACT) else ()
            found[EXACT] = Group((shared, *others))
        return found

    def __call__(
        self, leaves: Sequence[Any], x: Any, y: Any, key: Any, weights: Any, size: int
    ) -> tuple[Examples, list[Any]]:
        """The examples' losses, and for each leaf what is wanted: sums over examples, or a row for each."""
        columns = sum(map(self.count, self.groups))
        most = self.limit // max(1, self.study.bytes_of_example(columns))
        if any(part.kind in WHOLE for part in self.parts):
            most = size
        keys = jax.random.split(key, (size, self.samples)) if self.draws else None
        count = contractions.part_size(size, most)
        if count == size:
            return self._part(leaves, (x, y, keys, weights), size)
        whole = size - size % count
        parted = jax.tree.map(lambda a: a[:whole].reshape(-1, count, *a.shape[1:]), (x, y, keys, weights))

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
            rest = jax.tree.map(lambda a: a[whole:], (x, y, keys, weights))
            more, found = self._part(leaves, rest, size - whole)
            now, last = _split(found)
            sums = jax.tree.map(jnp.add, sums, now)
            values, rows = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), (values, rows), (more, last))
        return values, [a | _rows_last(b) for a, b in zip(sums, rows, strict=True)]

    def _part(self, leaves: Sequence[Any], batch: Any, size: int) -> tuple[Examples, list[Any]]:
        x, y, keys, weights = batch
        output, pull, activations = self.study.forward(leaves, x, size)
        values, columns, first_weight = self._columns(output, y, keys, weights)
        total = sum(map(self.count, self.groups))
        if total == 1:
            (one,) = pull(jax.tree.map(lambda c: c[0], columns))
            cotangents = {n: g[None] for n, g in one.items()}
        elif total:
            (cotangents,) = jax.vmap(pull)(columns)
        else:
            return values, [{} for _ in leaves]
        forms = self.study.forms(activations, cotangents, size, self.limit)
        members = self.members(first_weight, weights)
        found = [self._contracted(i, form, members) for i, form in enumerate(forms)]
        if self.draws and SAMPLED not in self.groups:
            drawn = jax.vmap(lambda keys: self._combined(cotangents, keys, members[EXACT]), 1)(keys)
            sampled = jax.tree.map(lambda g: g / math.sqrt(self.samples), drawn)
            others = self.study.forms(activations, sampled, size, self.limit)
            one = {SAMPLED: Group((WeightedColumns(slice(0, self.samples)),), examples=weights)}
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
        return jax.tree.map(lambda g: contractions.combination(g, at, factors), cotangents)

    def _columns(self, output: Any, y: Any, keys: Any, weights: Any) -> tuple[Examples, Any, Any]:
        """The losses, the cotangents of the output, columns first, and the weight of a shared gradient."""
        if {GRADIENT, _WEIGHTED, _ROOTED} & set(self.groups):
            values, gradient = jax.vmap(jax.value_and_grad(self.loss.values))(output, y)
        else:
            values, gradient = jax.vmap(self.loss.values)(output, y), None
        root = None if weights is None else jnp.sqrt(weights)
        found: list[Any] = []
        weight = None
        for group in self.groups:
            if group in (GRADIENT, _WEIGHTED, _ROOTED):
                scale = {GRADIENT: None, _WEIGHTED: weights, _ROOTED: root}[group]
                found.append(_scaled(jax.tree.map(lambda g: g[None], gradient), scale))
            elif group == SAMPLED:
                assert self.root is not None
                each = jax.vmap(self.root.sampled, (None, None, 0))
                sampled = jax.vmap(each, out_axes=1)(output, y, keys)
                mean = jax.tree.map(lambda g: g / math.sqrt(self.samples), sampled)
                found.append(_scaled(mean, root))
            elif group == EXACT:
                assert self.root is not None
                columns = self.root.all
                if self.shares_gradient:
                    assert isinstance(self.root, SharesGradient)
                    columns, weight = self.root.others, jax.vmap(self.root.first_weight)(output, y)
                found.append(_scaled(jax.vmap(columns, out_axes=1)(output, y), root))
            else:
                found.append(entries_of(output, self.count(OUTPUTS)))
        joined = jax.tree.map(lambda *c: jnp.concatenate(c), *found) if found else None
        return Examples(values, self._rootless(output, joined)), joined, weight

    def _rootless(self, output: Any, columns: Any) -> Any:
        """Of which examples the loss has no root in the output: it is finite, but is not convex there."""
        if not isinstance(self.root, DenseRoot | DiagonalRoot):
            return None
        finite = [jnp.isfinite(o).reshape(len(o), -1).all(-1) for o in jax.tree.leaves(output)]
        broken = [jnp.isnan(c).any((0, *range(2, c.ndim))) for c in jax.tree.leaves(columns)]
        return functools.reduce(jnp.logical_or, broken) & functools.reduce(jnp.logical_and, finite)

    def _contracted(self, leaf: int, form: GradientForm, members: dict[str, Group]) -> dict[Part, Any]:
        found: dict[Part, Any] = {}
        wanted: dict[str, Group] = {}
        for name, group in members.items():
            kinds = {part.kind for part in self.parts if self._columns_of(part) == name}
            group_of = GRADIENT if name in (_WEIGHTED, _ROOTED) else name
            if moments := kinds & {SUM, SQUARES, NORMS}:
                wanted[name] = group._replace(what=frozenset(moments))
            if EACH in kinds:
                found[Part(group_of, EACH)] = form.each(group.members[0].at)
            if GRAM in kinds:
                found[Part(group_of, GRAM)] = form.gram(group.members[0].at)
            for kind in kinds & {EXPAND, REDUCE}:
                found[Part(group_of, kind)] = form.factors(group, kind == REDUCE)
            if ROTATED in kinds and leaf in self.bases:
                found[Part(group_of, ROTATED)] = form.squares_in(self.bases[leaf], group)
        if wanted:
            found |= {
                Part(GRADIENT if name in (_WEIGHTED, _ROOTED) else name, kind): value
                for (name, kind), value in form.moments(wanted).items()
            }
        return found


def _scaled(columns: Any, by: Any) -> Any:
    """Columns `[c, n, …]`, times a number for each example."""
    if by is None:
        return columns
    return jax.tree.map(lambda g: g * by.astype(g.dtype).reshape(1, -1, *(1,) * (g.ndim - 2)), columns)


def entries_of(output: Any, count: int) -> Any:
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
