"""What `funcprop train` adds to a setup: checkpoints, devices, processes, precision, logs."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

from funcprop import partition, training
from funcprop.cli.errors import TargetError
from funcprop.training.loop import Setup
from funcprop.training.position import epoch_key
from funcprop.training.training_loss import TrainingLoss


class RunOptions(NamedTuple):
    """Options of how a run is done, as they were given; None where one was not."""

    mesh: str | None = None
    resume: Path | None = None
    checkpoints: Path | None = None
    every: int | None = None
    coordinator: str | None = None
    processes: int | None = None
    process_id: int | None = None
    precision: str | None = None
    accumulate: int | None = None
    log: Path | None = None
    tensorboard: Path | None = None


def join(options: RunOptions) -> None:
    """Join the other processes, if there are any.

    Raises:
        TargetError: they cannot be joined as it was asked.
    """
    given = (options.coordinator, options.processes, options.process_id)
    if all(value is None for value in given) and "JAX_COORDINATOR_ADDRESS" not in os.environ:
        return
    try:
        training.join_processes(*given)
    except (ValueError, RuntimeError) as error:
        raise TargetError(str(error)) from None
    if options.mesh is None:
        raise TargetError(
            "with several processes, say by --mesh how they share the work, such as --mesh data=2."
        )


def fit_options(setup: Setup, options: RunOptions, key: Any) -> dict[str, Any]:
    """Return the keyword arguments of `fit` for a setup and what was given on the command line.

    Raises:
        TargetError: options contradict each other, or what they name.
    """
    found: dict[str, Any] = {"evaluate": setup.evaluate, "key": key, **setup.options}
    for name in ("precision", "accumulate"):
        if getattr(options, name) is not None:
            found[name] = getattr(options, name)
    directory = _directory(options)
    if directory is not None:
        found["checkpoints"] = training.Checkpoints(directory, every=options.every)
    elif options.every is not None:
        raise TargetError("--every says how often to save; give --checkpoints DIR as well.")
    if options.mesh is not None:
        found["plan"] = _plan(setup, parse_mesh(options.mesh), key)
    try:
        logs: list[Any] = [] if options.log is None else [training.json_lines(options.log)]
    except OSError as error:
        raise TargetError(f"--log {str(options.log)!r} cannot be written: {error.strerror}.") from None
    if options.tensorboard is not None:
        try:
            logs.append(training.tensorboard(options.tensorboard))
        except ModuleNotFoundError as error:
            raise TargetError(str(error)) from None
    return found | {"log": logs}


def _directory(options: RunOptions) -> Path | None:
    """Where steps are saved: a directory of an earlier run is taken if it was asked for alone."""
    resume, checkpoints = options.resume, options.checkpoints
    if resume is not None and checkpoints is not None and resume.absolute() != checkpoints.absolute():
        raise TargetError(
            f"--resume {str(resume)!r} and --checkpoints {str(checkpoints)!r}: a run goes on in its own "
            "directory; give one of them, or copy the directory."
        )
    if resume is None and checkpoints is not None and (steps := training.Checkpoints(checkpoints).steps()):
        raise TargetError(
            f"--checkpoints {str(checkpoints)!r} has steps up to {steps[-1]} of an earlier run; --resume "
            f"{str(checkpoints)!r} goes on with them, or choose another directory."
        )
    if resume is not None and not training.Checkpoints(resume).steps():
        print(f"there is no step in {resume}: the run begins anew, and is saved there", file=sys.stderr)
    return checkpoints if resume is None else resume


def parse_mesh(text: str) -> dict[str, int]:
    """Return `data=2,model=4` as the sizes of the axes.

    Raises:
        TargetError: it is not written so.
    """
    found: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = part.partition("=")
        if not (name.isidentifier() and size.isdecimal() and int(size) and name not in found):
            raise TargetError(f"--mesh {text!r}: write axes and their sizes, such as data=2,model=4.")
        found[name] = int(size)
    return found


def _plan(setup: Setup, mesh: dict[str, int], key: Any) -> Any:
    """Plan the step of a setup on a mesh."""
    batches = setup.batches(epoch_key(key, 1)) if callable(setup.batches) else setup.batches
    batch = next(iter(batches), None)
    if batch is None:
        raise TargetError(f"--mesh: batches={setup.batches!r} yield nothing to plan for.")
    own = {name: setup.options[name] for name in ("has_aux", "keyed") if name in setup.options}
    state = setup.options.get("model_state")
    whole = TrainingLoss(setup.loss, stateful=state is not None, **own).whole

    def loss(params: Any, batch: Any) -> Any:
        return whole(params, state, batch, key)[0]

    loss.__name__ = getattr(setup.loss, "__name__", "loss")
    try:
        return partition.plan(loss, optimizer=setup.optimizer, mesh=mesh)(setup.params, batch)[0]
    except ValueError as error:
        raise TargetError(f"--mesh: {error}") from None
