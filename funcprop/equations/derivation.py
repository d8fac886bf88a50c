"""`fp.derive`: the forward and backward equations of a function, as text and LaTeX, each line verifiable.

A backward line has two forms, as the chapter writes it: the chain rule with `prod`, and the same evaluated by
the operator's equations. An operator without equations keeps the first form alone.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from funcprop.equations.bodies import InsideLines
from funcprop.equations.line_breaks import broken, broken_title
from funcprop.equations.line_writer import LineWriter
from funcprop.equations.readable_lines import ReadableLines, grouped, where
from funcprop.equations.verification import Line, Progress, Verification, verify
from funcprop.graph.objective import Argnums, Objective, trace_objective
from funcprop.graph.references import has_references
from funcprop.graph.tracing import Traced
from funcprop.program.dtypes import promoting
from funcprop.rules.expressions import Expression
from funcprop.rules.notation import latex_name, latex_path, latex_title


@dataclass(frozen=True, eq=False)
class Derivation:
    """The equations of both sweeps, in their order. `print` shows the text."""

    forward: tuple[Line, ...]
    backward: tuple[Line, ...]
    traced: Traced
    legend: Mapping[str, str] = field(default_factory=dict)
    functions: tuple[tuple[str, Expression], ...] = ()
    insides: tuple[InsideLines, ...] = ()

    def text(self, width: int = 100) -> str:
        """Both sweeps as aligned Unicode text with shapes; lines longer than `width` are broken."""
        lines = [line for _, lines in self.sections() for line in lines]
        shapes = {id(line): " × ".join(map(str, line.shape)) or "scalar" for line in lines}
        room = width - 7 - max(map(len, shapes.values()), default=0)
        rows = {id(line): broken(line, room) for line in lines}
        widest = max((len(row) for found in rows.values() for row in found), default=0)

        def section(title: str, lines: Sequence[Line]) -> Iterator[str]:
            yield from broken_title(title, width)
            for line in lines:
                first, *others = rows[id(line)]
                yield f"  {first:{widest}}   ({shapes[id(line)]})"
                yield from (f"  {row}" for row in others)

        parts = [row for title, lines in self.sections() for row in ("", *section(title, lines))][1:]
        if rows_of_where := where(self.functions, self.legend, width - 2):
            parts += ["", "where", *(f"  {row}" for row in rows_of_where)]
        return "\n".join(parts)

    def sections(self) -> Iterator[tuple[str, tuple[Line, ...]]]:
        """Titles with their lines: both sweeps, then a step of each loop and the branches."""
        yield "Forward propagation", self.forward
        yield "Backpropagation", self.backward
        for inside in self.insides:
            yield from inside.sections()

    def where(self) -> list[str]:
        """What the functions and the short names stand for, a row each."""
        return where(self.functions, self.legend)

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
        for title, lines in [*self.sections()][2:]:
            text += f"\n{latex_title(title)}"
            text += f":\n{environment([line.latex() for line in lines])}" if lines else "."
        rows = [
            f"${', '.join(map(latex_name, names.split(', ')))}$ is {latex_path(path)}"
            for names, path in grouped(self.legend)
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
            ValueError: the tolerance is negative; or no finite number could be compared, because all is NaN,
                infinite or empty.
        """
        if tolerance is not None and not tolerance >= 0:
            raise ValueError(f"verify: tolerance={tolerance!r} is no deviation; pass a number ≥ 0, as 1e-5.")
        with promoting():
            found = [verify([*self.forward, *self.backward], self.traced, tolerance, progress)]
            for inside in self.insides:
                found += inside.verify(self.traced.values(), tolerance, progress)
            return Verification.together(found)

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
                writer = LineWriter(traced.graph, result, inputs)
                return Derivation(tuple(writer.forward()), tuple(writer.backward()), traced), None
            lines = ReadableLines(traced.graph, result, inputs)
            traced = replace(traced, graph=lines.graph)
            insides = lines.insides.written(lines.writer, lines.condensed)
            return Derivation(*lines.sweeps(), traced, lines.legend, lines.functions, insides), None

    if detail not in ("layers", "operators"):
        raise ValueError(f"derive: detail={detail!r} is none of 'layers', 'operators'.")
    return lambda *args, **kwargs: trace_objective(write, fun, argnums, args, kwargs, has_aux)
