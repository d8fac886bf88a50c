"""The plan of a rematerialisation: what is saved, what is run again, and whether the compiler obeys."""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from funcprop import _jax
from funcprop._jax import xla_options
from funcprop.graph.graph import Graph, Operator, Variable, aligned
from funcprop.graph.tracing import graph_of
from funcprop.memory.remat.chain import StepChain
from funcprop.memory.remat.choice import CompiledGradient, GradientProgram
from funcprop.memory.remat.policy import SaveOperators, policy_within
from funcprop.memory.remat.saving import Residuals
from funcprop.memory.remat.schedule import Schedule


class Proof(NamedTuple):
    """A gradient compiled plain and rematerialised, the latter also without the compiler options."""

    plain: CompiledGradient
    rematerialized: CompiledGradient
    without_options: CompiledGradient | None

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        named = self._asdict().items()
        return {name: None if c is None else {**c._asdict(), "total": c.total} for name, c in named}

    def __str__(self) -> str:
        rows = [("compiled gradient", "temp bytes", "all bytes", "FLOPs (loops: one step)")]
        named = {
            "plain": self.plain,
            "rematerialized": self.rematerialized,
            "without its options": self.without_options,
        }
        rows += [
            (name, f"{c.temp:,}", f"{c.total:,}", f"{c.flops:,.0f}")
            for name, c in named.items()
            if c is not None
        ]
        return aligned(rows, right={1, 2, 3}, widest=48)


