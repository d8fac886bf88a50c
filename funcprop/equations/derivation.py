"""`fp.derive`: the forward and backward equations of a function, as text and LaTeX, each line verifiable.

A backward line has two forms, as the chapter writes it: the chain rule with `prod`, and the same evaluated by
the operator's equations. An operator without equations keeps the first form alone.
"""

from __future__ import annotations

import html
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import jax.numpy as jnp

from funcprop import _jax
from funcprop.equations.chain_rule import ChainTerm, call_operator
from funcprop.equations.composition import LinePart, literal, own_equations, type_of
from funcprop.equations.condense import WriteLine, condense
from funcprop.equations.line_breaks import broken
from funcprop.equations.line_names import short_names
from funcprop.equations.verification import Line, Progress, Verification, verify
from funcprop.graph.graph import Graph, Operator, Variable
from funcprop.graph.objective import Argnums, Objective, trace_objective
from funcprop.graph.references import has_references
from funcprop.graph.tracing import Traced
from funcprop.program.dtypes import promoting
from funcprop.rules.expressions import (
    Equations,
    Expression,
    Symbol,
    apply,
    is_one,
    number,
    opaque,
    symbol,
)
from funcprop.rules.notation import latex_name, latex_path
from funcprop.sweeps.activity import active_variables
from funcprop.sweeps.propagation import completion_order


@dataclass(frozen=True, eq=False)
class Derivation:
    """The equations of both sweeps, in their order. `print` shows the text."""

    forward: tuple[Line, ...]
    backward: tuple[Line, ...]
    traced: Traced
    legend: Mapping[str, str] = field(default_factory=dict)
    functions: tuple[tuple[str, Expression], ...] = ()

    def text(self, width: int = 100) -> str:
        """Both sweeps as aligned Unicode text with shapes; lines longer than `width` are broken."""
        lines = [*self.forward, *self.backward]
        shapes = {line.key: " × ".join(map(str, line.shape)) or "scalar" for line in lines}
        room = width - 7 - max(map(len, shapes.values()), default=0)
        rows = {line.key: broken(line, room) for line in lines}
        widest = max((len(row) for found in rows.values() for row in found), default=0)

        def section(title: str, lines: Sequence[Line]) -> Iterator[str]:
            yield title
            for line in lines:
                first, *others = rows[line.key]
                yield f"  {first:{widest}}   ({shapes[line.key]})"
                yield from (f"  {row}" for row in others)

        parts = [
            *section("Forward propagation", self.forward),
            "",
            *section("Backpropagation", self.backward),
        ]
        if where := self.where():
            parts += ["", "where", *(f"  {row}" for row in where)]
        return "\n".join(parts)

    def where(self) -> list[str]:
        """What the functions and the short names stand for, a row each."""
        functions = [f"{name} = {form.text()}" for name, form in self.functions]
        return [*functions, *(f"{names} = {path}" for names, path in self.grouped_legend())]

    def grouped_legend(self) -> list[tuple[str, str]]:
        """The short names with their paths, one row a module: `W₁, b₁` and `Dense_0/{kernel, bias}`."""
        modules: dict[str, list[tuple[str, str]]] = {}
        for short, path in self.legend.items():
            module, _, leaf = path.rpartition("/")
            modules.setdefault(module, []).append((short, leaf))
        rows = []
        for module, found in modules.items():
            leaves = ", ".join(leaf for _, leaf in found)
            end = leaves if len(found) == 1 else f"{{{leaves}}}"
            rows.append((", ".join(short for short, _ in found), f"{module}/{end}" if module else leaves))
        return rows

    def latex(self) -> str:
        """Two `align*` environments, ready for a document with `amsmath`, and what short names stand for."""

        def environment(lines: Sequence[str]) -> str:
            body = " \\\\\n".join(lines)
            return f"\\begin{{align*}}\n{body}\n\\end{{align*}}"

        sweeps = [[line.latex() for line in lines] for lines in (self.forward, self.backward)]
        sweeps.append(
            [
                f"{latex_name(name.partition('(')[0])}\\!\\left(z\\right) &= {form.latex()}"
                for name, form in self.functions
            ]
        )
        text = "\n".join(environment(lines) for lines in sweeps if lines)
        rows = [
            f"${', '.join(map(latex_name, names.split(', ')))}$ is {latex_path(path)}"
            for names, path in self.grouped_legend()
        ]
        return text + (f"\nwhere {', '.join(rows)}." if rows else "")

    def _repr_latex_(self) -> str:
        return self.latex()

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(self.text())}</pre>"

    def verify(self, tolerance: float | None = None, progress: Progress = None) -> Verification:
        """Evaluate every printed form at the given arguments and compare it with autodiff.

        Values are compared with the function's own intermediates, cotangents with those that `jax.vjp` of
        the whole function passes on, partial derivatives with those of the operator. Each form is evaluated
        from these, so every line is checked by itself. What has no line is not differentiated, and an
        operator with side effects is run once. Mutable references are left as they are.

        Args:
            tolerance: largest deviation allowed, relative to the largest finite entry, or to the terms that
                cancel in it where these are larger. By default, what rounding explains: `1e-10` of an entry
                in float64 (half the root of the resolution otherwise), or 8 times what it changes by when
                all roundings of its terms are changed at random. Infinities must be equal and NaN be in the
                same places; of complex numbers only the places count.
            progress: True for a progress bar on stderr (needs rich), if that is a terminal; or what is called
                as `progress(done, total)` after every line. None is a bar for long derivations, where rich is
                installed.

        Raises:
            DerivationError: a form deviates; the message names the line.
            TypeError: the arguments were shapes only.
            ValueError: no finite number could be compared, because all is NaN, infinite or empty.
        """
        with promoting():
            return verify([*self.forward, *self.backward], self.traced, tolerance, progress)

    __repr__ = __str__ = text


