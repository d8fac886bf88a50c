"""What orbax has to say, in one line."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sys
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep orbax from logging, and its threads from printing, what we say in one line."""

    def by_another(record: logging.LogRecord) -> bool:
        return "orbax" not in record.pathname

    def hook(unraisable: Any) -> None:
        # When several files fail at once, the second failure finds nobody who waits for it.
        if str(unraisable.exc_value) != "Event loop is closed":
            before(unraisable)

    logger, before = logging.getLogger("absl"), sys.unraisablehook
    logger.addFilter(by_another)
    sys.unraisablehook = hook
    try:
        yield
    finally:
        logger.removeFilter(by_another)
        if sys.unraisablehook is hook:
            sys.unraisablehook = before


def cause(error: BaseException) -> str:
    """Return what the system says of a file, if the error is from there; else the error's first line."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror} ({error.filename})" if error.filename else error.strerror
    text = str(error)
    code, files = re.search(r"os_error_code='(\d+)'", text), re.findall(r'"(/[^"]+)"', text)
    if code is not None and files:
        return f"{os.strerror(int(code[1]))} ({files[-1]})"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300] if lines else ''}"
