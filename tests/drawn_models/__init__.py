"""Small versions of the models that people draw: `MODELS` has a graph of each, by its name."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import funcprop as fp
from drawn_models import frameworks, linen, plain
from drawn_models.tracing import shape as shape

MODELS: dict[str, Callable[[], fp.Graph]] = {
    f.__name__: cache(f)
    for f in (
        plain.plain_mlp, plain.convlstm, plain.graphnet, plain.mamba, plain.two_towers, plain.wavenet,
        linen.transformer, linen.vit, linen.vae, linen.resnet, linen.unet, linen.lstm, linen.unrolled_lstm,
        linen.experts, linen.densenet, linen.pyramid, linen.actor_critic,
        frameworks.equinox_cnn, frameworks.equinox_mlp, frameworks.nnx_transformer, frameworks.haiku_resnet,
        frameworks.haiku_mlp,
    )
}  # fmt: skip
