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
from funcprop.partition.device_bytes import DeviceBytes, flat_jaxpr, peak_of
from funcprop.partition.layout import DATA, mesh_of
from funcprop.partition.problem import TrainingProblem
from funcprop.partition.programs import updated
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
    platform: str = "cpu"

    @cached_property
    def places(self) -> list[int | None]:
        """Along which axis each parameter is split: the longest that can be; None for one kept whole."""
        return [self._place(x) for x in jax.tree.leaves(self.problem.shapes[0])]

    def _place(self, leaf: Any) -> int | None:
        fit = [d for d, size in enumerate(leaf.shape) if size % self.parts == 0 and size]
        return max(fit, key=lambda d: leaf.shape[d], default=None)

    def _specs(self, tree: Any) -> Any:
        """The layouts of parameters, or of a state: of each leaf its longest axis that can be split."""
        spec = lambda x, d: PartitionSpec() if d is None else PartitionSpec(*[None] * d, DATA)  # noqa: E731
        return jax.tree.map(lambda x: spec(x, self._place(x)), tree)

    @property
    def _batch_specs(self) -> Any:
        tree = jax.tree.structure(self.problem.batch)
        places = self.problem.batch_axes
        return jax.tree.unflatten(
            tree, [PartitionSpec() if d is None else PartitionSpec(*[None] * d, DATA) for d in places]
        )

    def local_loss(self, shards: Any, batch: Any) -> Any:
        """The loss of one device's examples with its shards of the parameters, inside `shard_map`."""
        problem, places = self.problem, self.places
        leaves, tree = jax.tree.flatten(shards)
        # What is kept whole is used as what varies over the devices, so that its gradient is added up once.
        leaves = [
            jax.lax.pcast(x, DATA, to="varying") if d is None else x
            for x, d in zip(leaves, places, strict=True)
        ]
        gather = lambda x, d: x if d is None else jax.lax.all_gather(x, DATA, axis=d, tiled=True)  # noqa: E731
        # Traced here: a jaxpr that was made outside has no casts to what varies over the devices.
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
            return jax.lax.pmean(values[0], DATA)
        weight = jnp.asarray(problem.weight(batch), values[0].dtype)
        return jax.lax.psum(weight * values[0], DATA) / jax.lax.psum(weight, DATA)

    def gradient(self, mesh: Any) -> Callable[..., Any]:
        """Value and gradient of split parameters and batch; the gradient is split as they are."""
        specs = self._specs(self.problem.shapes[0])
        return jax.shard_map(
            jax.value_and_grad(self.local_loss),
            mesh=mesh,
            in_specs=(specs, self._batch_specs),
            out_specs=(PartitionSpec(), specs),
        )

    def jitted(
        self, devices: Sequence[Any], optimizer: Any, gradient_only: bool = False
    ) -> tuple[Any, tuple[Any, ...]]:
        """The program as a jitted function, and the layouts of its arguments."""
        mesh = mesh_of(devices, {DATA: self.parts})
        at = lambda specs: jax.tree.map(lambda s: NamedSharding(mesh, s), specs)  # noqa: E731
        params, batch = at(self._specs(self.problem.shapes[0])), at(self._batch_specs)
        one = NamedSharding(mesh, PartitionSpec())
        options = barrier_options(self.platform) or None
        fun, ins, outs = self.gradient(mesh), (params, batch), (one, params)
        if optimizer is None or gradient_only:
            return jax.jit(fun, in_shardings=ins, out_shardings=outs, compiler_options=options), ins
        state = at(self._specs(self.problem.state_shapes(optimizer)))
        whole = (params, state, batch)
        step = jax.jit(
            updated(fun, optimizer),
            in_shardings=whole,
            out_shardings=(params, state, one),
            donate_argnums=(0, 1),
            compiler_options=options,
        )
        return step, whole

    def compiled(self, devices: Sequence[Any]) -> Any:
        """The program compiled for some devices."""
        optimizer = self.problem.optimizer
        fun, ins = self.jitted(devices, optimizer)
        params, batch = self.problem.shapes
        shapes = (
            (params, batch) if optimizer is None else (params, self.problem.state_shapes(optimizer), batch)
        )
        placed = jax.tree.map(
            lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), shapes, ins
        )
        return fun.lower(*placed).compile()

    @cached_property
    def _local(self) -> Any:
        """The flat program of loss and gradient on one device."""
        mesh = jax.sharding.AbstractMesh((self.parts,), (DATA,), axis_types=(jax.sharding.AxisType.Auto,))
        closed = jax.make_jaxpr(self.gradient(mesh))(*self.problem.shapes)
        (eqn,) = [e for e in _jax.open_jaxpr(closed).eqns if e.primitive.name == "shard_map"]
        (_, body), *_ = _jax.sub_jaxprs(eqn)
        return flat_jaxpr(body)

    @cached_property
    def predicted_bytes(self) -> DeviceBytes:
        """The peak of one device."""
        jaxpr, count = self._local, len(self.places)
        purposes = ["parameters"] * count + ["batch"] * (len(jaxpr.invars) - count)
        has_optimizer = self.problem.optimizer is not None
        found = peak_of(jaxpr, purposes, forward_until=jaxpr.outvars[0], handed_on=has_optimizer)
        state = self._state_bytes
        return DeviceBytes({**found.by_purpose, **({"optimizer state": state} if state else {})})

    @property
    def _state_bytes(self) -> int:
        if self.problem.optimizer is None:
            return 0
        leaves = jax.tree.leaves(self.problem.state_shapes(self.problem.optimizer))
        return sum(nbytes(x) // (1 if self._place(x) is None else self.parts) for x in leaves)

    @cached_property
    def predicted_traffic(self) -> list[Collective]:
        """The collectives of one step: what is gathered twice, and scattered once."""
        kinds = {"all_gather": "all-gather", "reduce_scatter": "reduce-scatter"}
        kinds |= dict.fromkeys(("psum", "psum_invariant", "pmax", "pmin"), "all-reduce")
        return [
            Collective(kinds[eqn.primitive.name], nbytes(v), f"{_jax.scope(eqn)}/{eqn.primitive.name}")
            for eqn in self._local.eqns
            if eqn.primitive.name in kinds
            for v in eqn.outvars
        ]

    @cached_property
    def flops(self) -> int:
        """Operations of one device in one step, with those that are done again."""
        return of_jaxpr(self._local)
