"""`fp.memory.batch_limit`: the largest batch that fits, before anything is run."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from funcprop import _jax
from funcprop._jax.xla_options import without_folding
from funcprop.graph.objective import positions
from funcprop.graph.references import require_no_references
from funcprop.memory.accounting import footprint
from funcprop.memory.cases import Kind
from funcprop.memory.ledger import Ledger
from funcprop.memory.rows import largest
from funcprop.program.call import Call, is_array
from funcprop.program.sizes import budget_bytes
from funcprop.rules.rule_set import RuleSet

_LARGEST = 2**31 - 1  # what an axis can have
_FILLED = 0.97  # a batch that fills so much of the budget is not made larger


def batch_limit(
    fun: Callable[..., Any],
    budget: int | str,
    argnums: int | Sequence[int] | None = 0,
    has_aux: bool = False,
    *,
    batch_axes: Any = "leading",
    program: Literal["training", "inference"] = "training",
    by: Literal["checked", "estimate", "compiled"] = "checked",
    optimizer: optax.GradientTransformation | None = None,
    donate: bool = True,
    rules: RuleSet | None = None,
    kind: Kind | None = None,
    compiler_options: Mapping[str, Any] | None = None,
) -> Callable[..., int | float]:
    """Find the largest batch whose memory fits a budget, before anything is run.

    `batch_limit(fun, budget)(*args) -> int`: the largest `B` for which `fp.memory.footprint` of `fun`, at
    arguments whose batch axes have length `B`, is at most `budget` bytes; `math.inf` if there is no limit,
    because the longest axis that an array can have, `2³¹ − 1`, fits by the estimate. The search doubles `B`
    until two in a row do not fit, for the memory of a larger batch may be less, and then halves the bracket,
    guided by a line through its ends. It goes by the estimate; the program of the answer is compiled, the
    search repeated with the ratio that is found, and the batch that is returned has been compiled and fits.
    Arguments may be shapes; their own batch size is where the search begins. Over several devices the budget
    is that of one.

    Args:
        fun: a loss, a prediction or a train step, as for `footprint`; it must be traceable at any batch size.
        budget: bytes, as a number or as text (`"8GB"`).
        argnums, has_aux, optimizer, donate, rules, kind, compiler_options: as in `footprint`.
        batch_axes: which axis of each argument is the batch: one entry for each positional argument, None
            for an argument without one, as `in_axes` of `jax.vmap`. By default the leading axis of all arrays
            with axes in the arguments that are not differentiated.
        program: "training" or "inference".
        by: "checked"; "estimate", which compiles nothing; or "compiled", which compiles every candidate.

    Raises:
        ValueError: not even a batch of one fits (the message says what it needs, and for what); the batch
            axes differ in length or there are none; the memory does not depend on the batch; `budget` is not
            positive; or `program`, `by` or `batch_axes` is not known.
        TypeError: `budget` is not a number.

    Example:
        >>> import jax, jax.numpy as jnp, funcprop as fp
        >>> predict = lambda w, x: jnp.tanh(x @ w["W1"]) @ w["W2"]
        >>> shape = lambda *dims: jax.ShapeDtypeStruct(dims, "float32")
        >>> w, x = {"W1": shape(8, 4), "W2": shape(4, 2)}, shape(1, 8)
        >>> fp.memory.batch_limit(predict, 10_000, program="inference")(w, x)  # 160 + 56 B ≤ 10000
        175
    """
    if program not in ("training", "inference"):
        raise ValueError(f"batch_limit: program={program!r} is not known; use 'training' or 'inference'.")
    if by not in ("checked", "estimate", "compiled"):
        raise ValueError(f"batch_limit: by={by!r} is not known; use 'checked', 'estimate' or 'compiled'.")
    if isinstance(budget, str):
        budget = budget_bytes(budget, "batch_limit: budget")
    if isinstance(budget, bool) or not isinstance(budget, int | float | np.integer | np.floating):
        raise TypeError(f"batch_limit: budget={budget!r} is not a number; pass bytes, as 64 * 2**20.")
    if not budget > 0:
        raise ValueError(f"batch_limit: budget={budget!r} holds nothing; pass bytes, more than 0.")
    if isinstance(batch_axes, str) and batch_axes != "leading":
        raise ValueError(
            f"batch_limit: batch_axes={batch_axes!r} is not known; use 'leading', or one entry for each "
            "argument, an axis or None."
        )
    account = functools.partial(
        footprint,
        *(fun, argnums, has_aux),
        optimizer=optimizer,
        donate=donate,
        rules=rules,
        kind=kind,
        programs=(program,),
        compiler_options=without_folding(compiler_options or {}),
    )

    def limit(*args: Any, **kwargs: Any) -> int | float:
        require_no_references("batch_limit", fun, args, kwargs)
        call = Call.of(args, kwargs, is_array)
        axes = _axes(call, args, argnums, batch_axes)
        sizes = {jnp.shape(call.leaves[i])[axis] for i, axis in axes.items()}
        if len(sizes) != 1:
            lengths = ", ".join(map(str, sorted(sizes))) or "none at all"
            raise ValueError(
                f"batch_limit: batch_axes={batch_axes!r} have the lengths {lengths}; give batch_axes with "
                "one entry for each argument, an axis or None, so that all have the length of the batch."
            )

        # Over several devices a batch is as many examples of each.
        unit = max(_shards(call.leaves[i], axis) for i, axis in axes.items())

        def ledger(batch: int, measure: bool) -> Ledger:
            leaves = list(call.leaves)
            for i, axis in axes.items():
                shape = list(jnp.shape(leaves[i]))
                shape[axis] = batch * unit
                dtype, sharding = jnp.result_type(leaves[i]), _jax.sharding_of(leaves[i])
                leaves[i] = jax.ShapeDtypeStruct(tuple(shape), dtype, sharding=sharding)
            call_args, call_kwargs = call.arguments(leaves)
            found = account(measure=measure)(*call_args, **call_kwargs).ledgers
            if program not in found:
                raise ValueError(
                    f"batch_limit: the function has no program={program!r}; its only is {list(found)}."
                )
            return found[program]

        def estimated(batch: int) -> int:
            return ledger(batch, False).estimate

        @functools.cache
        def compiled(batch: int) -> int:
            return ledger(batch, True).held

        needs = compiled if by == "compiled" else estimated
        start = max(1, max(sizes) // unit)
        if needs(1) <= budget:
            found = (
                _checked(needs, compiled, budget, start)
                if by == "checked"
                else _searched(needs, budget, start)
            )
            if found:
                return unit * found
        one = ledger(1, by != "estimate")
        raise ValueError(
            f"batch_limit: budget={budget:,} bytes, but a batch of one needs {one.held:,}; the largest: "
            f"{largest(one.rows)}."
        )

    return limit


def _shards(leaf: Any, axis: int) -> int:
    """Over how many devices an axis of an argument is divided."""
    sharding, shape = _jax.sharding_of(leaf), tuple(jnp.shape(leaf))
    return 1 if sharding is None else int(shape[axis] // max(sharding.shard_shape(shape)[axis], 1))


def _axes(
    call: Call, args: Sequence[Any], argnums: int | Sequence[int] | None, batch_axes: Any
) -> dict[int, int]:
    """The batch axis of each leaf that has one."""
    given: list[Any] = []
    if isinstance(batch_axes, str) and batch_axes == "leading":
        chosen = () if argnums is None else positions(argnums)
        count = len(args)
        at = [p % count for p in ((chosen,) if isinstance(chosen, int) else chosen) if count]
        given = [None if p in at else 0 for p in range(count)]
    else:
        given = list(batch_axes) if isinstance(batch_axes, tuple | list) else [batch_axes] * len(args)
        if len(given) != len(args):
            raise ValueError(
                f"batch_limit: batch_axes={batch_axes!r} has {len(given)} entries for {len(args)} arguments."
            )
    per_leaf = [
        axis for a, axis in zip(args, given, strict=True) for axis in [axis] * len(jax.tree.leaves(a))
    ]
    return {
        i: axis
        for i, axis in enumerate(per_leaf)
        if axis is not None and i in call.variables and jnp.ndim(call.leaves[i]) > 0
    }


def _searched(needs: Callable[[int], float], budget: int, start: int) -> int | float:
    """The largest batch that fits, where a batch of one does; infinity if that of the longest axis does.

    The batch is doubled until two in a row do not fit, for the memory of a larger batch may be less; then the
    bracket is halved, guided by a line through its ends.
    """
    known: dict[int, float] = {1: needs(1)}
    low, high, equal, missed = 1, max(2, start), 0, 0
    while True:
        known[high] = needs(high)
        if known[high] <= budget:
            equal = equal + 1 if known[high] == known[low] else 0
            if equal == 3:
                raise ValueError(
                    f"batch_limit: {known[high]:,.0f} bytes at a batch of {low:,} and of {high:,}; the "
                    "memory does not depend on batch_axes."
                )
            if high >= _LARGEST:
                return math.inf
            low, missed = high, 0
        elif missed or high >= _LARGEST:
            high = missed or high
            break
        else:
            missed = high
        high = min(_LARGEST, 2 * high)

    # Along the line twice, for its answer may fit and the next not; then the middle, should it be no line.
    for guided in itertools.cycle((True, True, False)):
        if high - low <= 1:
            break
        slope = (known[high] - known[low]) / (high - low)
        guess = low + int((budget - known[low]) / slope) if guided and slope > 0 else (low + high) // 2
        batch = min(max(guess, low + 1), high - 1)
        known[batch] = needs(batch)
        low, high = (batch, high) if known[batch] <= budget else (low, batch)
    return low


def _checked(
    needs: Callable[[int], int], compiled: Callable[[int], int], budget: int, start: int
) -> int | float:
    """The largest batch by an estimate, corrected until a compiled program of it fits, and nearly fills."""
    ratio, best = 1.0, 0
    for _ in range(4):
        found = _searched(lambda batch, ratio=ratio: ratio * needs(batch), budget, start)  # type: ignore[misc]
        if isinstance(found, float) or found <= best:
            return found if isinstance(found, float) else best
        held = compiled(found)
        if held <= budget:
            if best or held >= _FILLED * budget:
                return found
            best = found
        ratio = held / needs(found)
        if ratio * needs(1) > budget:
            break
    best = best or 1
    # The estimate did not lead there: the compiled program decides.
    return best if compiled(best) <= budget else 0
