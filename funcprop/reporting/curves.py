"""A short training run, for its curves."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

from funcprop.training.fitting import fit
from funcprop.training.loop import Setup


@dataclass(frozen=True)
class Curves:
    """Metrics after every epoch, by name; `stopped` says why there are fewer epochs than planned.

    A metric that an epoch does not have is NaN there.
    """

    planned: int
    seconds: float
    metrics: dict[str, tuple[float, ...]]
    stopped: str | None = None

    @property
    def epochs(self) -> int:
        """How many epochs were run."""
        return max(map(len, self.metrics.values()), default=0)

    @property
    def charts(self) -> list[Chart]:
        """Losses on one axis, accuracies on another, every other metric on its own."""
        groups: dict[str, dict[str, tuple[float, ...]]] = {}
        for name, values in self.metrics.items():
            kind = next((k for k in ("loss", "accuracy") if name.endswith(k)), name)
            groups.setdefault(kind, {})[name] = values
        return [_chart(metrics) for metrics in groups.values()]


@dataclass(frozen=True)
class Tick:
    """A mark on the vertical axis; `at` is its height, from 0 to 1."""

    at: float
    label: str


@dataclass(frozen=True)
class Curve:
    """A line in a chart: its points in a square of 100, y down."""

    name: str
    points: str


@dataclass(frozen=True)
class Chart:
    """Curves over one axis; `alternative` says in words what they show."""

    lines: tuple[Curve, ...]
    ticks: tuple[Tick, ...]
    alternative: str


def _chart(metrics: dict[str, tuple[float, ...]]) -> Chart:
    """Metrics of one kind on one axis."""
    finite = [x for values in metrics.values() for x in values if math.isfinite(x)] or [0.0]
    ticks = _ticks(min(finite), max(finite))
    low, high = ticks[0], ticks[-1]

    def height(x: float) -> float:
        return (x - low) / (high - low)

    def points(values: tuple[float, ...]) -> str:
        across = 100 / max(len(values) - 1, 1)
        shown = [(i * across, 100 - 100 * height(x)) for i, x in enumerate(values) if math.isfinite(x)]
        # Of one epoch there is a dot: a line of no length, with round ends.
        shown = [(50.0, shown[0][1]), (50.01, shown[0][1])] if len(shown) == 1 else shown
        return " ".join(f"{x:.2f},{y:.2f}" for x, y in shown)

    said = [f"{name} from {x[0]:.4g} to {x[-1]:.4g}" for name, x in metrics.items()]
    return Chart(
        tuple(Curve(name, points(values)) for name, values in metrics.items()),
        tuple(Tick(height(x), f"{x:.6g}".replace("-", "−")) for x in ticks),
        "Line chart over epochs: " + "; ".join(said),
    )


def _ticks(low: float, high: float) -> list[float]:
    """About five round numbers around a range."""
    width = (high - low) or abs(high) or 1.0
    unit = 10.0 ** math.floor(math.log10(width / 4))
    size = next(unit * k for k in (1, 2, 5, 10) if width / (unit * k) <= 5)
    first, last = math.floor(low / size), math.ceil(high / size)
    return [i * size for i in range(first, max(last, first + 1) + 1)]


def train(setup: Setup, epochs: int, seconds: float) -> Curves:
    """Train until the epochs or the time are over; a loss that is not finite ends the run, not the page."""
    history: list[dict[str, float]] = []
    stopped = None
    start = time.perf_counter()
    run = fit(*setup[:4], epochs=epochs, evaluate=setup.evaluate, **setup.options)
    try:
        for epoch in run:
            history.append(epoch.metrics)
            if time.perf_counter() - start > seconds and len(history) < epochs:
                stopped = f"stopped after {seconds:g} seconds"
                break
    except FloatingPointError as error:
        stopped = str(error)
    names = dict.fromkeys(name for metrics in history for name in metrics)
    curves = {name: tuple(metrics.get(name, math.nan) for metrics in history) for name in names}
    return Curves(epochs, time.perf_counter() - start, curves, stopped)
