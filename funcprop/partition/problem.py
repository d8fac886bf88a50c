"""What is to be partitioned: a loss at the shapes of its arguments, with its optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from funcprop import _jax
from funcprop._jax.xla_options import for_buffers
from funcprop.partition.axis_program import AxisProgram, flat_program
from funcprop.partition.layout import batch_places, example_axis, placed_type
from funcprop.partition.logical_axes import Axes, axes_of
from funcprop.partition.segments import Cuttable
from funcprop.program.call import has_values, update_by
from funcprop.rules.rule_set import RuleSet
from funcprop.rules.running import with_rules
from funcprop.rules.transforms import value_and_grad

Weight = Callable[[Any], Any]


@dataclass(frozen=True, eq=False)
class TrainingProblem:
    """A loss of parameters and batch, an optimizer or None, and arguments, which may be shapes.

    `platform` is that of the devices.
    """

    loss: Callable[..., Any]
    params: Any
    batch: Any
    optimizer: optax.GradientTransformation | None = None
    rules: RuleSet | None = None
    weight: Weight | None = None
    platform: str = "cpu"
    _cuttables: dict[int, Cuttable] = field(default_factory=dict, init=False, repr=False)

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
        """The logical axes of the step, or of loss and gradient if there is no optimizer."""
        whole = self.gradient if self.optimizer is None else updated(self.gradient, self, self.optimizer)
        return self.axes_of(whole, self.optimizer)

    def arguments(self, optimizer: optax.GradientTransformation | None) -> tuple[Any, ...]:
        """The shapes of what a step reads: parameters, the optimizer's state if there is one, and batch."""
        params, batch = self.shapes
        return (params, batch) if optimizer is None else (params, self.state_shapes(optimizer), batch)

    def axes_of(self, fun: Callable[..., Any], optimizer: optax.GradientTransformation | None) -> Axes:
        """The axes of a step with an optimizer, or of value and gradient, without one."""
        shapes = self.arguments(optimizer)
        program = flat_program(fun, *shapes)
        variables = list(program.jaxpr.invars[len(program.consts) :])
        params, batch = len(jax.tree.leaves(shapes[0])), len(jax.tree.leaves(shapes[-1]))
        results = program.jaxpr.outvars
        program.join(results[1:] if optimizer is None else results[:params], variables[:params])
        ends = [*variables[:params], *variables[len(variables) - batch :]]
        return axes_of(program, shapes[0], shapes[-1], ends)

    def batch_variables(self, program: AxisProgram) -> list[Any]:
        """The variables of the batch in the program of a step."""
        count = len(jax.tree.leaves(self.batch))
        return list(program.jaxpr.invars[len(program.jaxpr.invars) - count :])

    @cached_property
    def batch_axes(self) -> list[int | None]:
        """Along which axis each array of the batch holds the examples; None where it holds none."""
        program = self.axes.program
        variables = self.batch_variables(program)
        return batch_places(program, example_axis(self.axes, variables), variables)

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

    def cuttable(self, parts: int) -> Cuttable:
        """The forward program of one of so many parts of the batch, to be cut."""
        if parts not in self._cuttables:
            self._cuttables[parts] = Cuttable(self.loss, self.shapes[0], self.part_shapes(parts))
        return self._cuttables[parts]

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

    def require_divisible(self, batch: Any, parts: int) -> None:
        """Raise unless a batch like the one that was planned can be cut into so many equal parts.

        Raises:
            ValueError: it is another tree, or an array of it cannot.
        """
        tree: Any = jax.tree.structure(batch)
        if tree != (planned := jax.tree.structure(self.batch)):
            raise ValueError(f"the plan is for batches {planned}, and this one is {tree}.")
        for (path, x), d in zip(jax.tree.leaves_with_path(batch), self.batch_axes, strict=True):
            if d is not None and any(n % parts for n in np.shape(x)[d : d + 1]):
                raise ValueError(
                    f"the batch's array {jax.tree_util.keystr(path)} of shape {np.shape(x)} cannot be cut "
                    f"into the {parts} equal parts of the plan; use batches of sizes that {parts} divides, "
                    "and leave out a ragged last one."
                )

    @cached_property
    def value_type(self) -> Any:
        """The type of the loss."""
        return jax.eval_shape(self.loss, *self.shapes).dtype

    @cached_property
    def gradient(self) -> Callable[..., Any]:
        """Value and gradient of the loss as it is."""
        return value_and_grad(self.loss, rules=self.rules)

    def compiled(self, step: Any, places: Any) -> Any:
        """A jitted step whose arguments lie so, compiled for its buffers; devices need not be there."""
        placed = jax.tree.map(placed_type, self.arguments(self.optimizer), places)
        return _jax.compiled_by_its_names(step.lower(*placed), for_buffers(self.platform))

    def state_shapes(self, optimizer: optax.GradientTransformation) -> Any:
        """The shapes of an optimizer's state."""
        return jax.eval_shape(optimizer.init, self.shapes[0])


def updated(
    gradient: Callable[..., Any], problem: TrainingProblem, optimizer: optax.GradientTransformation
) -> Callable[..., Any]:
    """A train step of a problem: `step(params, state, batch) -> params, state, loss`."""
    update, loss = update_by(optimizer), with_rules(problem.loss, problem.rules)

    def step(params: Any, state: Any, batch: Any) -> Any:
        value, grads = gradient(params, batch)
        changes, state = update(grads, state, params, value, loss, batch)
        return optax.apply_updates(params, changes), state, value

    return step


def require_mean(problem: TrainingProblem, most: int = 64) -> None:
    """Check on numbers that the loss of a batch is the mean of the losses of its parts.

    It is done for the two halves of at most `most` examples, taken evenly from the batch.

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
    eps = float(jnp.finfo(problem.value_type).eps)
    if not math.isfinite(whole):
        raise ValueError(
            f"the loss of {len(chosen)} examples is {whole}, which does not say whether it is a mean over "
            "them; fp.backprop(loss)(params, batch).first_nonfinite() names the operator."
        )
    if abs(whole - mean) <= 1e4 * eps * max(abs(whole), abs(first), abs(second)):
        return
    draws = any(eqn.primitive.name == "random_bits" for eqn, _ in problem.axes.program.equations)
    needed = (whole - second) / (first - second) if first != second else math.nan
    needs = (
        "it draws random numbers, and parts draw others than the whole; give each example a key of its own"
        if draws
        else f"it needs the weight {needed:.4g} for the first half. Pass weight=, the function of a batch "
        "that says how much it counts (for instance its number of tokens)"
        if 0 <= needed <= 1
        else "no weights make it one. Divide it by the number of examples if it is their sum"
    )
    given = "weight=" if problem.weight is not None else "a weight of 1/2 each"
    raise ValueError(
        f"the loss is not the mean over examples: of {len(chosen)} examples it is {whole:.6g}, of the halves "
        f"{first:.6g} and {second:.6g}, with {given} {mean:.6g}; {needs}, or use plans without microbatches "
        "(data, tensor)."
    )
