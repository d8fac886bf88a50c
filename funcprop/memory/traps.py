"""Where the numbers of XLA's CPU backend mislead: each trap in words, where it bites, with its remedy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from funcprop import _jax
from funcprop._jax import xla_options
from funcprop._jax.hlo import constant_bytes
from funcprop.memory.cases import AccountedProgram
from funcprop.memory.rows import Predicted, predicted
from funcprop.program.facts import CHECKPOINTS, PRODUCTS
from funcprop.program.flops import of_jaxpr
from funcprop.program.sizes import nbytes

# With it, a chain of layers is no longer one kernel whose memory is not reported.
SHOWN = {"xla_cpu_experimental_ynn_fusion_type": ""}


@dataclass(frozen=True, eq=False)
class CompiledBytes:
    """A compiled program: bytes, and what it hid before an option showed it."""

    total: int
    fields: dict[str, int]
    hidden: int
    flops: float | None


def keeps_barriers(options: Mapping[str, Any]) -> bool:
    """Whether recomputation is kept: by compiler options, or because this compiler keeps it anyway."""
    asked = "cse_barrier_expander" in str(options.get("xla_disable_hlo_passes", ""))
    return asked or xla_options.barrier_options(jax.default_backend()) == {}


def without_library(options: Mapping[str, Any]) -> bool:
    """Whether compiler options say that sums are not computed by a library."""
    return any(options.get(name) == value for name, value in SHOWN.items())


def measured(
    case: AccountedProgram, options: Mapping[str, Any], shown: Mapping[str, Any], captures: bool = False
) -> CompiledBytes:
    """Compile; with `shown` once more, where this compiler knows that option, to see what the first hides.

    If the program `captures` arrays, those that are part of the executable are counted, too.
    """
    program = case.compiled(options)
    fields = _jax.memory_fields(program)
    flops = _jax.counted_flops(program)
    total, hidden = _jax.held_bytes(fields), 0
    if shown and xla_options.accepted(tuple(shown.items())):
        other = _jax.memory_fields(case.compiled({**options, **shown}))
        hidden = max(0, _jax.held_bytes(other) - total)
        fields = other if hidden else fields
    constants = constant_bytes(_jax.program_text(program)) if captures else 0
    return CompiledBytes(total + hidden + constants, {**fields, "constant": constants}, hidden, flops)


def found(
    case: AccountedProgram, ours: Predicted, program: CompiledBytes, options: Mapping[str, Any]
) -> Iterator[str]:
    """The traps that bite this program."""
    if program.hidden:
        ((option, value),) = SHOWN.items()
        yield (
            "the forward pass compiles to a fused kernel whose own memory is not reported: "
            f"{program.hidden:,} bytes are hidden. They are shown, and counted here, with "
            f"compiler_options={{{option!r}: {value!r}}}."
        )
    fields = program.fields
    held = _jax.held_bytes(fields)
    if fields["temporary"] and fields["peak"] < held - fields["temporary"] // 2:
        yield (
            f"memory_analysis().peak_memory_in_bytes says {fields['peak']:,}, without the temporaries; use "
            f"argument + output + temp − alias, which is {held:,}."
        )
    if not keeps_barriers(options) and _has_checkpoints(case.jaxpr):
        kept = predicted(case, library=True, barriers=True)
        if kept.total < 0.98 * ours.total:
            known = xla_options.barrier_options(jax.default_backend())
            remedy = (
                f"jit with compiler_options={known}, or put the checkpointed part into a scan"
                if known
                else "put the checkpointed part into a scan; this XLA does not have the option that keeps it"
            )
            yield (
                "what jax.checkpoint computes again is shared with what was computed before, so nothing is "
                f"saved: {ours.total:,} bytes where {kept.total:,} would do; {remedy}."
            )
    ours_flops = of_jaxpr(case.jaxpr)
    if program.flops and _has_loops(case.jaxpr) and program.flops < 0.5 * ours_flops:
        yield (
            f"cost_analysis() counts the body of a loop once: it says {program.flops:,.0f} flops, there are "
            f"{ours_flops:,}; fp.trace(fun)(*args).flops counts every iteration of the function itself."
        )


def embedded(ours: Predicted) -> Iterator[str]:
    """The arrays that the function closes over, which are part of the executable."""
    if ours.captured > 0.01 * ours.total:
        yield (
            f"{ours.captured:,} bytes are constants, arrays that the function closes over: they are part of "
            "the executable, which memory_analysis() does not count; pass them as arguments."
        )


def widened(case: AccountedProgram) -> Iterator[str]:
    """Products of 16-bit numbers, whose operands XLA's CPU backend converts to copies of 32 bits."""
    if jax.default_backend() == "cpu" and _has_products_of_16_bits(case.jaxpr):
        yield (
            "products of 16-bit numbers are computed in float32 on the CPU, from converted copies of their "
            "operands that the prediction does not count: it is up to a half too low; go by `compiled`."
        )


def divided(case: AccountedProgram) -> Iterator[str]:
    """A `shard_map` over several devices, of which only its body is accounted for one."""
    eqns = (e for e in _jax.equations(case.jaxpr) if e.primitive.name == "shard_map")
    devices = max((e.params["mesh"].size for e in eqns), default=1)
    if devices > 1:
        yield (
            f"a shard_map over {devices} devices: `compiled` is what one of them holds, while `predicted` "
            "counts what one of them computes, but whole arguments."
        )


def undonated(case: AccountedProgram | None) -> Iterator[str]:
    """What a train step holds twice because it donates nothing."""
    if case is None or case.donated:
        return
    jaxpr = _jax.open_jaxpr(case.jaxpr)
    state = [i for i, c in enumerate(case.categories) if c in ("parameters", "optimizer state")]
    saved = sum(
        nbytes(jaxpr.invars[i])
        for i in AccountedProgram(case.jaxpr, case.names, case.categories, frozenset(state)).aliases
    )
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


def _has_loops(jaxpr: Any) -> bool:
    return any(eqn.primitive.name == "scan" and eqn.params["length"] > 1 for eqn in _jax.equations(jaxpr))


def _has_products_of_16_bits(jaxpr: Any) -> bool:
    return any(
        v.aval.dtype in (jnp.bfloat16, jnp.float16)
        for eqn in _jax.equations(jaxpr)
        if eqn.primitive.name in PRODUCTS
        for v in eqn.invars
    )
