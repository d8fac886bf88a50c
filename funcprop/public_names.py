"""Names of a package that are imported when they are used, from its stub `__init__.pyi`."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any

import lazy_loader


def attach(package: str, file: str) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """Make `__getattr__`, `__dir__` and `__all__` of a package; a name that is misspelled is said.

    Example:
        >>> import funcprop as fp
        >>> fp.hesian
        Traceback (most recent call last):
        AttributeError: funcprop has no 'hesian'; did you mean 'hessian'?
    """
    load, names, public = lazy_loader.attach_stub(package, file)

    def __getattr__(name: str) -> Any:  # noqa: N807
        if name in names():
            return load(name)
        near = difflib.get_close_matches(name, public, n=3)
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"dir({package}) lists its names."
        raise AttributeError(f"{package} has no {name!r}; {hint}")

    return __getattr__, names, public
