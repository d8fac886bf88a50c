"""How attention lays out its operands, and its products: the heads of a group are rows of one matrix."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from funcprop.layers.tiling import all_of, reach_of, seen
from funcprop.program.dtypes import common_dtype, product_dtype, single_at_least


class AttentionOperands(NamedTuple):
    """Heads outside: `q: … × kv × group × queries × d`; `k, v: … × kv × keys × d`, all three in their common
    precision; bias and mask with all axes of the logits, those along which they are broadcast of length 1."""

    q: Any
    k: Any
    v: Any
    bias: Any
    mask: Any

    @property
    def sums(self) -> Any:
        """The precision of the sums: single at least."""
        return single_at_least(self.q)


def scale_of(q: Any, scale: float | None) -> float:
    """The factor of the logits: `1/√d` unless it is given."""
    return 1 / math.sqrt(max(q.shape[-1], 1)) if scale is None else scale


def by_group(x: Any, kv: int) -> Any:
    """`… × queries × heads × d` as `… × kv × group × queries × d`."""
    *batch, queries, heads, d = x.shape
    return jnp.moveaxis(x.reshape(*batch, queries, kv, heads // kv, d), -4, -2)


def by_query(x: Any) -> Any:
    """The inverse of `by_group`."""
    x = jnp.moveaxis(x, -2, -4)
    return x.reshape(*x.shape[:-3], x.shape[-3] * x.shape[-2], x.shape[-1])


def like_logits(x: Any, q: Any, kv: int) -> Any:
    """A bias or mask, broadcastable to `… × heads × queries × keys`, with the axes of the logits."""
    if x is None:
        return None
    x = x.reshape((1,) * (q.ndim - x.ndim) + x.shape)
    heads = x.shape[-3]
    split = (1, 1) if heads == 1 else (kv, heads // kv)
    return x.reshape(*x.shape[:-3], *split, *x.shape[-2:])


def operands_of(q: Any, k: Any, v: Any, bias: Any, mask: Any, dtype: Any) -> AttentionOperands:
    """The layer's arguments, laid out and in one precision."""
    kv = k.shape[-2]
    return AttentionOperands(
        by_group(q.astype(dtype), kv),
        jnp.moveaxis(k.astype(dtype), -2, -3),
        jnp.moveaxis(v.astype(dtype), -2, -3),
        like_logits(bias, q, kv),
        like_logits(mask, q, kv),
    )


# A group's queries are rows of one matrix: the products that XLA's CPU backend is quick at. Operands of 16
# bits stay so, as matrix units want them, and their products are summed in single precision.


def _rows(x: Any) -> Any:
    return x.reshape(*x.shape[:-3], x.shape[-3] * x.shape[-2], x.shape[-1])


def scores(q: Any, k: Any) -> Any:
    """`Q Kᵀ`: `… × group × queries × d` and `… × keys × d` to `… × group × queries × keys`."""
    s = _product("...qd,...kd->...qk", _rows(q), k)
    return s.reshape(*q.shape[:-1], k.shape[-2])


def mixed(p: Any, v: Any) -> Any:
    """`P V`, of `… × group × queries × d`."""
    y = _product("...qk,...kd->...qd", _rows(p), v)
    return y.reshape(*p.shape[:-1], v.shape[-1])


def mixed_transposed(p: Any, g: Any) -> Any:
    """`Pᵀ G`, of `… × keys × d`, summed over the group."""
    return _product("...qk,...qd->...kd", _rows(p), _rows(g))


def _product(axes: str, a: Any, b: Any) -> Any:
    dtype = common_dtype(a, b)
    return jnp.einsum(axes, a.astype(dtype), b.astype(dtype), preferred_element_type=single_at_least(a, b))


def weights_of(q: Any, k: Any, bias: Any, mask: Any, static: dict[str, Any]) -> Any:
    """The attention weights `… × kv × group × queries × keys`, all of them."""
    x = operands_of(q, k, k, bias, mask, product_dtype(q, k))
    s = scores(x.q, x.k) * scale_of(q, static["scale"])
    if x.bias is not None:
        s = s + x.bias.astype(s.dtype)
    row, col = jnp.arange(q.shape[-3])[:, None], jnp.arange(k.shape[-3])[None]
    conditions = seen(row, col, reach_of(static["causal"], static["window"]), static["offset"])
    shown = all_of(conditions if x.mask is None else [*conditions, x.mask])
    if shown is not None:
        s = jnp.where(shown, s, -jnp.inf)
    largest = lax.stop_gradient(s.max(-1, keepdims=True, initial=jnp.finfo(s.dtype).min))
    p = jnp.exp(s - largest)
    total = p.sum(-1, keepdims=True)
    return p / jnp.where(total == 0, 1, total)
