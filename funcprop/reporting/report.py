"""`fp.report(fun)(*args)`: everything there is to see of a function, on one page that needs nothing else."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict
from functools import cached_property
from html import escape
from pathlib import Path
from typing import Any

import jax

from funcprop.cost.second_order import second_order_cost
from funcprop.equations.derivation import derive
from funcprop.graph.objective import Argnums, Objective, positions
from funcprop.graph.references import require_no_references
from funcprop.graph.writable import require_writable
from funcprop.program.call import has_values, without_aux
from funcprop.reporting.curves import train
from funcprop.reporting.exercises import LEFT_TO_THE_COMMAND, MOST_LINES, all_exercises, planned
from funcprop.reporting.inspection import first_nonfinite, inspect
from funcprop.reporting.layers import data_shapes, memory
from funcprop.reporting.on_machine import on_this_machine
from funcprop.reporting.report_data import ReportData
from funcprop.reporting.scale import picture_of
from funcprop.reporting.spectrum import is_smooth, top
from funcprop.rules.rule_set import RuleSet
from funcprop.sweeps.backprop import propagation_of
from funcprop.training.loop import Setup


class ReportError(RuntimeError):
    """The page cannot be written; the message says why and what to do."""


class Report(ReportData):
    """A page about a function: `.html` is its text, `.save(path)` writes it, `.as_dict()` is its content.

    A notebook shows the page itself. A section is None where there is nothing to show.
    """

    @cached_property
    def html(self) -> str:
        """The whole page; it works from a file and loads nothing.

        Raises:
            ReportError: jinja2, which writes it, is not installed.
            DrawingError: there is no layout engine.
        """
        return renderer()(self)

    def as_dict(self) -> dict[str, Any]:
        """The numbers of the page as plain data, for JSON; statistics are of finite entries."""
        return {
            "title": self.title,
            "graph": {"operators": len(self.graph), "flops": self.graph.flops, "nbytes": self.value_bytes},
            "parameters": self.parameters,
            "first_nonfinite": self.nonfinite,
            "variables": [asdict(q) for q in self.inspection.quantities.values()],
            "cost": self.cost.as_dict(),
            "operators": [asdict(kind) for kind in self.kinds],
            "memory": {"of": self.memory.subject, **self.memory.footprint.as_dict()},
            "exercises": [asdict(exercise) for exercise in self.exercises],
            "eigenvalues": None if self.spectrum is None else asdict(self.spectrum),
            "training": None if self.curves is None else asdict(self.curves),
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the page into a file.

        Raises:
            OSError: it does not end in .html, or its directory is not there; before the page is written.
        """
        require_writable("report: path", path, (".html", ".htm"))
        Path(path).write_text(self.html, encoding="utf-8")

    def _repr_html_(self) -> str:
        frame = 'style="width:100%;height:85vh;border:0" sandbox="allow-scripts"'
        return f'<iframe {frame} title="{escape(self.title)}" srcdoc="{escape(self.html)}"></iframe>'


def renderer() -> Callable[[ReportData], str]:
    """Import the function that writes the page.

    Raises:
        ReportError: jinja2 is not installed.
    """
    try:
        from funcprop.reporting.page import render
    except ModuleNotFoundError as error:
        raise ReportError(
            f"fp.report: the page needs {error.name!r}; pip install 'funcprop[draw]' brings it."
        ) from error
    return render


