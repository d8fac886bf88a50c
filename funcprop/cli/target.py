"""What a command is about: a function of the user's with its arguments, found by name."""

from __future__ import annotations

import ast
import difflib
import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp

from funcprop import models
from funcprop.cli.errors import TargetError, users_code
from funcprop.program.call import has_values, without_aux
from funcprop.training.loop import Setup, first_minibatch

USAGE = "write module:function, file.py:function, or the built-in `chapter`"


@dataclass(frozen=True)
class Target:
    """A function, the arguments to call it with, and the module that it is in; None for the built-in."""

    label: str
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    module: ModuleType | None = None

    def has_arrays(self) -> bool:
        """Whether the arguments are values; shapes (`jax.ShapeDtypeStruct`) can only be traced."""
        return has_values((self.args, self.kwargs))

    def require_arrays(self, what: str, instead: str) -> None:
        """Refuse shapes, as whose arguments `what` cannot be done; `instead` says what can.

        Raises:
            TargetError: an argument is a shape.
        """
        if not self.has_arrays():
            raise TargetError(
                f"target {self.label!r}: example() returns shapes (jax.ShapeDtypeStruct), but {what} needs "
                f"arrays; {instead}."
            )


def load(target: str, has_aux: bool = False) -> Target:
    """The target's function, with the arguments that its module's `example()` returns.

    Of a `setup()`, as for `funcprop train`, it is the loss, with the parameters and the first minibatch.

    With `has_aux` it returns a pair, of which the second is left out.

    Raises:
        TargetError: it cannot be imported, is not a function, or its arguments are not known.
    """
    if has_aux:
        found = load(target)
        return replace(found, function=without_aux(found.function))
    if target == "chapter":
        return Target(target, models.chapter, chapter_example(), {})
    function, module = load_function(target)
    example = getattr(module, "example", None)
    if callable(example):
        with users_code(f"target {target!r}: example() failed", module):
            given = example()
        args, kwargs = _arguments(target, function, given)
    else:
        args, kwargs = (), {}
        missing = _does_not_bind(function, args, kwargs)
        if missing:
            raise TargetError(
                f"target {target!r}: {function.__name__}{_signature(function)} needs arguments ({missing}), "
                f"and module {module.__name__!r} has no example() that gives them; define "
                "`def example(): return (…)` beside the function."
            )
        signature = _signature(function)
        if signature is not None and not signature.parameters:
            with users_code(f"target {target!r} failed", module):
                given = function()
            if isinstance(given, Setup) or (isinstance(given, dict) and {"loss", "params"} <= given.keys()):
                setup = as_setup(target, given)
                function, args = setup.loss, (setup.params, *first_minibatch(setup))
    return Target(target, function, args, kwargs, module)


def as_setup(target: str, given: Any) -> Setup:
    """Make a `Setup` of the result of `setup()`, which may be a dict with its fields."""
    fields = ", ".join(
        f"{name} (optional)" if name in Setup._field_defaults else name for name in Setup._fields
    )
    if isinstance(given, dict):
        unknown = [name for name in given if name not in Setup._fields]
        missing = [n for n in Setup._fields if n not in given and n not in Setup._field_defaults]
        problem = (
            f"unknown {', '.join(map(repr, unknown))}" if unknown else f"no {', '.join(map(repr, missing))}"
        )
        if unknown or missing:
            raise TargetError(f"target {target!r}: the dict it returns has {problem}; its keys are {fields}.")
        given = Setup(**given)
    if not isinstance(given, Setup):
        raise TargetError(
            f"target {target!r} returns an object of type {type(given).__name__}; return an "
            f"`fp.training.Setup`, or a dict with {fields}."
        )
    return given


def chapter_example() -> tuple[Any, ...]:
    """The chapter's model at a size that fits the screen: d = 4, h = 3, q = 2, λ = 0.1."""
    params = models.init_chapter(jax.random.key(0), inputs=4, hidden=3, outputs=2)
    return params, jnp.array([1.0, -0.5, 0.25, 2.0]), jnp.array(1), jnp.array(0.1)


