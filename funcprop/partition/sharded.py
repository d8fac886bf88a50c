"""ZeRO-3 of an unchanged loss: every device keeps a part of each parameter, its gradient and its optimizer
state.

The loss is cut into segments. Each gathers its parameters when its input has arrived (a barrier ties
them), is a checkpoint, so that they are gathered again in the backward sweep and not kept, and hands back
its gradients reduce-scattered, which is the transpose of gathering. Without the barrier XLA starts all
gathers at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from funcprop import _jax
from funcprop._jax.xla_options import barrier_options
from funcprop.partition.device_bytes import DeviceBytes, peak_of_step
from funcprop.partition.flat import flattened, simplified
from funcprop.partition.layout import DATA, along, mesh_of
from funcprop.partition.problem import TrainingProblem, updated
from funcprop.partition.segments import Cuttable
from funcprop.partition.traffic import Collective
from funcprop.program.flops import of_jaxpr
from funcprop.program.sizes import nbytes
from funcprop.rules.running import with_rules


@dataclass(frozen=True, eq=False)
class ShardedProgram:
    """A step in which all that is kept is split over `parts` devices, the loss in `count` segments."""

    problem: TrainingProblem
    parts: int
    count: int

    @cached_property
    def places(self) -> list[int | None]:
        """Along which axis each parameter is split: the longest that can be; None for one kept whole."""
        return [self._place(x) for x in jax.tree.leaves(self.problem.shapes[0])]

    def _place(self, leaf: Any) -> int | None:
        fit = [d for d, size in enumerate(leaf.shape) if size % self.parts == 0 and size]
        return max(fit, key=lambda d: leaf.shape[d], default=None)

    def _specs(self, tree: Any) -> Any:
        """The layouts of parameters, or of a state: of each leaf its longest axis that can be split."""
        return jax.tree.map(lambda x: along(self._place(x)), tree)

    @property
    def _batch_specs(self) -> Any:
        tree = jax.tree.structure(self.problem.batch)
        return jax.tree.unflatten(tree, map(along, self.problem.batch_axes))

    def local_loss(self, shards: Any, batch: Any) -> Any:
        """The part of the loss that one device's examples are, inside `shard_map`."""
        problem, places = self.problem, self.places
        leaves, tree = jax.tree.flatten(shards)
        gather = lambda x, d: x if d is None else jax.lax.all_gather(x, DATA, axis=d, tiled=True)  # noqa: E731
        whole = [gather(x, d) for x, d in zip(leaves, places, strict=True)]
        segments = Cuttable(problem.loss, jax.tree.unflatten(tree, whole), batch).segments(self.count)
        examples = jax.tree.leaves(batch)
        values: list[Any] = []
        for segment in segments:

            def body(params: Any, values: Any, examples: Any, segment: Any = segment) -> Any:
                if values:
                    params, values = jax.lax.optimization_barrier((params, values))
                full = [gather(x, places[i]) for i, x in zip(segment.params, params, strict=True)]
                return segment.run(full, examples, values)

            ruled = with_rules(body, rules=problem.rules)
            given = [leaves[i] for i in segment.params], values, [examples[i] for i in segment.batch]
            values = jax.checkpoint(ruled)(*given)
        if problem.weight is None:
            return values[0] / self.parts
        weight = jnp.asarray(problem.weight(batch), values[0].dtype)
        return values[0] * (weight / jax.lax.psum(weight, DATA))

    def _local_gradient(self, shards: Any, batch: Any) -> Any:
        """The loss of all examples, and the gradient of one device's shards.

        What was gathered comes back reduce-scattered; gradients of what is kept whole are added up.
        """
        value, grads = jax.value_and_grad(self.local_loss)(shards, batch)
        leaves, tree = jax.tree.flatten(grads)
        whole = [jax.lax.psum(x, DATA) if d is None else x for x, d in zip(leaves, self.places, strict=True)]
        return jax.lax.psum(value, DATA), jax.tree.unflatten(tree, whole)

    def gradient(self, mesh: Any) -> Callable[..., Any]:
        """Value and gradient of split parameters and batch; the gradient is split as they are."""
        specs = self._specs(self.problem.shapes[0])
        return jax.shard_map(
            self._local_gradient,
            mesh=mesh,
            check_vma=False,  # A user's loop need not say which of its carries vary over the devices.
            in_specs=(specs, self._batch_specs),
            out_specs=(PartitionSpec(), specs),
        )

    @cached_property
    def compiler_options(self) -> dict[str, str] | None:
        """What the outermost jit needs, so that parameters are gathered when they are needed."""
        return barrier_options(self.problem.platform)

    def jitted(
        self, devices: Sequence[Any], optimizer: Any, gradient_only: bool = False
    ) -> tuple[Any, tuple[Any, ...]]:
        """The program as a jitted function, and the layouts of its arguments."""
        mesh = mesh_of(devices, {DATA: self.parts})
        at = lambda specs: jax.tree.map(lambda s: NamedSharding(mesh, s), specs)  # noqa: E731
        params, batch = at(self._specs(self.problem.shapes[0])), at(self._batch_specs)
        one = NamedSharding(mesh, PartitionSpec())
        options = self.compiler_options or None
        fun, ins, outs = self.gradient(mesh), (params, batch), (one, params)
        if optimizer is None or gradient_only:
            return jax.jit(fun, in_shardings=ins, out_shardings=outs, compiler_options=options), ins
        state = at(self._specs(self.problem.state_shapes(optimizer)))
        whole = (params, state, batch)
        step = jax.jit(
            updated(fun, self.problem, optimizer),
            in_shardings=whole,
            out_shardings=(params, state, one),
            donate_argnums=(0, 1),
            compiler_options=options,
        )
        return step, whole

    @cached_property
    def _body(self) -> Any:
        """The program of one device: a step, or value and gradient if there is no optimizer."""
        optimizer, one = self.problem.optimizer, PartitionSpec()
        params, batch = self._specs(self.problem.shapes[0]), self._batch_specs
        fun: Callable[..., Any] = self._local_gradient
        ins: tuple[Any, ...] = (params, batch)
        outs: tuple[Any, ...] = (one, params)
        if optimizer is not None:
            state = self._specs(self.problem.state_shapes(optimizer))
            # Where the optimizer adds up over parameters its numbers are wrong here, but not its bytes.
            fun = updated(fun, self.problem, optimizer)
            ins, outs = (params, state, batch), (params, state, one)
        mesh = jax.sharding.AbstractMesh((self.parts,), (DATA,), axis_types=(jax.sharding.AxisType.Auto,))
        whole = jax.shard_map(fun, mesh=mesh, check_vma=False, in_specs=ins, out_specs=outs)
        closed = jax.make_jaxpr(whole)(*self.problem.arguments(optimizer))
        (eqn,) = [e for e in _jax.open_jaxpr(closed).eqns if e.primitive.name == "shard_map"]
        (_, body), *_ = _jax.sub_jaxprs(eqn)
        return body

    @cached_property
    def _flat(self) -> Any:
        """The same without calls."""
        return simplified(flattened(self._body)[0])

    @cached_property
    def predicted_bytes(self) -> DeviceBytes:
        """The peak of one device."""
        arguments = self.problem.arguments(self.problem.optimizer)
        return peak_of_step(
            _jax.open_jaxpr(self._body), arguments, barriers=True, platform=self.problem.platform
        )

    @cached_property
    def predicted_traffic(self) -> list[Collective]:
        """The collectives of one step: what is gathered twice, and scattered once."""
        kinds = {"all_gather": "all-gather", "reduce_scatter": "reduce-scatter"}
        kinds |= dict.fromkeys(("psum", "psum_invariant", "pmax", "pmin"), "all-reduce")
        return [
            Collective(kinds[eqn.primitive.name], nbytes(v), f"{_jax.scope(eqn)}/{eqn.primitive.name}")
            for eqn in self._flat.eqns
            if eqn.primitive.name in kinds
            for v in eqn.outvars
        ]

    @cached_property
    def flops(self) -> int:
        """Operations of one device in one step, with those that are done again."""
        return of_jaxpr(self._flat)
