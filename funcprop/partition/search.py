"""`fp.partition.plan`: every kind of plan for a loss on some devices, in order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, cached_property, partial
from numbers import Integral
from typing import Any, Literal, get_args

import optax

from funcprop.memory.remat.limits import BudgetError
from funcprop.partition.device_bytes import DeviceBytes
from funcprop.partition.partition_plan import PartitionPlan
from funcprop.partition.plan_kinds import PlanKinds
from funcprop.partition.plans import Plans, RejectedPlan
from funcprop.partition.problem import TrainingProblem, Weight
from funcprop.partition.task_order import Order
from funcprop.partition.topology import target_of
from funcprop.program.batch_arguments import one_batch, taking_a_batch
from funcprop.program.call import require_optimizer
from funcprop.program.facts import PRODUCTS
from funcprop.program.sizes import budget_bytes, nbytes
from funcprop.program.trained import Trained
from funcprop.rules.rule_set import RuleSet
from funcprop.rules.sets import chosen_rules

_SHARES = (0.5, 0.25, 0.1)
# What is estimated to be larger than the budget by so much is not compiled to see whether it fits.
_DOUBT = 1.25
By = Literal["checked", "estimate"]


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
    by: By = "checked",
) -> Callable[..., Plans]:
    """Plan a train step on several devices: `plan(loss)(params, *batch, devices=8) -> Plans`.

    The loss is used as it is. Each plan says bytes of one device at the peak, operations, bytes communicated,
    the bubble of a pipeline and updates for each batch; `plans[0].compile()` proves it, `.place` and `.step`
    do it. Arguments may be shapes, and `on=` names devices that are not there.

    With `mesh`, the one plan of that mesh: `{"data": 4, "model": 2}`, `{"stage": 4, "data": 2}`. Without,
    data and tensor parallelism and both, ZeRO-3, pipelines, and on one device smaller minibatches,
    accumulation and rematerialisation, which are the alternatives at equal bytes. Bytes are estimated; on
    devices that are here the best plans are compiled until one is known to fit the budget.

    Plans that cut the batch (all but data and tensor parallelism) need a loss that is a mean over
    examples; with `weight`, a weighted one, in which a part of the batch counts `weight(part)`. It is
    checked on numbers.

    Args:
        loss: of parameters and batch, both pytrees; or `loss(params, *batch)`, which the plan's step is given
            as one tuple. Parameters may be a module of Equinox as it is: its floating-point arrays are
            trained, and plans are for a tree of these, `eqx.filter(module, eqx.is_inexact_array)`. Of an nnx
            model give what `nnx.split` returns.
        optimizer: any optax optimizer; without, only the gradient is accounted.
        budget: bytes of one device, or text as "16GB"; the device's memory for `on=`.
        rules: the rules of the gradient; `fp.rules.default` if None.
        weight: how much a part of the batch counts, its number of tokens for instance.
        mesh: the sizes of the axes "data", "model" and "stage".
        microbatches: into how many parts a pipeline, or accumulation, cuts the batch.
        schedule: of a pipeline: "1f1b", "gpipe" or "interleaved" (two stages on each device).
        shard_parameters: with `mesh={"data": n}`, ZeRO-3.
        by: "checked", or "estimate", which compiles nothing.

    Raises:
        TypeError: an nnx model holds more than parameters, or there is no batch; with what to write.
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
        params: Any, *data: Any, devices: int | Sequence[Any] | None = None, on: str | None = None
    ) -> Plans:
        batch = one_batch("plan", data)
        target = target_of(devices, on)
        _check(optimizer, weight, mesh, microbatches, by)
        limit = target.machine.memory if budget is None else budget_bytes(budget, "budget")
        chosen = chosen_rules(rules)
        if not target.is_present and chosen.target is None:
            chosen = chosen.on(target.machine.platform)
        model = Trained.stateless(params)
        function = model.function(taking_a_batch(loss, params, batch))
        platform = target.machine.platform
        problem = TrainingProblem(function, model.arrays, batch, optimizer, chosen, weight, platform)
        kinds = PlanKinds(problem, target, limit, microbatches, schedule)
        if mesh is not None:
            return Plans((kinds.on_mesh(mesh, shard_parameters),), (), problem.examples)
        return _Search(kinds, by).all()

    return planned


def _check(optimizer: Any, weight: Any, mesh: Any, microbatches: Any, by: Any) -> None:
    """Raise if an argument of `plan` is not what it says."""
    if by not in get_args(By):
        raise ValueError(f"by={by!r} is not known; use one of {', '.join(map(repr, get_args(By)))}.")
    if optimizer is not None:
        require_optimizer("plan: ", optimizer)
    if weight is not None and not callable(weight):
        raise TypeError(f"weight={weight!r} is no function; pass that of a batch which counts its tokens.")
    if mesh is not None and not isinstance(mesh, Mapping):
        raise TypeError(f"mesh={mesh!r}: pass the sizes of its axes, such as {{'data': 2, 'model': 4}}.")
    counts = {f"mesh[{name!r}]": size for name, size in (mesh or {}).items()} | {"microbatches": microbatches}
    for name, size in counts.items():
        if size is not None and (not isinstance(size, Integral) or size < 1):
            raise ValueError(f"{name}={size!r} is no number of parts; pass a whole number from 1.")


