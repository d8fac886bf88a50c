"""`fp.memory.batch_limit`: the largest batch that fits, before anything is run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

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


def batch_limit(
    fun: Callable[..., Any],
    budget: int | str,
    argnums: int | Sequence[int] | None = 0,
    has_aux: bool = False,
    *,
    batch_axes: Any = "leading",
    program: Literal["training", "inference"] = "training",
    by: Literal["predicted", "compiled"] = "predicted",
    optimizer: optax.GradientTransformation | None = None,
    donate: bool = True,
    rules: RuleSet | None = None,
    kind: Kind | None = None,
) -> Callable[..., int]:
    """The largest batch whose memory fits a budget, before anything is run.

    `batch_limit(fun, budget)(*args) -> int`: the largest `B` for which `fp.memory.footprint` of `fun`, at
    arguments whose batch axes have length `B`, is at most `budget` bytes. The memory is taken to grow with
    `B`; the search brackets the limit by doubling and then halves, guided by a line through the bracket's
    ends. Arguments may be shapes; their own batch size is where the search begins.

    Args:
        fun: a loss, a prediction or a train step, as for `footprint`; it must be traceable at any batch size.
        budget: bytes, as a number or as text (`"8GB"`).
        argnums, has_aux, optimizer, donate, rules, kind: as in `footprint`.
        batch_axes: which axis of each argument is the batch: one entry for each positional argument, None
            for an argument without one, as `in_axes` of `jax.vmap`. By default the leading axis of all arrays
            with axes in the arguments that are not differentiated.
        program: "training" or "inference".
        by: "predicted", which traces for each candidate, or "compiled", which compiles for each.

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
    if by not in ("predicted", "compiled"):
        raise ValueError(f"batch_limit: by={by!r} is not known; use 'predicted' or 'compiled'.")
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
    account = footprint(
        fun,
        argnums,
        has_aux,
        optimizer=optimizer,
        donate=donate,
        rules=rules,
        kind=kind,
        measure=by == "compiled",
        programs=(program,),
    )

    def limit(*args: Any, **kwargs: Any) -> int:
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

        def ledger(batch: int) -> Ledger:
            leaves = list(call.leaves)
            for i, axis in axes.items():
                shape = list(jnp.shape(leaves[i]))
                shape[axis] = batch
                leaves[i] = jax.ShapeDtypeStruct(tuple(shape), jnp.result_type(leaves[i]))
            call_args, call_kwargs = call.arguments(leaves)
            found = account(*call_args, **call_kwargs).ledgers
            if program not in found:
                raise ValueError(
                    f"batch_limit: the function has no program={program!r}; its only is {list(found)}."
                )
            return found[program]

        def needs(batch: int) -> int:
            found = ledger(batch)
            return found.held

        return _search(needs, budget, max(1, *sizes), lambda: largest(ledger(1).rows))

    return limit


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


def _search(needs: Callable[[int], int], budget: int, start: int, rows: Callable[[], str]) -> int:
    """The largest batch that fits; `needs` grows with the batch."""
    known: dict[int, int] = {}

    def fits(batch: int) -> bool:
        known[batch] = needs(batch)
        return known[batch] <= budget

    if not fits(1):
        raise ValueError(
            f"batch_limit: budget={budget:,} bytes, but a batch of one needs {known[1]:,}; the largest: "
            f"{rows()}."
        )
    low, high = 1, max(2, start)
    while fits(high):
        if known[high] <= known[low]:
            raise ValueError(
                f"batch_limit: {known[high]:,} bytes at a batch of {low:,} and of {high:,}; the memory does "
                "not depend on batch_axes."
            )
        if high >= _LARGEST:
            return high
        low, high = high, min(_LARGEST, 2 * high)
    while high - low > 1:
        slope = (known[high] - known[low]) / (high - low)
        guess = low + int((budget - known[low]) / slope) if slope > 0 else (low + high) // 2
        # One of the two next to a straight line's answer; the middle where the line has not narrowed enough.
        middle = min(max(guess, low + 1), high - 1)
        width = high - low
        low, high = (middle, high) if fits(middle) else (low, middle)
        if high - low > max(1, width // 2):
            near = low + 1 if low == middle else high - 1
            if low < near < high:
                low, high = (near, high) if fits(near) else (low, near)
        if high - low > max(1, width // 2):
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
    return low
