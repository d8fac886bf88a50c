"""A language model of Flax's own layers, whose embedding is also its last matrix."""

from __future__ import annotations

from typing import Any

import flax.linen as nn


class LanguageModel(nn.Module):
    """Blocks of attention and a layer in between of four times the width."""

    width: int
    layers: int
    length: int
    heads: int = 4
    vocabulary: int = 256

    @nn.compact
    def __call__(self, tokens: Any) -> Any:
        """The logits of the next token at every place."""
        embed = nn.Embed(self.vocabulary, self.width)
        places = self.param("places", nn.initializers.normal(0.02), (self.length, self.width))
        x = embed(tokens) + places
        mask = nn.make_causal_mask(tokens)
        for _ in range(self.layers):
            x = x + nn.MultiHeadDotProductAttention(self.heads)(nn.LayerNorm()(x), mask=mask)
            x = x + nn.Dense(self.width)(nn.gelu(nn.Dense(4 * self.width)(nn.LayerNorm()(x))))
        return embed.attend(nn.LayerNorm()(x))
