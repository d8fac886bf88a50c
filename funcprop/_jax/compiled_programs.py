"""What a compiled program says of itself: its bytes, its operations, its text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax

_NAMES_COUNT = "jax_compilation_cache_include_metadata_in_key"


def compiled_by_its_names(lowered: Any, options: Mapping[str, Any] | None = None) -> Any:
    """Compile a lowered program whose scopes are read afterwards.

    JAX's cache on disk otherwise takes programs that differ in their scopes alone for one another.
    """
    before = getattr(jax.config, _NAMES_COUNT)
    jax.config.update(_NAMES_COUNT, True)
    try:
        return lowered.compile(dict(options) if options else None)
    finally:
        jax.config.update(_NAMES_COUNT, before)


def memory_fields(compiled: Any) -> dict[str, int]:
    """Read the bytes that a compiled program reports: `argument, output, temporary, alias` and `peak`."""
    names = {"argument": "argument_size", "output": "output_size", "temporary": "temp_size"}
    names |= {"alias": "alias_size", "peak": "peak_memory"}
    found = compiled.memory_analysis()
    return {ours: int(getattr(found, f"{theirs}_in_bytes", 0)) for ours, theirs in names.items()}


def held_bytes(fields: Mapping[str, int]) -> int:
    """Bytes that a program needs at all, by its `memory_fields`: what results and arguments share, once."""
    return fields["argument"] + fields["output"] + fields["temporary"] - fields["alias"]


def temporary_bytes(compiled: Any) -> int:
    """Bytes that a compiled program needs besides its arguments and results."""
    return memory_fields(compiled)["temporary"]


def program_text(compiled: Any) -> str:
    """A compiled program as XLA writes it, `funcprop._jax.hlo` reads it."""
    return str(compiled.as_text())


def counted_flops(compiled: Any) -> float | None:
    """Read the operations that XLA's own cost analysis counts; None where it does not."""
    found = compiled.cost_analysis()
    return None if not found else found.get("flops")