def derive(
    fun: Callable[..., Any],
    argnums: Argnums = 0,
    has_aux: bool = False,
    detail: Literal["layers", "operators"] = "layers",
) -> Callable[..., Derivation]:
    """The equations of forward propagation and backpropagation of a scalar function.

    `derive(fun, argnums, has_aux)(*args, **kwargs) -> Derivation`; arguments may be `jax.ShapeDtypeStruct`s.
    A backward line reads `∂J/∂z = prod(∂J/∂h, ∂h/∂z) = ∂J/∂h ⊙ φ′(z)`: the chain rule, then evaluated by the
    equations that the operator's rule brings. A variable used more than once has a sum. An operator without
    equations leaves `prod(…)` alone. An argument that the result does not depend on has the gradient 0.

    Args:
        fun: returns a real scalar.
        argnums: the arguments whose gradients are derived, as in `jax.grad`; None for all that have one.
        has_aux: as in `jax.grad`; auxiliary data have no equations.
        detail: "layers" writes a line for what a person would: products with their bias, activations,
            normalisations, losses, and what has a name; what is between is written where it is read.
            "operators" writes a line for every operator, as for a function that changes references.

    Raises:
        TypeError: `fun` does not return one real scalar, or an argument at `argnums` has no derivative.
        ValueError: there is no argument at a position in `argnums`.

    Reference: Zhang et al., *Dive into Deep Learning*, section 5.3.

    Example:
        >>> import jax.numpy as jnp, funcprop as fp
        >>> def loss(w, x):
        ...     return fp.name(fp.layers.mean_squared_error(fp.name(w * x, "z"), x), "J")
        >>> print(fp.derive(loss)(jnp.array(2.0), jnp.array(3.0)).backward[-1].text())
        ∂J/∂w = prod(∂J/∂z, ∂z/∂w) = ∂J/∂z x
    """

    def write(objective: Objective) -> tuple[Derivation, None]:
        traced, result, inputs = objective.traced, objective.result, list(objective.inputs.values())
        with promoting():
            # Where values are written into references, order is meaning: nothing is merged.
            if detail == "operators" or any(map(has_references, traced.graph.operators)):
                writer = _LineWriter(traced.graph, result, inputs)
                return Derivation(tuple(writer.forward()), tuple(writer.backward()), traced), None
            chosen = [v.name for v in inputs]
            condensed = condense(traced.graph, result, chosen)
            names, legend = short_names(condensed, result, chosen)
            traced = replace(traced, graph=condensed.graph)
            writer = _LineWriter(condensed.graph, result, inputs, names, writers=condensed.writers)
            functions = tuple((f"{name}(z)", formula) for name, formula in condensed.functions.items())
            lines = tuple(writer.forward()), tuple(writer.backward())
            return Derivation(*lines, traced, legend, functions), None

    if detail not in ("layers", "operators"):
        raise ValueError(f"derive: detail={detail!r} is none of 'layers', 'operators'.")
    return lambda *args, **kwargs: trace_objective(write, fun, argnums, args, kwargs, has_aux)


