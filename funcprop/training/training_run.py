"""A run: step after step, epoch after epoch, what the host knows of them, and what is written down.

The host hears of a step two steps later, so that the devices always have work.
"""

from __future__ import annotations

import contextlib
import sys
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from funcprop.progress import bar
from funcprop.rules.rule_set import RuleSet
from funcprop.training.checkpoints import Checkpoints
from funcprop.training.compiled_step import CompiledStep, PlannedStep, copied, mesh_of, placed_like
from funcprop.training.interruption import Terminated, until_terminated
from funcprop.training.loop import Epoch, Evaluate
from funcprop.training.manifest import CheckpointError, versions
from funcprop.training.nonfinite_step import nonfinite_step
from funcprop.training.peers import Peers, fingerprint
from funcprop.training.planned import step_under
from funcprop.training.position import Batches, Position, key_numbers, remaining_batches, with_last
from funcprop.training.run_records import Means, Recorder
from funcprop.training.stopping import Stop
from funcprop.training.training_loss import TrainingLoss, examples
from funcprop.training.training_state import TrainingState
from funcprop.training.update_step import Carried, Outcome, update_step

AHEAD = 2  # steps that may be under way
RECENT = 32  # steps over which the examples per second are a mean


class _Pending(NamedTuple):
    before: Position
    batch: Any
    outcome: Outcome


