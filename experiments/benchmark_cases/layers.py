"""Our layers against the same functions in plain `jax.numpy`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

import funcprop as fp
from benchmark_cases.case import Case, Row, gradients, normal, products


def plain_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Causal softmax attention as it is usually written."""
    logits = jnp.einsum("btnh,bsnh->bnts", q, k) / q.shape[-1] ** 0.5
    seen = jnp.tril(jnp.ones(logits.shape[-2:], bool))
    return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(jnp.where(seen, logits, -jnp.inf)), v)


our_attention = partial(fp.layers.attention, causal=True)


def attention(
    compare: Callable[..., Case], length: int, batch: int = 1, heads: int = 4, width: int = 64, **options: Any
) -> Case:
    """A cubic function of the result, so that the Hessian has every term; `options` are the layer's."""

    def loss(qkv: Any, *, by: Callable[..., Any]) -> jax.Array:
        return jnp.sum(by(*qkv) ** 3)

    qkv = tuple(normal(batch, length, heads, width, seed=i) for i in range(3))
    ours = partial(our_attention, **options)
    return compare(partial(loss, by=ours), qkv, plain=partial(loss, by=plain_attention))


def plain_head(h: jax.Array, w: jax.Array, labels: jax.Array) -> jax.Array:
    """Cross-entropy of a linear map, all logits at once."""
    return optax.softmax_cross_entropy_with_integer_labels(h @ w, labels).mean()


def head(compare: Callable[..., Case], tokens: int, width: int, vocabulary: int, **options: Any) -> Case:
    def loss(params: Any, labels: jax.Array, *, by: Callable[..., Any]) -> jax.Array:
        return by(params["h"], params["w"], labels)

    params = {"h": normal(tokens, width), "w": normal(width, vocabulary, seed=1) / width**0.5}
    labels = jax.random.randint(jax.random.key(2), (tokens,), 0, vocabulary)
    ours = partial(loss, by=partial(fp.layers.linear_cross_entropy, **options))
    return compare(ours, params, labels, plain=partial(loss, by=plain_head))


def plain_norm(x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
    centred = x - x.mean(-1, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.mean(centred**2, -1, keepdims=True) + 1e-6) * scale + bias


def language_model(layers: int, width: int, length: int, batch: int, vocabulary: int) -> Case:
    """Pre-norm transformer by a scan over layers: norms, attention, gelu and head are ours, or plain."""
    heads = width // 64 or 1

    def loss(
        params: Any, tokens: jax.Array, labels: jax.Array, *, norm: Any, attention: Any, gelu: Any, head: Any
    ) -> jax.Array:
        def layer(x: jax.Array, p: Any) -> tuple[jax.Array, None]:
            qkv = (norm(x, **p["before"]) @ p["qkv"]).reshape(*x.shape[:2], 3, heads, -1)
            x = x + attention(*(qkv[:, :, i] for i in range(3))).reshape(x.shape) @ p["out"]
            return x + gelu(norm(x, **p["between"]) @ p["up"]) @ p["down"], None

        x, _ = jax.lax.scan(layer, params["embedding"][tokens] + params["position"], params["layers"])
        return head(norm(x, **params["last"]), params["head"], labels)

    def weights(*shape: int, seed: int) -> jax.Array:
        return normal(*shape, seed=seed) / shape[-2] ** 0.5

    def of_norm(*batch: int) -> dict[str, jax.Array]:
        return {"scale": jnp.ones((*batch, width)), "bias": jnp.zeros((*batch, width))}

    params = {
        "embedding": weights(vocabulary, width, seed=1),
        "position": 0.1 * weights(length, width, seed=2),
        "layers": {
            "before": of_norm(layers), "between": of_norm(layers),
            "qkv": weights(layers, width, 3 * width, seed=3), "out": weights(layers, width, width, seed=4),
            "up": weights(layers, width, 4 * width, seed=5),
            "down": weights(layers, 4 * width, width, seed=6),
        },
        "last": of_norm(),
        "head": weights(width, vocabulary, seed=7),
    }  # fmt: skip
    text = jax.random.randint(jax.random.key(8), (batch, length + 1), 0, vocabulary)
    ours = partial(
        loss,
        norm=fp.layers.layer_norm,
        attention=our_attention,
        gelu=fp.layers.gelu,
        head=fp.layers.linear_cross_entropy,
    )
    plain = partial(loss, norm=plain_norm, attention=plain_attention, gelu=jax.nn.gelu, head=plain_head)
    return gradients(ours, params, text[:, :-1], text[:, 1:], plain=plain)


ROWS: dict[str, Row] = {
    "attention, T2048, 4 heads, d 64, causal": Row(
        lambda: attention(gradients, 2048), lambda: attention(gradients, 272, heads=2, width=8), 1.0, 0.08
    ),
    "HVP of attention, T1024": Row(
        lambda: attention(products, 1024), lambda: attention(products, 272, heads=2, width=8), 1.1, 0.12
    ),
    "linear + cross-entropy, 4096 × 256 × 32k": Row(
        lambda: head(gradients, 4096, 256, 2**15), lambda: head(gradients, 130, 8, 64), 1.05, 0.10
    ),
    "language model, 4 layers d256 T512 B4 V32k": Row(
        lambda: language_model(4, 256, 512, 4, 2**15), lambda: language_model(2, 64, 16, 8, 128), 0.90, 0.25
    ),
}

# Layers that buy bytes with time, by what their loop takes at a time.
CURVES: dict[str, dict[str, Callable[[], Case]]] = {
    "linear + cross-entropy, 4096 × 256 × 32k, by tokens in a chunk": {
        str(chunk): partial(head, gradients, 4096, 256, 2**15, chunk=chunk)
        for chunk in (256, 512, 1024, 2048)
    },
    "attention, T2048, 4 heads, d 64, causal, by queries × keys in a block": {
        f"{q}×{k}": partial(attention, gradients, 2048, blocks=(q, k))
        for q, k in ((256, 256), (512, 512), (512, 1024), (1024, 1024), (2048, 2048))
    },
}