def forward_lines(
    graph: Graph, result: Variable, written: Mapping[str, str], others: Iterable[Variable]
) -> Iterator[Line]:
    """The forward lines of any graph, with what some variables are `written` as.

    `others` are variables that no operator of the graph computes, and that are none of its inputs.
    """
    return _LineWriter(graph, result, (), written, others).forward()


class _LineWriter:
    """Writes the lines of both sweeps over one graph."""

    def __init__(
        self,
        graph: Graph,
        result: Variable,
        inputs: Sequence[Variable],
        written: Mapping[str, str] | None = None,
        others: Iterable[Variable] = (),
        writers: Mapping[Operator, WriteLine] | None = None,
    ) -> None:
        self.graph, self.result, self.inputs, self.writers = graph, result, inputs, writers
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
        written = op.op if op.equation is None or op.call else _jax.function_name(op.equation)
        type_ = self.symbols[op.outputs[index].name].type
        return apply(written + suffix, lambda *xs: call_operator(op, xs)[index], *inputs, type_=type_)

    def backward(self) -> Iterator[Line]:
        """`∂J/∂z = prod(∂J/∂h, ∂h/∂z) = …` in the order in which the cotangents are complete."""
        partials_written: set[str] = set()
        for name in completion_order(self.graph):
            if name not in self.active or name == self.result.name:
                continue
            uses = [op for op in self.users[name] if any(v.name in self.reaching for v in op.outputs)]
            if not uses:
                continue
            if len(uses) > 1:
                for op in (op for op in uses if self.writers is None or op.outputs[0].named):
                    yield from self._partials(op, partials_written)
            yield self._cotangent_line(name, uses)
        for v in self.inputs:
            if v.name not in self.reaching:
                left, zero = self.cotangents[v.name], jnp.zeros(v.shape or (), v.dtype)
                form = opaque(lambda zero=zero: zero, (), "0", "0")
                yield Line(left.key, left.text(), left.latex(), (form,), v.shape or ())

    @cached_property
    def active(self) -> set[str]:
        """The variables that depend on an input."""
        return set(active_variables(self.graph, {v.name for v in self.inputs}))

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

    def _cotangent_line(self, name: str, uses: Sequence[Operator]) -> Line:
        target = self.symbols[name]
        chain: list[Expression] = []
        evaluated: list[Expression] = []
        is_known = False
        for op in uses:
            product = self._prod(op, name)
            terms = self._evaluated(op, name)
            chain.append(product)
            evaluated.append(product if terms is None else terms)
            is_known |= terms is not None
        left = self.cotangents[name]
        forms = [_total(chain)] if any(o is not self.result for op in uses for o in op.outputs) else []
        if is_known:
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
            y, g = self.symbols[v.name], self.cotangents[v.name]
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
