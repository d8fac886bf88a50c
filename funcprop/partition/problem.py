"""What is to be partitioned: a loss at the shapes of its arguments, with its optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from funcprop.partition.flat import flattened, simplified, with_makers_apart
from funcprop.partition.layout import batch_places, example_axis
from funcprop.partition.logical_axes import Axes, AxisProgram, axes_of, program_of
from funcprop.program.call import has_values
from funcprop.program.sizes import nbytes
from funcprop.rules.rule_set import RuleSet
from funcprop.rules.transforms import value_and_grad

Weight = Callable[[Any], Any]


@dataclass(frozen=True, eq=False)
class TrainingProblem:
    """A loss of parameters and batch, an optimizer or None, and arguments, which may be shapes."""

    loss: Callable[..., Any]
    params: Any
    batch: Any
    optimizer: optax.GradientTransformation | None = None
    rules: RuleSet | None = None
    weight: Weight | None = None

    @cached_property
    def has_values(self) -> bool:
        """Whether the arguments are arrays, not shapes alone."""
        return has_values((self.params, self.batch))

    @cached_property
    def shapes(self) -> tuple[Any, Any]:
        """The shapes of parameters and batch."""
        return jax.eval_shape(lambda *args: args, self.params, self.batch)

    @cached_property
    def axes(self) -> Axes:
        """The logical axes of loss and gradient."""
        program = program_of(self.loss, *self.shapes, self.rules)
        return axes_of(program, *self.shapes)

    @property
    def program(self) -> AxisProgram:
        """The flat program of loss and gradient."""
        return self.axes.program

    @property
    def parameter_variables(self) -> list[Any]:
        """The variables of the parameters in the program of loss and gradient."""
        start = len(self.program.consts)
        return list(self.program.jaxpr.invars[start : start + len(jax.tree.leaves(self.params))])

    @property
    def batch_variables(self) -> list[Any]:
        """Those of the batch."""
        count = len(jax.tree.leaves(self.batch))
        return list(self.program.jaxpr.invars[len(self.program.jaxpr.invars) - count :])

    @cached_property
    def batch_axes(self) -> list[int | None]:
        """Along which axis each array of the batch holds the examples; None where it holds none."""
        root = example_axis(self.axes, self.batch_variables)
        return batch_places(self.program, root, self.batch_variables)

    @cached_property
    def examples(self) -> int:
        """The number of examples in the batch; 1 where no axis of it can be split."""
        leaves = jax.tree.leaves(self.shapes[1])
        sizes = [leaf.shape[d] for leaf, d in zip(leaves, self.batch_axes, strict=True) if d is not None]
        return math.gcd(*sizes) if sizes else 1

    def parts_of(self, batch: Any, parts: int, strided: bool) -> Any:
        """The batch with a new leading axis of so many parts; what holds no examples is repeated.

        Strided parts have every `parts`-th example, so that the parts of a batch that is split over
        devices are.
        """

        def cut(x: Any, d: int | None) -> Any:
            if d is None:
                return jnp.broadcast_to(x, (parts, *jnp.shape(x)))
            before, size, after = x.shape[:d], x.shape[d], x.shape[d + 1 :]
            if strided:
                return jnp.moveaxis(x.reshape(*before, size // parts, parts, *after), d + 1, 0)
            return jnp.moveaxis(x.reshape(*before, parts, size // parts, *after), d, 0)

        leaves, tree = jax.tree.flatten(batch)
        return jax.tree.unflatten(tree, [cut(x, d) for x, d in zip(leaves, self.batch_axes, strict=True)])

    def part_shapes(self, parts: int) -> Any:
        """The shapes of one of so many parts of the batch."""
        stacked = jax.eval_shape(lambda batch: self.parts_of(batch, parts, True), self.shapes[1])
        return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape[1:], s.dtype), stacked)

    def require_parts(self, parts: int, what: str) -> None:
        """Raise unless the batch can be cut into so many equal parts.

        Raises:
            ValueError: it cannot; with the numbers that do.
        """
        if self.examples == 1 and parts > 1:
            raise ValueError(
                f"{what}={parts}: no axis of the batch can be cut into examples; "
                "print(fp.partition.axes(loss)(params, batch)) says why."
            )
        if self.examples % parts:
            fit = [n for n in range(1, self.examples + 1) if self.examples % n == 0]
            raise ValueError(
                f"{what}={parts}: {self.examples} examples leave a ragged last part of "
                f"{self.examples % parts}; use one of {', '.join(map(str, fit[:12]))}."
            )

    @cached_property
    def gradient(self) -> Callable[..., Any]:
        """Value and gradient of the loss as it is."""
        return value_and_grad(self.loss, rules=self.rules)

    def state_shapes(self, optimizer: optax.GradientTransformation) -> Any:
        """The shapes of an optimizer's state."""
        return jax.eval_shape(optimizer.init, self.shapes[0])

    @cached_property
    def parameter_bytes(self) -> int:
        """Bytes of all parameters."""
        return sum(nbytes(x) for x in jax.tree.leaves(self.shapes[0]))

    @cached_property
    def state_bytes(self) -> int:
        """Bytes of the optimizer's state."""
        return (
            0
            if self.optimizer is None
            else sum(map(nbytes, jax.tree.leaves(self.state_shapes(self.optimizer))))
        )


def flat_program(fun: Callable[..., Any], *shapes: Any) -> AxisProgram:
    """The flat program of any function of pytrees, with the classes of its axes."""
    jaxpr, consts = flattened(jax.make_jaxpr(fun)(*shapes))
    return AxisProgram(with_makers_apart(simplified(jaxpr)), consts)


def require_mean(problem: TrainingProblem, most: int = 64) -> None:
    """Check on numbers that the loss of a batch is the mean of the losses of its parts.

    It is done for half of the batch and the other half, of at most `most` examples, and of each pair of them.

    Raises:
        ValueError: it is not, with the weight that the first half would need.
    """
    if not problem.has_values or problem.examples < 2:
        return
    chosen = np.linspace(0, problem.examples - 1, min(problem.examples, most)).astype(int)
    chosen = chosen[: len(chosen) // 2 * 2]
    leaves, tree = jax.tree.flatten(problem.batch)
    places = problem.batch_axes
    pick = lambda at: jax.tree.unflatten(  # noqa: E731
        tree,
        [
            x if d is None else jnp.take(jnp.asarray(x), at, axis=d)
            for x, d in zip(leaves, places, strict=True)
        ],
    )
    loss = jax.jit(problem.loss)
    weigh = problem.weight or (lambda batch: 1.0)
    halves = [pick(half) for half in np.split(chosen, 2)]
    whole = float(loss(problem.params, pick(chosen)))
    first, second = (float(loss(problem.params, half)) for half in halves)
    w, v = (float(weigh(half)) for half in halves)
    mean = (w * first + v * second) / (w + v)
    eps = float(jnp.finfo(jax.eval_shape(problem.loss, *problem.shapes).dtype).eps)
    if abs(whole - mean) <= 1e4 * eps * max(abs(whole), abs(first), abs(second)):
        return
    needed = (whole - second) / (first - second) if first != second else math.nan
    given = "weight=" if problem.weight is not None else "a weight of 1/2 each"
    raise ValueError(
        f"the loss is not the mean over examples: of {len(chosen)} examples it is {whole:.6g}, of the halves "
        f"{first:.6g} and {second:.6g}, with {given} {mean:.6g}; it needs the weight "
        f"{needed:.4g} for the first "
        "half. Pass weight=, the function of a batch that says how much it counts (for instance "
        "its number of "
        "tokens), or use plans without microbatches (data, tensor)."
    )
