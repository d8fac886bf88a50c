"""What a run carries from step to step besides the parameters."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import jax

from funcprop.training.mixed_precision import LossScale
from funcprop.training.position import Position


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainingState:
    """What a run carries besides the parameters: `fit(..., state=epoch.state)` goes on from there.

    * `optimizer`: the state of the optax optimizer.
    * `model`: the mutable state of the model, such as running averages of a batch norm; None without.
    * `scale`: the loss scale; None without.
    * `position`: how many steps and epochs are done. Shuffles and epoch numbers go on after them.
    """

    optimizer: Any
    model: Any = None
    scale: LossScale | None = None
    position: Position = field(default=Position(), metadata={"static": True})
