"""Names of a package that are imported when they are used, from its stub `__init__.pyi`."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Callable
from typing import Any

import lazy_loader


def attach(package: str, file: str) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """Make `__getattr__`, `__dir__` and `__all__` of a package; it is said where a name of another room is.

    Example:
        >>> import funcprop as fp
        >>> fp.laplace
        Traceback (most recent call last):
        AttributeError: funcprop has no 'laplace'; did you mean funcprop.curvature.laplace?
    """
    load, names, public = lazy_loader.attach_stub(package, file)

    def __getattr__(name: str) -> Any:  # noqa: N807
        if name in names():
            return load(name)
        # Reading any attribute that starts so (`__wrapped__`, `_repr_png_`) is a question, not a mistake.
        near = [] if name.startswith("_") else _near(package, name, public)
        hint = f"did you mean {' or '.join(near)}?" if near else f"dir({package}) lists its names."
        raise AttributeError(f"{package} has no {name!r}; {hint}")

    return __getattr__, names, public


def _near(package: str, name: str, public: list[str]) -> list[str]:
    """Where this very name is, in whichever room of the library; else the names spelled most like it."""
    top = importlib.import_module(package.partition(".")[0])
    rooms = {package: public, top.__name__: getattr(top, "__all__", [])}
    for found in pkgutil.iter_modules(top.__path__, f"{top.__name__}."):
        if found.ispkg:
            rooms.setdefault(found.name, getattr(importlib.import_module(found.name), "__all__", []))
    known = {other for its_names in rooms.values() for other in its_names}
    near = [name] if name in known else difflib.get_close_matches(name, known, n=2, cutoff=0.7)
    return [f"{room}.{other}" for other in near for room, its_names in rooms.items() if other in its_names]
