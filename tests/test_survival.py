"""Runs that are interrupted: what comes out is what would have come out."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from funcprop import training
from funcprop.training import CheckpointError, Checkpoints

ROOT = Path(__file__).parents[1]
X = np.asarray(jax.random.normal(jax.random.key(0), (40, 8)))
Y = np.sin(X.sum(1))
PARAMS = {"up": jax.random.normal(jax.random.key(1), (8, 16)), "down": jnp.ones(16) / 8}
ADAM = optax.adam(1e-2)


def loss(params: Any, average: Any, x: Any, y: Any, *, key: Any) -> Any:
    """With all that a run must have back: a state of the model, and keys."""
    h = jnp.tanh(x @ params["up"])
    average = 0.9 * average + 0.1 * h.mean(0)
    h = jnp.where(jax.random.bernoulli(key, 0.8, h.shape), h - average, 0)
    return jnp.mean((h @ params["down"] - y) ** 2), (average, {"largest": jnp.max(h)})


class InterruptedHereError(Exception):
    """Raised in the middle of a run, as if it had died there."""


def run(directory: Path | None, epochs: int = 3, *, dies: int | None = None, **options: Any) -> list[Any]:
    """The yielded epochs of a run; `dies` is after how many minibatches it is interrupted."""
    made = 0

    def batches(key: Any) -> Iterator[Any]:
        nonlocal made
        for batch in training.minibatches((X, Y), 8, key):
            made += 1
            if dies is not None and made > dies:
                raise InterruptedHereError
            yield batch

    given = {
        "key": jax.random.key(7),
        "has_aux": True,
        "keyed": True,
        "model_state": jnp.zeros(16),
        "evaluate": lambda params, average: {"norm": jnp.linalg.norm(params["up"]) + average.sum()},
        "checkpoints": None if directory is None else Checkpoints(directory, every=2),
    }
    found: list[Any] = []
    with contextlib.suppress(InterruptedHereError):
        found.extend(training.fit(loss, PARAMS, batches, ADAM, epochs=epochs, **given | options))
    return found


@cache
def uninterrupted(epochs: int = 3) -> list[Any]:
    """The epochs of the run that nothing interrupts."""
    return run(None, epochs)


def same(found: Any, expected: Any) -> None:
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.sampled(4)
@pytest.mark.parametrize(
    ("dies", "saved"), [(1, 0), (2, 0), (3, 2), (4, 2), (5, 5), (6, 5), (8, 6), (11, 10)]
)
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path, dies: int, saved: int) -> None:
    """Five minibatches are an epoch; it dies while it asks for the next one."""
    whole = uninterrupted()
    run(tmp_path, dies=dies)
    records: list[Any] = []
    resumed = run(tmp_path, log=records.append)
    assert [epoch.number for epoch in resumed] == list(range(saved // 5 + 1, 4))
    same(resumed, whole[saved // 5 :])
    assert [r["step"] for r in records if r["event"] == "resumed"] == [saved] * (saved > 0)


def test_interrupted_again_and_again(tmp_path: Path) -> None:
    for _ in range(12):
        run(tmp_path, dies=4)
    same(run(tmp_path)[-1], uninterrupted()[-1])


def test_a_finished_run_yields_its_outcome_and_more_epochs_go_on(tmp_path: Path) -> None:
    first = run(tmp_path, 2)
    (again,) = run(tmp_path, 2)
    same(again, first[-1])
    assert [epoch.number for epoch in run(tmp_path, 4)] == [3, 4]
    same(run(tmp_path, 4)[-1], uninterrupted(4)[-1])


def test_early_stop_counts_the_epochs_before_the_interruption(tmp_path: Path) -> None:
    values = {1: 3.0, 2: 2.0, 3: 2.5, 4: 2.6, 5: 1.0}
    stop = training.early_stop("test", patience=2)

    def evaluate(params: Any, average: Any) -> Any:
        seen.append(len(seen) + 1)
        return {"test": values[seen[-1]]}

    seen: list[int] = []
    whole = run(None, 5, evaluate=evaluate, stop=stop)
    seen = []
    run(tmp_path, 5, evaluate=evaluate, stop=stop, dies=17)
    rest = run(tmp_path, 5, evaluate=evaluate, stop=stop)
    assert [epoch.number for epoch in whole] == [1, 2, 3, 4]
    assert [epoch.number for epoch in rest] == [4]


def test_minibatches_that_are_a_sequence_are_not_made_again(tmp_path: Path) -> None:
    made = []

    class Counted(training.Minibatches):
        def __getitem__(self, index: Any) -> Any:
            made.append(index)
            if fails and len(made) > 4:
                raise InterruptedHereError
            return super().__getitem__(index)

    batches = Counted((X, Y), 8, np.arange(40))
    squared = lambda w, x, y: jnp.mean((x @ w["up"] @ w["down"] - y) ** 2)  # noqa: E731
    options = {"epochs": 1, "checkpoints": Checkpoints(tmp_path, every=2)}
    fails = True
    with pytest.raises(InterruptedHereError):
        list(training.fit(squared, PARAMS, batches, ADAM, **options))
    made.clear()
    fails = False
    list(training.fit(squared, PARAMS, batches, ADAM, **options))
    assert made == [2, 3, 4]


def mesh(devices: int) -> Any:
    return jax.make_mesh((devices,), ("data",), devices=jax.devices()[:devices], axis_types=(AxisType.Auto,))


def test_on_8_then_4_then_1_devices(tmp_path: Path) -> None:
    for epochs, devices in ((1, 8), (2, 4), (3, 1)):
        split, rows = (
            NamedSharding(mesh(devices), PartitionSpec(*axes)) for axes in ((None, "data"), ("data",))
        )
        placed = {"up": jax.device_put(PARAMS["up"], split), "down": jax.device_put(PARAMS["down"], rows)}

        def batches(key: Any, rows: Any = rows) -> Iterator[Any]:
            return (jax.device_put(batch, rows) for batch in training.minibatches((X, Y), 8, key))

        *_, last = training.fit(
            loss,
            placed,
            batches,
            ADAM,
            epochs=epochs,
            key=jax.random.key(7),
            has_aux=True,
            keyed=True,
            model_state=jnp.zeros(16),
            checkpoints=tmp_path,
        )
        assert last.number == epochs
        assert last.params["up"].sharding.is_equivalent_to(split, 2)
    expected = uninterrupted()[-1]
    for a, b in zip(jax.tree.leaves(last.params), jax.tree.leaves(expected.params), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-9, atol=1e-12)


# --- signals ----------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [1, 3, 5, 7])
def test_sigterm_saves_and_leaves(tmp_path: Path, at: int, capsys: pytest.CaptureFixture[str]) -> None:
    def terminated(record: Any) -> None:
        if record["event"] == "step" and record["step"] == at:
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as caught:
        run(tmp_path, log=terminated)
    assert caught.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is before
    (last,) = Checkpoints(tmp_path).steps()[-1:]
    assert at <= last <= at + 2
    said = capsys.readouterr().err
    assert said == f"fit: SIGTERM after step {last}; step {last} is saved in {tmp_path}.\n"
    same(run(tmp_path)[-1], uninterrupted()[-1])


@pytest.mark.nightly
def test_sigkill_at_random_moments() -> None:
    """The experiment, with fewer kills."""
    command = [sys.executable, ROOT / "experiments" / "kill_and_resume.py", "--kills", "2", "--epochs", "2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["kills"] >= 1
    assert found["steps of the uninterrupted run"] == 40
    assert all(found[f"{what} that differ"] == 0 for what in ("losses", "epochs", "arrays"))
    assert found["finished steps lost"] == 0


# --- damage -----------------------------------------------------------------------------------


def test_a_damaged_step_is_told_and_the_one_before_it_used(tmp_path: Path) -> None:
    run(tmp_path, dies=8)
    *_, last = Checkpoints(tmp_path).steps()
    (tmp_path / str(last) / "_METADATA").write_bytes(b"?")
    records: list[Any] = []
    with pytest.warns(
        RuntimeWarning, match=rf"{last}/_METADATA has 1 bytes, .* were written; step {last - 1} is"
    ):
        resumed = run(tmp_path, log=records.append)
    assert [r["step"] for r in records if r["event"] == "resumed"] == [last - 1]
    same(resumed[-1], uninterrupted()[-1])


def test_a_disk_that_is_full_for_a_while(tmp_path: Path) -> None:
    """What cannot be saved is a warning, and the next step is; a run whose last step is not saved fails."""
    program = """
        import json, resource, signal, sys, warnings
        import jax.numpy as jnp, numpy as np, optax
        from funcprop import training
        warnings.simplefilter("always")
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        until, problems = int(sys.argv[2]), 0

        def limits(record):
            global problems
            problems += record["event"] == "problem"
            if record["event"] == "saved" and record["step"] == 2 or problems == until:
                resource.setrlimit(resource.RLIMIT_FSIZE, (before[0] if problems else 20_000, before[1]))
            if record["event"] in ("saved", "resumed"):
                print(record["event"], record["step"], flush=True)

        def loss(w, x):
            return jnp.mean((w - x) ** 2)

        batches = [(x,) for x in np.random.default_rng(0).normal(size=(10, 30_000))]
        options = {"checkpoints": training.Checkpoints(sys.argv[1], every=2), "log": limits}
        try:
            list(training.fit(loss, jnp.zeros(30_000), batches, optax.adam(0.1), epochs=1, **options))
        except training.CheckpointError as error:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
            print("failed:", error)
    """

    def python(until: int) -> Any:
        command = [sys.executable, "-c", textwrap.dedent(program), str(tmp_path), str(until)]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)

    done = python(2)
    assert done.stdout.splitlines() == ["saved 2", "saved 8", "saved 10"]
    warned = [line for line in done.stderr.splitlines() if "RuntimeWarning" in line]
    assert len(warned) == 2
    for line, step in zip(warned, (4, 6), strict=True):
        assert f"step {step} could not be written to {tmp_path}/{step}: File too large (" in line
        assert line.endswith("step 2 is the last good one.")
    assert "Traceback" not in done.stderr
    shutil.rmtree(tmp_path)
    done = python(99)
    *_, failed = done.stdout.splitlines()
    assert failed.startswith(
        f"failed: checkpoints: step 10 could not be written to {tmp_path}/10: File too large"
    )
    assert failed.endswith("step 2 is the last good one.")
    assert Checkpoints(tmp_path).steps() == [2]


def test_the_step_before_what_is_not_finite_is_saved(tmp_path: Path) -> None:
    batches = [(jnp.ones(3),), (jnp.ones(3),), (jnp.array([1.0, jnp.inf, 1.0]),)]
    total = lambda w, x: jnp.sum(w * x)  # noqa: E731
    with pytest.raises(training.NonFiniteStepError, match="are those before it, saved as step 2"):
        list(training.fit(total, jnp.ones(3), batches, optax.sgd(0.1), checkpoints=tmp_path))
    assert Checkpoints(tmp_path).steps() == [2]
    mended = [*batches[:2], (jnp.ones(3),)]
    *_, last = training.fit(total, jnp.ones(3), mended, optax.sgd(0.1), epochs=1, checkpoints=tmp_path)
    np.testing.assert_allclose(last.params, 0.7)


# --- bad input --------------------------------------------------------------------------------


def test_another_seed_is_refused(tmp_path: Path) -> None:
    run(tmp_path, 1)
    with pytest.raises(CheckpointError, match=r"was written by a run with another key \(seed\)"):
        run(tmp_path, 2, key=jax.random.key(8))


def test_another_optimizer_is_refused(tmp_path: Path) -> None:
    run(tmp_path, 1)
    with pytest.raises(CheckpointError, match="go on with the model and optimizer that wrote it"):
        list(
            training.fit(
                loss,
                PARAMS,
                [],
                optax.sgd(0.1),
                model_state=jnp.zeros(16),
                has_aux=True,
                keyed=True,
                checkpoints=tmp_path,
            )
        )


def test_nothing_is_said_by_others(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(tmp_path, 1)
    assert [record for record in caplog.records if "orbax" in record.pathname] == []