def _in_file(target: str) -> str:
    """What to write for a file without a function; nothing if there is no such file."""
    try:
        found = ast.parse(Path(target).read_bytes()).body
    except (OSError, SyntaxError, ValueError):
        return ""
    functions = [node.name for node in found if isinstance(node, ast.FunctionDef)]
    names = [name for name in functions if name != "example" and not name.startswith("_")]
    return f"write {target}:{names[0]}, or another of {', '.join(names[:8])}" if names else ""


def load_function(target: str, define: str = "") -> tuple[Callable[..., Any], ModuleType]:
    """The function that `module:function` or `file.py:function` names, and its module.

    `define` is what to write where there is none.
    """
    place, separator, path = target.rpartition(":")
    if not (place and separator and path):
        raise TargetError(f"target {target!r} is incomplete; {_in_file(target) or USAGE}.")
    module = _load_file(target, Path(place)) if place.endswith(".py") else _load_module(target, place)
    try:
        found = reduce(getattr, path.split("."), module)
    except AttributeError:
        near = difflib.get_close_matches(path, [name for name in dir(module) if name[0] != "_"])
        hint = f"; did you mean {' or '.join(near)}?" if near else f"; define `{define}`." if define else "."
        raise TargetError(f"target {target!r}: module {module.__name__!r} has no {path!r}{hint}") from None
    if not callable(found):
        raise TargetError(f"target {target!r} is of type {type(found).__name__}, not a function; {USAGE}.")
    return found, module


def _load_module(target: str, name: str) -> ModuleType:
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())
    if "/" in name or os.sep in name or (Path(name).is_file() and "." in name):
        raise TargetError(f"target {target!r}: {name} is no .py file; {USAGE}.")
    with users_code(
        f"target {target!r}: cannot import module {name!r} (from {os.getcwd()} or sys.path)", None
    ):
        return importlib.import_module(name)


def _load_file(target: str, path: Path) -> ModuleType:
    if not path.is_file():
        raise TargetError(f"target {target!r}: there is no file {path}; {USAGE}.")
    given, path = path, path.resolve()
    # Its neighbours can be imported, as when the file is run as a script.
    sys.path.insert(0, str(path.parent))
    name = path.stem if path.stem not in sys.modules else f"{path.stem} ({path})"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    with users_code(f"target {target!r}: cannot import {given}", None):
        spec.loader.exec_module(module)
    return module


# --- arguments --------------------------------------------------------------------------------


def _arguments(
    target: str, function: Callable[..., Any], given: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments that `example()` returned: `(args, kwargs)` if they fit so, a tuple, or a dict."""
    readings: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    if isinstance(given, tuple):
        if len(given) == 2 and isinstance(given[0], tuple) and _is_keywords(given[1]):
            readings.append((given[0], given[1]))
        readings.append((given, {}))
    elif _is_keywords(given):
        readings.append(((), given))
    else:
        raise TargetError(
            f"target {target!r}: example() returned {_briefly(given)}; return a tuple of arguments, a dict "
            "of keyword arguments, or (args, kwargs). One argument is a tuple too: `return (x,)`."
        )
    problems = [_does_not_bind(function, *reading) for reading in readings]
    for (args, kwargs), problem in zip(readings, problems, strict=True):
        if problem is None:
            return _positional_first(function, args, kwargs)
    raise TargetError(
        f"target {target!r}: the arguments that example() returns do not fit "
        f"{function.__name__}{_signature(function)}: {problems[-1]}."
    )


def _is_keywords(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(name, str) for name in value)


def _signature(function: Callable[..., Any]) -> inspect.Signature | None:
    try:
        return inspect.signature(function)
    except (TypeError, ValueError):
        return None  # Some functions in C have none; calling them will tell.


def _does_not_bind(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    signature = _signature(function)
    if signature is None:
        return None
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        return str(error)
    return None


def _positional_first(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Keywords as positions where they can be, so that the first parameter is the one to differentiate."""
    signature = _signature(function)
    if signature is None:
        return args, kwargs
    bound = signature.bind(*args, **kwargs)
    return bound.args, bound.kwargs


def _briefly(value: Any) -> str:
    shape = f" of shape {value.shape}" if hasattr(value, "shape") else ""
    return f"an object of type {type(value).__name__}{shape}"
