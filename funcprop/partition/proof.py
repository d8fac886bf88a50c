"""What a compiled plan says of itself, beside what was predicted."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jax.experimental import multihost_utils

from funcprop.partition.device_bytes import DeviceBytes
from funcprop.partition.traffic import Collective, volume


@dataclass(frozen=True)
class PartitionProof:
    """A plan, compiled. `print(proof)` is a report.

    Attributes:
        predicted: bytes of one device at the peak, as planned.
        compiled: the same by XLA: arguments + results + temporaries − what they share; of a pipeline, by the
            programs of the busiest device.
        collectives: those of the compiled program, each array by itself; of a pipeline, what stages send.
        predicted_collectives: those that the plan expects.
        unpredicted: those of the program that it does not, each with its operator.
        gradient_error: the largest deviation of an entry of the gradient from the one of one device,
        relative to
            the largest entry of all; None where the devices or the values are not there.
        loss_error: the deviation of the loss.
    """

    name: str
    predicted: DeviceBytes
    compiled: int
    collectives: Sequence[Collective]
    predicted_collectives: Sequence[Collective]
    unpredicted: Sequence[Collective]
    gradient_error: float | None
    loss_error: float | None

    @property
    def ratio(self) -> float:
        """Predicted over compiled bytes."""
        return self.predicted.total / self.compiled

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "name": self.name,
            "predicted": self.predicted.total,
            "compiled": self.compiled,
            "ratio": self.ratio,
            "communicated": volume(self.collectives),
            "predicted_communicated": volume(self.predicted_collectives),
            "unpredicted": [vars(c) for c in self.unpredicted],
            "gradient_error": self.gradient_error,
            "loss_error": self.loss_error,
        }

    def json(self) -> str:
        """The proof as JSON."""
        return json.dumps(self.as_dict())

    def __str__(self) -> str:
        kinds = Counter(c.kind for c in self.collectives)
        made = ", ".join(f"{count} {kind}" for kind, count in kinds.items()) or "none"
        lines = [
            f"{self.name}, compiled",
            f"  bytes per device: predicted {self.predicted.total:,}, compiled {self.compiled:,} "
            f"({self.ratio:.3f})",
            f"  collectives: {made}; {volume(self.collectives):,} bytes, predicted "
            f"{volume(self.predicted_collectives):,}",
        ]
        lines += [
            f"  not predicted: {c.kind} of {c.nbytes:,} bytes × {c.trips}, by {c.operator}"
            for c in self.unpredicted
        ]
        if self.gradient_error is not None:
            lines.append(
                f"  against one device: gradient {self.gradient_error:.1e}, loss {self.loss_error:.1e}"
            )
        return "\n".join(lines)


def deviation(gradient: Sequence[Any], reference: Sequence[Any], together: bool = False) -> float:
    """The largest deviation of an entry, relative to the largest entry of the whole reference.

    Each process compares the parts that it has; `together`, all of them call this.
    """
    worst, largest = 0.0, 0.0
    for a, b in zip(gradient, map(np.asarray, reference), strict=True):
        largest = max(largest, float(np.max(np.abs(b), initial=0)))
        for part in a.addressable_shards:
            difference = np.abs(np.asarray(part.data) - b[part.index])
            worst = max(worst, float(np.max(difference, initial=0)))
    if together:
        worst = float(np.max(multihost_utils.process_allgather(np.asarray(worst))))
    return worst / largest if largest else worst
