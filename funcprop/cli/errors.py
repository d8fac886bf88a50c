"""What is wrong with a target or with the user's code in it, in a message for the user."""

from __future__ import annotations

import os
import sysconfig
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType, TracebackType

import funcprop
from funcprop.training.interruption import Terminated


class TargetError(Exception):
    """The target is not what the command needs; the message is for the user, without a traceback of ours."""


@contextmanager
def users_code(doing: str, module: ModuleType | None) -> Iterator[None]:
    """Turn an exception inside into a `TargetError` with the user's own frames of its traceback.

    Frames of Python's library, of installed packages and of funcprop are left out, except those of an
    installed package that the target itself belongs to.
    """
    try:
        yield
    except (Exception, SystemExit) as error:
        if isinstance(error, TargetError | Terminated):
            raise
        lines = [f"{doing}:", *_own_frames(error.__traceback__, module), *_description(error)]
        raise TargetError("\n".join(lines)) from None


def _description(error: BaseException) -> list[str]:
    """The exception's type, message and notes, without JAX's note on how it shortens tracebacks."""
    kind = type(error)
    library = "" if kind.__module__ in ("builtins", "__main__") else kind.__module__.split(".")[0] + "."
    notes = [note for note in getattr(error, "__notes__", ()) if "removed its internal frames" not in note]
    return [f"{library}{kind.__qualname__}: {error}", *notes]


def _own_frames(start: TracebackType | None, module: ModuleType | None) -> list[str]:
    paths = sysconfig.get_paths()
    others = [paths["stdlib"], paths["purelib"], paths["platlib"], os.path.dirname(funcprop.__file__)]
    own = os.path.dirname(getattr(module, "__file__", None) or "") or "\0"

    def is_own(filename: str) -> bool:
        if filename.startswith("<"):
            return False
        return filename.startswith(own) or not any(filename.startswith(other) for other in others)

    frames = [frame for frame in traceback.extract_tb(start) if is_own(frame.filename)]
    return [line.rstrip("\n") for line in traceback.format_list(frames)]
