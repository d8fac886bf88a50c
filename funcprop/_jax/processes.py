"""What the processes of one run tell each other without any computation: texts under names, and barriers."""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
from typing import Any, NoReturn

import jax
from jax._src import distributed  # Its client has no public name.

ARRIVAL = 3600  # seconds that processes wait for each other, such as for compilations

# What process 0 starts. It stays for a while when that process is gone, so that the others find out who is
# gone and say so: JAX ends a process in which it cannot reach the service, without a word of ours.
_SERVICE = """
import json, signal, sys, time
from jax._src import distributed
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, signal.SIG_IGN)
address, count, options, patience, stay = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3]), 30, 8
until = time.monotonic() + patience
while True:
    try:
        service = distributed._jax.get_distributed_runtime_service(address, count, **options)
        break
    except Exception as error:  # The port is that of a run before this one, which is ending.
        if time.monotonic() > until:
            sys.exit(print(str(error).splitlines()[0]))
        time.sleep(0.5)
print("ready", flush=True)
if sys.stdin.read() != "done":
    time.sleep(stay)
service.shutdown()
"""


class CoordinationService:
    """The service by which processes find each other, in a process of its own beside process 0."""

    def __init__(self, address: str, count: int, **options: Any) -> None:
        command = [sys.executable, "-c", _SERVICE, address, str(count), json.dumps(options)]
        pipe, nowhere = subprocess.PIPE, subprocess.DEVNULL
        self._process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=nowhere, text=True, start_new_session=True
        )
        assert self._process.stdout is not None
        said = self._process.stdout.readline().strip()
        if said != "ready":
            raise RuntimeError(f"no service for the other processes could be started on {address}: {said}")

    def shutdown(self) -> None:
        """End the service at once."""
        self._process.communicate("done")


def initialize(**options: Any) -> None:
    """Do what `jax.distributed.initialize` does, with the service in a process of its own."""
    made = distributed._jax.get_distributed_runtime_service
    distributed._jax.get_distributed_runtime_service = CoordinationService
    try:
        jax.distributed.initialize(**options)
    finally:
        distributed._jax.get_distributed_runtime_service = made
    atexit.register(_end_after_error)


def _end_after_error() -> None:
    if getattr(sys, "last_value", None) is not None:
        end(1)


def end(code: int) -> NoReturn:
    """End this process after an error: JAX would wait for the others, which leave, and then abort."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def joined() -> bool:
    """Return whether this process is one of several that were started together."""
    return _client() is not None and jax.process_count() > 1


def publish(name: str, text: str) -> None:
    """Make a text known to all processes, in place of what was there."""
    _client().key_value_set(name, text, allow_overwrite=True)


def forget(name: str) -> None:
    """Remove a text, if it is there."""
    _client().key_value_delete(name)


def published(name: str, seconds: float) -> str:
    """Return a text that a process makes known within that time.

    Raises:
        jax.errors.JaxRuntimeError: none does.
    """
    return str(_client().blocking_key_value_get(name, int(1000 * seconds)))


def published_now(name: str) -> str | None:
    """Return a text if it is known already; None if it is not.

    Raises:
        jax.errors.JaxRuntimeError: the process that keeps the texts, number 0, does not answer.
    """
    try:
        return str(_client().key_value_try_get(name))
    except jax.errors.JaxRuntimeError as error:
        if "NOT_FOUND" in str(error):
            return None
        raise


def wait_for_all(name: str, seconds: float) -> None:
    """Wait until all processes are here.

    Raises:
        jax.errors.JaxRuntimeError: they are not within that time.
    """
    _client().wait_at_barrier(name, int(1000 * seconds))


def _client() -> Any:
    return distributed.global_state.client
