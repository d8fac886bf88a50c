"""`fit`: train for some epochs, and survive what happens meanwhile."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import jax
import optax

from funcprop.program.trained import Trained
from funcprop.rules.rule_set import RuleSet
from funcprop.training.checkpoints import Checkpoints
from funcprop.training.fit_arguments import check
from funcprop.training.loop import Epoch, Evaluate, Loss
from funcprop.training.mixed_precision import MixedPrecision
from funcprop.training.nonfinite_step import NonFiniteStepError
from funcprop.training.position import Batches
from funcprop.training.run_records import Log, recorders
from funcprop.training.stopping import Stop
from funcprop.training.training_loss import TrainingLoss
from funcprop.training.training_run import TrainingRun
from funcprop.training.training_state import TrainingState


def fit(
    loss: Loss,
    params: Any,
    batches: Batches,
    optimizer: optax.GradientTransformation,
    *,
    epochs: int = 10,
    evaluate: Evaluate | None = None,
    rules: RuleSet | None = None,
    key: Any = None,
    state: TrainingState | None = None,
    has_aux: bool = False,
    model_state: Any = None,
    keyed: bool = False,
    precision: MixedPrecision | str | None = None,
    accumulate: int = 1,
    weight: Callable[..., Any] | None = None,
    stop: Stop | None = None,
    plan: Any = None,
    checkpoints: Checkpoints | str | os.PathLike[str] | None = None,
    log: Log = None,
    progress: bool = False,
) -> Iterator[Epoch]:
    """Train, and yield an `Epoch` after every epoch. `fit(*setup[:4], epochs=…)` unpacks a `Setup`.

    Every step is one jitted program, which works in the buffers of the parameters that it is given. Gradients
    are clipped by the optimizer: `optax.chain(optax.clip_by_global_norm(1.0), …)`. What a step is given
    depends on `key` and on its number alone.

    Several processes (`join_processes`) that call this with the same arguments train as one. They are
    compared at the start, and their batches at each step; where one of them is gone, dead or stopped, the
    others say so in one line and leave with exit code 75.

    Args:
        loss, params, batches, optimizer, evaluate: see `Setup`. Parameters may be placed on several devices
            (`jax.device_put` with a `NamedSharding`); batches are placed by `batches`. Of a module of
            Equinox, or another tree that holds more than real numbers, floating-point arrays are trained; of
            an nnx model what is `nnx.Param`, and its other variables go from step to step as a `model_state`.
        epochs: how many times all minibatches are visited, after those that `state` has behind it.
        rules: a rule set; `fp.rules.default` if None.
        key: the PRNG key from which `batches` gets one for every epoch, if it is a function;
            `jax.random.key(0)` if None.
        state: an epoch's `state`, to go on after that epoch: its number, its shuffles, its optimizer.
        has_aux: the loss returns `(value, {name: number})`; the means of the numbers are metrics.
        model_state: what the model changes while it is trained, such as the averages of a batch norm. The
            loss is called as `loss(params, model_state, *batch)` and returns `(value, new model state)`, or
            `(value, (new model state, aux))` with `has_aux`.
        keyed: call the loss with `key=`, another one in every step, as a dropout needs.
        precision: the type in which the loss is computed, such as "bfloat16"; "float16" scales the loss. See
            `MixedPrecision`.
        accumulate: in how many parts a batch is taken, one after the other, with one update from their mean.
        weight: how much a part counts, `weight(*part)`, if its loss is not the mean over its examples.
        stop: `stop(metrics of all epochs) -> bool`, after every epoch; such as `early_stop("test_loss")`.
        plan: where and how the step runs: one of `fp.partition.plan(loss)(params, batch)`; or an object with
            `place(params, state)` and `step(optimizer)`. Plans of ZeRO-3 and pipelines take losses that are
            means over examples: no `has_aux`, `model_state` or `keyed`. In a pipeline parameters stay with
            their stages: `plan.gather(epoch.params)` are all of them on the host, as `evaluate` gets them.
        checkpoints: a directory, or `Checkpoints(directory, every=…)`, in which steps are saved while
            training goes on. If there are steps of this run, it goes on after the last of them, as if it had
            never been interrupted; on any number of devices. After SIGTERM it saves and leaves.
        log: a path for lines of JSON, a function of a record such as `fp.training.tensorboard(dir)`, or a
            list of these.
        progress: show a line with loss, examples per second and bytes while it runs.

    Raises:
        CheckpointError: the directory cannot be written, or has nothing that this run can go on from, or the
            last step could not be saved. Other failures to save are warnings; training goes on.
        ValueError: an argument is out of range, `batches` yields nothing, or `evaluate` has a metric named
            `loss`.
        TypeError: an argument is of another type, `evaluate` returns anything but numbers by name, or `plan`
            is given with what its step does not do.
        NonFiniteStepError: a loss or an update is not finite. It is a FloatingPointError that names the first
            operator and holds the parameters before that step.

    Example:
        >>> import jax.numpy as jnp, optax, funcprop as fp
        >>> batches = [(jnp.array([1.0, 3.0]),), (jnp.array([5.0, 3.0]),)]
        >>> mean = lambda w, x: jnp.mean((w - x) ** 2)
        >>> for epoch in fp.training.fit(mean, jnp.array(0.0), batches, optax.sgd(0.25), epochs=2):
        ...     print(epoch.number, epoch.metrics, epoch.params)
        1 {'loss': 7.5} 2.5
        2 {'loss': 2.65625} 3.125
    """
    check(
        optimizer,
        batches=batches,
        epochs=epochs,
        evaluate=evaluate,
        key=key,
        state=state,
        model_state=model_state,
        accumulate=accumulate,
        weight=weight,
        stop=stop,
        plan=plan,
    )
    model = Trained.of(params)
    if model.state is not None:
        if model_state is not None:
            raise ValueError("fit: an nnx model holds its state itself; leave model_state out.")
        model_state = model.state if state is None or state.model is None else None
    if state is None:
        state = TrainingState(optimizer.init(model.arrays), model_state)
    elif model_state is not None:
        state = TrainingState(state.optimizer, model_state, state.scale, state.position)
    found = MixedPrecision.of(precision)
    objective = TrainingLoss(
        model.function(loss, has_aux), has_aux, state.model is not None, keyed, found, accumulate, weight
    )
    saved = None
    if checkpoints is not None:
        saved = checkpoints if isinstance(checkpoints, Checkpoints) else Checkpoints(checkpoints)
    run = TrainingRun(
        objective,
        batches,
        optimizer,
        rules,
        evaluate=model.evaluation(evaluate),
        stop=stop,
        key=jax.random.key(0) if key is None else key,
        plan=plan,
        checkpoints=saved,
        recorders=recorders(log),
        progress=progress,
    )
    yielded = run.epochs(model.arrays, state, epochs)
    return yielded if model.is_whole else _of_models(yielded, model)


def _of_models(epochs: Iterator[Epoch], model: Trained) -> Iterator[Epoch]:
    """Yield epochs whose parameters are whole models again."""
    try:
        for epoch in epochs:
            yield epoch._replace(params=model.joined(epoch.params, epoch.state.model))
    except NonFiniteStepError as error:
        error.params = model.joined(error.params, error.state.model)
        raise
