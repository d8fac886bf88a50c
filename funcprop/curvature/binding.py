"""A user's function of the parameters, with its other arguments bound: a pytree that passes through `jit`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from funcprop.calls import require_values
from funcprop.registry import RuleSet
from funcprop.running import with_rules

# What is known of shapes alone, for messages.
SHAPES = "fp.second_order_cost(loss)(…) or fp.curvature.hessian_diagonal(loss).plan(…)"


class Same:
    """Hashable by what it holds if that is possible, else by identity."""

    def __init__(self, value: Any) -> None:
        self.value = value
        try:
            self._hash = hash(value)
        except TypeError:
            self._hash = id(value)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Same) or self._hash != other._hash:
            return False
        return self.value is other.value or (self._hash != id(self.value) and self.value == other.value)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class Bound:
    """`fun(·, *args, **kwargs)`, carrying rules.

    Arrays among the arguments are data; all else stays concrete, and a new value means a new compilation.
    """

    arrays: tuple[Any, ...]
    fun: Same = field(metadata={"static": True})
    rules: RuleSet | None = field(metadata={"static": True})
    tree: Any = field(metadata={"static": True})
    concrete: tuple[Any, ...] = field(metadata={"static": True})

    @classmethod
    def of(
        cls, fun: Callable[..., Any], rules: RuleSet | None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Bound:
        """Bind all arguments but the first."""
        given = {f"argument {i + 1}": value for i, value in enumerate(args)}
        require_values("curvature", given | kwargs, SHAPES)
        leaves, tree = jax.tree.flatten((args, kwargs))
        arrays = tuple(leaf for leaf in leaves if _is_array(leaf))
        concrete = tuple(None if _is_array(leaf) else Same(leaf) for leaf in leaves)
        return cls(arrays, Same(fun), rules, tree, concrete)

    def __call__(self, first: Any) -> Any:
        """Call the function with its first argument."""
        arrays = iter(self.arrays)
        leaves = [next(arrays) if c is None else c.value for c in self.concrete]
        args, kwargs = jax.tree.unflatten(self.tree, leaves)
        return with_rules(self.fun.value, self.rules)(first, *args, **kwargs)

    @property
    def name(self) -> str:
        """The function's, for messages."""
        return str(getattr(self.fun.value, "__name__", self.fun.value))


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray | np.generic)
