"""The rule of a layer that is made of operators with rules of their own."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax

from funcprop.rules.rule import Rule
from funcprop.rules.running import with_rules
from funcprop.rules.sets import handwritten


class Pullback(NamedTuple):
    """JAX's pullback of the layer's operators, a pytree of what their rules keep."""

    pull: Any


def composed_rule(function: Callable[..., Any], equations: Callable[..., Any]) -> Rule:
    """The pullback of `function` by its operators' handwritten rules, with equations for the whole.

    It wins nowhere by itself: where a rule set has not got it, the rewrite enters the layer and finds the
    rules of its operators.
    """

    def forward(*args: Any, **static: Any) -> tuple[Any, Pullback]:
        y, pull = jax.vjp(with_rules(partial(function, **static), handwritten), *args)
        return y, Pullback(pull)

    def backward(residuals: Pullback, g: Any, needs: Any, **static: Any) -> tuple[Any, ...]:
        return tuple(residuals.pull(g))

    return Rule(forward, backward, equations, platforms=frozenset(), pure=True)
