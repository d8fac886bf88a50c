"""The chapter's exercises on any function: `python experiments/exercise_1_gradient_shape.py file.py:loss`."""

from __future__ import annotations

import argparse
import json
import textwrap
from dataclasses import asdict
from typing import Any

import jax
import optax

import funcprop as fp
from funcprop.cli.errors import TargetError
from funcprop.cli.output import table
from funcprop.cli.target import Target, load
from funcprop.graph.objective import Objective, trace_objective
from funcprop.program.batch_arguments import of_batch
from funcprop.reporting import exercises
from funcprop.reporting.layers import data_shapes
from funcprop.sweeps.propagation import Propagation

from . import command_line, folder

OPTIMIZERS = {"SGD": optax.sgd(0.1), "momentum": optax.sgd(0.1, momentum=0.9), "Adam": optax.adam(1e-3)}


def exercise_line(description: str | None, smoke: str) -> argparse.ArgumentParser:
    """The options of an exercise: those of any experiment, and a function to answer it for."""
    parser = command_line(description, smoke)
    parser.add_argument(
        "target", nargs="?", help="answer it for a function of your own: module:function or file.py:function"
    )
    return parser


def answered(number: int, options: argparse.Namespace) -> bool:
    """Answer an exercise for the target, if there is one: print it, and write it as JSON."""
    if options.target is None:
        return False
    try:
        found = load(options.target)
        exercise = _ANSWERS[number](found)
    except TargetError as error:
        raise SystemExit(f"exercise {number}: {error}") from None
    rows = [("", "predicted", "measured"), *((r.what, r.predicted, r.measured) for r in exercise.rows)]
    answer = textwrap.fill(f"{exercise.question} {exercise.answer}", 100, break_on_hyphens=False)
    print(f"{answer}\n\n{table(rows, right=(1, 2))}")
    path = folder(options.smoke) / f"exercise_{number}_target.json"
    path.write_text(json.dumps({"target": options.target, **asdict(exercise)}, ensure_ascii=False, indent=2))
    return True


def _of_sweeps(target: Target, answer: Any) -> exercises.Exercise:
    """An answer from the traced function and both sweeps, which are None if there are shapes alone."""
    swept: Propagation | None = None
    if target.has_arrays():
        swept = fp.backprop(target.function)(*target.args, **target.kwargs)

    def use(objective: Objective) -> tuple[exercises.Exercise, None]:
        return answer(objective, swept), None

    found: exercises.Exercise = trace_objective(use, target.function, 0, target.args, target.kwargs)
    return found


def _memory(target: Target) -> exercises.Exercise:
    account = lambda optimizer, *programs: fp.memory.footprint(  # noqa: E731
        target.function, optimizer=optimizer, programs=programs
    )(*target.args, **target.kwargs)
    footprints = {"gradient alone, ": account(None, "inference", "training")}
    footprints |= {f"{name}, ": account(optimizer, "training") for name, optimizer in OPTIMIZERS.items()}
    return exercises.memory_held(footprints, data_shapes(target.function, target.args, target.kwargs, 0))


def _devices(target: Target) -> exercises.Exercise:
    if not target.args or len(target.args) + len(target.kwargs) < 2:
        raise TargetError("plans need a loss of parameters and data, loss(params, *data).")
    params, *rest = target.args
    loss = of_batch(target.function, tuple(target.kwargs))
    plans = fp.partition.plan(loss, optimizer=OPTIMIZERS["Adam"])(params, (*rest, *target.kwargs.values()))
    held = plans.named("one device").predicted.total
    nbytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(params) if hasattr(x, "dtype"))
    return exercises.several_devices(
        [(plan, plan.compile()) for plan in plans], exercises.refusals(plans.rejected), nbytes, held
    )


_ANSWERS = {
    1: lambda target: _of_sweeps(target, exercises.gradient_shapes),
    2: lambda target: _of_sweeps(target, exercises.bias),
    3: _memory,
    4: lambda target: exercises.second_derivatives(
        fp.second_order_cost(target.function)(*target.args, **target.kwargs)
    ),
    5: _devices,
}
