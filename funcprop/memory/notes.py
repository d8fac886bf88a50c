"""Where the numbers of a compiled program mislead: each case in words, where it bites, with its remedy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from funcprop import _jax
from funcprop._jax import xla_options
from funcprop.memory.accounted_program import AccountedProgram
from funcprop.memory.estimate import MemoryEstimate, estimate
from funcprop.program.facts import CHECKPOINTS
from funcprop.program.sizes import nbytes

# With it, a chain of layers is no longer one kernel whose memory is not reported.
SHOWN = {"xla_cpu_experimental_ynn_fusion_type": ""}


def estimated(case: AccountedProgram, options: Mapping[str, Any], kept: bool = False) -> MemoryEstimate:
    """Estimate a program; recomputation is shared unless compiler options, or `kept`, say otherwise."""
    kept = kept or _keeps_barriers(case, options)
    return estimate(case.jaxpr, case.aliases, barriers=kept, platform=case.platform)


def _keeps_barriers(case: AccountedProgram, options: Mapping[str, Any]) -> bool:
    asked = "cse_barrier_expander" in str(options.get("xla_disable_hlo_passes", ""))
    return asked or xla_options.barrier_options(case.platform) == {}


def hidden_bytes(case: AccountedProgram, held: int, options: Mapping[str, Any]) -> int:
    """The bytes that a program needs besides, once no kernel computes several layers."""
    if case.platform != "cpu" or not xla_options.accepted(tuple(SHOWN.items())):
        return 0
    return max(0, _jax.held_bytes(_jax.memory_fields(case.compiled({**options, **SHOWN}))) - held)


def hides(hidden: int) -> str:
    """A kernel that computes several layers."""
    return (
        "several layers compile to one kernel whose own memory is not reported: about "
        f"{hidden:,} bytes are hidden. They are shown with compiler_options={SHOWN!r}."
    )


def undone(case: AccountedProgram, ours: MemoryEstimate, options: Mapping[str, Any]) -> Iterator[str]:
    """Recomputation that the compiler undoes."""
    if _keeps_barriers(case, options) or not _has_checkpoints(case.jaxpr):
        return
    kept = estimated(case, options, kept=True)
    if kept.temporary >= 0.98 * ours.temporary:
        return
    known = xla_options.barrier_options(case.platform)
    remedy = (
        f"jit with compiler_options={known}, or put the checkpointed part into a scan"
        if known
        else "put the checkpointed part into a scan; this XLA does not have the option that keeps it"
    )
    yield (
        "what jax.checkpoint computes again is shared with what was computed before, so nothing is saved: "
        f"about {ours.temporary:,} temporary bytes where {kept.temporary:,} would do; {remedy}."
    )


def embedded(ours: MemoryEstimate, total: int) -> Iterator[str]:
    """The arrays that the function closes over, which are part of the executable."""
    captured = sum(nbytes(v) for v in ours.constants)
    if captured > 0.01 * total:
        yield (
            f"{captured:,} bytes are constants, arrays that the function closes over: they are part of "
            "the executable, which memory_analysis() does not count; pass them as arguments."
        )


def divided(case: AccountedProgram) -> Iterator[str]:
    """Several devices, of which compiled bytes are those of one."""
    eqns = (e for e in _jax.equations(case.jaxpr) if e.primitive.name == "shard_map")
    meshes = [e.params["mesh"].size for e in eqns]
    devices = max([*meshes, *(len(s.device_set) for s in case.shardings if s is not None)], default=1)
    if devices > 1:
        yield (
            f"{devices} devices: compiled bytes are what one of them holds, while the estimate counts one "
            "device's arguments, and other values as if it held all of them."
        )


def undonated(case: AccountedProgram | None) -> Iterator[str]:
    """What a train step holds twice because it donates nothing."""
    if case is None or case.donated:
        return
    jaxpr = _jax.open_jaxpr(case.jaxpr)
    state = [i for i, c in enumerate(case.categories) if c in ("parameters", "optimizer state")]
    saved = sum(nbytes(jaxpr.invars[i]) for i in case.donating(state).aliases)
    if saved:
        yield (
            f"The step donates nothing, so that parameters and optimizer state exist twice: {saved:,} bytes; "
            "jax.jit(step, donate_argnums=…) writes the new ones over the old."
        )


def _has_checkpoints(jaxpr: Any) -> bool:
    """Whether something is recomputed outside of loops."""

    def outside(eqn: Any) -> bool:
        return eqn.primitive.name not in ("scan", "while")

    return any(eqn.primitive.name in CHECKPOINTS for eqn in _jax.equations(jaxpr, outside))
