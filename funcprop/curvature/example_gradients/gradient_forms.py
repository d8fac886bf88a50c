"""The gradients of a batch of examples in one leaf, in whichever form they are known.

A form answers for moments, for the gradients themselves, for their inner products and for Kronecker factors.
There are four: outer products of one tap, gradients that are at hand (both here), rows of a table (`table`),
and sums of several (`several`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import lax

from funcprop.curvature.example_gradients import contractions
from funcprop.curvature.example_gradients.contractions import NORMS, SQUARES, SUM, Group, Moments
from funcprop.curvature.example_gradients.outer_products import OuterForm

# The largest leaf without an outer product whose curvature is kept as a dense matrix.
DENSE = 1024


class Factors(NamedTuple):
    """The two factors of one leaf's curvature, summed over the batch: of activations and of cotangents.

    A factor is a matrix, a stack of matrices for independent blocks, or a vector that stands for a diagonal.
    `seen` is what the examples count together of which the factor of activations has a part, for each block;
    None if it has one of all.
    """

    activations: Any
    cotangents: Any
    seen: Any = None


class GradientForm(Protocol):
    """The gradients `W[c, n]` of columns `c` and examples `n` in one leaf."""

    def part(self, start: Any, count: int) -> GradientForm:
        """The form of some of the examples."""

    def moments(self, wanted: Mapping[str, Group]) -> Moments:
        """For each group of columns sum and sum of squares, like the leaf, and square norms, `[n]`."""

    def each(self, columns: slice) -> Any:
        """The gradients, `[c, n, *leaf]`."""

    def gram(self, columns: slice) -> Any:
        """Inner products, `[n, c, n, c]`."""

    def factors(self, group: Group, reduce: bool) -> Factors:
        """Kronecker factors, summed over examples (see `funcprop.curvature.kronecker` for conventions)."""

    def squares_in(self, basis: Factors, group: Group) -> Any:
        """`Σ (U_aᵀ W U_g)²` in the factors' bases, as `[k, i, o]`; the basis of a diagonal is a vector."""

    def kept(self, reduce: bool) -> str:
        """Describe the factors, for the audit."""


def rows_of(x: Any, start: Any, count: int, axis: int) -> Any:
    """Take the rows of some examples, along an axis."""
    return lax.dynamic_slice_in_dim(x, start, count, axis)


# --- gradients at hand ------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class AtHand:
    """The gradients themselves, `[c, n, *leaf]`.

    `positions` are `[c, n, t, o]` where a gradient is a sum over `t`, for the factors of weight sharing.
    """

    w: Any
    limit: int
    positions: Any = None

    def part(self, start: Any, count: int) -> AtHand:
        """The form of some of the examples."""
        positions = None if self.positions is None else rows_of(self.positions, start, count, 1)
        return replace(self, w=rows_of(self.w, start, count, 1), positions=positions)

    def moments(self, wanted: Mapping[str, Group]) -> Moments:
        """Sum, squares and norms of each group."""
        found: Moments = {}
        for name, group in wanted.items():
            if SUM in group.what:
                found[name, SUM] = group.total(self.w).sum(0)
            if group.what & {SQUARES, NORMS}:
                squares = group.squares(self.w)
            if SQUARES in group.what:
                found[name, SQUARES] = squares.sum(0)
            if NORMS in group.what:
                found[name, NORMS] = squares.sum(tuple(range(1, squares.ndim)))
        return found

    def each(self, columns: slice) -> Any:
        """The gradients, `[c, n, *leaf]`."""
        return self.w[columns]

    def gram(self, columns: slice) -> Any:
        """Inner products, `[n, c, n, c]`."""
        w = jnp.moveaxis(self.w[columns], 0, 1)
        flat = w.reshape(w.shape[0] * w.shape[1], -1)
        return (flat @ flat.T).reshape(*w.shape[:2], *w.shape[:2])

    def factors(self, group: Group, reduce: bool) -> Factors:
        """Kronecker factors, summed over examples."""
        flat = group.scaled(self.w).reshape(-1, math.prod(self.w.shape[2:]))
        if self.positions is not None and not reduce:
            flat = group.scaled(self.positions).reshape(-1, self.positions.shape[-1])
        one = group.counted(self.w.shape[1], flat.dtype).reshape(1, 1)
        if flat.shape[-1] > DENSE:
            return Factors(one, (flat * flat).sum(0))
        return Factors(one, contractions.product(flat, flat))

    def kept(self, reduce: bool) -> str:
        """A whole block, or its diagonal."""
        over = ""
        if self.positions is not None:
            over = (
                ", summed over positions" if reduce else f", expand over {self.positions.shape[2]} positions"
            )
            if not reduce and self.positions.shape[-1] <= DENSE:
                return f"G alone{over}"
        return block_or_diagonal(math.prod(self.w.shape[2:]), over)

    def squares_in(self, basis: Factors, group: Group) -> Any:
        """Squares along the factors' eigenvectors."""
        flat = group.scaled(self.w).reshape(-1, math.prod(self.w.shape[2:]))
        if basis.cotangents.ndim == 2:
            flat = flat @ basis.cotangents
        return (flat * flat).sum(0)[None, None]


