"""The inside of a loop as equations: one step, with `t` for its number.

    z[t] = xs[t] Wx + h[t−1] Wh + b          h[t] = tanh(z[t])
    ∂J/∂z[t] = ∂J/∂h[t] ⊙ tanh′(z[t])        ∂J/∂Wh += h[t−1]ᵀ ∂J/∂z[t]

What is read by every step collects its gradient (`+=`), and so does a result that is read in the step itself:
what the steps after it and the rest of the function contribute is there before. A `while` has its condition
beside its step, and no derivative.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import compress
from typing import Any

import jax
import jax.numpy as jnp

from funcprop import _jax
from funcprop.equations.bodies import Around, Body, BodyWriter, dependence, operand_names
from funcprop.graph.graph import Operator
from funcprop.program.facts import facts_of
from funcprop.rules.expressions import Expression

# What carried values are called, the cells of an LSTM, and whole numbers.
_CARRIED, _CELLS, _COUNTERS = "hcsvmq", "csvmqh", "ijkn"
# The number of a step, and of one in a loop inside of a loop.
_STEPS = "tτσ"


class WrittenStep:
    """One step of a loop as a function of its own: of what every step reads, what is carried, and slices.

    The first `fixed` operands are read by every step, `carries` are carried. `read` are the results of the
    loop that are read around it; what these do not depend on is not told.
    """

    fixed: int
    carries: int
    first, last, is_back = 1, "T", False

    def __init__(self, op: Operator, closed: Any, active: Collection[int], read: Collection[int]) -> None:
        self.op, self.closed = op, closed
        jaxpr = _jax.open_jaxpr(closed)
        # One value that is carried and stacked is one result.
        self.same = [jaxpr.outvars.index(v) for v in jaxpr.outvars]
        self.results = [v.aval for v in jaxpr.outvars]
        self.alive = self._alive(read)
        self.body = Body(self.step, self._types(), active, self._told())

    def step(self, *values: Any) -> list[Any]:
        """The results of one step."""
        return _jax.evaluate(self.closed, _jax.constants(self.closed), values)

    def leaves(self, operands: Sequence[Any]) -> list[Any]:
        """What the second step reads, or the first one where there is no other."""
        raise NotImplementedError

    def lines(
        self, operands: Sequence[Expression], results: Sequence[str | None], given: Around
    ) -> tuple[str, str, BodyWriter]:
        """Titles and the writer of the lines, with what operands and results are called around the loop."""
        body, end = self.body, self.fixed + self.carries
        t = _STEPS[min(given.depth, len(_STEPS) - 1)]
        own = body.own_names([*(x.text() for x in operands), *filter(None, results)])
        bases = self._bases(results, {*own.values(), *given.taken})
        fixed = [*operands[: self.fixed], *operands[end:]]
        called, told = operand_names(fixed, {*own.values(), *bases, *given.taken})
        before = f"[{t}{'+' if self.is_back else '−'}1]"
        after = [*called[: self.fixed], *(base + before for base in bases[: self.carries])]
        after += [f"{text}[{t}]" for text in called[self.fixed :]]
        names = {name: f"{text}[{t}]" for name, text in own.items()}
        names |= {v.name: text for v, text in zip(body.inputs, after, strict=True)}
        own_inputs = {v.name for v in body.inputs}
        for i, v in body.outputs.items():
            if v.name not in own_inputs and i < len(bases):
                names[v.name] = f"{bases[i]}[{t}]"
        writer = body.writer(names, [v.name for v in body.inputs[: self.fixed]])
        start = self.first + (1 if self.is_back else -1)
        shown = [i in self.alive and i == self.same[i] for i in range(self.carries)]
        begins = compress(zip(bases, operands[self.fixed :], strict=False), shown)
        told = [*(f"{base}[{start}] = {x.text()}" for base, x in begins), *told]
        told_back = []
        for i, (base, result) in enumerate(zip(bases, results, strict=True)):
            g = "1" if i == given.ends else f"∂J/∂{result}"
            if result and i < self.carries:
                told.append(f"{result} = {base}[{self.last}]")
                told_back.append(f"∂J/∂{base}[{self.last}] = {g}")
            elif result and result != base:
                told.append(f"{result}[{t}] = {base}[{t}]")
                told_back.append(f"∂J/∂{base}[{t}] += {g}[{t}]")
        back = f"Back for {t} = {self.last} … {self.first}"
        return ", ".join([self._title(writer, t), *told]), ", ".join([back, *told_back]), writer

    def _title(self, writer: BodyWriter, t: str) -> str:
        return f"Scan for {t} = {self.first} … {self.last}"

    def _types(self) -> list[Any]:
        jaxpr = _jax.open_jaxpr(self.closed)
        return [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in jaxpr.invars]

    def _told(self) -> list[int]:
        return [i for i in sorted(self.alive) if self.same[i] == i]

    def _alive(self, read: Collection[int]) -> set[int]:
        """The results that are read, and those that these depend on in any step."""
        reads, before = dependence(_jax.open_jaxpr(self.closed)), self._inputs_of_step()
        wanted = set(read)
        while True:
            more = {i - before for k in wanted for i in reads[k] if 0 <= i - before < self.carries}
            if more <= wanted:
                return wanted | {self.same[i] for i in wanted}
            wanted |= more

    def _inputs_of_step(self) -> int:
        """How many inputs of a step stand before those that are carried."""
        return self.fixed

    def _bases(self, results: Sequence[str | None], taken: Collection[str]) -> list[str]:
        """What results are called in the step, none as what is `taken`; one value has one name."""
        bases: list[str] = []
        cells = self._cells()
        for i, k in enumerate(self.same):
            result, type_ = results[i], self.results[i]
            if k < i:
                bases.append(bases[k])
            elif i >= self.carries and result:
                bases.append(result)
            elif i not in self.alive:
                bases.append("")
            else:
                is_counter = type_.shape == () and jnp.issubdtype(type_.dtype, jnp.integer)
                letters = _COUNTERS + _CARRIED if is_counter else _CELLS if i in cells else _CARRIED
                bases.append(next((x for x in letters if x not in taken and x not in bases), f"s{i}"))
        return bases

    def _cells(self) -> set[int]:
        """Carried values that only functions of each entry read, beside one that others read, too."""
        jaxpr, before = _jax.open_jaxpr(self.closed), self._inputs_of_step()
        mixed = {
            v
            for eqn in jaxpr.eqns
            if not facts_of(eqn).elementwise
            for v in eqn.invars
            if not isinstance(v, _jax.Literal)
        }
        cells = {i for i in range(self.carries) if jaxpr.invars[before + i] not in mixed}
        return cells if len(cells) < self.carries else set()


class Scan(WrittenStep):
    """A step of a `scan`."""

    def __init__(self, op: Operator, active: Sequence[bool], read: Collection[int]) -> None:
        assert op.equation is not None
        self.fixed, self.carries = _jax.scan_counts(op.static)
        count = op.static["length"]
        self.order = list(range(count))[:: -1 if op.static["reverse"] else 1]
        self.first, self.last = self.order[0] + 1, str(self.order[-1] + 1)
        self.is_back = op.static["reverse"]
        known = {i for i, is_active in enumerate(active) if is_active}
        carried = range(self.fixed, self.fixed + self.carries) if known else ()
        super().__init__(op, op.equation.params["jaxpr"], known.union(carried), read)

    def leaves(self, operands: Sequence[Any]) -> list[Any]:
        """What the second step reads, or the first one where there is no other."""
        end = self.fixed + self.carries
        given, carry, slices = operands[: self.fixed], operands[self.fixed : end], operands[end:]
        for i in self.order[: len(self.order[:2]) - 1]:
            carry = self.step(*given, *carry, *(x[i] for x in slices))[: self.carries]
        at = self.order[:2][-1]
        return [*given, *carry, *(x[at] for x in slices)]


class While(WrittenStep):
    """A step of a `while`, of which the last result is whether it is taken."""

    def __init__(self, op: Operator, read: Collection[int]) -> None:
        assert op.equation is not None
        params = op.equation.params
        self.of_condition, self.condition = params["cond_nconsts"], params["cond_jaxpr"]
        self.fixed = self.of_condition + params["body_nconsts"]
        self.carries = len(op.outputs)
        (tested,) = dependence(_jax.open_jaxpr(self.condition))
        tested = {i - self.of_condition for i in tested if i >= self.of_condition}
        super().__init__(op, params["body_jaxpr"], (), tested.union(read))

    def step(self, *values: Any) -> list[Any]:
        """The results of one step, and whether it is taken."""
        return [*super().step(*values[self.of_condition :]), self._is_taken(values)]

    def _is_taken(self, values: Sequence[Any]) -> Any:
        given = [*values[: self.of_condition], *values[self.fixed :]]
        return _jax.evaluate(self.condition, _jax.constants(self.condition), given)[0]

    def leaves(self, operands: Sequence[Any]) -> list[Any]:
        """What the second step reads, or the first one where there is no other."""
        given, carry = list(operands[: self.fixed]), list(operands[self.fixed :])
        after = self.step(*given, *carry)[:-1] if self._is_taken(operands) else carry
        return [*given, *(after if self._is_taken([*given, *after]) else carry)]

    def _title(self, writer: BodyWriter, t: str) -> str:
        """The condition; it has no line."""
        goes_on = self.body.outputs[self.carries].name
        line = next((line for line in writer.forward() if line.key == goes_on), None)
        writer.unwritten.add(goes_on)
        written = writer.symbols[goes_on].text() if line is None else line.forms[-1].text()
        return f"While {written}, for {t} = 1, 2 … T"

    def _types(self) -> list[Any]:
        avals = [v.aval for v in _jax.open_jaxpr(self.condition).invars[: self.of_condition]]
        return [*(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in avals), *super()._types()]

    def _told(self) -> list[int]:
        return [*super()._told(), self.carries]

    def _inputs_of_step(self) -> int:
        return self.fixed - self.of_condition
