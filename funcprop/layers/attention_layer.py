"""Softmax attention in blocks of queries and keys: no array of queries × keys is ever held.

With logits `S = s Q Kᵀ + B` (`−∞` where a query does not see a key), `P = softmax(S)` and `Y = P V`, the
forward walks over blocks of `S` and keeps for every query the running maximum, the sum of exponentials and
the weighted sum of values (the online softmax). It saves `Y` and the logarithm of the normalizer, `L`. The
backward walks over the same blocks, each computed again by `P = exp(S − L)`:

    V̄ = Pᵀ Ȳ        S̄ = P ∘ (Ȳ Vᵀ − rowsum(Ȳ ∘ Y))        Q̄ = s S̄ K        K̄ = s S̄ᵀ Q        B̄ = S̄

Blocks that causality or the window mask wholly are not visited: half of the work of causal attention.

Sources: Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018; Rabe and Staats,
"Self-attention does not need O(n²) memory", 2021; Dao et al., "FlashAttention", NeurIPS 2022.
"""

from __future__ import annotations

import functools
import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Inexact

from funcprop import _jax
from funcprop.layers import attention_kernels
from funcprop.layers.attention_kernels import KernelCall, KernelResiduals
from funcprop.layers.tiling import Tiling, all_of, reach_of, seen, sum_to
from funcprop.program.dtypes import common_dtype, product_dtype, single_at_least
from funcprop.rules.attach import attach
from funcprop.rules.bound_rule import BoundRule
from funcprop.rules.expressions import Equations, OperatorSymbols, apply
from funcprop.rules.layer import layer
from funcprop.rules.machine import Machine, costs_traffic, dtype_of_factors, host, least_logits
from funcprop.rules.rule import Rule
from funcprop.rules.running import with_rules
from funcprop.rules.sets import autodiff

# --- layout -----------------------------------------------------------------------------------


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


def _scale(q: Any, scale: float | None) -> float:
    return 1 / math.sqrt(max(q.shape[-1], 1)) if scale is None else scale


