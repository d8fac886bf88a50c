"""Arguments that a function changes in place: `batch.pop("label")`, `log.append(x)`, `cache["h"] = h`.

A traced function is given copies of its arguments, in which tracers stand for the arrays. What it writes into
dictionaries and lists is written into the caller's afterwards; any other container that it changes is an
error. (nnx models have their own way, `funcprop._nnx`.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax


def changed(arguments: Any, leaves: Sequence[Any], tree: Any) -> Any:
    """The arguments after the call if they are not `leaves` in `tree` any more, otherwise None."""
    try:
        new_leaves, new_tree = jax.tree.flatten(arguments)
    except Exception:
        return None  # An object that is used up, like Equinox's `State`, holds nothing that could be read.
    if new_tree == tree and all(new is old for new, old in zip(new_leaves, leaves, strict=True)):
        return None
    return arguments


def write_back(old: Any, new: Any, place: str) -> Any:
    """What the caller should find at `place`: `old`, with the contents of `new` in its containers.

    Raises:
        TypeError: a container that is neither a dictionary nor a list was changed.
    """
    if type(old) is not type(new) or old is None or jax.tree_util.all_leaves([old]):
        return new
    if isinstance(old, dict):
        entries = {k: write_back(old[k], v, f"{place}[{k!r}]") if k in old else v for k, v in new.items()}
        old.clear()
        old.update(entries)
    elif isinstance(old, list):
        kept = [write_back(a, b, f"{place}[{i}]") for i, (a, b) in enumerate(zip(old, new, strict=False))]
        old[:] = [*kept, *new[len(kept) :]]
    elif isinstance(old, tuple):
        for i, (a, b) in enumerate(zip(old, new, strict=True)):
            write_back(a, b, f"{place}[{i}]")
    elif changed(new, *jax.tree.flatten(old)) is not None:
        raise TypeError(
            f"the function changes {place}, a {type(old).__name__}, in place; funcprop traces it with a "
            "copy, so the change would be lost. Return the new value (with has_aux=True under `grad`)."
        )
    return old
