"""`fp.partition.plan`: every kind of plan for a loss on some devices, in order."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache, cached_property, partial
from numbers import Integral
from typing import Any

import optax

from funcprop.memory.remat.limits import BudgetError, RematLimits
from funcprop.memory.remat.rematerialize import Rematerializer
from funcprop.partition.layout import DATA, MODEL, STAGE
from funcprop.partition.pipeline import PipelinedProgram
from funcprop.partition.plans import PartitionPlan, PlanProgram, Plans, RejectedPlan
from funcprop.partition.problem import TrainingProblem, Weight, require_mean
from funcprop.partition.programs import SteppedProgram
from funcprop.partition.sharded import ShardedProgram
from funcprop.partition.task_order import Order
from funcprop.partition.topology import DeviceTarget, target_of
from funcprop.program.batch_arguments import taking_a_batch
from funcprop.program.call import require_optimizer
from funcprop.program.facts import PRODUCTS
from funcprop.program.sizes import budget_bytes, nbytes
from funcprop.program.trained import Trained
from funcprop.rules.primitives import convolution, pooling
from funcprop.rules.rule import Rule
from funcprop.rules.rule_set import OperatorKey, RuleSet
from funcprop.rules.sets import chosen_rules

# Segments of ZeRO-3: more of them gather less at a time.
_SEGMENTS = 12
_SHARES = (0.5, 0.25, 0.1)
_CONVOLUTION = "conv_general_dilated"


def plan(
    loss: Callable[..., Any],
    *,
    optimizer: optax.GradientTransformation | None = None,
    budget: int | str | None = None,
    rules: RuleSet | None = None,
    weight: Weight | None = None,
    mesh: Mapping[str, int] | None = None,
    microbatches: int | None = None,
    schedule: Order = "1f1b",
    shard_parameters: bool = False,
) -> Callable[..., Plans]:
    """Plan a train step on several devices: `plan(loss)(params, batch, devices=8) -> Plans`.

    The loss is used as it is. Each plan says bytes of one device at the peak, operations, bytes communicated,
    the bubble of a pipeline and updates for each batch; `plans[0].compile()` proves it, `.place` and `.step`
    do it. Arguments may be shapes, and `on=` names devices that are not there.

    With `mesh`, the one plan of that mesh: `{"data": 4, "model": 2}`, `{"stage": 4, "data": 2}`. Without,
    data and tensor parallelism and both, ZeRO-3, pipelines, and on one device smaller minibatches,
    accumulation and rematerialisation, which are the alternatives at equal bytes.

    Plans that cut the batch (all but data and tensor parallelism) need a loss that is a mean over
    examples; with `weight`, a weighted one, in which a part of the batch counts `weight(part)`. It is
    checked on numbers.

    Args:
        loss: of parameters and batch, both pytrees; or `loss(params, *batch)`. Parameters may be a module of
            Equinox as it is: its floating-point arrays are trained, and plans are for a tree of these,
            `eqx.filter(module, eqx.is_inexact_array)`. Of an nnx model give what `nnx.split` returns.
        optimizer: any optax optimizer; without, only the gradient is accounted.
        budget: bytes of one device, or text as "16GB"; the device's memory for `on=`.
        rules: the rules of the gradient; `fp.rules.default` if None.
        weight: how much a part of the batch counts, its number of tokens for instance.
        mesh: the sizes of the axes "data", "model" and "stage".
        microbatches: into how many parts a pipeline, or accumulation, cuts the batch.
        schedule: of a pipeline: "1f1b", "gpipe" or "interleaved" (two stages on each device).
        shard_parameters: with `mesh={"data": n}`, ZeRO-3.

    Raises:
        TypeError: an nnx model holds more than parameters; with what to write.
        ValueError: there are not so many devices, an axis of the mesh is not known or cannot be split, the
        batch
            cannot be cut, or the loss is no mean over examples.

    Example:
        >>> import jax, jax.numpy as jnp, optax, funcprop as fp
        >>> loss = lambda w, x: jnp.mean(jnp.tanh(x @ w[0]) @ w[1])
        >>> shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, "float32")
        >>> shapes = [shape(64, 256), shape(256, 64)], shape(32, 64)
        >>> plans = fp.partition.plan(loss, optimizer=optax.adam(1e-3), budget="1MB")(*shapes, on="v5e:2x2")
        >>> plans.named("tensor 4").mesh, plans.named("tensor 4").fits
        ({'data': 1, 'model': 4}, True)
    """

    def planned(
        params: Any, batch: Any, devices: int | Sequence[Any] | None = None, on: str | None = None
    ) -> Plans:
        target = target_of(devices, on)
        _check(optimizer, weight, mesh, microbatches)
        limit = target.machine.memory if budget is None else budget_bytes(budget, "budget")
        chosen = chosen_rules(rules)
        if not target.is_present and chosen.target is None:
            chosen = chosen.on(target.machine.platform)
        model = Trained.stateless(params)
        function = model.function(taking_a_batch(loss, params, batch))
        platform = target.machine.platform
        problem = TrainingProblem(function, model.arrays, batch, optimizer, chosen, weight, platform)
        search = _Search(problem, target, limit, microbatches, schedule)
        if mesh is not None:
            return Plans((search.on_mesh(mesh, shard_parameters),), (), problem.examples)
        return search.all()

    return planned


def _check(optimizer: Any, weight: Any, mesh: Any, microbatches: Any) -> None:
    """Raise if an argument of `plan` is not what it says."""
    if optimizer is not None:
        require_optimizer("plan: ", optimizer)
    if weight is not None and not callable(weight):
        raise TypeError(f"weight={weight!r} is no function; pass that of a batch which counts its tokens.")
    counts = {f"mesh[{name!r}]": size for name, size in (mesh or {}).items()} | {"microbatches": microbatches}
    for name, size in counts.items():
        if size is not None and (not isinstance(size, Integral) or size < 1):
            raise ValueError(f"{name}={size!r} is no number of parts; pass a whole number from 1.")


class _Search:
    """The plans of one problem."""

    def __init__(
        self,
        problem: TrainingProblem,
        target: DeviceTarget,
        budget: int | None,
        microbatches: int | None,
        schedule: Order,
    ) -> None:
        self.problem, self.target, self.budget = problem, target, budget
        self.microbatches, self.schedule = microbatches, schedule

    def _plan(self, name: str, mesh: Mapping[str, int], program: PlanProgram, **more: Any) -> PartitionPlan:
        notes: tuple[str, ...] = ()
        if not self.problem.has_values and not (isinstance(program, SteppedProgram) and program.is_plain):
            notes = ("not checked: whether the loss is a mean over examples needs values, not shapes",)
        return PartitionPlan(
            name, dict(mesh), program.problem, program, self.target, self.budget, notes=notes, **more
        )

    def _split(self, devices: int) -> TrainingProblem:
        """The problem where examples are on several devices: rules go by the sizes of one.

        A convolution takes its batch in chunks, of which each device has a part. For autodiff's derivative of
        a max-pool XLA gathers the examples, so there the rule is used at all sizes.
        """
        problem, rules = self.problem, self.problem.rules
        if devices == 1 or rules is None or problem.platform == "tpu":
            return problem
        made = {eqn.primitive.name for eqn, _ in problem.axes.program.equations}
        changes: dict[OperatorKey, Rule | None] = {}
        if "select_and_scatter_add" in made:
            pools = ("reduce_window_max", False), ("reduce_window_min", True)
            changes |= {name: pooling.rule(minimum=least, everywhere=True) for name, least in pools}
        if _CONVOLUTION in made:
            changes[_CONVOLUTION] = convolution.rule(devices=devices)
        changes = {name: r for name, r in changes.items() if name in rules and not rules.is_replaced(name)}
        return replace(problem, rules=rules.replace(changes)) if changes else problem

    @cached_property
    def _mean(self) -> None:
        require_mean(self.problem)

    # --- single plans -------------------------------------------------------------------------

    def on_mesh(self, mesh: Mapping[str, int], shard_parameters: bool) -> PartitionPlan:
        """The plan of a mesh.

        Raises:
            ValueError: an axis is not known, or there are not so many devices.
        """
        if unknown := set(mesh) - {DATA, MODEL, STAGE}:
            raise ValueError(
                f"mesh={dict(mesh)!r}: the model has no axis "
                f"{', '.join(sorted(map(repr, unknown)))}; use data "
                "(examples), model (parameters) and stage (a pipeline)."
            )
        count = math.prod(mesh.values())
        if count > self.target.count:
            raise ValueError(
                f"mesh={dict(mesh)!r} needs {count} devices, and there are {self.target.count}; "
                f"use fewer, or "
                "on='v5e:4x4' for devices that are not there."
            )
        if mesh.get(STAGE, 1) > 1:
            if mesh.get(MODEL, 1) > 1:
                raise ValueError(
                    f"mesh={dict(mesh)!r}: a pipeline is combined with data, not with model; drop one."
                )
            return self.pipeline(mesh[STAGE], mesh.get(DATA, 1))
        if shard_parameters:
            if mesh.get(MODEL, 1) > 1:
                raise ValueError(f"mesh={dict(mesh)!r}: shard_parameters=True is for data alone; drop model.")
            return self.zero(mesh.get(DATA, 1))
        parts = self.microbatches or 1
        return self.layout(mesh.get(DATA, 1), mesh.get(MODEL, 1), parts)

    def layout(self, data: int, model: int, parts: int = 1) -> PartitionPlan:
        """Data and tensor parallelism, with accumulation over `parts` microbatches."""
        names = ([f"data {data}"] if data > 1 else []) + ([f"tensor {model}"] if model > 1 else [])
        if parts > 1:
            self.problem.require_parts(parts, "microbatches")
            self.problem.require_parts(parts * data, "microbatches × data")
            self._mean  # noqa: B018
            names.append(f"accumulation {parts}")
        sizes = {DATA: data, MODEL: model} if model > 1 else {DATA: data}
        program = SteppedProgram(self._split(data), sizes, parts)
        program.whole_batch  # noqa: B018 (an axis that cannot be split is an error here)
        return self._plan(" × ".join(names) or "one device", sizes, program)

    def minibatch(self, parts: int) -> PartitionPlan:
        """A smaller minibatch on one device: so many updates with a part of the batch each."""
        self.problem.require_parts(parts, "minibatches")
        program = SteppedProgram(self.problem, {DATA: 1}, minibatches=parts)
        size = self.problem.examples // parts
        return self._plan(f"minibatch of {size}", {DATA: 1}, program, updates=parts)

    def remat(self, share: float) -> PartitionPlan:
        """Rematerialisation on one device, within a share of what is held between the sweeps."""
        # Schedules are compared by what they compile to only where that is what will run.
        lean = Rematerializer(RematLimits(share, measure=False))
        found = lean.plan_of(self.problem.loss)(*self.problem.shapes)
        options = found.compiler_options if self.target.is_present else {}
        program = SteppedProgram(self.problem, {DATA: 1}, lean=lean.applied, compiler_options=options or {})
        return self._plan(f"rematerialisation {share:.0%}", {DATA: 1}, program)

    def zero(self, parts: int) -> PartitionPlan:
        """ZeRO-3 over so many devices."""
        self.problem.require_parts(parts, "data")
        self._mean  # noqa: B018
        most = len(self.problem.cuttable(parts).positions()) - 1
        program = ShardedProgram(self.problem, parts, min(most, _SEGMENTS))
        return self._plan(f"zero {parts}", {DATA: parts}, program)

    def pipeline(self, stages: int, replicas: int) -> PartitionPlan:
        """A pipeline, each stage on `replicas` devices."""
        parts = self.microbatches or self._microbatches(stages, replicas)
        self.problem.require_parts(parts, "microbatches")
        self.problem.require_parts(parts * replicas, "microbatches × data")
        self._mean  # noqa: B018
        count = stages * 2 if self.schedule == "interleaved" else stages
        program = PipelinedProgram(self._split(replicas), count, parts, self.schedule, stages, replicas)
        program.timeline  # noqa: B018
        program.segments  # noqa: B018 (a loss that cannot be cut is an error here)
        name = f"pipeline {stages} ({self.schedule})" + (f" × data {replicas}" if replicas > 1 else "")
        mesh = {STAGE: stages, DATA: replicas} if replicas > 1 else {STAGE: stages}
        return self._plan(name, mesh, program)

    def _microbatches(self, stages: int, replicas: int) -> int:
        """The largest number up to four for each stage into which the batch can be cut."""
        each = self.problem.examples // replicas
        fit = [
            m
            for m in range(1, 4 * stages + 1)
            if each % m == 0 and self.problem.examples % (m * replicas) == 0
        ]
        if self.schedule == "interleaved":
            fit = [m for m in fit if m % stages == 0] or fit
        return max(fit, default=1)

    # --- all plans ----------------------------------------------------------------------------

    def all(self) -> Plans:
        """Every kind of plan that can be made, best first."""
        found: list[PartitionPlan] = []
        rejected: list[RejectedPlan] = []
        for name, make in self._candidates():
            try:
                made = make()
                made.predicted  # noqa: B018 (an optimizer that a pipeline cannot take apart is an error here)
            except ValueError as error:
                rejected.append(RejectedPlan(name, str(error)))
                continue
            found.append(made)
        found.sort(key=lambda p: (p.fits is False, p.seconds / p.updates if p.fits else p.predicted.total))
        return Plans(tuple(found), tuple(rejected), self.problem.examples)

    def _candidates(self) -> Iterator[tuple[str, Callable[[], PartitionPlan]]]:
        n = self.target.count
        yield "one device", lambda: self._one_device
        if n > 1:
            yield f"data {n}", partial(self.layout, n, 1)
            for model in _divisors(n):
                yield f"data {n // model} × tensor {model}", partial(self.layout, n // model, model)
            yield f"zero {n}", partial(self.zero, n)
            for stages in _stage_counts(n):
                yield f"pipeline {stages}", partial(self.pipeline, stages, n // stages)
            yield (
                f"data {n} × accumulation",
                lambda: self._smallest(lambda parts: self.layout(n, 1, parts), n),
            )
        yield "accumulation", partial(self._smallest, partial(self.layout, 1, 1), 1)
        if self.problem.optimizer is not None:
            yield "minibatch", partial(self._smallest, self.minibatch, 1)
        yield "rematerialisation", self._cheapest_remat

    def _smallest(self, make: Callable[[int], PartitionPlan], among: int) -> PartitionPlan:
        """The plan of the fewest parts that fits; of the most parts if none does."""
        each = self.problem.examples // among
        parts = [k for k in range(2, each + 1) if each % k == 0 and self.problem.examples % (k * among) == 0]
        if not parts:
            raise ValueError(f"{self.problem.examples} examples on {among} devices cannot be cut further.")
        chosen = [k for k in parts if k & (k - 1) == 0] or parts
        if self.budget is None:
            return make(chosen[min(1, len(chosen) - 1)])
        made = cache(make)
        return made(chosen[bisect.bisect_left(chosen[:-1], True, key=lambda k: bool(made(k).fits))])

    @cached_property
    def _one_device(self) -> PartitionPlan:
        return self.layout(1, 1)

    def _bytes_that_stay(self) -> int:
        """What one device holds at some time, whatever is computed again."""
        held = self._one_device.predicted.by_purpose
        kept = ("parameters", "optimizer state", "batch", "results")
        products = (eqn for eqn, _ in self.problem.axes.program.equations if eqn.primitive.name in PRODUCTS)
        largest = max((nbytes(eqn.outvars[0]) for eqn in products), default=0)
        return sum(held.get(name, 0) for name in kept) + largest

    def _cheapest_remat(self) -> PartitionPlan:
        """The largest share that fits; the smallest that can be planned if none does.

        Raises:
            ValueError: nothing can be computed again, or that would not be enough.
        """
        found = None
        # A schedule for a model of billions takes minutes; for machines to be bought it must be of some use.
        if self.budget is not None and not self.target.is_present:
            least = self._bytes_that_stay()
            if least > self.budget:
                raise ValueError(
                    f"parameters, what goes with them, and the largest product's result are {least:,} bytes; "
                    f"no recomputation makes that {self.budget:,}."
                )
        for share in _SHARES:
            try:
                found = self.remat(share)
            except BudgetError:
                break
            if self.budget is None or found.fits:
                return found
        if found is None:
            raise ValueError("no half of what is held between the sweeps can be computed again.")
        return found


def _divisors(n: int) -> list[int]:
    """Over how many of n devices parameters are split: powers of two, few of them, and all."""
    found = [m for m in (2, 4, 8, 16, 32) if m < n and n % m == 0]
    return [*found, n] if n <= 32 else found


def _stage_counts(n: int) -> list[int]:
    """How many stages of a pipeline n devices make: all, a half, and for many at most 16."""
    return [s for s in (16, 8, 4, 2) if s <= n and n % s == 0][:3] if n > 3 else [n]
