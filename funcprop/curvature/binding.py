"""A user's function of the parameters, with its other arguments bound; and a traced one, with its rules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from funcprop.operators.subset import SHAPES, Point
from funcprop.program.call import Call, require_values
from funcprop.program.program import Program
from funcprop.rules.rewrite import Rewriter
from funcprop.rules.rule_set import RuleSet
from funcprop.rules.sets import chosen_rules


@dataclass(frozen=True, eq=False)
class Bound:
    """`fun(·, *args, **kwargs)`, as a function of its first argument and of all arrays among the others.

    What is not an array among them stays concrete. With a `point` the first argument is given by the chosen
    parameters; the other parameters are among the arrays.
    """

    fun: Callable[..., Any]
    call: Call
    point: Point | None

    @classmethod
    def of(
        cls,
        fun: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        point: Point | None = None,
    ) -> Bound:
        """Bind all arguments but the first."""
        given = {f"argument {i + 1}": value for i, value in enumerate(args)}
        require_values("curvature", given | kwargs, SHAPES)
        # Among the parameters a number is data, too.
        others = () if point is None else tuple(map(jnp.asarray, point.others))
        return cls(fun, Call.of((others, *args), kwargs, _is_array), point)

    @property
    def arrays(self) -> list[Any]:
        """The arrays that are bound."""
        return self.call.values

    def __call__(self, first: Any, arrays: Sequence[Any]) -> Any:
        """Call the function."""
        (others, *args), kwargs = self.call.arguments(self.call.filled(arrays))
        return self.fun(first if self.point is None else self.point.whole(first, others), *args, **kwargs)


def ruled(program: Program, rules: RuleSet | None) -> Callable[..., Any]:
    """A traced function, carrying rules."""
    return program.by(lambda jaxpr, values: Rewriter(chosen_rules(rules)).run(jaxpr, values))


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray | np.generic)
