"""What experiments do alike: read the command line, let programs take turns, and write what was found."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np

RESULTS = Path(__file__).parents[1] / "results"

Step = TypeVar("Step")  # what a step is called by


def command_line(description: str | None, smoke: str) -> argparse.ArgumentParser:
    """The options of an experiment: `--smoke`, which runs it in seconds; `smoke` says what that leaves."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true", help=smoke)
    return parser


def folder(smoke: bool) -> Path:
    """Where results go: `results`, or `results/smoke`, so that a trial leaves those of the full run alone."""
    found = RESULTS / "smoke" if smoke else RESULTS
    found.mkdir(parents=True, exist_ok=True)
    return found


def write(name: str, smoke: bool, content: Any, draw: Callable[[Path], None], **options: Any) -> None:
    """Write `NAME.json` into the folder, with the options of `json.dumps`, and let `draw` make `NAME.png`."""
    where = folder(smoke)
    (where / f"{name}.json").write_text(json.dumps(content, indent=2, **options))
    draw(where / f"{name}.png")


def blocking(program: Callable[..., Any], args: Sequence[Any]) -> Callable[[], Any]:
    """A step that runs a program and waits for its results."""
    return lambda: jax.block_until_ready(program(*args))


def interleaved(
    steps: dict[Step, Callable[[], Any]],
    repeats: int,
    *,
    twice: bool = False,
    before: Callable[[], None] | None = None,
    clock: Callable[[], Any] = time.perf_counter,
) -> dict[Step, np.ndarray]:
    """Seconds of each step in each turn, by a clock or by several (`both_clocks`).

    If `twice`, the second of two runs counts: what it finds in memory and caches is then its own, as in a
    training loop, and not what the step before it left. `before` is called before each step and not counted.
    """
    seconds: dict[Step, list[Any]] = {name: [] for name in steps}
    for _ in range(repeats):
        for name, step in steps.items():
            if twice:
                step()
            if before is not None:
                before()
            start = clock()
            step()
            seconds[name].append(clock() - start)
    return {name: np.array(times) for name, times in seconds.items()}


def both_clocks() -> np.ndarray:
    """Seconds of the clock on the wall, and of all cores for this process, which others disturb less."""
    return np.array([time.perf_counter(), time.process_time()])


def machine() -> str:
    """The processor, as many cores as this process may use, and the versions that a result depends on."""
    try:
        described = Path("/proc/cpuinfo").read_text()
    except OSError:
        described = ""
    name = re.search(r"model name\s*:\s*(.*)", described)
    processor = name[1] if name else platform.processor() or platform.machine()
    python = platform.python_version()
    return f"{processor}, {len(os.sched_getaffinity(0))} cores, Python {python}, jax {jax.__version__}"
