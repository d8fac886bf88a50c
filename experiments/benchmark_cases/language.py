"""Transformers and their parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import optax
from flax import linen as nn

from benchmark_cases.case import NEVER_WORSE, Case, Row, gradients


class Block(nn.Module):
    """A pre-norm transformer block."""

    heads: int = 4

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        x = x + nn.MultiHeadDotProductAttention(self.heads)(nn.LayerNorm()(x), mask=mask)
        hidden = nn.gelu(nn.Dense(4 * x.shape[-1])(nn.LayerNorm()(x)))
        return x + nn.Dense(x.shape[-1])(hidden)


class Transformer(nn.Module):
    """A causal language model with learned positions and a tied embedding."""

    blocks: int = 12
    width: int = 128
    vocabulary: int = 512

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        position = self.param("position", nn.initializers.normal(), (tokens.shape[1], self.width))
        embed = nn.Embed(self.vocabulary, self.width)
        x = embed(tokens) + position
        mask = nn.make_causal_mask(tokens)
        for _ in range(self.blocks):
            x = Block()(x, mask)
        return embed.attend(nn.LayerNorm()(x))


def next_token_loss(model: Transformer) -> Callable[[Any, jax.Array], jax.Array]:
    """The mean cross-entropy of every token but the first, given those before it."""

    def loss(params: Any, tokens: jax.Array) -> jax.Array:
        logits: Any = model.apply(params, tokens)
        return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:]).mean()

    return loss


def transformer(blocks: int, batch: int, length: int) -> Case:
    model = Transformer(blocks)
    tokens = jax.random.randint(jax.random.key(0), (batch, length), 0, model.vocabulary)
    params = jax.jit(model.init)(jax.random.key(1), tokens)
    return gradients(next_token_loss(model), params, tokens)


ROWS: dict[str, Row] = {
    "Flax transformer, 12 blocks": Row(
        lambda: transformer(12, 8, 64), lambda: transformer(1, 2, 8), *NEVER_WORSE
    ),
}
