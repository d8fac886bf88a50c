"""Plans that are one compiled program: layouts, accumulation, minibatches, rematerialisation, ZeRO-3."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from funcprop import _jax
from funcprop.partition.device_bytes import DeviceBytes, peak_of_step
from funcprop.partition.layout import MeshLayout, layout_of, mesh_of
from funcprop.partition.local import local_program
from funcprop.partition.problem import TrainingProblem, updated
from funcprop.partition.traffic import Collective, predicted_collectives
from funcprop.program.flops import of_jaxpr
from funcprop.rules.transforms import value_and_grad

Gradient = Callable[..., Any]


def accumulated(problem: TrainingProblem, gradient: Gradient, parts: int) -> Gradient:
    """Value and gradient as the weighted mean of those of `parts` microbatches, one after the other."""

    def run(params: Any, batch: Any) -> Any:
        def one(total: Any, part: Any) -> tuple[Any, None]:
            value, grads = gradient(params, part)
            if problem.weight is None:
                return tuple(jax.tree.map(jnp.add, total, (1.0, value, grads))), None
            weight = jnp.asarray(problem.weight(part), value.dtype)
            new = jax.tree.map(lambda t, x: t + weight.astype(x.dtype) * x, total[1:], (value, grads))
            return (total[0] + weight, *new), None

        zero = jnp.zeros((), problem.value_type)
        start = (zero, zero, jax.tree.map(jnp.zeros_like, params))
        total, value, grads = jax.lax.scan(one, start, problem.parts_of(batch, parts, strided=True))[0]
        return jax.tree.map(lambda x: x / total.astype(x.dtype), (value, grads))

    return run


def in_minibatches(
    problem: TrainingProblem, gradient: Gradient, optimizer: optax.GradientTransformation, parts: int
) -> Callable[..., Any]:
    """A step that makes `parts` updates, each with a part of the batch; its loss is their mean."""
    step = updated(gradient, problem, optimizer)

    def run(params: Any, state: Any, batch: Any) -> Any:
        def one(carry: Any, part: Any) -> tuple[Any, Any]:
            params, state, value = step(*carry, part)
            return (params, state), value

        parted = problem.parts_of(batch, parts, strided=False)
        (params, state), values = jax.lax.scan(one, (params, state), parted)
        return params, state, jnp.mean(values)

    return run


@dataclass(frozen=True, eq=False)
class SteppedProgram:
    """A step that is one program on a mesh, partitioned by XLA.

    Attributes:
        sizes: the mesh, by the sizes of its axes.
        parts: into how many microbatches the batch is cut, whose gradients are accumulated.
        minibatches: how many updates a step makes, each with a part of the batch.
        lean: what is differentiated for a loss, such as the loss rematerialised; None for the loss itself.
        compiler_options: what the outermost jit needs.
    """

    problem: TrainingProblem
    sizes: Mapping[str, int]
    parts: int = 1
    minibatches: int = 1
    lean: Callable[[Gradient], Gradient] | None = None
    compiler_options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_plain(self) -> bool:
        """Whether the loss is that of the whole batch as it is."""
        return self.parts == self.minibatches == 1 and self.lean is None

    @cached_property
    def gradient(self) -> Gradient:
        """Value and gradient of parameters and batch."""
        if self.is_plain:
            return self.problem.gradient
        loss = self.problem.loss if self.lean is None else self.lean(self.problem.loss)
        gradient = value_and_grad(loss, rules=self.problem.rules)
        return gradient if self.parts == 1 else accumulated(self.problem, gradient, self.parts)

    def whole(self, optimizer: optax.GradientTransformation | None) -> Callable[..., Any]:
        """The function that is compiled: a step, or value and gradient if there is no optimizer."""
        if optimizer is None:
            return self.gradient
        if self.minibatches > 1:
            return in_minibatches(self.problem, self.gradient, optimizer, self.minibatches)
        return updated(self.gradient, self.problem, optimizer)

    def laid_out(self, optimizer: optax.GradientTransformation | None) -> MeshLayout:
        """The layout of the whole program: what the model's axes say, and what the optimizer's follow."""
        problem = self.problem
        if self.is_plain and optimizer is problem.optimizer:
            axes = problem.axes
        else:
            axes = problem.axes_of(self.whole(optimizer), optimizer)
        return layout_of(axes, self.sizes, problem.batch_variables(axes.program))

    @cached_property
    def layout(self) -> MeshLayout:
        """The layout with the problem's own optimizer."""
        return self.laid_out(self.problem.optimizer)

    def shardings(self, layout: MeshLayout, mesh: Mesh, optimizer: Any) -> tuple[Any, ...]:
        """The layouts of the arguments, as trees."""
        shapes = self.problem.arguments(optimizer)
        leaves = layout.shardings(mesh, layout.program.jaxpr.invars[len(layout.program.consts) :])
        return jax.tree.unflatten(jax.tree.structure(shapes), leaves)

    def jitted(
        self, devices: Sequence[Any], optimizer: Any, gradient_only: bool = False
    ) -> tuple[Any, tuple[Any, ...]]:
        """The program as a jitted function, and the layouts of its arguments."""
        optimizer = None if gradient_only else optimizer
        layout = self.layout if optimizer is self.problem.optimizer else self.laid_out(optimizer)
        mesh = mesh_of(devices, self.sizes)
        ins = self.shardings(layout, mesh, optimizer)
        one = NamedSharding(mesh, PartitionSpec())
        outs = (one, ins[0]) if optimizer is None else (ins[0], ins[1], one)
        donated = () if optimizer is None else (0, 1)
        options = dict(self.compiler_options) or None
        fun = jax.jit(
            self.whole(optimizer),
            in_shardings=ins,
            out_shardings=outs,
            donate_argnums=donated,
            compiler_options=options,
        )
        return fun, ins

    @cached_property
    def whole_batch(self) -> MeshLayout:
        """The layout of a step with the whole batch; errors as of `layout_of`."""
        axes = self.problem.axes
        return layout_of(axes, self.sizes, self.problem.batch_variables(axes.program))

    @cached_property
    def _local(self) -> Any:
        """The program of one device."""
        return local_program(self.layout, self.problem.platform)

    @cached_property
    def predicted_bytes(self) -> DeviceBytes:
        """The peak of one device."""
        arguments = self.problem.arguments(self.problem.optimizer)
        if self.lean is not None:  # Of one device; what is computed again is not shared.
            closed = jax.make_jaxpr(self.whole(self.problem.optimizer))(*arguments)
            return peak_of_step(
                _jax.with_constants_as_inputs(closed)[0], arguments, True, self.problem.platform
            )
        return peak_of_step(self._local, arguments, platform=self.problem.platform)

    @cached_property
    def predicted_traffic(self) -> list[Collective]:
        """The collectives of one step."""
        return predicted_collectives(self.layout, self.problem.platform)

    @cached_property
    def flops(self) -> int:
        """Operations of one device in one step."""
        return of_jaxpr(self._local)