@dataclass(eq=False)
class TrainingRun:
    """What `fit` was given, and where it is; `epochs` runs it."""

    objective: TrainingLoss
    batches: Batches
    optimizer: optax.GradientTransformation
    rules: RuleSet | None
    evaluate: Evaluate | None
    stop: Stop | None
    key: Any
    plan: Any
    checkpoints: Checkpoints | None
    recorders: Sequence[Recorder]
    progress: bool
    peers: Peers = field(init=False)
    program: CompiledStep | PlannedStep = field(init=False)
    params: Any = field(init=False)
    carried: Carried = field(init=False)
    position: Position = field(init=False)
    means: Means = field(default_factory=Means, init=False)
    history: list[dict[str, float]] = field(default_factory=list, init=False)
    _pending: deque[_Pending] = field(default_factory=deque, init=False)
    _recent: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=RECENT), init=False)
    _prepared: bool = field(default=False, init=False)
    _saved: int | None = field(default=None, init=False)
    _problem: CheckpointError | None = field(default=None, init=False)
    _show: Callable[..., None] = field(default_factory=lambda: _silent, init=False)

    def epochs(self, params: Any, state: TrainingState, count: int) -> Iterator[Epoch]:
        """Train so many epochs more than `state` has behind it, and yield each."""
        end = state.position.epoch + count
        self.peers = Peers()
        if self.peers.mine:
            self.recorders, self.progress = (), False  # One of them is enough.
        with contextlib.ExitStack() as around:
            around.enter_context(self.peers.watched(self._gone))
            self.peers.require_same(
                {
                    "versions": versions(),
                    "plan": getattr(self.plan, "name", None),
                    "epochs": count,
                    "seed": key_numbers(self.key),
                    "parameters": fingerprint((params, state)),
                }
            )
            if self.checkpoints is not None:
                self.peers.told(self._last)
                around.enter_context(self.checkpoints.opened(self.peers))
            if self.progress:
                self._show = around.enter_context(bar("training", counted=False))
            self._begin(params, state)
            if self._resume() and (self.position.epoch >= end or self._stops()):
                yield self._yielded()  # There is nothing to do; the outcome is what was asked for.
            while self.position.epoch < end and not self._stops():
                # The steps give their buffers away. With copies, what was received or is yielded stays valid.
                self.params, self.carried = copied((self.params, self.carried))
                with until_terminated(self.checkpoints is not None and not self.peers.together) as asked:
                    self._epoch(asked)
                yield self._yielded()
            self._finish()

    def _stops(self) -> bool:
        return self.stop is not None and bool(self.history) and bool(self.stop(self.history))

    def _yielded(self) -> Epoch:
        return Epoch(self.position.epoch, self.params, self._state(), dict(self.history[-1]))

    def _state(self) -> TrainingState:
        return TrainingState(self.carried.optimizer, self.carried.model, self.carried.scale, self.position)

    def _begin(self, params: Any, state: TrainingState) -> None:
        precision = self.objective.precision
        scale = state.scale if state.scale is not None or precision is None else precision.first_scale()
        optimizer, shapes = state.optimizer, jax.eval_shape(lambda: params)
        if self.plan is None:
            self.program = CompiledStep(update_step(self.objective, self.optimizer, self.rules))
        else:
            self.objective, self.program, place = step_under(
                self.plan, self.objective, self.optimizer, self.rules, shapes
            )
            params, optimizer = place(*copied((params, optimizer)))
        carried = Carried(optimizer, state.model, scale, jnp.bool_(True))
        # Where stages have programs of their own, each array lies where its stage is.
        mesh = mesh_of(params) if isinstance(self.program, CompiledStep) else None
        self.params, self.carried = placed_like(mesh, copied((params, carried)))
        self.position = state.position
        # Of a pipeline, a process may have all parameters.
        alone = isinstance(self.program, CompiledStep) and self.peers.together
        if alone and all(leaf.is_fully_addressable for leaf in jax.tree.leaves(self.params)):
            raise ValueError(
                f"fit: {self.peers.count} processes, but the parameters lie on this process's devices alone; "
                "pass plan=, or put them on a mesh of all devices."
            )

    # --- steps --------------------------------------------------------------------------------

    def _epoch(self, asked: Callable[[], bool]) -> None:
        every = None if self.checkpoints is None else self.checkpoints.every
        remaining = remaining_batches(self.batches, self.key, self.position)
        for batch, last in with_last(remaining):
            arguments = self.params, self.carried, batch, self.key, np.int32(self.position.step)
            if self.peers.together:
                # Before JAX is given what is another thing in each process.
                self.peers.require_same_batch(self.position.step, fingerprint((batch, last)), self._prepared)
            if not self._prepared:
                self._prepare(arguments)
            # What is waited for is what the step before the last one said.
            self.params, self.carried, outcome = self.program(*arguments)
            self._pending.append(_Pending(self.position, batch, outcome))
            self.position = self.position.after_step()
            self._account(AHEAD)
            if asked() or (self.checkpoints is not None and self.peers.asked_to_leave(self.position.step)):
                self._leave()
            if every is not None and self.position.step % every == 0 and not last:
                self._save()
        self._account(0)
        if not self.means.count:
            raise ValueError(
                f"fit: batches={self.batches!r} yielded nothing in epoch {self.position.epoch + 1}; an "
                "iterator is used up after one epoch, so pass a list, or a function of a key that returns a "
                "new iterator."
            )
        self.position = self.position.after_epoch()
        metrics = self.means.means() | self._evaluated()
        self.means = Means()
        self.history.append(metrics)
        self._record("epoch", self.position, metrics)
        self._save()
        if asked():
            self._leave()

    def _prepare(self, arguments: tuple[Any, ...]) -> None:
        if self.objective.accumulate > 1:
            self.objective.require_mean(self.program.whole(arguments[0]), arguments[2])
        if self.peers.together:
            self.peers.require_same({"code": fingerprint(self.program.text(*arguments))})
        # A collective gives up after 30 s; so nobody begins before everybody has compiled.
        self.program.compile(*arguments)
        self.peers.arrive("compiled")
        self._recent.append((time.perf_counter(), 0))
        self._prepared = True

    def _account(self, under_way: int) -> None:
        """Wait for all but so many steps, and write down what they say."""
        while len(self._pending) > under_way:
            at, batch, outcome = self._pending.popleft()
            loss, aux, intact = jax.device_get(outcome)
            if not intact:
                self._fail(at, batch, float(loss))
            numbers = {"loss": float(loss), **{name: float(x) for name, x in aux.items()}}
            self.means.add(numbers)
            (start, _), now = self._recent[0], time.perf_counter()
            self._recent.append((now, examples(batch)))
            rate = sum(count for _, count in list(self._recent)[1:]) / (now - start)
            speed = {"examples_per_second": rate, "bytes": self.program.nbytes}
            done = at.after_step()
            self._record("step", done._replace(epoch=done.epoch + 1), numbers | speed)
            size = "" if self.program.nbytes is None else f"  {self.program.nbytes / 1e6:,.1f} MB"
            line = f"epoch {done.epoch + 1}  step {done.step}  loss {float(loss):.5g}"
            self._show(description=f"{line}  {rate:,.0f} examples/s{size}", advance=1)

    def _record(self, event: str, at: Position, numbers: dict[str, Any]) -> None:
        for record in self.recorders:
            record({"event": event, **at._asdict(), **numbers})

    def _fail(self, at: Position, batch: Any, loss: float) -> None:
        self.position = at
        self._pending.clear()
        if self.program.keeps:
            kept = "`params` and `state` of this error are those before it"
            self._save()
            kept += "" if self._saved != at.step else f", saved as step {at.step}"
        else:
            kept = "the plan's step has given the parameters before it away"
        params = self.program.whole(self.params)
        error = nonfinite_step(self.objective, self.rules, params, self._state(), batch, self.key, loss, kept)
        self._record("problem", at, {"message": str(error)})
        raise error

    def _evaluated(self) -> dict[str, float]:
        if self.evaluate is None:
            return {}
        state = () if self.carried.model is None else (self.carried.model,)
        returned = self.evaluate(self.program.whole(self.params), *state)
        if not isinstance(returned, Mapping) or any(np.shape(value) for value in returned.values()):
            raise TypeError(
                f"fit: evaluate returned {_shown(returned)}; return numbers by name, as {{'accuracy': 0.9}}."
            )
        found = {name: float(value) for name, value in returned.items()}
        if "loss" in found:
            raise ValueError(
                "fit: evaluate returned a metric named 'loss', which is the name of the training loss; call "
                "it 'test_loss'."
            )
        return found

    # --- what survives ------------------------------------------------------------------------

    def _tree(self) -> dict[str, Any]:
        carried = self.carried
        return {
            "params": self.params,
            "optimizer": carried.optimizer,
            "model": carried.model,
            "scale": carried.scale,
        }

    def _note(self) -> dict[str, Any]:
        return {
            "position": self.position._asdict(),
            "key": key_numbers(self.key),
            "means": asdict(self.means),
            "history": self.history,
        }

    def _save(self) -> None:
        """Begin to save this step, if it is not saved yet; a failure is told and training goes on."""
        if self.checkpoints is None or self._saved == self.position.step:
            return
        step = self.position.step
        self._account(0)
        self._settled(lambda saved: saved.wait())
        if self._settled(lambda saved: saved.save(step, self._tree(), self._note())):
            self._saved = step

    def _settled(self, act: Callable[[Checkpoints], None]) -> bool:
        """Do something with the checkpoints, and tell what was finished and what failed."""
        assert self.checkpoints is not None
        try:
            act(self.checkpoints)
            self._problem = None
        except CheckpointError as error:
            self._problem = error
            self._record("problem", self.position, {"message": str(error)})
            warnings.warn(str(error), RuntimeWarning, stacklevel=2)
        finished = self.checkpoints.finished()
        if finished is not None:
            self._record("saved", self.position._replace(step=finished), {})
        return self._problem is None

    def _resume(self) -> bool:
        """Go on from the last step that is whole; whether there is one."""
        if self.checkpoints is None:
            return False

        def warn(message: str) -> None:
            self._record("problem", self.position, {"message": message})
            warnings.warn(message, RuntimeWarning, stacklevel=2)

        restored = self.checkpoints.restore(self._tree(), warn)
        if restored is None:
            return False
        tree, note = restored.tree, restored.manifest.note
        if note["key"] != key_numbers(self.key):
            raise CheckpointError(
                f"checkpoints: {self.checkpoints.directory} was written by a run with another key (seed), "
                "whose shuffles are others; go on with that key, or choose another directory."
            )
        self.params = tree["params"]
        self.carried = Carried(tree["optimizer"], tree["model"], tree["scale"], self.carried.intact)
        self.position = Position(**note["position"])
        self.means, self.history = Means(**note["means"]), note["history"]
        self._saved = restored.manifest.step
        self._record("resumed", self.position, {"directory": str(self.checkpoints.directory)})
        return True

    def _last(self) -> str:
        assert self.checkpoints is not None
        steps = self.checkpoints.steps()
        return f"; step {steps[-1]} is the last in {self.checkpoints.directory}" if steps else ""

    def _gone(self, line: str) -> None:
        self._record("problem", self.position, {"message": line})

    def _leave(self) -> None:
        assert self.checkpoints is not None
        self._save()
        self._settled(lambda saved: saved.wait())
        last = self.checkpoints.steps()
        saved = f"step {last[-1]} is saved in {self.checkpoints.directory}" if last else "no step is saved"
        problem = "" if self._problem is None else f" ({self._problem})"
        if not self.peers.mine:
            line = f"fit: SIGTERM after step {self.position.step}; {saved}{problem}."
            print(line, file=sys.stderr, flush=True)
        self._record("terminated", self.position, {})
        raise Terminated

    def _finish(self) -> None:
        if self.checkpoints is not None:
            self._settled(lambda saved: saved.wait())
            if self._problem is not None:
                raise self._problem


def _silent(**_: Any) -> None:
    pass


def _shown(returned: Any) -> str:
    if not isinstance(returned, Mapping):
        return f"a {type(returned).__name__}"
    return str({name: f"shape {np.shape(value)}" for name, value in returned.items()})
