"""SIGTERM, by which schedulers announce that a machine is wanted back: save, say so, and leave."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

EXIT = 128 + signal.SIGTERM


class Terminated(SystemExit):
    """The end of a run that was asked to end by SIGTERM; the process leaves with exit code 143."""

    def __init__(self) -> None:
        super().__init__(EXIT)


@contextlib.contextmanager
def until_terminated(wanted: bool) -> Iterator[Callable[[], bool]]:
    """Note a SIGTERM instead of dying of it; what it yields says whether there was one.

    Only the main thread hears of signals; elsewhere, and if it is not wanted, nothing is changed.
    """
    if not wanted or threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    asked = False

    def note(*_: Any) -> None:
        nonlocal asked
        asked = True

    before = signal.signal(signal.SIGTERM, note)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGTERM, before if before is not None else signal.SIG_DFL)
