"""From the buffers of a program to the rows of its ledger: whose each is, and what it is for."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

from funcprop import _jax
from funcprop._jax.buffers import Assignment, Buffer
from funcprop.graph.naming import without_transformations
from funcprop.memory.accounted_program import AccountedProgram
from funcprop.memory.estimate import MemoryEstimate
from funcprop.memory.ledger import Category, Row
from funcprop.program.sizes import nbytes

_MARKS = ("vmap", "jvp", "transpose", "checkpoint", "rematted_computation")
# Parts of a name that say how something runs and not what it is.
_CALL = re.compile(r"jit\([^()]*\)")
_RUNNING = re.compile(r"while|body|cond|closed_call|checkpoint|rematted_computation|branch_\d+_fun")


def sweep_of(op_name: str) -> str:
    """The sweep in which an operator runs, by its name: empty outside of sweeps."""
    if "rematted_computation" in op_name:
        return "recomputed"
    if "transpose(" in op_name:
        return "backward"
    if "jvp(" in op_name:
        return "forward"
    return "optimizer" if "optimizer" in op_name.split("/") else ""


def scope_of(op_name: str) -> str:
    """The named scopes of an operator, without what transformations and calls add to them."""
    parts = without_transformations(_CALL.sub("", op_name), _MARKS).split("/")[:-1]
    return "/".join(part for part in parts if not _RUNNING.fullmatch(part))


def _first_scope(op_names: Iterable[str]) -> str:
    return next((scope for scope in map(scope_of, op_names) if scope), "")


def compiled_rows(
    case: AccountedProgram, found: Assignment, ours: MemoryEstimate, trains: bool
) -> tuple[Row, ...]:
    """The rows of a compiled program; `trains` says whether it has two sweeps."""
    rows = [_row(case, buffer, ours, trains) for buffer in found.buffers]
    if found.unused:
        rows.append(Row("gaps", "", "unused", found.unused, (found.unused,), "uint8", "placement"))
    return tuple(rows)


def _row(case: AccountedProgram, buffer: Buffer, ours: MemoryEstimate, trains: bool) -> Row:
    name = buffer.op_name.split("/")[-1] or buffer.opcode
    category: Category = "workspace"
    sweep, scope = sweep_of(buffer.op_name), scope_of(buffer.op_name)
    path = "" if buffer.source is None else _owner(case, case.read[buffer.source])
    operator = name
    if buffer.argument is not None:
        i = case.read[buffer.argument]
        name, category, path = case.names[i], case.categories[i], _owner(case, i)
        operator, sweep, scope = "input", "", _first_scope(ours.readers(ours.arguments[i]))
    elif buffer.kind == "constant":
        name, category = "constant", "constants"
    elif buffer.kind == "result":
        category = "results"
        if buffer.results:
            name, category = case.result(buffer.results[0])
        elif buffer.opcode == "tuple":
            name, scope, path, sweep = "pointers", "", "", ""
    elif buffer.op_name and buffer.opcode != "tuple":
        category = _purpose(sweep, buffer.readers, trains)
    return Row(name, scope, category, buffer.nbytes, buffer.shape, buffer.dtype, operator, sweep, path)


def _owner(case: AccountedProgram, i: int) -> str:
    """The path of the layer that an argument belongs to; empty for an input."""
    path = case.names[i]
    if case.categories[i] == "optimizer state":
        known = (n for n, c in zip(case.names, case.categories, strict=True) if c == "parameters")
        return max((n for n in known if path.endswith(f"/{n}")), key=len, default="")
    return path if case.categories[i] == "parameters" else ""


def _purpose(sweep: str, readers: Sequence[str], trains: bool) -> Category:
    """What a temporary value is for: by the sweep that makes it, and those that read it."""
    read_in = {sweep_of(reader) for reader in readers}
    if sweep == "backward":
        return "gradients" if read_in & {"optimizer", ""} and any(readers) else "cotangents"
    if sweep == "optimizer":
        return "gradients"
    if sweep == "forward" and read_in & {"backward", "recomputed"}:
        return "saved"
    return "activations" if sweep or not trains else "workspace"


def total_rows(case: AccountedProgram, fields: dict[str, int], constant: int) -> tuple[Row, ...]:
    """The rows of a compiled program of which only the totals are known: arguments, results and one other."""
    types = [_jax.open_jaxpr(case.jaxpr).invars[i].aval for i in case.read]
    shardings = [case.shardings[i] for i in case.read]
    rows = [
        _argument(case, i, aval, sharding)
        for i, aval, sharding in zip(case.read, types, shardings, strict=True)
    ]
    rest = {
        ("padding of arguments", "unused"): fields["argument"] - sum(row.nbytes for row in rows),
        ("results", "results"): fields["output"] - fields["alias"],
        ("temporaries", "workspace"): fields["temporary"],
        ("constants", "constants"): constant,
    }
    rows += [
        Row(name, "", category, n, (n,), "uint8", "not told")  # type: ignore[arg-type]
        for (name, category), n in rest.items()
        if n
    ]
    return tuple(rows)


def _argument(case: AccountedProgram, i: int, aval: Any, sharding: Any, scope: str = "") -> Row:
    shape = tuple(aval.shape) if sharding is None else tuple(sharding.shard_shape(aval.shape))
    size = nbytes(aval) // max(math.prod(aval.shape), 1) * math.prod(shape)
    return Row(
        *(case.names[i], scope, case.categories[i], size, shape, str(aval.dtype), "input"),
        path=_owner(case, i),
    )


def estimated_rows(case: AccountedProgram, found: MemoryEstimate, trains: bool) -> tuple[Row, ...]:
    """The rows of an estimate."""
    jaxpr = _jax.open_jaxpr(case.jaxpr)
    rows = []
    for i in case.read:
        scope = _first_scope(found.readers(found.arguments[i]))
        rows.append(_argument(case, i, jaxpr.invars[i].aval, case.shardings[i], scope))
    rows += [
        Row("constant", "", "constants", nbytes(v), tuple(v.aval.shape), str(v.aval.dtype), "constant")
        for v in found.constants
    ]
    overwriting = set(case.aliases.values())
    for j, v in enumerate(jaxpr.outvars):
        if j not in overwriting:
            name, category = case.result(j)
            rows.append(Row(name, "", category, nbytes(v), tuple(v.aval.shape), str(v.aval.dtype), "result"))
    for value in found.live:
        step = value.step
        assert step is not None
        named = f"{step.scope}/{step.op}"
        sweep = sweep_of(named)
        rows.append(
            Row(
                *(step.op, scope_of(named), _purpose(sweep, found.readers(value), trains), value.nbytes),
                *(tuple(value.aval.shape), str(value.aval.dtype), step.op),
                sweep=sweep,
            )
        )
    rest = found.temporary - sum(value.nbytes for value in found.live)
    if rest:
        rows.append(Row("inside of operators", "", "workspace", rest, (rest,), "uint8", found.operator))
    return tuple(rows)


def largest(rows: Iterable[Row], count: int = 3) -> str:
    """The largest rows as text."""
    chosen = sorted(rows, key=lambda row: -row.nbytes)[:count]
    return ", ".join(f"{row.name} {row.nbytes:,} ({row.category})" for row in chosen)
