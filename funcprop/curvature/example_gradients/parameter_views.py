"""A parameter seen through reshapes, transposes, slices and the like: a view of one leaf."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from funcprop import _jax
from funcprop.program.facts import facts_of


@dataclass(frozen=True, eq=False)
class ViewStep:
    """One operator of a view, and which of its results."""

    eqn: Any
    result: int

    @property
    def repeats(self) -> bool:
        """Whether entries of the operand appear more than once."""
        return self.eqn.outvars[self.result].aval.size > self.eqn.invars[0].aval.size

    def __call__(self, x: Any) -> Any:
        """The operator itself."""
        return _jax.one_equation(self.eqn)(x)[self.result]

    def transposed(self, x: Any) -> Any:
        """Cotangents of the result to cotangents of the operand."""
        operand = jax.ShapeDtypeStruct(self.eqn.invars[0].aval.shape, x.dtype)
        return jax.linear_transpose(self, operand)(x)[0]


@dataclass(frozen=True, eq=False)
class View:
    """`scale` times the entries of a leaf, moved by `steps`.

    A step that is None is a loop over the leading axis: what follows sees one slice. `marks` has for each
    loop around an object that stands for the operand that it closes over, None if it slices the leaf.
    """

    leaf: int
    steps: tuple[ViewStep | None, ...] = ()
    scale: float = 1.0
    marks: tuple[Any, ...] = ()

    @property
    def loops(self) -> tuple[bool, ...]:
        """Whether each loop around slices the leaf."""
        return tuple(mark is None for mark in self.marks)

    @property
    def mark(self) -> Any:
        """The operand that the innermost loop closes over, if it does."""
        return self.marks[-1] if self.marks else None

    @property
    def distinct(self) -> bool:
        """Whether no entry of the leaf appears twice."""
        return all(step is None or not step.repeats for step in self.steps)

    def to_leaf(self, value: Any) -> Any:
        """The transpose of the view without its scale: `value` has an axis in front for every slicing loop.

        Where entries are distinct, this also moves whatever belongs to an entry, such as its square.
        """
        depth = sum(self.loops)
        for step in reversed(self.steps):
            if step is None:
                depth -= 1
                continue
            move: Callable[[Any], Any] = step.transposed
            for _ in range(depth):
                move = jax.vmap(move)
            value = move(value)
        return value

    def sliced(self) -> View:
        """Slice off one entry of the leading axis, which one iteration of a loop sees."""
        return replace(self, steps=(*self.steps, None), marks=(*self.marks, None))


def seen_through(eqn: Any, views: list[View | None]) -> list[View] | None:
    """The views that an operator's results are of its only operand that is one; None if they are no views."""
    name = eqn.primitive.name
    facts, is_single = facts_of(eqn), len(eqn.invars) == 1
    if facts.identity and is_single and views[0] is not None:
        # A real leaf seen as complex has complex cotangents, of which its gradient is the real part alone.
        real = jnp.issubdtype(eqn.outvars[0].aval.dtype, jnp.floating)
        return [views[0]] if real else None
    if facts.moves and is_single and views[0] is not None:
        steps = views[0].steps
        return [replace(views[0], steps=(*steps, ViewStep(eqn, i))) for i in range(len(eqn.outvars))]
    if name == "neg" and views[0] is not None:
        return [replace(views[0], scale=-views[0].scale)]
    if name in ("mul", "div"):
        k = 0 if views[0] is not None else 1
        other = eqn.invars[1 - k]
        if isinstance(other, _jax.Literal) and np.ndim(other.val) == 0 and (name == "mul" or k == 0):
            view = views[k]
            assert view is not None
            factor = float(other.val) if name == "mul" else 1 / float(other.val)
            return [replace(view, scale=view.scale * factor)]
    return None