def block_or_diagonal(entries: int, over: str = "", why: str = "") -> str:
    """Say what is kept of a leaf whose block is no Kronecker product."""
    if entries <= DENSE:
        return f"exact block{over}"
    return f"diagonal{over}: {entries} entries are more than {DENSE}{why}"


# --- outer products ---------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class OuterProducts:
    """One tap: `raw[n]` is the other operand, `g[c, n]` the cotangent of the operator's result."""

    form: OuterForm
    raw: Any
    g: Any
    limit: int

    @property
    def size(self) -> int:
        """The number of examples."""
        return self.g.shape[1]

    def part(self, start: Any, count: int) -> OuterProducts:
        """The form of some of the examples."""
        return replace(self, raw=rows_of(self.raw, start, count, 0), g=rows_of(self.g, start, count, 1))

    def folded(self, columns: slice) -> tuple[Any, Any]:
        """`a[k, n, t, i]` and `g[k, c, n, t, o]`."""
        return self.folded_activations(), self.folded_cotangents(columns)

    def folded_activations(self) -> Any:
        """`a[k, n, t, i]`."""
        assert self.form.activations is not None
        return jax.vmap(self.form.activations, out_axes=1)(self.raw)

    def folded_cotangents(self, columns: slice) -> Any:
        """`g[k, c, n, t, o]`."""
        return jax.vmap(jax.vmap(self.form.cotangents, out_axes=1), out_axes=1)(self.g[columns])

    def moments(self, wanted: Mapping[str, Group]) -> Moments:
        """Sum, squares and norms of each group."""
        if self.form.positions == 1:
            a, g = self.folded(slice(None))

            def one(a: Any, g: Any) -> Moments:
                return contractions.single_position(a, g, wanted)

            found = _over_blocks(one, a[:, :, 0], g[:, :, :, 0])
            found = {k: v.sum(0) if k[1] == NORMS else v for k, v in found.items()}
        else:
            assert self.form.activations is not None
            by_pairs = {name: w for name, w in wanted.items() if w.what == {NORMS} and self._pairs_pay()}
            others = {name: w for name, w in wanted.items() if name not in by_pairs}
            found = {}
            if others:
                arguments = self.form.activations, self.raw, self.form.cotangents, self.g
                found = contractions.by_example(*arguments, others)
            for name, group in by_pairs.items():
                folded = replace(self, g=group.scaled(self.g)).folded(slice(None))
                found[name, NORMS] = jax.vmap(contractions.norms_by_pairs)(*folded).sum(0)
        return {k: v if k[1] == NORMS else self.form.to_leaf(v) for k, v in found.items()}

    def _pairs_pay(self) -> bool:
        """Whether inner products of positions cost less than the gradients."""
        a = jax.eval_shape(self.form.activations, self.raw[0])  # type: ignore[arg-type]
        outputs = jax.eval_shape(self.form.cotangents, self.g[0, 0]).shape[-1]
        return self.form.positions * (a.shape[-1] + outputs) < a.shape[-1] * outputs

    def each(self, columns: slice) -> Any:
        """The gradients, `[c, n, *leaf]`."""
        a, g = self.folded(columns)
        w = jnp.einsum("knti,kcnto->cnkio", a, g)
        return jax.vmap(jax.vmap(self.form.to_leaf))(w)

    def gram(self, columns: slice) -> Any:
        """Inner products, `[n, c, n, c]`."""
        return jax.vmap(lambda a, g: contractions.gram_blocks(a, g, self.limit))(*self.folded(columns)).sum(0)

    def weighted_gram(self, entries: Any) -> Any:
        """`⟨V W[c, n], W[d, n]⟩`, `[n, c, d]`; `V` has a number for each entry, `[k, i, o]`."""
        a, g = self.folded(slice(None))
        if self.form.positions > 1:
            w = jnp.einsum("knti,kcnto->kncio", a, g)
            return jnp.einsum("kncio,kndio->ncd", w * entries[:, None, None], w)
        g = g[:, :, :, 0]
        met = jnp.einsum("kni,kio->kno", a[:, :, 0] ** 2, entries)
        return jnp.einsum("kcno,kdno->ncd", g * met[:, None], g)

    def factors(self, group: Group, reduce: bool) -> Factors:
        """Kronecker factors, summed over examples."""
        return kronecker([self], group, reduce)

    def kept(self, reduce: bool) -> str:
        """Both factors."""
        return both([self], reduce)

    def squares_in(self, basis: Factors, group: Group) -> Any:
        """Squares along the factors' eigenvectors."""
        wanted = {"": group._replace(what=frozenset({SQUARES}))}
        return self.turned(basis).moments(wanted)["", SQUARES]

    def turned(self, basis: Factors) -> OuterProducts:
        """Turn the gradients into the factors' bases, as `[k, i, o]`."""
        a, g = self.form.activations, self.form.cotangents
        assert a is not None
        turned = OuterForm(
            lambda x: a(x) @ basis.activations,
            lambda x: g(x) @ basis.cotangents,
            lambda w: w,
            self.form.positions,
        )
        return replace(self, form=turned)


