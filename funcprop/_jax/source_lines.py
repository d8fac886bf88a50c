"""The line of the user's code that an equation of a jaxpr comes from."""

from __future__ import annotations

import functools
import os
import sysconfig
from collections.abc import Sequence
from typing import Any

import jax
from jax.extend import source_info_util

_JAX_DIRECTORY = os.path.dirname(jax.__file__) + os.sep
_OWN_DIRECTORY = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
# What JAX calls the user's line, in its messages and in compiled programs, is then none of ours.
source_info_util.register_exclusion(_OWN_DIRECTORY)
_ENTRANCES = frozenset(_OWN_DIRECTORY + name for name in ("calls.py", "tracing.py"))
_STANDARD_LIBRARY = sysconfig.get_path("stdlib") + os.sep


def source_line(eqn: Any, around: str | None = None) -> str | None:
    """`file:line (function)` of the user's code that an equation comes from.

    That is the innermost frame of the traced function that belongs to no installed package. An equation of a
    jitted library function has no such frame; it comes from where the function was called, the line `around`.
    Where all code is installed, the answer is the innermost frame that is neither JAX's nor funcprop's.
    """
    return _line(eqn.source_info.traceback, around)


def here() -> tuple[str, str | None]:
    """The scope and the source line of the operator that is running, as of an equation."""
    source = source_info_util.current()
    return str(source.name_stack), _line(source.traceback, None)


def _line(traceback: Any, around: str | None) -> str | None:
    frames: Sequence[Any] = () if traceback is None else traceback.frames
    installed = around
    for frame in frames:
        owner = _owner(frame.file_name)
        if owner == "entrance":
            break
        line = f"{frame.file_name}:{frame.line_num} ({frame.function_name})"
        if owner == "user":
            return line
        if owner == "package" and installed is None:
            installed = line
    return installed


@functools.cache
def _owner(file_name: str) -> str:
    """Whose code a file is: that of the user, of an installed package, or of neither.

    Outside of the `entrance`, in which funcprop traces a function, nothing belongs to the function.
    """
    path = os.path.abspath(file_name)
    if path in _ENTRANCES:
        return "entrance"
    if file_name.startswith("<") or path.startswith((_JAX_DIRECTORY, _OWN_DIRECTORY)):
        return "none"
    parts = path.split(os.sep)
    is_installed = path.startswith(_STANDARD_LIBRARY) or "site-packages" in parts or "dist-packages" in parts
    return "package" if is_installed else "user"