def _by_group(x: Any, kv: int) -> Any:
    """`… × queries × heads × d` as `… × kv × group × queries × d`."""
    *batch, queries, heads, d = x.shape
    return jnp.moveaxis(x.reshape(*batch, queries, kv, heads // kv, d), -4, -2)


def _by_query(x: Any) -> Any:
    """The inverse of `_by_group`."""
    x = jnp.moveaxis(x, -2, -4)
    return x.reshape(*x.shape[:-3], x.shape[-3] * x.shape[-2], x.shape[-1])


def _like_logits(x: Any, q: Any, kv: int) -> Any:
    """A bias or mask, broadcastable to `… × heads × queries × keys`, with the axes of the logits."""
    if x is None:
        return None
    x = x.reshape((1,) * (q.ndim - x.ndim) + x.shape)
    heads = x.shape[-3]
    split = (1, 1) if heads == 1 else (kv, heads // kv)
    return x.reshape(*x.shape[:-3], *split, *x.shape[-2:])


def _operands(q: Any, k: Any, v: Any, bias: Any, mask: Any, dtype: Any) -> AttentionOperands:
    kv = k.shape[-2]
    return AttentionOperands(
        _by_group(q.astype(dtype), kv),
        jnp.moveaxis(k.astype(dtype), -2, -3),
        jnp.moveaxis(v.astype(dtype), -2, -3),
        _like_logits(bias, q, kv),
        _like_logits(mask, q, kv),
    )


# A group's queries are rows of one matrix: the products that XLA's CPU backend is quick at. Operands of 16
# bits stay so, as matrix units want them, and their products are summed in single precision.


def _rows(x: Any) -> Any:
    return x.reshape(*x.shape[:-3], x.shape[-3] * x.shape[-2], x.shape[-1])


def _scores(q: Any, k: Any) -> Any:
    """`Q Kᵀ`: `… × group × queries × d` and `… × keys × d` to `… × group × queries × keys`."""
    s = _product("...qd,...kd->...qk", _rows(q), k)
    return s.reshape(*q.shape[:-1], k.shape[-2])


def _mixed(p: Any, v: Any) -> Any:
    """`P V`, of `… × group × queries × d`."""
    mixed = _product("...qk,...kd->...qd", _rows(p), v)
    return mixed.reshape(*p.shape[:-1], v.shape[-1])


def _mixed_transposed(p: Any, g: Any) -> Any:
    """`Pᵀ G`, of `… × keys × d`, summed over the group."""
    return _product("...qk,...qd->...kd", _rows(p), _rows(g))


def _product(axes: str, a: Any, b: Any) -> Any:
    dtype = common_dtype(a, b)
    return jnp.einsum(axes, a.astype(dtype), b.astype(dtype), preferred_element_type=single_at_least(a, b))


def _logits(x: AttentionOperands, scale: float, tiling: Tiling, i: Any, j: Any) -> Any:
    """One block of the logits."""
    s = _scores(tiling.row(x.q, i), tiling.col(x.k, j)) * scale
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


# --- the rule ---------------------------------------------------------------------------------

# Where the rule is evaluated operator by operator, its loops are compiled once for each size.
_staged = partial(jax.jit, inline=True)


class AttentionResiduals(NamedTuple):
    """The arguments, the result before it is rounded, and the logarithm of every query's normalizer."""

    q: Any
    k: Any
    v: Any
    bias: Any
    mask: Any
    out: Any
    normalizer: Any


def _forward(
    q: Any, k: Any, v: Any, bias: Any = None, mask: Any = None, *, scale: Any, blocks: Any, offset: int,
    causal: bool, window: Any, implementation: Any, machine: Machine | None = None,
) -> tuple[Any, AttentionResiduals | KernelResiduals]:  # fmt: skip
    machine = machine or host()
    call = KernelCall(q, k, v, bias, mask, causal, window, offset, _scale(q, scale))
    name = attention_kernels.chosen(implementation, call, blocks, machine)
    if name != "xla":
        attend = attention_kernels.kernel(name, call)
        return attention_kernels.forward(attend, _by_blocks(causal, scale, machine), q, k, v)
    tiling = Tiling.of(q, k, reach_of(causal, window), offset, blocks, machine)
    x = _operands(q, k, v, bias, mask, dtype_of_factors(machine, q, k, v))
    out, normalizer = _attend(x, tiling, _scale(q, scale))
    out = _by_query(out)
    return out.astype(common_dtype(q, k, v)), AttentionResiduals(q, k, v, bias, mask, out, normalizer)


@partial(_staged, static_argnames=("tiling", "scale"))
def _attend(x: AttentionOperands, tiling: Tiling, scale: float) -> tuple[Any, Any]:
    """The result and the logarithm of the normalizer of every query, by the online softmax."""

    def step(totals: Any, i: Any, j: Any) -> Any:
        out, largest, total = totals
        s = _logits(x, scale, tiling, i, j)
        before = tiling.row(largest, i)
        # What is subtracted from the logits cancels, and so it has no derivative.
        after = lax.stop_gradient(jnp.maximum(before, s.max(-1, keepdims=True)))
        p, faded = jnp.exp(s - after), jnp.exp(before - after)
        mixed = _mixed(p.astype(x.v.dtype), tiling.col(x.v, j))
        return (
            tiling.put_row(out, i, tiling.row(out, i) * faded + mixed),
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


def _by_blocks(causal: bool, scale: float | None, machine: Machine) -> Any:
    """Attention in blocks as a function of queries, keys and values, with its rule: what kernels compute."""
    rules = autodiff.replace({attention: _RULE}).on(machine)
    return with_rules(partial(attention, causal=causal, scale=scale, implementation="xla"), rules)


def _value(q: Any, k: Any, v: Any, bias: Any = None, mask: Any = None, **static: Any) -> Any:
    """The result where nothing is differentiated."""
    given = {key: static[key] for key in ("causal", "window", "offset")}
    call = KernelCall(q, k, v, bias, mask, **given, scale=_scale(q, static["scale"]))
    machine = static.get("machine") or host()
    name = attention_kernels.chosen(static["implementation"], call, static["blocks"], machine)
    if name != "xla":
        return attention_kernels.kernel(name, call)(q, k, v)
    return _forward(q, k, v, bias, mask, **static)[0]


def _by_kernel(q: Any, k: Any, v: Any, bias: Any, mask: Any, **static: Any) -> Any:
    """The layer by the kernel that is asked for, with its derivatives, whatever rules there are."""
    leaves, tree = jax.tree.flatten((q, k, v, bias, mask))
    names = tuple(f"operand {i}" for i in range(len(leaves)))
    (y,) = attach(BoundRule(_RULE, "attention", static, tree, names, machine=host()), leaves)
    return y


def _backward(
    residuals: AttentionResiduals | KernelResiduals, g: Any, needs: Any, *, scale: Any, blocks: Any, offset:
    int, causal: bool, window: Any, implementation: Any, machine: Machine | None = None,
) -> tuple[Any, ...]:  # fmt: skip
    machine = machine or host()
    if isinstance(residuals, KernelResiduals):
        same = _by_blocks(causal, scale, machine)
        return *attention_kernels.backward(same, residuals, g), None, None
    q, k, v, bias, mask, out, normalizer = residuals
    tiling = Tiling.of(q, k, reach_of(causal, window), offset, blocks, machine)
    x = _operands(q, k, v, bias, mask, dtype_of_factors(machine, q, k, v))
    kv, factor = k.shape[-2], _scale(q, scale)
    # rowsum(P ∘ P̄) = rowsum(Ȳ ∘ Y): no block is needed for it.
    delta = (g.astype(x.sums) * out).sum(-1, keepdims=True)
    g = _by_group(g.astype(x.q.dtype), kv)
    found = _pull(x, normalizer, g, _by_group(delta, kv), tiling, factor, tuple(needs))
    return (
        (_by_query(found["q"]) * factor).astype(q.dtype) if needs[0] else None,
        (jnp.moveaxis(found["k"], -3, -2) * factor).astype(k.dtype) if needs[1] else None,
        jnp.moveaxis(found["v"], -3, -2).astype(v.dtype) if needs[2] else None,
        found["bias"].reshape(bias.shape).astype(bias.dtype) if needs[3] else None,
        None,
    )


@partial(_staged, static_argnames=("tiling", "scale", "needs"))
def _pull(
    x: AttentionOperands, normalizer: Any, g: Any, delta: Any, tiling: Tiling, scale: float,
    needs: tuple[bool, ...],
) -> dict[str, Any]:  # fmt: skip
    """The wanted operands' cotangents, each summed over the blocks; of `q` and `k` without the scale."""
    wanted = [name for name, need in zip(AttentionOperands._fields, needs, strict=True) if need]

    def step(totals: dict[str, Any], i: Any, j: Any) -> dict[str, Any]:
        q, k, v = tiling.row(x.q, i), tiling.col(x.k, j), tiling.col(x.v, j)
        p = jnp.exp(_logits(x, scale, tiling, i, j) - tiling.row(normalizer, i))
        g_row = tiling.row(g, i)
        p_bar = _scores(g_row, v)
        s_bar = p * (p_bar - tiling.row(delta, i))
        factor, weights = s_bar.astype(q.dtype), p.astype(q.dtype)
        added = {
            "q": lambda total: tiling.add_row(total, i, _mixed(factor, k)),
            "k": lambda total: tiling.add_col(total, j, _mixed_transposed(factor, q)),
            "v": lambda total: tiling.add_col(total, j, _mixed_transposed(weights, g_row)),
            "bias": lambda total: tiling.add_tile(total, i, j, s_bar),
        }
        return {name: added[name](total) for name, total in totals.items()}

    start = {name: jnp.zeros(getattr(x, name).shape, x.sums) for name in wanted}
    return _over_blocks(tiling, step, start, g)


def _applies(
    q: Any, k: Any, v: Any, bias: Any = None, mask: Any = None, *, blocks: Any,
    implementation: Any, machine: Machine | None = None, **static: Any,
) -> bool | str:  # fmt: skip
    queries, keys = q.shape[-3], k.shape[-3]
    if blocks is not None or implementation not in (None, "xla"):
        return True
    machine = machine or host()
    if queries * keys < least_logits(machine) or queries * keys <= q.shape[-1] * (queries + keys):
        return f"the logits of a head are only {queries} × {keys}; blocks would save little and cost time"
    if costs_traffic(math.prod(q.shape[:-1]) * keys, machine):
        return (
            "on a GPU, blocks of so few logits cost more traffic than they save; pass blocks for less memory"
        )
    return True


# --- equations --------------------------------------------------------------------------------


def _equations(op: OperatorSymbols) -> Equations:
    q, k, v, bias, mask = op.args
    static = dict(op.static)
    kv, scale = k.shape[-2], _scale(q, static["scale"])
    given = [x for x in (bias, mask) if x is not None]

    def weights(q: Any, k: Any, *rest: Any) -> Any:
        values = iter(rest)
        of_bias, of_mask = (None if x is None else next(values) for x in (bias, mask))
        return _weights(q, k, of_bias, of_mask, static)

    def mix(p: Any, x: Any) -> Any:
        return _by_query(_mixed(p, jnp.moveaxis(x, -2, -3)))

    def mix_transposed(p: Any, x: Any) -> Any:
        return jnp.moveaxis(_mixed_transposed(p, _by_group(x, kv)), -3, -2)

    def score(x: Any, k: Any) -> Any:
        return _scores(_by_group(x, kv), jnp.moveaxis(k, -2, -3))

    def to_bias(s_bar: Any) -> Any:
        like = jax.eval_shape(lambda x: _like_logits(x, q.type, kv), bias.type)
        return sum_to(s_bar, like.shape).reshape(bias.shape)

    p = apply("softmax", weights, q, k, *given, latex="\\mathrm{softmax}")
    forward = apply("mix", mix, p, v)
    if op.cotangent.shape != op.output.shape:
        return Equations(forward, (None,) * 5)
    g = op.cotangent
    p_bar = apply("score", score, g, v)
    s_bar = p * (p_bar - (p * p_bar).sum(-1, keepdims=True))
    return Equations(
        forward,
        (
            scale * apply("mix", mix, s_bar, k),
            scale * apply("mixᵀ", mix_transposed, s_bar, q, latex="\\mathrm{mix}^{\\top}"),
            apply("mixᵀ", mix_transposed, p, g, latex="\\mathrm{mix}^{\\top}"),
            None if bias is None else apply("sum", to_bias, s_bar),
            None,
        ),
    )


# --- the layer --------------------------------------------------------------------------------


def _weights(q: Any, k: Any, bias: Any, mask: Any, static: dict[str, Any]) -> Any:
    """The attention weights `… × kv × group × queries × keys`, all of them."""
    x = _operands(q, k, k, bias, mask, product_dtype(q, k))
    s = _scores(x.q, x.k) * _scale(q, static["scale"])
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


def _check(q: Any, k: Any, v: Any, bias: Any, mask: Any, blocks: Any, implementation: Any) -> None:
    if implementation not in (None, *attention_kernels.IMPLEMENTATIONS):
        names = ", ".join(map(repr, attention_kernels.IMPLEMENTATIONS))
        raise ValueError(f"attention: implementation={implementation!r}; pass {names}, or None.")
    shapes = f"q {q.shape}, k {k.shape}, v {v.shape}"
    if q.ndim < 3 or k.ndim != q.ndim or v.shape[:-1] != k.shape[:-1] or q.shape[:-3] != k.shape[:-3]:
        raise ValueError(
            f"attention: {shapes} do not fit; pass q as (…, queries, heads, d), k as (…, keys, kv_heads, d) "
            "and v as (…, keys, kv_heads, dv)."
        )
    if q.shape[-1] != k.shape[-1] or not k.shape[-2] or q.shape[-2] % k.shape[-2]:
        raise ValueError(
            f"attention: {shapes} do not fit; q and k need the same d, and heads must be a multiple of "
            "kv_heads."
        )
    logits = (*q.shape[:-3], q.shape[-2], q.shape[-3], k.shape[-3])
    for name, x in (("bias", bias), ("mask", mask)):
        fits = x is None or (
            x.ndim <= q.ndim and all(n in (1, m) for n, m in zip(x.shape[::-1], logits[::-1], strict=False))
        )
        if not fits:
            raise ValueError(
                f"attention: {name} has shape {x.shape}, which does not broadcast to "
                f"(…, heads, queries, keys) = {logits}."
            )
    if mask is not None and mask.dtype != jnp.bool_:
        raise TypeError(
            f"attention: mask has dtype {mask.dtype}; pass booleans (True where a query sees a key), and an "
            "additive mask (0 and −∞) as bias."
        )
    if blocks is not None and min(blocks) < 1:
        raise ValueError(f"attention: blocks={blocks}; block sizes are at least 1.")


@functools.cache
def _ways() -> dict[str, Rule]:
    sizes = [(rows, cols) for rows in (128, 256, 512, 1024) for cols in (rows, 2 * rows)]
    return {f"blocks of {rows} × {cols}": _RULE.with_static(blocks=(rows, cols)) for rows, cols in sizes}


_RULE = Rule(
    _forward,
    _backward,
    _equations,
    applies=_applies,
    value=_value,
    pure=True,
    sized=True,
    ways=_ways,
)


@layer(rule=_RULE)
def attention(
    q: Inexact[Array, "*batch queries heads d"],
    k: Inexact[Array, "*batch keys kv_heads d"],
    v: Inexact[Array, "*batch keys kv_heads dv"],
    bias: Inexact[Array, "..."] | None = None,
    mask: Bool[Array, "..."] | None = None,
    *,
    causal: bool = False,
    window: int | tuple[int, int] | None = None,
    offset: int = 0,
    scale: float | None = None,
    blocks: tuple[int, int] | None = None,
    implementation: str | None = None,
) -> Inexact[Array, "*batch queries heads dv"]:
    """Multi-head attention, `Y = softmax(s Q Kᵀ + B) V` for every head.

    Backward, with `P` the weights: `V̄ = Pᵀ Ȳ`, `S̄ = P ∘ (Ȳ Vᵀ − rowsum(Ȳ ∘ Y))`, `Q̄ = s S̄ K`,
    `K̄ = s S̄ᵀ Q`, `B̄ = S̄` summed over the axes along which the bias was broadcast. The rule saves `Y` and one
    number for each query, and computes the weights again, block by block.

    With fewer heads of keys than of queries (grouped-query attention, multi-query for one), head `h` reads
    keys `h // (heads / kv_heads)`. All sums are in float32 at least. **A query that sees no key has result
    0** and gives no gradient; also if its row of the bias is `−∞`. Whether an infinity or NaN in a key that
    a query does not see reaches the query's result (as `0 · ∞`) is not defined.

    Args:
        q, k, v: as `jax.nn.dot_product_attention` has them, with any number of batch axes.
        bias: added to the logits; broadcastable to `*batch × heads × queries × keys`; `−∞` masks.
        mask: True where the query sees the key; broadcastable likewise.
        causal: query `i` sees keys up to `i + offset`.
        window: `(left, right)`: query `i` sees keys from `i + offset − left` to `i + offset + right`; an
            integer is both.
        offset: position of the first query among the keys: `keys − queries` if the queries are the last.
        scale: `s`; `1/√d` if None.
        blocks: queries × keys in one block of the rule; by default those for the machine that is compiled for
            (`rules.machine.attention_blocks`), and the rule leaves small logits (below 2¹⁶ a head, or fewer
            than entries in `q` and `k`) to autodiff.
        implementation: a kernel, `"cudnn"`, `"pallas"` (the flash attention that JAX has for TPUs) or
            `"tokamax"` (where it is installed), which take neither bias, mask, window nor offset; or `"xla"`.
            By default the rule takes the first that the target has and that takes the arguments (Pallas' on a
            TPU, cuDNN's on a GPU of this process), else blocks of XLA. The first derivative is the kernel's
            own, the second is that of the blocks.

    Raises:
        ValueError: the shapes do not fit, a block is empty, or a kernel does not take the arguments.
        ModuleNotFoundError: the kernel is not installed.
        TypeError: the mask is not boolean.

    References: Vaswani et al., "Attention is all you need", 2017; Ainslie et al., "GQA", 2023; Beltagy et
    al., "Longformer", 2020 (the window); those of the rule at the head of this module.

    Example:
        >>> import jax.numpy as jnp, funcprop as fp
        >>> x = jnp.array([0.0, 2.0]).reshape(2, 1, 1)
        >>> print(fp.layers.attention(jnp.zeros((2, 1, 1)), x, x, causal=True).ravel())
        [0. 1.]
    """
    _check(q, k, v, bias, mask, blocks, implementation)
    if implementation not in (None, "xla"):
        static = {"causal": causal, "window": window, "offset": offset, "scale": scale, "blocks": blocks}
        return _by_kernel(q, k, v, bias, mask, **static, implementation=implementation)
    p = _weights(q, k, bias, mask, {"causal": causal, "window": window, "offset": offset, "scale": scale})
    mixed = _mixed(p, jnp.moveaxis(v, -2, -3))
    return _by_query(mixed).astype(common_dtype(q, k, v))
