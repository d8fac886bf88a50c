"""`funcprop partition TARGET`: on how many devices a train step fits, split how, and at what cost."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import optax
import typer

import funcprop as fp
from funcprop.cli.errors import TargetError, users_code
from funcprop.cli.memory import OPTIMIZERS
from funcprop.cli.options import AsJson, TargetName, parse_bytes
from funcprop.cli.output import Output, emit, json_text
from funcprop.cli.target import Target, load
from funcprop.program.batch_arguments import of_batch
from funcprop.progress import bar


def partition(
    target: TargetName,
    devices: Annotated[int | None, typer.Option(min=1, help="so many of the devices that are here")] = None,
    on: Annotated[
        str | None, typer.Option(help="devices that are not here: v5e:4x4, v5p:2x2x1, h100:8")
    ] = None,
    budget: Annotated[str | None, typer.Option(help="bytes of one device, as 2GB")] = None,
    optimizer: Annotated[
        str, typer.Option(help="of the train step: adam, sgd, momentum, … or none")
    ] = "adam",
    axes: Annotated[
        bool, typer.Option("--axes", help="show the model's axes, and why one cannot be split")
    ] = False,
    prove: Annotated[bool, typer.Option("--prove", help="compile the best plan, and compare it")] = False,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="file to write the JSON to")] = None,
    as_json: AsJson = False,
) -> None:
    """Plans for a train step on several devices: bytes per device, FLOPs, communication; best first."""

    def compute() -> Output:
        limit = None if budget is None else parse_bytes("--budget", budget)
        chosen = _optimizer(optimizer)
        return report(load(target, False), devices, on, limit, chosen, axes, prove)

    emit(compute, as_json, out)


def _optimizer(name: str) -> optax.GradientTransformation | None:
    if name not in OPTIMIZERS:
        raise TargetError(f"--optimizer {name!r} is not known; choose one of {', '.join(OPTIMIZERS)}.")
    return OPTIMIZERS[name]


def report(
    target: Target,
    devices: int | None,
    on: str | None,
    budget: int | None,
    optimizer: optax.GradientTransformation | None,
    axes: bool,
    prove: bool,
) -> Output:
    """The plans, and what else is asked for.

    Raises:
        TargetError: the target has no parameters or no batch.
    """
    if not target.args or len(target.args) + len(target.kwargs) < 2:
        raise TargetError(
            f"target {target.label!r} has {len(target.args)} arguments; partition needs a loss of parameters "
            "and data, loss(params, *data)."
        )
    params, *rest = target.args
    loss = of_batch(target.function, tuple(target.kwargs))
    batch = (*rest, *target.kwargs.values())
    with (
        bar(f"{target.label}: plans", counted=False),
        users_code(f"target {target.label!r}: planning failed", None),
    ):
        plans = fp.partition.plan(loss, optimizer=optimizer, budget=budget)(
            params, batch, devices=devices, on=on
        )
        text, data = str(plans), {"target": target.label, **plans.as_dict()}
        if axes:
            found = fp.partition.axes(loss)(params, batch)
            text, data = f"{found}\n\n{text}", {**data, **found.as_dict()}
        if prove:
            proof = plans[0].compile()
            text, data = f"{text}\n\n{proof}", {**data, "proof": proof.as_dict()}
    return Output(text, data, json_text(data, 2) + "\n")
