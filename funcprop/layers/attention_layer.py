"""Softmax attention as a layer: its rule, by blocks or by a kernel, its equations, and what it refuses.

The rule saves the result and the logarithm of every query's normalizer; `attention_blocks` computes both.
"""

from __future__ import annotations

import functools
import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Inexact

from funcprop.layers import attention_kernels
from funcprop.layers.attention_blocks import attend, cotangents
from funcprop.layers.attention_kernels import KernelCall, KernelResiduals
from funcprop.layers.attention_operands import (
    by_group,
    by_query,
    like_logits,
    mixed,
    mixed_transposed,
    operands_of,
    scale_of,
    scores,
    weights_of,
)
from funcprop.layers.tiling import Tiling, reach_of, sum_to
from funcprop.program.dtypes import common_dtype
from funcprop.rules.attach import attach
from funcprop.rules.bound_rule import BoundRule
from funcprop.rules.equations import Equations, OperatorSymbols, apply
from funcprop.rules.layer import layer
from funcprop.rules.machine import Machine, costs_traffic, dtype_of_factors, host, least_logits
from funcprop.rules.rule import Rule
from funcprop.rules.running import with_rules
from funcprop.rules.sets import autodiff

# --- the rule ---------------------------------------------------------------------------------


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
    call = KernelCall(q, k, v, bias, mask, causal, window, offset, scale_of(q, scale))
    name = attention_kernels.chosen(implementation, call, blocks, machine)
    if name != "xla":
        kernel = attention_kernels.kernel(name, call)
        return attention_kernels.forward(kernel, _by_blocks(causal, scale, machine), q, k, v)
    tiling = Tiling.of(q, k, reach_of(causal, window), offset, blocks, machine)
    x = operands_of(q, k, v, bias, mask, dtype_of_factors(machine, q, k, v))
    out, normalizer = attend(x, tiling, scale_of(q, scale))
    out = by_query(out)
    return out.astype(common_dtype(q, k, v)), AttentionResiduals(q, k, v, bias, mask, out, normalizer)


def _by_blocks(causal: bool, scale: float | None, machine: Machine) -> Any:
    """Attention in blocks as a function of queries, keys and values, with its rule: what kernels compute."""
    rules = autodiff.replace({attention: _RULE}).on(machine)
    return with_rules(partial(attention, causal=causal, scale=scale, implementation="xla"), rules)


def _value(q: Any, k: Any, v: Any, bias: Any = None, mask: Any = None, **static: Any) -> Any:
    """The result where nothing is differentiated."""
    given = {key: static[key] for key in ("causal", "window", "offset")}
    call = KernelCall(q, k, v, bias, mask, **given, scale=scale_of(q, static["scale"]))
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
    x = operands_of(q, k, v, bias, mask, dtype_of_factors(machine, q, k, v))
    kv, factor = k.shape[-2], scale_of(q, scale)
    # rowsum(P ∘ P̄) = rowsum(Ȳ ∘ Y): no block is needed for it.
    delta = (g.astype(x.sums) * out).sum(-1, keepdims=True)
    g = by_group(g.astype(x.q.dtype), kv)
    found = cotangents(x, normalizer, g, by_group(delta, kv), tiling, factor, tuple(needs))
    return (
        (by_query(found["q"]) * factor).astype(q.dtype) if needs[0] else None,
        (jnp.moveaxis(found["k"], -3, -2) * factor).astype(k.dtype) if needs[1] else None,
        jnp.moveaxis(found["v"], -3, -2).astype(v.dtype) if needs[2] else None,
        found["bias"].reshape(bias.shape).astype(bias.dtype) if needs[3] else None,
        None,
    )


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
    kv, scale = k.shape[-2], scale_of(q, static["scale"])
    given = [x for x in (bias, mask) if x is not None]

    def weights(q: Any, k: Any, *rest: Any) -> Any:
        values = iter(rest)
        of_bias, of_mask = (None if x is None else next(values) for x in (bias, mask))
        return weights_of(q, k, of_bias, of_mask, static)

    def mix(p: Any, x: Any) -> Any:
        return by_query(mixed(p, jnp.moveaxis(x, -2, -3)))

    def mix_transposed(p: Any, x: Any) -> Any:
        return jnp.moveaxis(mixed_transposed(p, by_group(x, kv)), -3, -2)

    def score(x: Any, k: Any) -> Any:
        return scores(by_group(x, kv), jnp.moveaxis(k, -2, -3))

    def to_bias(s_bar: Any) -> Any:
        like = jax.eval_shape(lambda x: like_logits(x, q.type, kv), bias.type)
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
    p = weights_of(q, k, bias, mask, {"causal": causal, "window": window, "offset": offset, "scale": scale})
    return by_query(mixed(p, jnp.moveaxis(v, -2, -3))).astype(common_dtype(q, k, v))
