"""Where the numbers of a run go: lines of JSON, TensorBoard, or any function of a record.

A record is a dict with `event`: `step` (with step, epoch, batch, loss, examples_per_second, bytes, seconds),
`epoch` (with its metrics), `resumed`, `saved`, `problem` and the like. Several runs may write into one file:
what a run that was killed had left unfinished stays a line of its own.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

Record: TypeAlias = Mapping[str, Any]
Recorder: TypeAlias = Callable[[Record], None]
Log: TypeAlias = "str | os.PathLike[str] | Recorder | Iterable[Any] | None"


def recorders(log: Log) -> list[Recorder]:
    """Return the functions that `fit(..., log=)` names: a path is a file of JSON lines.

    Raises:
        TypeError: it is neither a path nor a function, nor several of them.
    """
    if log is None:
        return []
    if isinstance(log, str | os.PathLike):
        return [json_lines(log)]
    if callable(log):
        return [log]
    if not isinstance(log, list | tuple):
        raise TypeError(f"fit: log={log!r}; pass a path, a function of a record, or a list of them.")
    return [one for part in log for one in recorders(part)]


def json_lines(path: str | os.PathLike[str], *, every: int = 1) -> Recorder:
    """Append records to a file, each as one line of JSON; NaN and infinities are strings.

    Args:
        path: the file; its directory is there.
        every: write every so manyth step; all other events are written.

    Raises:
        OSError: the file cannot be written.

    Example:
        >>> import pathlib, tempfile, funcprop as fp
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "run.jsonl"
        >>> fp.training.json_lines(path)({"event": "step", "step": 1, "loss": 0.5})
        >>> print(path.read_text(), end="")
        {"event": "step", "step": 1, "loss": 0.5}
    """
    path = Path(path)
    with path.open("ab+") as file:
        size = file.seek(0, os.SEEK_END)
        if size:
            file.seek(size - 1)
            if file.read(1) != b"\n":
                file.write(b"\n")

    def write(record: Record) -> None:
        if record["event"] == "step" and record["step"] % every:
            return
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({k: _plain(v) for k, v in record.items()}) + "\n")

    return write


def tensorboard(directory: str | os.PathLike[str], *, every: int = 1) -> Recorder:
    """Write the numbers of steps and epochs for TensorBoard.

    Args:
        directory: where TensorBoard's event files go.
        every: write every so manyth step.

    Raises:
        ModuleNotFoundError: tensorboardX is not installed.

    Example:
        >>> import funcprop as fp
        >>> try:
        ...     write = fp.training.tensorboard("runs")  # doctest: +SKIP
        ... except ModuleNotFoundError as error:
        ...     print(error)
    """
    try:
        from tensorboardX import SummaryWriter
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"tensorboard: {error.name!r} is not installed; pip install tensorboardX, or log to a file of "
            "JSON lines.",
            name=error.name,
        ) from error
    writer = SummaryWriter(str(directory))

    def write(record: Record) -> None:
        event = record["event"]
        if event not in ("step", "epoch") or (event == "step" and record["step"] % every):
            return
        for name, value in record.items():
            if isinstance(value, int | float) and name not in ("step", "epoch", "batch"):
                writer.add_scalar(f"{event}/{name}", value, record["step"])
        writer.flush()

    return write


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    return value


@dataclass
class Means:
    """Sums of the numbers of an epoch's steps so far, in their order."""

    count: int = 0
    sums: dict[str, float] = field(default_factory=dict)

    def add(self, numbers: dict[str, float]) -> None:
        """Add the numbers of one step."""
        self.count += 1
        for name, value in numbers.items():
            self.sums[name] = self.sums.get(name, 0.0) + value

    def means(self) -> dict[str, float]:
        """Return the means, in the order in which the names came."""
        return {name: total / self.count for name, total in self.sums.items()}
