"""A bar on stderr while something long runs; nothing where stderr is no terminal."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def bar(doing: str, total: int | None = None, *, counted: bool = True) -> Iterator[Callable[..., None]]:
    """Around what takes long: a line with what is being done, a bar and the time that has passed.

    What it yields changes the line, with keywords of `rich.progress.Progress.update`: `advance=1`,
    `completed=…`, `total=…`, `description="…"`. Without a `total` the bar moves to and fro; `counted` shows
    the numbers.

    Raises:
        ModuleNotFoundError: rich is not installed.
    """
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "progress=True needs 'rich'; pip install 'funcprop[cli]', or pass a function instead."
        ) from error
    console = Console(stderr=True)
    columns: list[Any] = [TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()]
    if counted:
        columns.insert(2, MofNCompleteColumn())
    progress = Progress(
        *columns,
        console=console,
        transient=True,
        disable=not (console.is_terminal or console.is_jupyter),
        # What is being timed must not wait for a line to be drawn.
        refresh_per_second=2,
        # On one terminal, lines are printed above the bar; a redirected stdout must get them itself.
        redirect_stdout=sys.stdout.isatty(),
    )
    with progress:
        task = progress.add_task(doing, total=total)
        yield lambda **change: progress.update(task, **change)
