"""Files that are asked for, looked at before anything is computed."""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from pathlib import Path


def require_writable(argument: str, path: str | os.PathLike[str], suffixes: Sequence[str]) -> None:
    """Raise an OSError that says what is wrong with a path: its suffix, its directory, or that it is one.

    Example:
        >>> from funcprop.graph.writable import require_writable
        >>> require_writable("path", "picture.jpg", (".svg", ".png"))
        Traceback (most recent call last):
        ...
        OSError: path='picture.jpg' ends in '.jpg'; write one of .svg, .png.
    """
    file, said = Path(path), f"{argument}={os.fspath(path)!r}"
    if file.is_dir():
        raise OSError(
            f"{said} is a directory; name a file in it, as {str(file / ('picture' + suffixes[0]))!r}."
        )
    if file.suffix not in suffixes:
        near = difflib.get_close_matches(file.suffix.lower(), suffixes, 1, 0.6)
        hint = f" Did you mean {near[0]}?" if near else ""
        ending = f"ends in {file.suffix!r}" if file.suffix else "has no suffix that says what to write"
        raise OSError(f"{said} {ending}; write one of {', '.join(suffixes)}.{hint}")
    if not file.parent.is_dir():
        raise OSError(f"{said}: there is no directory {str(file.parent)!r}; make it first.")
