"""The programs of a pipeline's stages: forward sweeps, backward sweeps, and updates."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.tree_util import Partial

from funcprop import _jax
from funcprop.partition.flat import flattened
from funcprop.partition.layout import DATA, mesh_of, placed_type
from funcprop.partition.segments import LossSegment
from funcprop.program.call import all_finite
from funcprop.rules.rule_set import RuleSet
from funcprop.rules.running import with_rules


@dataclass(frozen=True, eq=False)
class StageSweeps:
    """The two sweeps of all stages that compute the same.

    `forward(params, batch, inputs) -> outputs, saved` and `backward(total, saved, cotangents, params, batch,
    inputs) -> total, cotangents of inputs`, in which the gradients are added to `total`. `saved` is the
    pullback without what it was given; with `recompute` it is empty, and the segment is run again.
    """

    segment: LossSegment
    rules: RuleSet | None
    recompute: bool

    @cached_property
    def _run(self) -> Callable[..., Any]:
        return with_rules(self.segment.run, rules=self.rules)

    def _pullback(self, params: Any, batch: Any, inputs: Any) -> Any:
        return jax.vjp(lambda params, inputs: self._run(params, batch, inputs), params, inputs)

    @cached_property
    def forward(self) -> Any:
        """The forward sweep, jitted."""

        def forward(params: Any, batch: Any, inputs: Any) -> Any:
            if self.recompute:
                return self._run(params, batch, inputs), Partial(_again)
            outputs, pull = self._pullback(params, batch, inputs)
            given = [*params, *batch, *inputs]
            leaves, tree = jax.tree.flatten(pull)
            places = tuple(next((i for i, x in enumerate(given) if x is leaf), None) for leaf in leaves)
            kept = [leaf for leaf, place in zip(leaves, places, strict=True) if place is None]
            return outputs, Partial(partial(_rebuilt, tree, places), kept)

        return jax.jit(forward)

    @cached_property
    def backward(self) -> Any:
        """The backward sweep, jitted; it overwrites the sum of gradients."""

        def backward(total: Any, saved: Any, cotangents: Any, params: Any, batch: Any, inputs: Any) -> Any:
            if self.recompute:
                _, pull = self._pullback(params, batch, inputs)
            else:
                pull = saved([*params, *batch, *inputs])
            grads, sent = pull(cotangents)
            return jax.tree.map(jnp.add, total, grads), [x for x in sent if x.dtype != jax.dtypes.float0]

        return jax.jit(backward, donate_argnums=0)

    def types(self, params: Sequence[Any], batch: Sequence[Any]) -> tuple[list[Any], list[Any], list[Any]]:
        """The types of what the stage of the segment reads, from those of all leaves."""
        own = [params[i] for i in self.segment.params], [batch[i] for i in self.segment.batch]
        return *own, list(self.segment.inputs)


def _again(given: Any) -> Any:
    raise AssertionError("a stage that is run again has no pullback")


def _rebuilt(tree: Any, places: Sequence[int | None], kept: Sequence[Any], given: Sequence[Any]) -> Any:
    """A pullback from what was kept of it and what it had been given."""
    rest = iter(kept)
    return jax.tree.unflatten(tree, [next(rest) if place is None else given[place] for place in places])


def _kind(v: Any) -> tuple[Any, Any]:
    return v.aval.shape, v.aval.dtype


class CoupledError(ValueError):
    """An optimizer whose update of one parameter depends on the gradients of other stages, or on the loss."""


@dataclass(frozen=True, eq=False)
class StageUpdates:
    """The optimizer's update, taken apart into one for each stage; `owners` is the stage of each parameter.

    Raises:
        CoupledError: when it is made, if the update of a parameter reads gradients of several stages or a
            loss.
    """

    optimizer: optax.GradientTransformation
    params: Any
    owners: tuple[int, ...]
    stages: int

    @cached_property
    def _flat(self) -> tuple[Any, list[Any], int, int]:
        state = jax.eval_shape(self.optimizer.init, self.params)

        def update(params: Any, state: Any, grads: Any) -> Any:
            try:
                changes, state = self.optimizer.update(grads, state, params)
            except TypeError as error:
                if not isinstance(self.optimizer, optax.GradientTransformationExtraArgs):
                    raise
                raise CoupledError(
                    f"the optimizer's update asks for more than gradients ({error}), and no stage of a "
                    "pipeline has the loss of the whole model; use a plan without a pipeline."
                ) from error
            new = optax.apply_updates(params, changes)
            return jax.tree.leaves(new), jax.tree.leaves(state), jax.tree.leaves(changes)

        jaxpr, consts = flattened(jax.make_jaxpr(update)(self.params, state, self.params))
        return jaxpr, consts, len(self.owners), len(jax.tree.leaves(state))

    @cached_property
    def state_owners(self) -> list[int | None]:
        """The stage of each leaf of the state; None for one that belongs to no parameter, such as a count."""
        jaxpr, consts, count, size = self._flat
        inputs = jaxpr.invars[len(consts) :]
        bits = {v: 1 << s for v, s in zip(inputs[:count], self.owners, strict=True)}
        bits |= {v: 1 << s for v, s in zip(inputs[count + size :], self.owners, strict=True)}
        state = [0] * size
        for _ in range(size + 1):
            masks = {**bits, **dict(zip(inputs[count : count + size], state, strict=True))}
            for eqn in jaxpr.eqns:
                mask = 0
                for v in _jax.variables(eqn.invars):
                    mask |= masks.get(v, 0)
                masks.update(dict.fromkeys(eqn.outvars, mask))
            found = [
                0 if isinstance(v, _jax.Literal) else masks.get(v, 0) for v in jaxpr.outvars[: count + size]
            ]
            if found[count:] == state:
                break
            state = [old | new for old, new in zip(state, found[count:], strict=True)]
        if any(mask & (mask - 1) for mask in found):
            raise CoupledError(
                "the optimizer's update of a parameter reads gradients of several stages of the "
                "pipeline (such as "
                "optax.clip_by_global_norm); use optax.clip, or a plan without a pipeline."
            )
        return [mask.bit_length() - 1 if mask else None for mask in state]

    @cached_property
    def programs(self) -> list[Any]:
        """For each stage `update(params, state, grads, changes) -> params, state`.

        It returns what it is given unless something `changes`.
        """
        jaxpr, consts, count, _ = self._flat
        found = []
        for stage in range(self.stages):
            own, kept = self.of(stage)
            results = [jaxpr.outvars[i] for i in own] + [jaxpr.outvars[count + j] for j in kept]
            part = self._part(stage, results)
            read = part.invars[len(consts) :]

            def update(params: Any, state: Any, grads: Any, changes: Any, part: Any = part) -> Any:
                values = _jax.evaluate(part, (), [*consts, *params, *state, *grads])
                values = [
                    jnp.where(changes, jnp.asarray(x, v.aval.dtype), old)
                    for x, v, old in zip(values, part.outvars, [*params, *state], strict=True)
                ]
                return values[: len(params)], values[len(params) :]

            # The memory of gradients is used for the state; without as many arrays in it JAX would warn.
            spare = Counter(_kind(v) for v in results[len(own) :])
            spare.subtract(_kind(v) for v in read[len(own) + len(kept) :])
            found.append(jax.jit(update, donate_argnums=(0, 2) if min(spare.values(), default=0) >= 0 else 0))
        return found

    @cached_property
    def checks(self) -> list[Any]:
        """For each stage `sound(params, state, grads, before)`: whether its changes are finite, and `before`.

        An update overwrites the parameters; so that none does if one is not finite, all are made twice.
        """
        jaxpr, consts, count, size = self._flat

        def sound(params: Any, state: Any, grads: Any, before: Any, part: Any) -> Any:
            return before & all_finite(_jax.evaluate(part, (), [*consts, *params, *state, *grads]))

        changes = jaxpr.outvars[count + size :]
        parts = [self._part(s, [changes[i] for i in self.of(s)[0]]) for s in range(self.stages)]
        return [jax.jit(partial(sound, part=part)) for part in parts]

    def _part(self, stage: int, results: Sequence[Any]) -> Any:
        """The program of some results from what a stage has: parameters, a state, gradients."""
        jaxpr, consts, count, size = self._flat
        inputs, start = jaxpr.invars, len(consts)
        own, kept = self.of(stage)
        places = [*own, *(count + j for j in kept), *(count + size + i for i in own)]
        body = _jax.needed_equations(jaxpr.eqns, results, inputs)
        return _jax.jaxpr_of(body, [*inputs[:start], *(inputs[start + i] for i in places)], results, "update")

    def lowered(self, shardings: Sequence[Any]) -> list[Any]:
        """The programs and checks lowered for parameters that are laid out so, stage by stage."""
        found = []
        leaves = jax.tree.leaves(self.params)
        state = jax.tree.leaves(jax.eval_shape(self.optimizer.init, self.params))
        programs = zip(self.programs, self.checks, shardings, strict=True)
        for stage, (update, check, sharding) in enumerate(programs):
            own, needed = self.of(stage)
            weights = [leaves[i] for i in own]
            given = weights, [state[j] for j in needed], weights, jax.ShapeDtypeStruct((), bool)
            types = jax.tree.map(partial(placed_type, sharding=sharding), given)
            found += [update.lower(*types), check.lower(*types)]
        return found

    def of(self, stage: int) -> tuple[list[int], list[int]]:
        """The positions of a stage's own parameters, and of the leaves of the state that it needs."""
        own = [i for i, s in enumerate(self.owners) if s == stage]
        return own, [j for j, s in enumerate(self.state_owners) if s in (stage, None)]


def stage_meshes(devices: Sequence[Any], places: int, replicas: int) -> list[Mesh]:
    """A mesh for each place in the pipeline: `replicas` devices, over which the examples are split."""
    return [mesh_of(devices[i * replicas :], {DATA: replicas}) for i in range(places)]


def replicated(mesh: Mesh) -> NamedSharding:
    """Whole on each device of a mesh."""
    return NamedSharding(mesh, PartitionSpec())