@dataclass(frozen=True, eq=False)
class RematPlan:
    """The plan of `fp.memory.rematerialize` for a function at given arguments. `print(plan)` is a report.

    `residual_bytes` is what the pullback holds besides arguments and constants of the function, which exist
    anyway; of these it holds `argument_bytes`. The two add up to the leaves of `jax.vjp(f, *x)[1]`.
    `plain_…` are the same of the function as it stands. `budget` is in bytes. `peak_bytes` is the largest
    sum of what is held and of what one recomputed segment needs while it is differentiated, by the schedule.
    `extra_flops` are run a second time, `forward_flops` the first.

    `temp_bytes` and `plain_temp_bytes` are the temporary bytes of the compiled gradient, with the plan and
    without; None if nothing was compiled. `reason` says why the function is left as it is, or what keeps the
    peak high; None where there is nothing to say.
    """

    name: str
    budget: int
    residual_bytes: int
    argument_bytes: int
    plain_residual_bytes: int
    plain_argument_bytes: int
    peak_bytes: int
    extra_flops: int
    forward_flops: int
    gradient: GradientProgram = field(repr=False)
    schedule: Schedule = field(repr=False)
    temp_bytes: int | None = None
    plain_temp_bytes: int | None = None
    reason: str | None = None

    @property
    def program(self) -> StepChain:
        """The function as a chain of steps."""
        return self.gradient.program

    @functools.cached_property
    def saved(self) -> tuple[Variable, ...]:
        """The values held between the sweeps, without arguments; in a loop those of all its steps.

        What a derivative makes for itself (a mask, a cosine) is called after its operator.
        """
        return tuple(_saved(self.program, self.schedule, self._graph))

    @functools.cached_property
    def recomputed(self) -> tuple[Operator, ...]:
        """The operators that are run again, with the FLOPs of that; those of a loop's body in every step."""
        return tuple(_recomputed(self.program, self.schedule, self._graph))

    @functools.cached_property
    def _graph(self) -> Graph:
        return graph_of(self.name, self.program.closed, inline=frozenset())

    @property
    def segments(self) -> int:
        """How many pieces are recomputed, each as a whole; a loop whose steps recompute is one."""
        return sum(
            s.recomputed or any(form.body is not None for _, form in self.program.forms(s))
            for s in self.schedule.segments
        )

    @functools.cached_property
    def compiler_options(self) -> dict[str, str]:
        """For the outermost `jax.jit(…, compiler_options=…)`: without them XLA may undo the recomputation.

        Empty where none are needed, and where none are known to help; `advice` tells which.
        """
        return self.gradient.options(self.schedule)

    @property
    def advice(self) -> str | None:
        """Advise about the compiler and its options."""
        if not any(s.recomputed for s in self.schedule.segments):
            return None
        if xla_options.barrier_options(self.gradient.placement.platform) is None:
            return (
                "this XLA shares what is recomputed with the forward sweep, and has no option against it: "
                "the bytes are those of the program as it is written, not as it is compiled"
            )
        if self.compiler_options:
            return (
                f"give the outermost jit compiler_options={self.compiler_options!r}: without, XLA undoes it"
            )
        return None

    @functools.cached_property
    def _policy(self) -> tuple[SaveOperators, Residuals]:
        limit = self.budget if self.residual_bytes <= self.budget else self.residual_bytes
        return policy_within(self.program, limit)

    @property
    def policy(self) -> SaveOperators:
        """The plan as a policy, for `jax.checkpoint(fun, policy=plan.policy)`.

        A policy is only shown the kind of an operator and the types of its operands. So it saves the results
        of all operators of a kind or of none, those that are the dearest to run again for their bytes, as
        long as they fit the budget together; and `jax.checkpoint` recomputes the rest at once, so that
        it saves less of the peak than the plan.
        """
        return self._policy[0]

    @property
    def policy_residual_bytes(self) -> int:
        """The bytes that `jax.checkpoint(fun, policy=plan.policy)` holds, without arguments."""
        return self._policy[1].computed

    def prove(self) -> Proof:
        """Compile the gradient plain and rematerialised, and report what XLA allocates.

        It is the gradient in the arguments at `argnums`.
        """
        without = self.gradient.compiled(self.schedule, {}) if self.compiler_options else None
        return Proof(self.gradient.compiled(None), self.gradient.compiled(self.schedule), without)

    def as_dict(self) -> dict[str, Any]:
        """Plain data, as in `json()`."""
        numbers = {
            name: getattr(self, name)
            for name in (
                *("name", "budget", "residual_bytes", "argument_bytes", "plain_residual_bytes"),
                *("plain_argument_bytes", "peak_bytes", "extra_flops", "forward_flops", "segments"),
                *("temp_bytes", "plain_temp_bytes", "reason", "compiler_options", "advice"),
            )
        }
        saved = [
            {"name": v.name, "type": v.type, "nbytes": v.nbytes, "scope": v.scope, "named": v.named}
            for v in self.saved
        ]
        recomputed = [
            {"name": op.name, "op": op.op, "scope": op.scope, "flops": op.flops} for op in self.recomputed
        ]
        return {**numbers, "saved": saved, "recomputed": recomputed}

    def json(self) -> str:
        """The plan as JSON."""
        return json.dumps(self.as_dict(), indent=2)

    def __str__(self) -> str:
        def share(part: float, whole: float) -> str:
            return f"{part / whole:7.1%}" if whole else ""

        plain = self.plain_residual_bytes
        summary = [
            (
                "held between the sweeps, besides arguments",
                self.residual_bytes,
                share(self.residual_bytes, plain),
            ),
            ("… by the function as it stands", plain, ""),
            ("… budget", self.budget, ""),
            ("… with one segment recomputed (peak)", self.peak_bytes, share(self.peak_bytes, plain)),
            ("arguments held", self.argument_bytes, ""),
            ("… by the function as it stands", self.plain_argument_bytes, ""),
            (
                "FLOPs run again, of the forward sweep",
                self.extra_flops,
                share(self.extra_flops, self.forward_flops),
            ),
        ]
        if self.temp_bytes is not None and self.plain_temp_bytes is not None:
            share_of_temp = share(self.temp_bytes, self.plain_temp_bytes)
            summary += [
                ("temporary bytes of the compiled gradient", self.temp_bytes, share_of_temp),
                ("… of the function as it stands", self.plain_temp_bytes, ""),
            ]
        rows = [(self.name, "", ""), *((text, f"{n:,}", s.strip()) for text, n, s in summary)]
        parts = [aligned(rows, right={1, 2}, widest=80)]
        if self.reason:
            parts.append(self.reason)
        if self.advice:
            parts.append(self.advice)
        saved = [(v.name, v.type, f"{v.nbytes:,}") for v in _largest(self.saved)]
        parts.append(aligned([("saved", "type", "bytes"), *saved], right={2}, widest=60))
        repeats = Counter[str]()
        for op in self.recomputed:
            repeats[op.op] += op.flops
        again = [(op, f"{n:,}") for op, n in repeats.most_common()]
        parts.append(aligned([("run again", "FLOPs"), *again], right={1}, widest=60))
        return "\n\n".join(parts)

    __repr__ = __str__


