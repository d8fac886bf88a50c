"""Curvature of a user's functions, which were traced when the operator was made."""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from funcprop.operators.linear_operator import LinearOperator
from funcprop.operators.parameters import Parameters
from funcprop.program.program import Program
from funcprop.rules.rule_set import RuleSet


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False, repr=False)
class Derived(LinearOperator):
    """A curvature that is derived from a function: what the function read when it was traced, it has since.

    Attributes:
        written: the function of `chosen` and `arrays`, without rules.
        chosen: the parameters that the operator acts on.
        arrays: the other arrays among the arguments.
        whole: `(chosen, arrays, v) ↦ A v`, traced as a whole, where the function cannot be differentiated
            after it was traced: it has a custom derivative that holds one of its intermediate values.
        rules: those that the function carries when it is differentiated.
    """

    written: Program
    chosen: PyTree
    arrays: Any
    whole: Program | None
    parameters: Parameters = field(metadata={"static": True})
    rules: RuleSet | None = field(metadata={"static": True})

    @abc.abstractmethod
    def derived(self, v: PyTree) -> PyTree:
        """`A v`, by differentiating `written`."""

    def product(self, v: PyTree) -> PyTree:
        """`A v`."""
        return self.derived(v) if self.whole is None else self.whole(self.chosen, self.arrays, v)

    def linear_map(self) -> Callable[[PyTree], PyTree]:
        """The product, with all that does not depend on `v` computed once."""
        return jax.linearize(self.product, self.parameters.zeros())[1]

    def block_map(self, rows: Sequence[int], columns: Sequence[int]) -> Callable[[Sequence[Any]], list[Any]]:
        """The product along some leaves, of which other leaves are kept."""
        zeros = jax.tree.leaves(self.parameters.zeros())

        def block(parts: Sequence[Any]) -> list[Any]:
            leaves = list(zeros)
            for position, part in zip(columns, parts, strict=True):
                leaves[position] = part
            results = jax.tree.leaves(self.product(self.parameters.unflatten(leaves)))
            return [results[i] for i in rows]

        return jax.linearize(block, [jnp.zeros_like(zeros[i]) for i in columns])[1]
