"""`funcprop train TARGET`: minibatch stochastic gradient descent, then both sweeps for one minibatch."""

from __future__ import annotations

import inspect
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import typer

from funcprop import training
from funcprop._jax.processes import end as end_process
from funcprop._jax.processes import joined as processes_joined
from funcprop.cli.backward import gradients, gradients_table, values_table
from funcprop.cli.errors import TargetError, users_code
from funcprop.cli.options import AsJson
from funcprop.cli.output import Output, describe, emit, nonfinite_data, number
from funcprop.cli.target import as_setup, load_function
from funcprop.cli.train_run import RunOptions, fit_options, join
from funcprop.equations.derivation import Derivation, derive
from funcprop.program.trained import Trained
from funcprop.progress import bar
from funcprop.sweeps.backprop import propagation_of
from funcprop.sweeps.propagation import Propagation
from funcprop.training.loop import Epoch, Setup, first_minibatch
from funcprop.training.training_loss import TrainingLoss


class TrainOptions(NamedTuple):
    """The options given on the command line; None where one was not given."""

    epochs: int | None
    seed: int | None
    batch: int | None
    lr: float | None
    hidden: int | None
    decay: float | None
    data: Path | None


def train(
    target: Annotated[str, typer.Argument(help="module:setup, file.py:setup or chapter")],
    epochs: Annotated[int | None, typer.Option(min=1, help="how often the training set is visited")] = None,
    seed: Annotated[int | None, typer.Option(help="of the initial parameters and the shuffle")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="chapter: examples in a minibatch")] = None,
    lr: Annotated[float | None, typer.Option(help="chapter: learning rate")] = None,
    hidden: Annotated[int | None, typer.Option(min=1, help="chapter: width of the hidden layer")] = None,
    decay: Annotated[float | None, typer.Option(help="chapter: weight decay λ")] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="chapter: directory with Fashion-MNIST's IDX files; scikit-learn's digits if not given"
        ),
    ] = None,
    checkpoints: Annotated[Path | None, typer.Option(help="directory in which steps are saved")] = None,
    every: Annotated[
        int | None, typer.Option(min=1, help="save every so manyth step, not at the end of epochs alone")
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(help="go on from the last step in this directory, and save there")
    ] = None,
    precision: Annotated[
        str | None, typer.Option(help="type in which the loss is computed: bfloat16, float16, float32")
    ] = None,
    accumulate: Annotated[
        int | None, typer.Option(min=1, help="in how many parts a batch is taken, one after the other")
    ] = None,
    mesh: Annotated[
        str | None, typer.Option(help="devices by axes, such as data=2,model=4: how a step is shared")
    ] = None,
    coordinator: Annotated[
        str | None, typer.Option(help="host:port of process 0, if there are several processes")
    ] = None,
    processes: Annotated[int | None, typer.Option(help="how many processes there are")] = None,
    process_id: Annotated[int | None, typer.Option(help="which of them this is, from 0")] = None,
    log: Annotated[Path | None, typer.Option(help="file to which every step is appended as JSON")] = None,
    tensorboard: Annotated[Path | None, typer.Option(help="directory for TensorBoard")] = None,
    as_json: AsJson = False,
) -> None:
    """Train by minibatch gradient descent; then the variables and gradients of one minibatch."""
    options = TrainOptions(epochs, seed, batch, lr, hidden, decay, data)
    how = RunOptions(
        mesh,
        resume,
        checkpoints,
        every,
        coordinator,
        processes,
        process_id,
        precision,
        accumulate,
        log,
        tensorboard,
    )
    try:
        emit(lambda: run(target, options, how), as_json)
    except typer.Exit as end:
        if processes_joined():
            end_process(end.exit_code)
        raise


def run(target: str, options: TrainOptions, how: RunOptions) -> Output:
    """Train with a line for every epoch, and describe the outcome."""
    join(how)
    setup = chapter_setup(options) if target == "chapter" else users_setup(target, options)
    key = jax.random.key(options.seed or 0)
    history = []
    start = time.perf_counter()
    with users_code(f"target {target!r}: training failed", None):
        given = fit_options(setup, how, key)
        for epoch in with_progress(setup, given):
            history.append(epoch.metrics | {"epoch": epoch.number})
            if not jax.process_index():
                print(epoch_line(epoch, setup.epochs), flush=True)
        seconds = time.perf_counter() - start
        if not history:
            raise TargetError("--epochs 0 leaves nothing to train.")
        sweeps = one_minibatch(setup, epoch, key)
    propagation = None if sweeps is None else sweeps.propagation
    variables = [] if propagation is None else describe_variables(propagation)
    first = None if propagation is None else propagation.first_nonfinite()
    data = {
        "target": target,
        "seconds": seconds,
        "epochs": [
            {"epoch": metrics["epoch"], **{k: number(v) for k, v in metrics.items()}} for metrics in history
        ],
        "objective": None if propagation is None else number(propagation.value),
        "variables": variables,
        "first_nonfinite": nonfinite_data(first),
    }
    text = [f"\nTrained in {seconds:.1f} s."]
    if sweeps is not None:
        text[0] += " Both sweeps for one minibatch at the trained parameters:\n"
        lines = gradients(sweeps.propagation, sweeps.derivation)
        text += [values_table(sweeps.propagation, sweeps.derivation), "", gradients_table(lines)]
        if where := sweeps.derivation.where():
            text += ["", "where", *(f"  {row}" for row in where)]
    text += [] if first is None else [f"\nFirst non-finite: {first}"]
    return Output("\n".join(text), data)


