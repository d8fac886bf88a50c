"""Networks of the blocks of the literature, drawn at random: grouped, depthwise and pointwise convolutions.

ResNeXt, RegNet with squeeze and excitation, MobileNet, EfficientNet, ShuffleNet and ConvNeXt are one block
with other choices: a pointwise convolution that widens, a grouped one, and a pointwise one back beside a
shortcut.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any, NamedTuple

from flax import linen as nn

Layer = Callable[[Any], Any]


class Block(NamedTuple):
    """The choices of a stage's blocks."""

    width: int
    depth: int
    expansion: float
    groups: int
    kernel: int
    stride: int
    dilation: int


class BlockNet(nn.Module):
    """A stem, stages of blocks, the first of which may have a stride, and a dense head."""

    kind: str
    stem: int
    blocks: tuple[Block, ...]
    norm: Layer
    activation: Layer
    excited: bool

    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = self.activation(self.norm(nn.Conv(self.blocks[0].width, (3, 3), self.stem)(x)))
        for block in self.blocks:
            for i in range(block.depth):
                x = self._block(x, block, block.stride if i == 0 else 1)
        return nn.Dense(10)(x.mean((1, 2)))

    def _block(self, x: Any, block: Block, stride: int) -> Any:
        inner, act = int(block.width * block.expansion), self.activation
        groups = inner if block.groups == 0 else block.groups
        mixed = groups if self.kind == "ShuffleNet" else 1
        if self.kind == "ConvNeXt":
            y = _grouped(block, x.shape[-1], stride, x.shape[-1])(x)
            y = act(nn.Conv(inner, (1, 1))(self.norm(y)))
            y = nn.Conv(block.width, (1, 1))(y)
        else:
            y = act(self.norm(nn.Conv(inner, (1, 1), use_bias=False, feature_group_count=mixed)(x)))
            if mixed > 1:
                y = y.reshape(*y.shape[:-1], mixed, -1).swapaxes(-1, -2).reshape(y.shape)
            y = act(self.norm(_grouped(block, inner, stride, groups)(y)))
            if self.excited:
                y = y * nn.sigmoid(
                    nn.Dense(inner)(act(nn.Dense(max(inner // 4, 4))(y.mean((1, 2), keepdims=True))))
                )
            y = self.norm(nn.Conv(block.width, (1, 1), use_bias=False, feature_group_count=mixed)(y))
        if x.shape != y.shape and self.kind in ("ResNeXt", "RegNet"):
            x = self.norm(nn.Conv(block.width, (1, 1), stride, use_bias=False)(x))
        y = x + y if x.shape == y.shape else y
        return act(y) if self.kind in ("ResNeXt", "RegNet", "ShuffleNet") else y


def _grouped(block: Block, features: int, stride: int, groups: int) -> Layer:
    kernel = (block.kernel,) * 2
    return nn.Conv(
        features, kernel, stride, kernel_dilation=block.dilation, feature_group_count=groups, use_bias=False
    )


# Of each kind: groups (0 for one of each channel), expansions, kernels.
_CHOICES: dict[str, tuple[tuple[int, ...], tuple[float, ...], tuple[int, ...]]] = {
    "ResNeXt": ((2, 4, 8), (0.5, 1, 2), (3,)),
    "RegNet": ((2, 4, 8), (1,), (3,)),
    "MobileNet": ((0,), (2, 4, 6), (3,)),
    "ShuffleNet": ((2, 4), (0.5, 1), (3,)),
    "ConvNeXt": ((0,), (2, 4), (5, 7)),
    "EfficientNet": ((0,), (1, 4, 6), (3, 5)),
}


def block_net(
    rng: random.Random, norm_of: Callable[[str], Layer], activations: dict[str, Layer]
) -> tuple[str, nn.Module, tuple[int, ...]]:
    """One of the kinds, with sizes drawn: what it is, the module, and the shape of images for it."""
    kind = rng.choice(list(_CHOICES))
    groups, expansions, kernels = _CHOICES[kind]
    width, widening = rng.choice([16, 24, 32, 48]), rng.choice([1.5, 2, 2])
    blocks = []
    for i in range(rng.randint(2, 3)):
        wide = int(width * widening**i) // 16 * 16 or 16
        blocks.append(
            Block(wide, rng.randint(1, 3), rng.choice(expansions), rng.choice(groups), rng.choice(kernels),
                  rng.choice([1, 2]) if i == 0 else 2, rng.choice([1, 1, 1, 2]))
        )  # fmt: skip
    stem, size, batch = rng.choice([1, 2]), rng.choice([24, 32, 48]), rng.choice([8, 16, 32])
    norm = rng.choice(["none", "batch", "batch", "layer", "group"])
    activation = rng.choice(list(activations))
    excited = kind == "EfficientNet" or (kind == "RegNet" and rng.random() < 0.7)
    text = f"{kind} {batch}×{size}² /{stem}, {norm}, {activation}{', excited' * excited}, " + "; ".join(
        f"{b.depth}×{b.width}e{b.expansion:g}g{b.groups}k{b.kernel}/{b.stride}d{b.dilation}" for b in blocks
    )
    net = BlockNet(kind, stem, tuple(blocks), norm_of(norm), activations[activation], excited)
    return text, net, (batch, size, size, 3)
