"""Softmax attention in blocks of queries and keys: no array of queries × keys is ever held.

With logits `S = s Q Kᵀ + B` (`−∞` where a query does not see a key), `P = softmax(S)` and `Y = P V`, the
forward walks over blocks of `S` and keeps for every query the running maximum, the sum of exponentials and
the weighted sum of values (the online softmax). Besides `Y` it returns the logarithm of the normalizer, `L`.
The backward walks over the same blocks, each computed again by `P = exp(S − L)`:

    V̄ = Pᵀ Ȳ        S̄ = P ∘ (Ȳ Vᵀ − rowsum(Ȳ ∘ Y))        Q̄ = s S̄ K        K̄ = s S̄ᵀ Q        B̄ = S̄

Blocks that causality or the window mask wholly are not visited: half of the work of causal attention.

Sources: Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018; Rabe and Staats,
"Self-attention does not need O(n²) memory", 2021; Dao et al., "FlashAttention", NeurIPS 2022.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from funcprop import _jax
from funcprop.layers.attention_operands import AttentionOperands, mixed, mixed_transposed, scores
from funcprop.layers.tiling import Tiling, all_of

# Where the rule is evaluated operator by operator, its loops are compiled once for each size.
_staged = partial(jax.jit, inline=True)


@partial(_staged, static_argnames=("tiling", "scale"))
def attend(x: AttentionOperands, tiling: Tiling, scale: float) -> tuple[Any, Any]:
    """The result and the logarithm of the normalizer of every query, by the online softmax."""

    def step(totals: Any, i: Any, j: Any) -> Any:
        out, largest, total = totals
        s = _logits(x, scale, tiling, i, j)
        before = tiling.row(largest, i)
        # What is subtracted from the logits cancels, and so it has no derivative.
        after = lax.stop_gradient(jnp.maximum(before, s.max(-1, keepdims=True)))
        p, faded = jnp.exp(s - after), jnp.exp(before - after)
        added = mixed(p.astype(x.v.dtype), tiling.col(x.v, j))
        return (
            tiling.put_row(out, i, tiling.row(out, i) * faded + added),
            tiling.put_row(largest, i, after),
            tiling.put_row(total, i, tiling.row(total, i) * faded + p.sum(-1, keepdims=True)),
        )

    queries = x.q.shape[:-1]
    start = (
        jnp.zeros((*queries, x.v.shape[-1]), x.sums),
        jnp.full((*queries, 1), jnp.finfo(x.sums).min, x.sums),
        jnp.zeros((*queries, 1), x.sums),
    )
    out, largest, total = _over_blocks(tiling, step, start, x.q)
    # A query that sees nothing: its normalizer is ∞, and every exp(S − L) of the backward 0.
    empty = total == 0
    divisor = jnp.where(empty, 1, total)
    return out / divisor, jnp.where(empty, jnp.inf, largest + jnp.log(divisor))


@partial(_staged, static_argnames=("tiling", "scale", "needs"))
def cotangents(
    x: AttentionOperands, normalizer: Any, g: Any, delta: Any, tiling: Tiling, scale: float,
    needs: tuple[bool, ...],
) -> dict[str, Any]:  # fmt: skip
    """The wanted operands' cotangents, each summed over the blocks; of `q` and `k` without the scale."""
    wanted = [name for name, need in zip(AttentionOperands._fields, needs, strict=True) if need]

    def step(totals: dict[str, Any], i: Any, j: Any) -> dict[str, Any]:
        q, k, v = tiling.row(x.q, i), tiling.col(x.k, j), tiling.col(x.v, j)
        p = jnp.exp(_logits(x, scale, tiling, i, j) - tiling.row(normalizer, i))
        g_row = tiling.row(g, i)
        p_bar = scores(g_row, v)
        s_bar = p * (p_bar - tiling.row(delta, i))
        factor, weights = s_bar.astype(q.dtype), p.astype(q.dtype)
        added = {
            "q": lambda total: tiling.add_row(total, i, mixed(factor, k)),
            "k": lambda total: tiling.add_col(total, j, mixed_transposed(factor, q)),
            "v": lambda total: tiling.add_col(total, j, mixed_transposed(weights, g_row)),
            "bias": lambda total: tiling.add_tile(total, i, j, s_bar),
        }
        return {name: added[name](total) for name, total in totals.items()}

    start = {name: jnp.zeros(getattr(x, name).shape, x.sums) for name in wanted}
    return _over_blocks(tiling, step, start, g)


def _logits(x: AttentionOperands, scale: float, tiling: Tiling, i: Any, j: Any) -> Any:
    """One block of the logits."""
    s = scores(tiling.row(x.q, i), tiling.col(x.k, j)) * scale
    if x.bias is not None:
        s = s + tiling.tile(x.bias, i, j).astype(s.dtype)
    conditions = [] if x.mask is None else [tiling.tile(x.mask, i, j)]
    visible = tiling.visible(i, j)
    shown = all_of(conditions if visible is None else [*conditions, visible])
    return s if shown is None else jnp.where(shown, s, -jnp.inf)


def _over_blocks(tiling: Tiling, step: Any, totals: Any, like: Any) -> Any:
    """Run `step(totals, i, j)` over all blocks.

    The step is checkpointed: the reverse derivative of the backward computes its blocks again, too.
    """
    leaves, tree = jax.tree.flatten(totals)
    totals = jax.tree.unflatten(tree, _jax.align_varying_axes([like, *leaves])[1:])
    body = jax.checkpoint(lambda carry, pair: (step(carry, *pair), None), prevent_cse=False)
    return lax.scan(body, totals, tiling.pairs())[0]