# --- what is trained --------------------------------------------------------------------------


def chapter_setup(options: TrainOptions) -> Setup:
    """The chapter's perceptron on digits, or on the IDX files in `--data`."""
    with users_code("target 'chapter': the training cannot be set up", None):
        split = training.digits() if options.data is None else training.fashion_mnist(options.data)
        given: dict[str, Any] = {
            "epochs": options.epochs,
            "seed": options.seed,
            "batch": options.batch,
            "rate": options.lr,
            "hidden": options.hidden,
            "decay": options.decay,
        }
        return training.chapter(split, **{name: value for name, value in given.items() if value is not None})


def users_setup(target: str, options: TrainOptions) -> Setup:
    """Call the user's `setup()`, which returns a `Setup` or a dict with its fields."""
    for name in ("batch", "lr", "hidden", "decay", "data"):
        if getattr(options, name) is not None:
            raise TargetError(
                f"--{name} is for the built-in `chapter`; {target!r} decides it in its setup()."
            )
    define = "def setup(): return fp.training.Setup(…)"
    function, module = load_function(target, define)
    if needed := _needed_arguments(function):
        raise TargetError(
            f"target {target!r} needs {', '.join(needed)}, but train calls a function of no "
            f"arguments; define `{define}` with the loss, parameters, batches and optimizer, and name it."
        )
    with users_code(f"target {target!r}: {function.__name__}() failed", module):
        given = function()
    setup = as_setup(target, given)
    return setup if options.epochs is None else setup._replace(epochs=options.epochs)


def _needed_arguments(function: Callable[..., Any]) -> list[str]:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return []  # Not every callable says them.
    many = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [p.name for p in parameters if p.default is p.empty and p.kind not in many]


# --- the run ----------------------------------------------------------------------------------


def with_progress(setup: Setup, given: dict[str, Any]) -> Iterator[Epoch]:
    """Train with a progress bar on stderr, if that is a terminal."""
    with bar("epoch 1") as update:

        def show(record: Any) -> None:
            if record["event"] == "step":
                size = "" if record["bytes"] is None else f"  {record['bytes'] / 1e6:,.1f} MB"
                speed = f"{record['examples_per_second']:,.0f} examples/s{size}"
                line = f"epoch {record['epoch']}  loss {record['loss']:.5g}  {speed}"
                update(completed=record["step"], description=line)
            elif record["event"] == "epoch":
                total = record["step"] / record["epoch"] * setup.epochs
                update(completed=record["step"], total=total)
            elif record["event"] == "resumed":
                where = Path(record["directory"])
                where = where.relative_to(Path.cwd()) if where.is_relative_to(Path.cwd()) else where
                print(f"goes on after step {record['step']} of {where}", file=sys.stderr)

        yield from training.fit(*setup[:4], epochs=setup.epochs, **given | {"log": [show, *given["log"]]})


def epoch_line(epoch: Epoch, epochs: int) -> str:
    """`epoch  3/30  loss 0.2468  test_loss 0.2345  test_accuracy 95.83 %`."""
    shown = [f"epoch {epoch.number:{len(str(epochs))}}/{epochs}"]
    for name, value in epoch.metrics.items():
        shown.append(f"{name} {100 * value:.2f} %" if name.endswith("accuracy") else f"{name} {value:.5g}")
    return "  ".join(shown)


class Sweeps(NamedTuple):
    """Both sweeps of one minibatch, and their equations."""

    propagation: Propagation
    derivation: Derivation

    @classmethod
    def of(cls, loss: Callable[..., Any], *args: Any) -> Sweeps:
        """Both sweeps of a loss at its arguments."""
        return cls(propagation_of(loss)(*args), derive(loss)(*args))


def one_minibatch(setup: Setup, epoch: Epoch, key: Any) -> Sweeps | None:
    """Both sweeps for the first minibatch of a further epoch; None if no process has all parameters."""
    arrays = [leaf for leaf in jax.tree.leaves(epoch.params) if isinstance(leaf, jax.Array)]
    if not all(leaf.is_fully_addressable for leaf in arrays):
        return None
    trained = Trained.of(epoch.params)
    params = jax.tree.map(jnp.asarray, jax.device_get(trained.arrays))
    parts = first_minibatch(setup, key)
    own = {name: setup.options[name] for name in ("has_aux", "keyed") if name in setup.options}
    stateful = epoch.state.model is not None
    loss = trained.function(setup.loss, own.get("has_aux", False))
    if not (own or stateful):
        return Sweeps.of(loss, params, *parts)
    whole = TrainingLoss(loss, stateful=stateful, **own).whole
    model = jax.tree.map(jnp.asarray, jax.device_get(epoch.state.model))

    def of_parts(params: Any, *parts: Any) -> Any:
        return whole(params, model, parts, key)[0]

    # Data are called as the loss calls them.
    names = list(inspect.signature(loss).parameters.values())
    vars(of_parts)["__signature__"] = inspect.Signature([*names[:1], *names[1 + stateful :]])
    return Sweeps.of(of_parts, params, *parts)


def describe_variables(propagation: Propagation) -> list[dict[str, Any]]:
    """Every input and intermediate, with its gradient where it has one."""
    values = {v.name: propagation.tape.values[v.name] for v in propagation.graph.inputs}
    values.update(propagation.values)
    gradients = propagation.gradients
    listed = set(gradients)
    return [
        {
            "name": name,
            "value": describe(value, None),
            "gradient": describe(gradients[name], None) if name in listed else None,
        }
        for name, value in values.items()
    ]
