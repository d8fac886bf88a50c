"""The extra arguments of optax's `update`: which are needed, and which of them a function takes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax


def chosen_arguments(function: Callable[..., Any], extra: Mapping[str, Any]) -> dict[str, Any]:
    """The extra arguments that are parameters of a function after its first; all if it takes any."""
    _, *parameters = inspect.signature(function).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return dict(extra)
    names = {p.name for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)}
    return {name: value for name, value in extra.items() if name in names}


def require_arguments(optimizer: str, given: Mapping[str, Any], *names: str) -> list[Any]:
    """Require the arguments with these names, and `params`.

    Raises:
        ValueError: one is missing, or None.
    """
    missing = [name for name in ("params", *names) if given.get(name) is None]
    if missing:
        raise ValueError(
            f"{optimizer}: update() lacks {', '.join(missing)}; call "
            f"update({', '.join(['updates', 'state', 'params', *(f'{name}=…' for name in names)])}), or let "
            "fp.training.make_step do it."
        )
    return [given[name] for name in names]


def require_whole(optimizer: str, params: Any) -> None:
    """Refuse a part of the parameters, as optax hands it on, where the loss is called with them.

    Raises:
        ValueError: some are masked.
    """
    nodes = jax.tree.leaves(params, is_leaf=lambda node: isinstance(node, optax.MaskedNode))
    if any(isinstance(node, optax.MaskedNode) for node in nodes):
        raise ValueError(
            f"{optimizer}: some of params are masked (optax.masked, multi_transform), but the loss is a "
            "function of all of them; make the step of all and set the updates of the rest to zero after it."
        )
