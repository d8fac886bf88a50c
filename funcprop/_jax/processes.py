"""What the processes of one run tell each other without any computation: texts under names, and barriers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from jax._src import distributed  # Its client has no public name.


def initialize(lost: Callable[[Any], None], **options: Any) -> None:
    """Do what `jax.distributed.initialize` does; `lost` is called where JAX would abort this process.

    JAX gives its own client no such function, and ends a process with the stack of its C++ code as soon as
    process 0 is gone.
    """
    made = distributed._jax.get_distributed_runtime_client
    distributed._jax.get_distributed_runtime_client = partial(made, missed_heartbeat_callback=lost)
    try:
        jax.distributed.initialize(**options)
    finally:
        distributed._jax.get_distributed_runtime_client = made


def joined() -> bool:
    """Return whether this process is one of several that were started together."""
    return _client() is not None and jax.process_count() > 1


def publish(name: str, text: str) -> None:
    """Make a text known to all processes, in place of what was there."""
    _client().key_value_set(name, text, allow_overwrite=True)


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