def kronecker(forms: Sequence[OuterProducts], group: Group, reduce: bool) -> Factors:
    """Kronecker factors of taps whose blocks are alike: their positions are one set."""
    first = forms[0]
    cotangents = [replace(form, g=group.scaled(form.g)).folded_cotangents(slice(None)) for form in forms]
    shares, seen = position_shares(cotangents, reduce)

    def square(folded: Sequence[Any]) -> Any:
        """`Σ x xᵀ` over the rows of `x[k, …, t, i]`, with `reduce` over their sums over all `t`."""
        if reduce:
            folded = [sum(x.sum(-2) for x in folded)]
        rows = [x.reshape(len(x), -1, x.shape[-1]) for x in folded]
        return sum(_over_blocks(lambda x: contractions.product(x, x), x) for x in rows)

    def part(start: Any, count: int) -> Moments:
        here, folded = group.part(start, count), []
        for form, share in zip(forms, shares, strict=True):
            a = form.part(start, count).folded_activations()
            if share is not None:
                a = a * rows_of(share, start, count, 1)[..., None].astype(a.dtype)
            if here.examples is not None:
                a = a * jnp.sqrt(here.examples)[None, :, None, None].astype(a.dtype)
            folded.append(a)
        return {("A", SUM): square(folded)}

    a = [jax.eval_shape(form.folded_activations) for form in forms]
    each = sum(x.size * x.dtype.itemsize for x in a) // first.size
    A = contractions.in_parts(part, first.size, first.limit // max(1, each))["A", SUM]
    # Cotangents are there, whatever their bytes; a bias has the same, and XLA sees that in one product alone.
    G = square(cotangents)
    if seen is not None:
        seen = seen_total(seen, group).astype(A.dtype)
    return Factors(*(x if x is None else x[0] if len(x) == 1 else x for x in (A, G, seen)))


def position_shares(cotangents: Sequence[Any], reduce: bool) -> tuple[list[Any], Any]:
    """What each position of an example weighs in the factor of activations, `[k, n, t]` for each form.

    Of the R positions of an example whose cotangents are not all zero each has `1/R` of the squares, or with
    `reduce` of the sum: padding, which the loss does not see, counts for nothing. The second result says of
    which examples any position is seen, `[k, n]`: the factor is the mean over these. Where an example has one
    position alone it always counts, and nothing is returned.
    """
    if sum(g.shape[-2] for g in cotangents) == 1:
        return [None for _ in cotangents], None
    seen = [jnp.any(g != 0, axis=(1, 4)) for g in cotangents]
    positions = functools.reduce(jnp.add, [s.sum(-1, keepdims=True) for s in seen])
    each = jnp.maximum(positions, 1)
    return [s / (each if reduce else jnp.sqrt(each)) for s in seen], positions[..., 0] > 0


def seen_total(seen: Any, group: Group) -> Any:
    """What the examples that are seen count together, for each block."""
    return jnp.sum(seen if group.examples is None else seen * group.examples, 1)


def both(forms: Sequence[OuterProducts], reduce: bool) -> str:
    """Describe the factors of taps whose blocks are alike."""
    positions = sum(form.form.positions for form in forms)
    blocks = jax.eval_shape(forms[0].folded_activations).shape[0]
    of = "A ⊗ G" if blocks == 1 else f"{blocks} blocks A ⊗ G"
    if positions == 1:
        return of
    uses = "" if len(forms) == 1 else f" of {len(forms)} uses together"
    return f"{of}, {'reduce' if reduce else 'expand'} over {positions} positions{uses}"


def _over_blocks(fun: Callable[..., Any], *arrays: Any) -> Any:
    """`fun` for each block; a single one without a batched product."""
    if len(arrays[0]) == 1:
        return jax.tree.map(lambda y: y[None], fun(*(x[0] for x in arrays)))
    return jax.vmap(fun)(*arrays)
