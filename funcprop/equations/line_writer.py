"""The lines of both sweeps over a graph, each written by the equations of its operators."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import cached_property

import jax.numpy as jnp

from funcprop.equations.chain_rule import ChainTerm, call_operator
from funcprop.equations.composition import LinePart, by_name, called, literal, own_equations, type_of
from funcprop.equations.condense import WriteLine
from funcprop.equations.verification import Line
from funcprop.graph.graph import Graph, Operator, Variable
from funcprop.rules.equations import Equations, opaque
from funcprop.rules.expressions import Expression, Symbol, number, symbol
from funcprop.rules.formula import is_one
from funcprop.rules.notation import latex_name
from funcprop.sweeps.activity import active_variables
from funcprop.sweeps.propagation import completion_order


def forward_lines(
    graph: Graph, result: Variable, written: Mapping[str, str], others: Iterable[Variable]
) -> Iterator[Line]:
    """The forward lines of any graph, with what some variables are `written` as.

    `others` are variables that no operator of the graph computes, and that are none of its inputs.
    """
    return LineWriter(graph, result, (), written, others).forward()


class LineWriter:
    """Writes the lines of both sweeps over one graph."""

    def __init__(
        self,
        graph: Graph,
        result: Variable,
        inputs: Sequence[Variable],
        written: Mapping[str, str] | None = None,
        others: Iterable[Variable] = (),
        writers: Mapping[Operator, WriteLine] | None = None,
        smooth: Collection[str] | None = None,
    ) -> None:
        self.graph, self.result, self.inputs, self.writers = graph, result, inputs, writers
        self.smooth = smooth
        variables = {v.name: v for v in (*graph.variables, *others)}
        # An objective that nobody named is written as the chapter writes it.
        names = {result.name: "J"} if not result.named and "J" not in variables else {}
        names |= written or {}
        self.symbols: dict[str, Symbol] = {
            name: _symbol(v, names.get(name, name)) for name, v in variables.items()
        }
        of = self.symbols[result.name]
        self.cotangents = {name: _cotangent(v, of, self.symbols[name]) for name, v in variables.items()}
        # What a cotangent is known to be, for the operators before it: the symbol, or the constant 1.
        self.known: dict[str, Expression] = {result.name: number(1, result.dtype)}
        # What is known to be the result; what it reads directly has no chain.
        self.ends = {result.name}
        self._written: dict[Operator, tuple[Expression, Equations | None]] = {}

    def value(self, variable: Variable) -> Expression:
        """A variable's symbol, or the number that a literal is."""
        return literal(variable) if variable.kind == "literal" else self.symbols[variable.name]

    def equations(self, op: Operator) -> Equations | None:
        """Ask the operator's rule for its equations, if it has any; `backward` is flat."""
        if len(op.outputs) != 1:
            return None
        name = op.outputs[0].name
        cotangent = self.known.get(name, self.cotangents[name])
        # They are asked for each input, and in both sweeps.
        if self._written.get(op, (None, None))[0] is not cotangent:
            self._written[op] = cotangent, self._equations(op, cotangent)
        return self._written[op][1]

    def _equations(self, op: Operator, cotangent: Expression) -> Equations | None:
        inputs = [self.value(v) for v in op.inputs]
        if self.writers is None:
            return own_equations(op, inputs, self.symbols[op.outputs[0].name], cotangent)
        if op in self.writers:
            return self.writers[op](inputs, cotangent, self.symbols[op.outputs[0].name])
        part = LinePart(op.outputs[0], op.inputs, operator=op)
        return part.equations(inputs, self.symbols[op.outputs[0].name], cotangent)

    # --- the lines ----------------------------------------------------------------------------

    def forward(self) -> Iterator[Line]:
        """`z = W1 x` for every operator's every result."""
        for op in self.graph.operators:
            equations = self.equations(op)
            for i, v in enumerate(op.outputs):
                if self.writers is not None and v.name not in self.users and v is not self.result:
                    continue
                form = self._unknown_forward(op, i) if equations is None else equations.forward
                left = self.symbols[v.name]
                if form is not left:
                    yield Line(v.name, left.text(), left.latex(), (form,), v.shape or ())

    def _unknown_forward(self, op: Operator, index: int) -> Expression:
        inputs = [self.value(v) for v in op.inputs]
        others = (*op.outputs[:index], *op.outputs[index + 1 :])
        # Where no other result is read, it need not be said which one this is.
        is_one_of_several = any(self.writers is None or w.name in self.users for w in others)
        suffix = f"_{index + 1}" if is_one_of_several else ""
        type_ = self.symbols[op.outputs[index].name].type
        compute = lambda *xs: call_operator(op, xs)[index]  # noqa: E731
        return by_name(op, called(op) + suffix, compute, inputs, type_)

    def backward(self) -> Iterator[Line]:
        """`∂J/∂z = prod(∂J/∂h, ∂h/∂z) = …` in the order in which the cotangents are complete."""
        partials_written: set[str] = set()
        for name in completion_order(self.graph):
            if name not in self.active or name == self.result.name:
                continue
            uses = [op for op in self.users[name] if any(v.name in self.reaching for v in op.outputs)]
            # One that reads it behind a `stop_gradient` says nothing.
            uses = [op for op in uses if not self._is_zero(op, name)] or uses[:1]
            if not uses:
                continue
            if len(uses) > 1:
                for op in (op for op in uses if self.writers is None or op.outputs[0].named):
                    yield from self._partials(op, partials_written)
            if (line := self._cotangent_line(name, uses)) is not None:
                yield line
        for v in self.inputs:
            if v.name not in self.reaching:
                left, zero = self.cotangents[v.name], jnp.zeros(v.shape or (), v.dtype)
                form = opaque(lambda zero=zero: zero, (), "0", "0")
                yield Line(left.key, left.text(), left.latex(), (form,), v.shape or ())

    @cached_property
    def active(self) -> set[str]:
        """The variables that depend on an input."""
        found = active_variables(self.graph, {v.name for v in self.inputs})
        return found if self.smooth is None else found & set(self.smooth)

    @cached_property
    def users(self) -> dict[str, list[Operator]]:
        """The operators that read each variable, in order."""
        found: dict[str, dict[str, Operator]] = defaultdict(dict)
        for op in self.graph.operators:
            for v in op.inputs:
                found[v.name][op.name] = op
        return {name: list(ops.values()) for name, ops in found.items()}

    @cached_property
    def reaching(self) -> set[str]:
        """The active variables on which the result depends."""
        found = {self.result.name} & self.active
        for op in reversed(self.graph.operators):
            if any(v.name in found for v in op.outputs):
                found.update(v.name for v in op.inputs if v.name in self.active)
        return found

    def _cotangent_line(self, name: str, uses: Sequence[Operator]) -> Line | None:
        target = self.symbols[name]
        chain: list[Expression] = []
        evaluated: list[Expression] = []
        is_known = False
        for op in uses:
            terms = self._evaluated(op, name)
            ends = any(v.name in self.ends for v in op.outputs)
            product = terms if ends and terms is not None else self._prod(op, name)
            chain.append(product)
            evaluated.append(product if terms is None else terms)
            is_known |= terms is not None
        left = self.cotangents[name]
        forms = [_total(chain)] if any(o.name not in self.ends for op in uses for o in op.outputs) else []
        if is_known and not (forms and forms[0].text() == _total(evaluated).text()):
            forms.append(_total(evaluated))
        if not forms:
            forms = [_total(chain)]
        if is_one(forms[-1]):
            self.known[name] = forms[-1]
        return Line(left.key, left.text(), left.latex(), tuple(forms), target.shape)

    def _evaluated(self, op: Operator, name: str) -> Expression | None:
        """`∂J/∂target` by way of one operator, from its equations; None if they do not say."""
        equations = self.equations(op)
        if equations is None:
            return None
        terms = [
            cotangent for v, cotangent in zip(op.inputs, equations.backward, strict=True) if v.name == name
        ]
        known = [term for term in terms if term is not None]
        return _total(known) if len(known) == len(terms) else None

    def _is_zero(self, op: Operator, name: str) -> bool:
        term = self._evaluated(op, name)
        return term is not None and term.constant == 0

    def _partials(self, op: Operator, written: set[str]) -> Iterator[Line]:
        """`∂s/∂W1 = λ W1`: what a scalar operator contributes to sums stands by itself first."""
        (output, *others) = op.outputs
        if op.name in written or others or output.shape != () or output is self.result:
            return
        written.add(op.name)
        saved = self.known.get(output.name)
        self.known[output.name] = number(1, output.dtype)
        for name in dict.fromkeys(v.name for v in op.inputs if v.name in self.active):
            form = self._evaluated(op, name)
            if form is not None:
                y, x = self.symbols[output.name], self.symbols[name]
                key = f"∂{output.name}/∂{name}"
                yield Line(key, f"∂{y.text()}/∂{x.text()}", _fraction(y, x), (form,), x.shape)
        del self.known[output.name]
        if saved is not None:
            self.known[output.name] = saved

    def _prod(self, op: Operator, name: str) -> Expression:
        """`prod(∂J/∂y, ∂y/∂x)`, a sum over the operator's differentiable results."""
        x = self.symbols[name]
        inputs = [self.value(v) for v in op.inputs]
        terms = []
        for i, v in enumerate(op.outputs):
            if v.name not in self.reaching:
                continue
            y = self.symbols[v.name]
            g = self.known[v.name] if v.name in self.ends else self.cotangents[v.name]
            terms.append(
                opaque(
                    ChainTerm(op, i, name, self.active),
                    [g, *inputs],
                    f"prod({g.text()}, ∂{y.text()}/∂{x.text()})",
                    f"\\mathrm{{prod}}\\!\\left({g.latex()}, {_fraction(y, x)}\\right)",
                    x.type,
                )
            )
        return _total(terms)


def _total(terms: Sequence[Expression]) -> Expression:
    return sum(terms[1:], start=terms[0])


def _symbol(variable: Variable, written: str) -> Symbol:
    return symbol(variable.name, written, latex_name(written), type_of(variable))


def _cotangent(variable: Variable, objective: Symbol, of: Symbol) -> Symbol:
    written = f"∂{objective.text()}/∂{of.text()}"
    return symbol(f"∂{objective.key}/∂{of.key}", written, _fraction(objective, of), type_of(variable))


def _fraction(y: Symbol, x: Symbol) -> str:
    return f"\\frac{{\\partial {y.latex()}}}{{\\partial {x.latex()}}}"