def report(
    fun: Callable[..., Any],
    argnums: Argnums = 0,
    has_aux: bool = False,
    *,
    rules: RuleSet | None = None,
    title: str | None = None,
    setup: Setup | None = None,
    epochs: int = 10,
    seconds: float = 30.0,
    examples: bool = False,
    depth: int | None = None,
    fold: bool = True,
    progress: Callable[[str], None] | None = None,
) -> Callable[..., Report]:
    """One self-contained HTML page about a scalar function: `report(fun)(*args, **kwargs) -> Report`.

    The page has the computational graph to zoom into, with shape, bytes, equation, statistics and histograms
    of value and gradient of every node; both sweeps step by step; the typeset equations; the memory of
    inference and training by layer; costs; the chapter's five exercises; the largest eigenvalues of the
    Hessian where they take seconds; and with `setup` the curves of a short training run. It needs no network
    and no server.

    Arguments may be shapes (`jax.ShapeDtypeStruct`); then there are no values and no statistics. Of what is
    not differentiated by (data and labels) the page has statistics only, unless `examples`.

    Args:
        fun: returns a real scalar.
        argnums: the arguments to differentiate with respect to, as in `fp.backprop`.
        has_aux: `fun` returns the scalar and auxiliary data, which are left out.
        rules: a rule set for the sweeps and the costs; if None, `fp.rules.handwritten` for the sweeps and
            `fp.rules.default` for the costs.
        title: the heading; the function's name if None.
        setup: a training run whose curves are shown.
        epochs, seconds: when it ends, whichever comes first.
        examples: embed histograms and the entries of arguments that are not differentiated by.
        depth, fold: how the graph is drawn, as in `fp.draw`, with open loops; without `depth`, in a graph of
            more than 400 nodes loops are closed, then inner scopes, then runs of operators collapsed. A page
            of 2 MB or more has fewer statistics of values without a name. The page says what it leaves out.
        progress: called with what is being computed, before every part of the page.

    Raises:
        TypeError: `fun` does not return one real scalar, or an argument at `argnums` has no derivative.
        ValueError: there is no argument at a position in `argnums`.

    Example:
        >>> import jax, jax.numpy as jnp, funcprop as fp
        >>> params = fp.models.init_chapter(jax.random.key(0), inputs=4, hidden=3, outputs=2)
        >>> page = fp.report(fp.models.chapter)(params, jnp.ones(4), jnp.array(1), jnp.array(0.1))
        >>> page.html.startswith("<!doctype html>")
        True
    """

    scalar = without_aux(fun) if has_aux else fun

    def doing(part: str) -> None:
        if progress is not None:
            progress(part)

    def write(*args: Any, **kwargs: Any) -> Report:
        require_no_references("report", fun, args, kwargs)
        doing("equations")
        derivation = derive(scalar, argnums, detail="operators")(*args, **kwargs)
        # Of a larger function the page has a part of the lines alone.
        few = len(derivation.traced.graph) <= MOST_LINES
        readable = derive(scalar, argnums)(*args, **kwargs) if few else None
        traced = derivation.traced
        is_concrete = has_values(traced.leaves)
        doing("both sweeps")
        propagation = propagation_of(scalar, argnums, rules=rules)(*args, **kwargs) if is_concrete else None
        numbers = _all_smooth(args) if argnums is None else positions(argnums)
        doing("the graph's picture")
        drawing, inside, notes = picture_of(traced.graph, depth, fold)
        inspection = inspect(derivation, propagation, inside, examples)
        doing("costs of derivatives")
        costs = second_order_cost(scalar, argnums, rules=rules, repeats=3, patience=2.0)(*args, **kwargs)
        doing("memory")
        footprints = memory(scalar, numbers, args, kwargs, setup)
        doing("rules and recomputation")
        machine = on_this_machine(scalar, numbers, args, kwargs, rules, few)
        doing("the five exercises")
        plans, why = planned(scalar, args, kwargs, numbers, setup) if few else ([], LEFT_TO_THE_COMMAND)
        objective = Objective.of(traced, argnums)
        answers = all_exercises(objective, propagation if few else None, costs, footprints, plans, why)
        doing("the Hessian's spectrum")
        spectrum = top(scalar, numbers, args, kwargs, costs) if is_concrete else None
        doing("a training run")
        curves = None if setup is None else train(setup, min(epochs, setup.epochs), seconds)
        doing("layout")
        return Report(
            traced.graph.name if title is None else title,
            derivation,
            inside,
            drawing,
            notes,
            inspection,
            None if propagation is None else float(propagation.value),
            first_nonfinite(propagation),
            costs,
            footprints,
            spectrum,
            curves,
            data_shapes(scalar, args, kwargs, numbers),
            machine,
            readable if readable is not None and readable.text() != derivation.text() else None,
            answers,
        )

    return write


def _all_smooth(args: tuple[Any, ...]) -> tuple[int, ...]:
    """The positions of arguments that have anything to differentiate by."""
    return tuple(i for i, arg in enumerate(args) if any(map(is_smooth, jax.tree.leaves(arg))))