class _Search:
    """Every kind of plan of one problem, best first."""

    def __init__(self, kinds: PlanKinds, by: By) -> None:
        self.kinds, self.by = kinds, by
        self.problem, self.target, self.budget = kinds.problem, kinds.target, kinds.budget

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
        return Plans(tuple(self._checked(found)), tuple(rejected), self.problem.examples)

    def _checked(self, plans: list[PartitionPlan]) -> list[PartitionPlan]:
        """The plans, best first, compiled until the first of them is known to fit, or that none does."""
        found = sorted(plans, key=_order)
        if self.by != "checked" or not self.target.is_present or self.budget is None:
            return found
        limit = _DOUBT * self.budget
        while not found[0].fits or found[0].compiled_bytes is None:
            near = (i for i, p in enumerate(found) if p.compiled_bytes is None and p.held <= limit)
            if (i := next(near, None)) is None:
                break
            found[i] = found[i].checked()
            found.sort(key=_order)
        return found

    def _candidates(self) -> Iterator[tuple[str, Callable[[], PartitionPlan]]]:
        n = self.target.count
        yield "one device", lambda: self._whole(1)
        if n > 1:
            yield f"data {n}", lambda: self._whole(n)
            for model in _divisors(n):
                yield f"data {n // model} × tensor {model}", partial(self.kinds.layout, n // model, model)
            yield f"zero {n}", partial(self.kinds.zero, n)
            for stages in _stage_counts(n):
                yield f"pipeline {stages}", partial(self.kinds.pipeline, stages, n // stages)
            yield (
                f"data {n} × accumulation",
                lambda: self._smallest(lambda parts: self.kinds.layout(n, 1, parts), n),
            )
        yield "accumulation", partial(self._smallest, partial(self.kinds.layout, 1, 1), 1)
        if self.problem.optimizer is not None:
            yield "minibatch", partial(self._smallest, self.kinds.minibatch, 1)
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
        made, i, last = cache(make), self._guess(among, chosen), len(chosen) - 1
        while i < last and not made(chosen[i]).fits:
            i += 1
        while i > 0 and made(chosen[i]).fits and made(chosen[i - 1]).fits:
            i -= 1
        return made(chosen[i])

    def _guess(self, among: int, parts: Sequence[int]) -> int:
        """Which number of parts is likely to be the first that fits: what does not stay is divided."""
        assert self.budget is not None
        held = self._whole(among).predicted
        stays = _staying(held)
        rest = held.total - stays
        fit = (i for i, k in enumerate(parts) if stays + rest / k <= self.budget)
        return next(fit, len(parts) - 1)

    @cached_property
    def _whole(self) -> Callable[[int], PartitionPlan]:
        """The plan of the whole batch at once, over so many devices."""
        return cache(lambda devices: self.kinds.layout(devices, 1))

    def _bytes_that_stay(self) -> int:
        """What one device holds at some time, whatever is computed again."""
        products = (eqn for eqn, _ in self.problem.axes.program.equations if eqn.primitive.name in PRODUCTS)
        largest = max((nbytes(eqn.outvars[0]) for eqn in products), default=0)
        return _staying(self._whole(1).predicted) + largest

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
                found = self.kinds.remat(share)
            except BudgetError:
                break
            if self.budget is None or found.fits:
                return found
        if found is None:
            raise ValueError("no half of what is held between the sweeps can be computed again.")
        return found


def _staying(held: DeviceBytes) -> int:
    """What does not depend on how much is done at a time."""
    kept = ("parameters", "optimizer state", "batch", "results")
    return sum(held.by_purpose.get(name, 0) for name in kept)


def _order(plan: PartitionPlan) -> tuple[bool, float]:
    fast = plan.fits is not False
    return not fast, plan.seconds / plan.updates if fast else plan.held


def _divisors(n: int) -> list[int]:
    """Over how many of n devices parameters are split: powers of two, few of them, and all."""
    found = [m for m in (2, 4, 8, 16, 32) if m < n and n % m == 0]
    return [*found, n] if n <= 32 else found


def _stage_counts(n: int) -> list[int]:
    """How many stages of a pipeline n devices make: all, a half, and for many at most 16."""
    return [s for s in (16, 8, 4, 2) if s <= n and n % s == 0][:3] if n > 3 else [n]