def _largest(saved: Sequence[Variable], shown: int = 20) -> Sequence[Variable]:
    """The largest few, and the others as one."""
    ordered = sorted(saved, key=lambda v: -(v.nbytes or 0))
    rest = ordered[shown:]
    if len(rest) < 2:
        return ordered
    return [*ordered[:shown], _part(f"{len(rest)} others", sum(v.nbytes or 0 for v in rest))]


def _part(name: str, nbytes: int, scope: str = "") -> Variable:
    """Bytes without one shape."""
    return Variable(name, "intermediate", scope, None, None, nbytes, False, "")


# --- names --------------------------------------------------------------------------------------


def _variables(graph: Graph) -> dict[Any, Variable]:
    """The variable of each value that an equation makes."""
    return {
        var: variable
        for op in graph.operators
        for var, variable in zip(op.jaxpr.outvars, op.outputs, strict=True)
    }


def _saved(program: StepChain, schedule: Schedule, graph: Graph) -> Iterator[Variable]:
    names = _variables(graph)
    inputs = dict(zip(_jax.open_jaxpr(program.closed).invars, graph.inputs, strict=True))
    held = 0
    for s in schedule.segments:
        held |= s.held
    for var, bit in program.bits.items():
        if held & bit:
            found, size = names.get(var) or inputs.get(var), program.chain.size(bit)
            yield _part(str(var.aval), size) if found is None else replace(found, nbytes=size)
    for s in schedule.segments:
        if s.recomputed:
            continue
        for _, form in program.forms(s):
            if not form.derived:
                continue
            of = [names[v] for v in form.equation.outvars if v in names]
            label, scope = (of[0].name, of[0].scope) if of else (form.equation.primitive.name, "")
            if form.body is None:
                what = "carries of its chunks" if form.again else "derivative"
                yield _part(f"{label}: {what}", form.derived, scope)
                continue
            body, inner = form.body
            length = form.equation.params["length"]
            of_step = list(_saved(body, inner, graph_of("body", body.closed, inline=frozenset())))
            # What does not depend on the step is held once, and then the parts are not the whole.
            if length * sum(v.nbytes or 0 for v in of_step) != form.derived:
                yield _part(f"{label}: kept by its steps", form.derived, scope)
                continue
            for v in of_step:
                shape = None if v.shape is None else (length, *v.shape)
                yield replace(v, name=f"{label}/{v.name}", shape=shape, nbytes=length * (v.nbytes or 0))


def _recomputed(program: StepChain, schedule: Schedule, graph: Graph) -> Iterator[Operator]:
    operators = {v: op for op in graph.operators for v in op.jaxpr.outvars}
    for s in schedule.segments:
        for (_, form), again in zip(program.forms(s), program.run_again(s), strict=True):
            first = next((operators[v] for v in form.equation.outvars if v in operators), None)
            if again and first is not None:
                yield replace(first, flops=again)
            if form.again and form.body is None and first is not None:
                yield replace(first, flops=form.again)
            if form.body is not None:
                body, inner = form.body
                length = form.equation.params["length"]
                for op in _recomputed(body, inner, graph_of("body", body.closed, inline=frozenset())):
                    label = op.name if first is None else f"{first.name}/{op.name}"
                    yield replace(op, name=label, flops=length * op.flops)
