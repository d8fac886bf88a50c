"""Several processes as one run: how they find each other, compare themselves, and notice that one is gone.

A collective with a process that is gone fails, or waits for ever, and who waits cannot say so. Each process
therefore makes a count known every half second, and a thread of every other one watches it.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from funcprop._jax import processes as _processes

EXIT = 75  # EX_TEMPFAIL of sysexits.h: the same start may succeed later
HEARTBEAT = 30  # seconds, after which JAX itself aborts a process that has lost another
SILENCE = 8.0  # seconds without a sign, after which a process counts as gone, dead or stopped
PULSE = 0.5  # seconds between signs
DEAD = 3.0  # seconds without a sign, after which it is named as the one that broke a collective
_LATE = 16  # steps, more than a process can be behind another one: steps wait for each other

_leaving = threading.Lock()
_at_the_end: dict[str, Callable[..., Any]] = {}  # what a run has to say when this process must leave
_numbers = itertools.count(1)  # All processes do the same, so that they count the same.

_PEER = re.compile(
    "gloo|nccl|connection (closed|reset|refused)|coordination|heartbeat|UNAVAILABLE|DEADLINE_EXCEEDED|socket",
    re.IGNORECASE,
)


def join_processes(
    coordinator: str | None = None, processes: int | None = None, process_id: int | None = None
) -> None:
    """Make this process one of several that train together; before anything is computed.

    Args:
        coordinator: `host:port` of process 0; None for what JAX finds by itself (Slurm, MPI, cloud TPUs, the
            environment variable JAX_COORDINATOR_ADDRESS).
        processes: how many there are; None likewise.
        process_id: which one this is, from 0; None likewise.

    Raises:
        ValueError: an argument is out of range, or missing where JAX does not find it.
        RuntimeError: something was computed already.

    Example:
        >>> import funcprop as fp
        >>> fp.training.join_processes("localhost", processes=2, process_id=0)
        Traceback (most recent call last):
            ...
        ValueError: join_processes: coordinator='localhost'; write host:port, such as 10.0.0.1:1234.
    """
    if coordinator is not None and not re.fullmatch(r".+:\d+", coordinator):
        raise ValueError(
            f"join_processes: coordinator={coordinator!r}; write host:port, such as 10.0.0.1:1234."
        )
    if processes is not None and processes < 1:
        raise ValueError(f"join_processes: processes={processes}; pass how many there are, 1 or more.")
    if process_id is not None and not 0 <= process_id < (processes or process_id + 1):
        raise ValueError(
            f"join_processes: process_id={process_id}; with {processes} processes it is between 0 and "
            f"{(processes or 1) - 1}."
        )
    try:
        _processes.initialize(
            coordinator_address=coordinator,
            num_processes=processes,
            process_id=process_id,
            heartbeat_timeout_seconds=HEARTBEAT,
        )
    except ValueError as error:
        raise ValueError(
            f"join_processes: {error} Pass coordinator, processes and process_id (--coordinator, "
            "--processes, --process-id): JAX does not find them here."
        ) from error


class Peers:
    """The processes of one run, this one among them; with one process alone there is nothing to do."""

    def __init__(self) -> None:
        self.together = _processes.joined()
        self.mine, self.count = jax.process_index(), jax.process_count()
        self._run = next(_numbers)

    def told(self, last: Callable[[], str]) -> None:
        """Say what a message shall end with: where the last good step is."""
        _at_the_end.update(last=last)

    def arrive(self, where: str) -> None:
        """Wait until all processes are here."""
        if self.together:
            _processes.wait_for_all(f"funcprop/{self._run}/{where}", _processes.ARRIVAL)

    def gathered(self, what: str, text: str) -> list[str]:
        """Return the texts of all processes, by their numbers."""
        if not self.together:
            return [text]
        name = f"funcprop/{self._run}/{what}/{next(_numbers)}"
        _processes.publish(f"{name}/{self.mine}", text)
        return [_processes.published(f"{name}/{i}", _processes.ARRIVAL) for i in range(self.count)]

    def asked_to_leave(self, step: int) -> bool:
        """Return whether one of the processes got SIGTERM; JAX tells all of them at the same step."""
        return self.together and bool(multihost_utils.reached_preemption_sync_point(step))

    def require_same(self, facts: Mapping[str, Any]) -> None:
        """Compare facts about this process with those of the others.

        Raises:
            ValueError: they differ; the message names what and where.
        """
        if not self.together:
            return
        first, *others = map(json.loads, self.gathered("facts", json.dumps(dict(facts))))
        for number, other in enumerate(others, 1):
            different = [name for name in first if first[name] != other.get(name)]
            if different:
                shown = "; ".join(f"{name}: {first[name]} and {other.get(name)}" for name in different)
                raise _not_one_run(number, shown)

    def require_same_batch(self, step: int, batch: str, is_running: bool) -> None:
        """Compare what says which batch comes next, in a run with that of process 0 alone.

        No device waits for it.

        Raises:
            ValueError: they differ.
        """
        name = f"funcprop/{self._run}/batch"
        if not is_running:
            self.require_same({"data": batch})
        elif not self.mine:
            _processes.publish(f"{name}/{step}", batch)
            _processes.forget(f"{name}/{step - _LATE}")
        elif (first := _processes.published(f"{name}/{step}", _processes.ARRIVAL)) != batch:
            shown = f"data, or in how many batches an epoch has, at step {step + 1}: {first} and {batch}"
            raise _not_one_run(self.mine, shown)

    @contextlib.contextmanager
    def watched(self, gone: Callable[[str], None]) -> Iterator[None]:
        """Leave with one line and exit code 75 where another process is gone; `gone` is told first."""
        if not self.together:
            yield
            return
        self.arrive("begun")
        _at_the_end.update(gone=gone)
        watch = Watch(self)
        try:
            yield
        except GeneratorExit:
            raise
        except Exception as error:
            if _PEER.search(str(error)):
                watch.explain(error)
            watch.stop(f"left: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
            raise
        finally:
            watch.stop("done")


def leave(what: str) -> NoReturn:
    """Say what happened, and end this process without waiting for the others."""
    _leaving.acquire()  # Never released: who comes second has nothing to add.
    with contextlib.suppress(Exception):  # That it is said is what matters now.
        what += _at_the_end["last"]()
    line = f"fit: {what}; start all processes again to go on."
    with contextlib.suppress(Exception):
        _at_the_end["gone"](line)
    print(line, file=sys.stderr, flush=True)
    _processes.end(EXIT)


class Watch:
    """Two threads: one makes this process's count known and reads those of the others, one has the clock.

    The first may itself wait for process 0 for ever; so there are two.
    """

    def __init__(self, peers: Peers) -> None:
        self._peers = peers
        self._name = f"funcprop/{peers._run}/pulse"
        self._others = [i for i in range(peers.count) if i != peers.mine]
        now = time.monotonic()
        self._answered, self._changed = now, dict.fromkeys(self._others, now)
        self._seen: dict[int, str | None] = {}
        self._stopped = threading.Event()
        for target in (self._pulse, self._look):
            threading.Thread(target=target, name=f"watch{target.__name__}", daemon=True).start()

    def stop(self, state: str) -> None:
        """End the watch, and let the others know why."""
        if not self._stopped.is_set():
            self._stopped.set()
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                _processes.publish(f"{self._name}/{self._peers.mine}", state)

    def explain(self, error: BaseException) -> None:
        """Find out which process a collective failed for, and leave; return if all of them are there."""
        until = time.monotonic() + DEAD + 2 * PULSE
        while time.monotonic() < until:
            silent = [i for i in self._others if time.monotonic() - self._changed[i] > DEAD]
            if silent:
                self._leave(silent[0], f"a collective failed: {_first_line(error)}")
            time.sleep(PULSE / 5)

    def _pulse(self) -> None:
        for count in itertools.count():
            if self._stopped.wait(PULSE):
                return
            try:
                _processes.publish(f"{self._name}/{self._peers.mine}", str(count))
                for i in self._others:
                    found = _processes.published_now(f"{self._name}/{i}")
                    if found != self._seen.get(i):
                        self._seen[i], self._changed[i] = found, time.monotonic()
                self._answered = time.monotonic()
            except jax.errors.JaxRuntimeError as error:
                if not self._stopped.is_set():
                    self._leave(0, _first_line(error))
                return

    def _look(self) -> None:
        while not self._stopped.wait(PULSE):
            now = time.monotonic()
            if now - self._answered > SILENCE and self._peers.mine:
                self._leave(0, f"no answer for {SILENCE:.0f} s")
            for i in self._others:
                state = self._seen.get(i) or ""
                silent = now - self._changed[i]
                if state.startswith("left") and silent > DEAD:
                    self._leave(i, f"it {state}")
                if state != "done" and silent > SILENCE and now - self._answered < PULSE * 4:
                    self._leave(i, f"no sign for {SILENCE:.0f} s")

    def _leave(self, number: int, why: str) -> NoReturn:
        leave(f"process {number} of {self._peers.count} is gone ({why})")


def _not_one_run(number: int, shown: str) -> ValueError:
    return ValueError(
        f"fit: processes 0 and {number} are not one run, they differ in {shown}. Start all with the same "
        "code, data, parameters and seed."
    )


def fingerprint(tree: Any) -> str:
    """Return a digest of the numbers of a tree, as far as all processes must have the same.

    Of an array that is spread over processes it is the shape alone.
    """
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        digest.update(
            f"{jax.tree_util.keystr(path)} {np.shape(leaf)} {getattr(leaf, 'dtype', type(leaf))}".encode()
        )
        if isinstance(leaf, jax.Array) and jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated:
            digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()[:16]


def _first_line(error: BaseException) -> str:
    # An error that went through several programs begins with the same words for each of them.
    return re.sub(r"(\b[^:]+: )\1+", r"\1", (str(error).splitlines() or [type(error).__name__])[0])[:200]
