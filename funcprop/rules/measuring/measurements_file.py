"""The file in which measured choices are kept: one JSON object, safe to share, ignored if damaged."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

VERSION = 1


def default_path() -> Path:
    """The file in the user's cache directory (`$XDG_CACHE_HOME`, or `~/.cache`)."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "funcprop" / "measured.json"


def read(path: Path) -> dict[str, Any]:
    """The entries of a file by key; none, with a warning, if it is damaged."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        warnings.warn(f"{path} cannot be read and is ignored: {error}", stacklevel=4)
        return {}
    entries = content.get("entries") if isinstance(content, dict) else None
    if not isinstance(entries, dict) or content.get("version") != VERSION:
        warnings.warn(f"{path} is no file of measured rules of this version and is ignored.", stacklevel=4)
        return {}
    return entries


def add(path: Path, entries: Mapping[str, Any]) -> None:
    """Add entries to a file: under a lock, and the whole file is replaced at once.

    Raises:
        OSError: the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path.with_name(path.name + ".lock")):
        content = {"version": VERSION, "entries": {**read(path), **entries}}
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump(content, file, indent=1)
            os.replace(name, path)
        except BaseException:
            os.unlink(name)
            raise


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("a") as file:
        try:
            import fcntl
        except ModuleNotFoundError:  # Windows; the file is then replaced as a whole all the same.
            yield
            return
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)
