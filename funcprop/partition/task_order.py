"""In which order the stages of a pipeline do their work: GPipe, 1F1B, interleaved.

A schedule is data: for each device the order of its tasks, each the forward or backward sweep of a stage
for a microbatch. It is checked to end, and drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple
from xml.sax.saxutils import escape

Order = Literal["gpipe", "1f1b", "interleaved"]
ORDERS: tuple[Order, ...] = ("1f1b", "gpipe", "interleaved")


class PipelineTask(NamedTuple):
    """The sweep ("F" or "B") of a stage for a microbatch, and the tick in which it is run."""

    tick: int
    sweep: str
    stage: int
    microbatch: int


@dataclass(frozen=True)
class PipelineTimeline:
    """All tasks of a step in an order in which they can be run. `svg()` draws it, `print` writes it.

    `devices` says which device each stage is on; several stages on one are run one at a time.
    """

    tasks: tuple[PipelineTask, ...]
    devices: tuple[int, ...]
    microbatches: int

    @property
    def ticks(self) -> int:
        """How long it takes, in sweeps of a stage."""
        return 1 + max(task.tick for task in self.tasks)

    @property
    def bubble(self) -> float:
        """The share of time in which a device waits, if all sweeps of stages take equally long."""
        places = 1 + max(self.devices)
        return 1 - len(self.tasks) / (self.ticks * places)

    @cached_property
    def in_flight(self) -> tuple[int, ...]:
        """Of each stage, how many microbatches it holds between their two sweeps at most."""
        held = [0] * len(self.devices)
        most = [0] * len(self.devices)
        for task in self.tasks:
            held[task.stage] += 1 if task.sweep == "F" else -1
            most[task.stage] = max(most[task.stage], held[task.stage])
        return tuple(most)

    def _rows(self) -> list[list[PipelineTask | None]]:
        rows: list[list[PipelineTask | None]] = [[None] * self.ticks for _ in range(1 + max(self.devices))]
        for task in self.tasks:
            rows[self.devices[task.stage]][task.tick] = task
        return rows

    def __str__(self) -> str:
        width = len(f"F{self.microbatches - 1}") + (2 if len(set(self.devices)) < len(self.devices) else 0)
        several = len(set(self.devices)) < len(self.devices)

        def label(task: PipelineTask | None) -> str:
            if task is None:
                return "."
            return f"{task.sweep}{task.microbatch}" + (f"/{task.stage}" if several else "")

        lines = [" ".join(label(task).ljust(width) for task in row).rstrip() for row in self._rows()]
        return "\n".join(f"device {i}: {line}" for i, line in enumerate(lines))

    def svg(self) -> str:
        """The timeline as a picture: a row for each device, a box for each sweep of a microbatch."""
        unit, height, left, top = 26, 26, 70, 24
        rows = self._rows()
        width, bottom = left + unit * self.ticks + 10, top + height * len(rows) + 26
        boxes = []
        for i, row in enumerate(rows):
            y = top + i * height
            boxes.append(f'<text x="{left - 8}" y="{y + 17}" text-anchor="end">device {i}</text>')
            for task in row:
                if task is not None:
                    x = left + unit * task.tick
                    colour = "#cfe3f7" if task.sweep == "F" else "#f7d9c4"
                    what = "forward" if task.sweep == "F" else "backward"
                    title = f"{what} sweep of stage {task.stage}, microbatch {task.microbatch}"
                    boxes.append(
                        f'<g><title>{escape(title)}</title><rect x="{x}" y="{y}" width="{unit - 2}" '
                        f'height="{height - 4}" rx="3" fill="{colour}" stroke="#667"/>'
                        f'<text x="{x + unit / 2 - 1:g}" y="{y + 16}" text-anchor="middle">'
                        f"{task.microbatch}</text></g>"
                    )
        caption = (
            f"{self.microbatches} microbatches, {self.ticks} ticks, bubble {self.bubble:.0%}; "
            "blue: forward, orange: backward"
        )
        boxes.append(f'<text x="{left}" y="{bottom - 8}">{escape(caption)}</text>')
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{bottom}" '
            f'viewBox="0 0 {width} {bottom}" role="img" '
            'font-family="Helvetica, Arial, sans-serif" font-size="11">'
            "<title>Pipeline schedule</title>" + "".join(boxes) + "</svg>"
        )

    def _repr_html_(self) -> str:
        return self.svg()

    def save(self, path: str) -> None:
        """Write the picture to a file."""
        with open(path, "w", encoding="utf-8") as file:
            file.write(self.svg())


def timeline(order: Order, stages: int, microbatches: int, devices: int | None = None) -> PipelineTimeline:
    """The tasks of a pipeline of `stages` stages.

    "gpipe": all forward sweeps, then all backward sweeps: every microbatch is held. "1f1b": a stage begins
    its backward sweeps as soon as it can, so that it holds at most `stages − stage` microbatches.
    "interleaved": each of `devices` devices has several stages that are not neighbours, which shortens the
    bubble.

    Raises:
        ValueError: the order is not known, or the stages cannot be shared out among the devices.
    """
    if order not in ORDERS:
        raise ValueError(f"schedule={order!r} is not known; use one of {', '.join(ORDERS)}.")
    places = stages if devices is None else devices
    if stages % places:
        raise ValueError(
            f"{stages} stages cannot be shared out among {places} devices; use a multiple of {places}."
        )
    on = tuple(s % places for s in range(stages))
    each = stages // places
    if each > 1 and order != "gpipe" and microbatches % places:
        raise ValueError(
            f"schedule={order!r} with {each} stages on each device: {microbatches} microbatches are no "
            f"multiple of {places} devices; use {places * max(1, microbatches // places)}, or "
            "schedule='gpipe'."
        )
    make = _all_forward_first if order == "gpipe" else _one_forward_one_backward
    queues = [make(d, stages, places, microbatches) for d in range(places)]
    return PipelineTimeline(_merged(queues, stages), on, microbatches)


def _all_forward_first(
    device: int, stages: int, places: int, microbatches: int
) -> list[tuple[str, int, int]]:
    own = range(device, stages, places)
    forward = [("F", s, m) for s in own for m in range(microbatches)]
    return forward + [("B", s, m) for s in reversed(own) for m in range(microbatches)]


def _one_forward_one_backward(
    device: int, stages: int, places: int, microbatches: int
) -> list[tuple[str, int, int]]:
    """Some forward sweeps to fill the pipeline, then one backward for each forward.

    With several stages on a device, as many microbatches as there are devices pass one before the next.
    """
    each, count = stages // places, microbatches * (stages // places)

    def task(k: int, sweep: str) -> tuple[str, int, int]:
        if each == 1:
            return sweep, device, k
        own = k % (places * each) // places
        own = own if sweep == "F" else each - 1 - own
        return sweep, own * places + device, k // (places * each) * places + k % places

    filling = places - device - 1
    filling = min(count, filling if each == 1 else 2 * filling + (each - 1) * places)
    found = [task(k, "F") for k in range(filling)]
    for k in range(count):
        if k + filling < count:
            found.append(task(k + filling, "F"))
        found.append(task(k, "B"))
    return found


def _needs(task: tuple[str, int, int], stages: int) -> list[tuple[str, int, int]]:
    sweep, s, m = task
    if sweep == "F":
        return [("F", s - 1, m)] if s else []
    return [("F", s, m), *([("B", s + 1, m)] if s < stages - 1 else [])]


def _merged(queues: Sequence[Sequence[tuple[str, int, int]]], stages: int) -> tuple[PipelineTask, ...]:
    """The tasks of all devices, each in the order of its queue, as early as what they need is done."""
    done: set[tuple[str, int, int]] = set()
    at = [0] * len(queues)
    found: list[PipelineTask] = []
    tick = 0
    while any(i < len(queue) for i, queue in zip(at, queues, strict=True)):
        now = []
        for d, queue in enumerate(queues):
            if at[d] < len(queue) and all(need in done for need in _needs(queue[at[d]], stages)):
                now.append(queue[at[d]])
                at[d] += 1
        if not now:
            raise AssertionError("a schedule that cannot end")
        done.update(now)
        found += [PipelineTask(tick, *task) for task in now]
        tick += 1
    return tuple(found)
