"""Loops that are no recurrent networks: layers under `scan`, a loss by chunks, loops in loops."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from benchmark_cases.case import NEVER_WORSE, Case, Row, gradients, normal, products
from benchmark_cases.recurrent import LSTM, recurrent


class Block(nn.Module):
    """A transformer layer as the body of a scan."""

    heads: int = 4

    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        mask = nn.make_causal_mask(x[..., 0])
        y = nn.MultiHeadDotProductAttention(self.heads)(nn.LayerNorm()(x), mask=mask)
        x = x + y
        y = nn.gelu(nn.Dense(4 * x.shape[-1])(nn.LayerNorm()(x)))
        return x + nn.Dense(x.shape[-1])(y), None


def layers(count: int, batch: int, length: int, width: int, *, remat: bool = False) -> Case:
    """Transformer layers whose weights are scanned."""
    block = nn.remat(Block, prevent_cse=False) if remat else Block
    scanned = nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True}, length=count)
    model, x = scanned(), normal(batch, length, width)
    params = jax.jit(model.init)(jax.random.key(1), x, None)
    return gradients(lambda params, x: jnp.mean(model.apply(params, x, None)[0] ** 2), params, x)


def cross_entropy_by_chunks(tokens: int, chunk: int, width: int, vocabulary: int) -> Case:
    """Linear layer and cross-entropy, one chunk of tokens at a time; the matrix is the loop's constant."""
    x, labels = normal(tokens // chunk, chunk, width), jnp.arange(tokens).reshape(-1, chunk) % vocabulary

    def loss(w: jax.Array, x: jax.Array, labels: jax.Array) -> jax.Array:
        def step(total: jax.Array, part: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
            losses = optax.softmax_cross_entropy_with_integer_labels(part[0] @ w, part[1])
            return total + losses.sum(), None

        return jax.lax.scan(step, jnp.zeros(()), (x, labels))[0] / tokens

    return gradients(loss, normal(width, vocabulary, seed=1) / width**0.5, x, labels)


def in_loops(steps: int, refinements: int, batch: int, width: int) -> Case:
    """A recurrent network that refines its state in an inner loop."""

    def loss(params: dict[str, jax.Array], xs: jax.Array) -> jax.Array:
        def outer(h: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
            def inner(c: jax.Array, _: None) -> tuple[jax.Array, None]:
                return jnp.tanh(c @ params["u"] + x @ params["v"] + params["b"]), None

            h, _ = jax.lax.scan(inner, h, None, length=refinements)
            return h, h

        return jnp.mean(jax.lax.scan(outer, jnp.zeros((batch, width)), xs)[1] ** 2)

    scale = width**-0.5
    params = {"u": normal(width, width) * scale, "v": normal(width, width, seed=1) * scale}
    return gradients(loss, {**params, "b": jnp.zeros(width)}, normal(steps, batch, width, seed=2))


ROWS: dict[str, Row] = {
    "LSTM T64 B4 H512, HVP": Row(
        lambda: recurrent(LSTM, 64, 4, 512, products), lambda: recurrent(LSTM, 3, 2, 8, products), 0.50, 1.1
    ),
    "8 transformer layers under scan": Row(
        lambda: layers(8, 2, 128, 128), lambda: layers(2, 1, 4, 8), *NEVER_WORSE
    ),
    "12 transformer layers under scan": Row(
        lambda: layers(12, 2, 64, 128), lambda: layers(2, 1, 4, 8), *NEVER_WORSE
    ),
    "8 remat'ed layers under scan": Row(
        lambda: layers(8, 2, 128, 128, remat=True), lambda: layers(2, 1, 4, 8, remat=True), *NEVER_WORSE
    ),
    "cross-entropy by chunks of 256": Row(
        lambda: cross_entropy_by_chunks(2048, 256, 128, 4096),
        lambda: cross_entropy_by_chunks(8, 4, 4, 8),
        *NEVER_WORSE,
    ),
    "cross-entropy by chunks of 16": Row(
        lambda: cross_entropy_by_chunks(512, 16, 128, 8192),
        lambda: cross_entropy_by_chunks(8, 2, 8, 16),
        *NEVER_WORSE,
    ),
    "loop in a loop": Row(lambda: in_loops(32, 4, 4, 64), lambda: in_loops(3, 2, 2, 8), *NEVER_WORSE),
}
