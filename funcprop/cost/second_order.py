"""`fp.second_order_cost(fun)(*args)`: what second derivatives cost, predicted and measured.

For a network of N layers of equal widths, differentiated by its weights, the chapter's exercise counts
matrix products: `N` of the value, `3N − 1` of the gradient, `8N − 5` of a Hessian-vector product, `5N − 2` of
a Gauss-Newton product, and `2N − 1 + P (6N − 4)` of the dense Hessian of `P` parameters. Here the same is
counted for any function: before compiling, in the jaxpr, and afterwards, in the program that XLA made of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any

import jax

from funcprop import _jax
from funcprop.cost.programs import DENSE, GAUSS_NEWTON, GRADIENT, VALUE, programs
from funcprop.cost.timing import Rates, compiled_together, fastest, measured_rates
from funcprop.cost.work import Work, of_compiled, of_jaxpr
from funcprop.graph.graph import aligned, bytes_text
from funcprop.graph.objective import Argnums, Objective, trace_objective
from funcprop.graph.references import require_no_references
from funcprop.program.call import has_values
from funcprop.program.facts import CALLS
from funcprop.program.sizes import budget_bytes
from funcprop.rules.rule_set import RuleSet
from funcprop.rules.sets import chosen_rules

# A kind of product is timed at most so often.
_KIND_REPEATS = 5


@dataclass(frozen=True)
class Cost:
    """The cost of a computation. `operators` are equations, or instructions of the compiled program.

    `bytes` are those of arguments, results and temporaries together. `seconds` is None where nothing is run.
    """

    operators: int
    products: int
    flops: int
    bytes: int
    seconds: float | None


@dataclass(frozen=True)
class CostRow:
    """A computation with its predicted and its measured cost; `reason` says why it was not measured."""

    name: str
    predicted: Cost
    measured: Cost | None
    reason: str | None = None

    @property
    def time(self) -> float | None:
        """Measured over predicted seconds."""
        if self.measured is None or self.measured.seconds is None or self.predicted.seconds is None:
            return None
        return self.measured.seconds / self.predicted.seconds


@dataclass(frozen=True)
class SecondOrderCost:
    """The costs of the derivatives of one function. `print` shows a table, `as_dict` is plain data.

    `left` says of a computation that is not there why. `parameters` is how many numbers are differentiated.
    """

    name: str
    parameters: int
    platform: str
    rows: tuple[CostRow, ...]
    left: dict[str, str]
    rates: Rates | None
    output: str | None

    def __getitem__(self, name: str) -> CostRow:
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(f"{name!r}; there are {', '.join(row.name for row in self.rows)}.")

    @property
    def worst(self) -> float | None:
        """How far the predicted times are off: the largest factor, in either direction."""
        ratios = [row.time for row in self.rows if row.time is not None]
        return max((max(r, 1 / r) for r in ratios), default=None)

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        rows = [{**asdict(row), "time": row.time} for row in self.rows]
        rates = None if self.rates is None else _rates_as_dict(self.rates)
        left = dict(self.left)
        return {
            "name": self.name, "parameters": self.parameters, "platform": self.platform, "rows": rows,
            "left": left, "rates": rates, "output": self.output, "worst": self.worst,
        }  # fmt: skip

    def __str__(self) -> str:
        title = f"{self.name}: derivatives by {self.parameters:,} parameters, on {self.platform}"
        head = ("", "products", "XLA", "operators", "XLA", "Mflop", "XLA", "bytes", "XLA")
        table = [[*head, "ms", "measured", "ratio"]]
        table += [[row.name, *_cells(row), *_times(row)] for row in self.rows]
        parts = [title, aligned(table, right=set(range(1, 12)), widest=40)]
        notes = [f"{row.name}: not measured, {row.reason}" for row in self.rows if row.reason]
        notes += [f"{name}: left out, {reason}" for name, reason in self.left.items()]
        if self.output is not None:
            notes.append(f"{GAUSS_NEWTON}: the model's output is {self.output}")
        if self.rates is not None:
            notes.append(_rates_text(self.rates))
        if self.worst is not None:
            notes.append(f"Predicted times are off by a factor of at most {self.worst:.1f} here.")
        return "\n\n".join([*parts, "\n".join(notes)] if notes else parts)

    __repr__ = __str__


def _rates_as_dict(rates: Rates) -> dict[str, Any]:
    kinds = [
        {"kind": k.kind, "looped": k.looped, "flops": k.flops, "seconds": s}
        for k, s in rates.products.items()
    ]
    numbers = {f.name: getattr(rates, f.name) for f in fields(rates) if f.name != "products"}
    return {**{k: v if math.isfinite(v) else None for k, v in numbers.items()}, "products": kinds}


def _rates_text(rates: Rates) -> str:
    speeds = [kind.flops / seconds / 1e9 for kind, seconds in rates.products.items()]
    range_ = f" ({min(speeds):.3g} to {max(speeds):.3g} Gflop/s)" if speeds else ""
    return (
        f"Times are predicted from {len(speeds)} kinds of products{range_}, "
        f"{rates.bytes_per_second / 1e9:.3g} GB/s and {rates.call_seconds * 1e6:.2g} µs a call, measured in "
        f"this run, times {rates.scale:.2f}, with which the gradient takes what was measured first."
    )


def _cells(row: CostRow) -> list[str]:
    cells = []
    for key in ("products", "operators", "flops", "bytes"):
        for cost in (row.predicted, row.measured):
            value = None if cost is None else getattr(cost, key)
            shown = "-" if value is None else f"{value / 1e6:.4g}" if key == "flops" else f"{value:,}"
            cells.append(shown)
    return cells


def _times(row: CostRow) -> tuple[str, str, str]:
    seconds = [row.predicted.seconds, None if row.measured is None else row.measured.seconds]
    shown = ["-" if s is None else f"{s * 1e3:.3g}" for s in seconds]
    return shown[0], shown[1], "-" if row.time is None else f"{row.time:.2f}"


def second_order_cost(
    fun: Callable[..., Any],
    argnums: Argnums = 0,
    has_aux: bool = False,
    *,
    output: str | None = None,
    rules: RuleSet | None = None,
    repeats: int = 10,
    budget: int | str = 2**28,
    patience: float = 10.0,
) -> Callable[..., SecondOrderCost]:
    """Predict and measure the cost of gradient, Hessian-vector and Gauss-Newton products and dense Hessian.

    `second_order_cost(fun, argnums)(*args, **kwargs) -> SecondOrderCost`. Matrix products, operators,
    operations, bytes and time are predicted from the jaxpr; then every program is compiled and run, and what
    XLA made of it is counted. Times are predicted from the gradient's: from how fast this machine is at each
    kind of product of the function and at moving bytes, scaled so that the gradient takes what it was
    measured to, all in the same run; `ratio` says how far off they are. With shapes (`jax.ShapeDtypeStruct`)
    for arguments nothing is run and there are no times.

    The Hessian-vector products are those of `fp.hvp` (forward over reverse), and reverse over reverse. The
    dense Hessian is one of them for each parameter, after what they share.

    A Gauss-Newton product needs to know where the model ends and the loss begins: at the value named `output`
    (a name that `fp.trace` shows). By default that is what the last of `fp.layers`' losses reads, else the
    first value, past the parameters, in which a term of the objective is convex: the logits of any spelling
    of a cross-entropy, the prediction of a squared error. What reaches the objective past it, as weight decay
    does, enters with its exact Hessian.

    Args:
        fun: returns a real scalar.
        argnums: the arguments to differentiate; None for all that have a derivative.
        has_aux: `fun` returns the scalar and auxiliary data.
        output: the name of the model's output.
        rules: a rule set; `fp.rules.default` if None.
        repeats: how often each program is run.
        budget: the bytes of a dense Hessian beyond which it is only predicted.
        patience: the predicted seconds of a dense Hessian beyond which it is only predicted.

    Raises:
        ValueError: `repeats` is less than 1, there is no argument at `argnums`, or no value named `output`.
        TypeError: `fun` does not return one real scalar, or nothing can be differentiated.

    References: Pearlmutter, "Fast exact multiplication by the Hessian", Neural Computation 1994; Schraudolph,
    "Fast curvature matrix-vector products for second-order gradient descent", Neural Computation 2002.

    Example:
        >>> import jax, jax.numpy as jnp, funcprop as fp
        >>> def loss(weights, x):
        ...     for w in weights:
        ...         x = jnp.tanh(x @ w)
        ...     return jnp.sum(x**2)
        >>> square = jax.ShapeDtypeStruct((8, 8), "float32")
        >>> cost = fp.second_order_cost(loss)([square] * 3, square)
        >>> [(row.name, row.predicted.products, row.measured.products) for row in cost.rows[:3]]
        [('value', 3, 3), ('gradient', 8, 8), ('HVP forward-over-reverse', 19, 19)]
    """
    if repeats < 1:
        raise ValueError(f"second_order_cost: repeats={repeats}; every program has to run at least once.")
    rule_set = chosen_rules(rules)
    most = budget_bytes(budget, "second_order_cost: budget")

    def costs(*args: Any, **kwargs: Any) -> SecondOrderCost:
        require_no_references("second_order_cost", fun, args, kwargs)

        def use(objective: Objective) -> tuple[SecondOrderCost, None]:
            run = has_values(objective.traced.leaves)
            return _costs(objective, output, rule_set, repeats if run else 0, most, patience), None

        return trace_objective(use, fun, argnums, args, kwargs, has_aux, CALLS)

    return costs


def _costs(
    objective: Objective, output: str | None, rules: RuleSet, repeats: int, largest: int, patience: float
) -> SecondOrderCost:
    rules = rules.for_arguments(objective.traced.leaves)
    found, split, left = programs(objective, output, rules)
    count = sum(math.prod(v.shape or ()) for v in objective.inputs.values())
    jaxprs, lowered = {}, {}
    for p in found:
        try:
            jaxpr, program = jax.make_jaxpr(p.function)(*p.operands), jax.jit(p.function).lower(*p.operands)
            jaxprs[p.name], lowered[p.name] = jaxpr, program
        except (TypeError, ValueError, NotImplementedError) as error:
            if p.name in (VALUE, GRADIENT):
                raise
            # Such as a custom_vjp, which has no forward mode, and a loop, which has no reverse mode.
            left[p.name] = str(error).partition("\n")[0]
    found = [p for p in found if p.name in jaxprs]
    works = {name: of_jaxpr(jaxpr) for name, jaxpr in jaxprs.items()}
    gradient = next(p for p in found if p.name == GRADIENT)
    executable: dict[str, Any] = {}
    rates = None
    if repeats:
        executable[GRADIENT] = lowered[GRADIENT].compile()
        run = executable[GRADIENT], gradient.operands
        (once,) = fastest([run], 1)
        (again,) = fastest([run], max(1, min(repeats, int(patience / 10 / once))))
        largest_value, least = _largest(jaxprs[GRADIENT]), min(repeats, _KIND_REPEATS)
        rates = measured_rates(list(works.values()), gradient.operands, largest_value, least)
        rates = rates.calibrated(works[GRADIENT], min(once, again))
    predicted = {n: _cost(work, None if rates is None else rates.seconds(work)) for n, work in works.items()}
    reasons = dict.fromkeys(predicted)
    if DENSE in predicted:
        reasons[DENSE] = _too_large(predicted[DENSE], count, largest, patience)
    measured: dict[str, Cost] = {}
    chosen = [p for p in found if reasons[p.name] is None]
    others = {p.name: lowered[p.name] for p in chosen if p.name not in executable}
    executable.update(zip(others, compiled_together(others.values()), strict=True))
    compiled = [(p.name, executable[p.name], p.operands) for p in chosen]
    # The dense Hessian takes far longer than the others and is not run in turn with them.
    dense = [row for row in compiled if row[0] == DENSE]
    for together in filter(None, ([row for row in compiled if row[0] != DENSE], dense)):
        longest = max((predicted[name].seconds or 0 for name, _, _ in together), default=0)
        runs = max(1, min(repeats, int(patience / longest))) if longest else repeats
        seconds = fastest([run[1:] for run in together], runs) if repeats else [None] * len(together)
        for (name, program, _), s in zip(together, seconds, strict=True):
            measured[name] = _cost(of_compiled(program), s)
    rows = tuple(CostRow(name, cost, measured.get(name), reasons[name]) for name, cost in predicted.items())
    return SecondOrderCost(objective.traced.graph.name, count, rules.platform, rows, left, rates, split)


def _largest(jaxpr: Any) -> int:
    """The entries of the largest value of a jaxpr."""
    avals = (v.aval for eqn in _jax.open_jaxpr(jaxpr).eqns for v in eqn.outvars)
    return max((aval.size for aval in avals if hasattr(aval, "size")), default=0)


def _cost(work: Work, seconds: float | None) -> Cost:
    return Cost(work.operators, work.products, work.flops, work.bytes, seconds)


def _too_large(predicted: Cost, parameters: int, largest: int, patience: float) -> str | None:
    """Why a dense Hessian is not measured; None if it is."""
    if predicted.bytes > largest:
        return (
            f"it needs {bytes_text(predicted.bytes)} ({parameters:,}² numbers are its result), and the limit "
            f"is {bytes_text(largest)} (`budget`)"
        )
    if predicted.seconds is not None and predicted.seconds > patience:
        return f"it would take {predicted.seconds:.3g} s, and the limit is {patience:g} s (`patience`)"
    return None
