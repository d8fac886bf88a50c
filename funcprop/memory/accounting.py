"""`fp.memory.footprint`: what a function holds in memory, for inference and for training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import optax

from funcprop import _jax
from funcprop._jax import nnx
from funcprop._jax.buffers import NoBuffersError, buffers
from funcprop._jax.hlo import constant_bytes
from funcprop.graph.references import require_no_references
from funcprop.graph.tracing import Arguments
from funcprop.memory import notes
from funcprop.memory.accounted_program import AccountedProgram
from funcprop.memory.cases import KINDS, Kind, Subject
from funcprop.memory.estimate import MemoryEstimate
from funcprop.memory.ledger import Footprint, Ledger, Row
from funcprop.memory.rows import compiled_rows, estimated_rows, total_rows
from funcprop.program.call import require_optimizer
from funcprop.rules.rule_set import RuleSet


def footprint(
    fun: Callable[..., Any],
    argnums: int | Sequence[int] | None = 0,
    has_aux: bool = False,
    *,
    optimizer: optax.GradientTransformation | None = None,
    donate: bool = True,
    rules: RuleSet | None = None,
    kind: Kind | None = None,
    measure: bool = True,
    programs: Sequence[str] = ("inference", "training"),
    compiler_options: Mapping[str, Any] | None = None,
) -> Callable[..., Footprint]:
    """Account the memory of a function, buffer by buffer.

    `footprint(fun, argnums)(*args, **kwargs) -> Footprint`. Arguments may be shapes; the function is traced
    and compiled, never run. The rows are XLA's own buffers of the compiled program, which add up to
    `argument + output + temporary − alias` and the arrays that the function captures, which are part of the
    executable. Beside them stands an estimate that needs no compilation: the peak of a liveness analysis of
    the jaxpr,

        max over t of the bytes of all values that are needed at t.

    Where arguments carry shardings (`jax.ShapeDtypeStruct(…, sharding=…)`, or arrays), the program is
    compiled for their devices, those of a topology that is only described too, and the compiled bytes are
    those of one device. State that an optimizer makes of a parameter lies as the parameter does. A compiler
    that does not say which buffers there are (those of TPU and CUDA without a device) leaves one row for all
    temporaries.

    A loss (one real scalar) is accounted as it is (`inference`), and its value with its gradient, or a step
    of `optimizer` (`training`). A prediction is accounted as it is, and with the pullback of cotangents that
    are given as arguments. A whole train step, which contains a backward sweep of its own, is `training`
    alone.

    The estimate follows XLA's CPU backend. Of drawn programs of megabytes nine in ten are within 15 %
    (`experiments/memory_figures.py`); of kilobytes some are a third off.

    Args:
        fun: a loss, a prediction, or a train step, jitted or not.
        argnums: what is differentiated, as in `fp.grad`; None for all that can be.
        has_aux: whether `fun` returns the pair (result, auxiliary data).
        optimizer: any optax optimizer; `training` is a step of it: new parameters, new state, value.
        donate: whether that step overwrites parameters and state.
        rules: a rule set for the gradient; `fp.rules.default` if None.
        kind: "loss", "prediction" or "step" if it is not what it looks like.
        measure: whether to compile; if not, `compiled` is None, and the rows are those of the estimate.
        programs: a sequence of which of the two to account.
        compiler_options: as in `jax.jit`.

    Raises:
        ValueError: `kind` or one of `programs` is not known, or there is no argument at a position in
            `argnums`.
        TypeError: `optimizer` with a function that is not a loss, or an argument at `argnums` has no
            derivative.

    Example:
        >>> import jax, jax.numpy as jnp, funcprop as fp
        >>> predict = lambda w, x: jnp.tanh(x @ w["W1"]) @ w["W2"]
        >>> shape = lambda *dims: jax.ShapeDtypeStruct(dims, "float32")
        >>> w, x = {"W1": shape(8, 4), "W2": shape(4, 2)}, shape(100, 8)
        >>> fp.memory.footprint(predict)(w, x).inference.estimate  # 4 (P + Bd + Bh + Bq), P = dh + hq
        5760
    """
    if kind is not None and kind not in KINDS:
        raise ValueError(f"footprint: kind={kind!r} is not known; use one of {', '.join(KINDS)}, or None.")
    programs = (programs,) if isinstance(programs, str) else programs
    if unknown := set(programs) - {"inference", "training"}:
        raise ValueError(
            f"footprint: programs={programs!r}: {sorted(unknown)} are not known; use 'inference', 'training'."
        )
    options = dict(compiler_options or {})
    if optimizer is not None:
        require_optimizer("footprint: ", optimizer)

    def account(subject: Subject) -> Footprint:
        which = kind or subject.kind
        cases: dict[str, AccountedProgram | None] = {}
        if which != "step":
            cases["inference"] = subject.inference
        if "training" in programs:
            cases["training"] = (
                subject.whole_step()
                if which == "step"
                else subject.gradient()
                if optimizer is None
                else subject.step(optimizer, donate)
            )
        warnings: list[str] = []
        ledgers = {
            name: _ledger(case, measure, options, warnings, name)
            for name, case in cases.items()
            if case is not None and name in programs
        }
        if which == "step":
            warnings += notes.undonated(cases.get("training"))
        return Footprint(subject.label, ledgers.get("inference"), ledgers.get("training"), tuple(warnings))

    def accounted(*args: Any, **kwargs: Any) -> Footprint:
        return with_subject(account, fun, args, kwargs, argnums, has_aux, rules, kind)

    return accounted


def with_subject(
    use: Callable[[Subject], Any],
    fun: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    argnums: Any,
    has_aux: bool,
    rules: RuleSet | None,
    kind: Kind | None = None,
) -> Any:
    """`use` of a call whose arguments may be nnx models, which are left as they are.

    Raises:
        TypeError: an argument is a mutable reference.
    """
    require_no_references("footprint", fun, args, kwargs)
    if not nnx.has_models((args, kwargs)):
        return use(Subject.of(fun, args, kwargs, argnums, has_aux, rules, None))

    def run(pure: Callable[..., Any], arguments: tuple[Any, ...], _: Any) -> tuple[Any, Any]:
        signature = Arguments(*nnx.describe(args, kwargs, arguments))
        return use(Subject.of(pure, arguments, {}, argnums, has_aux, rules, signature)), None

    return nnx.call(run, fun, args, dict(kwargs))


def _ledger(
    case: AccountedProgram, measure: bool, options: Mapping[str, Any], warnings: list[str], name: str
) -> Ledger:
    """Account one program."""
    found = notes.estimated(case, options)
    trains = name == "training"
    rows = estimated_rows(case, found, trains)
    total = sum(row.nbytes for row in rows)
    said = [*notes.embedded(found, total), *notes.divided(case)]
    fields: dict[str, int] = {}
    compiled = None
    if measure:
        program = case.compiled(options)
        fields, rows, more = _measured(case, program, found, options, trains)
        compiled = sum(row.nbytes for row in rows)
        said += [*more, *notes.undone(case, found, options)]
    warnings += (f"{name}: {text}" for text in said)
    return Ledger(total, compiled, rows, fields)


def _measured(
    case: AccountedProgram, program: Any, ours: MemoryEstimate, options: Mapping[str, Any], trains: bool
) -> tuple[dict[str, int], tuple[Row, ...], list[str]]:
    """Read the bytes of a compiled program, its rows, and what they do not show."""
    fields = _jax.memory_fields(program)
    try:
        assignment = buffers(program)
    except NoBuffersError as error:
        rows = total_rows(case, fields, constant_bytes(_jax.program_text(program)))
        return {**fields, "hidden": 0}, rows, [str(error)]
    rows = compiled_rows(case, assignment, ours, trains)
    constant = sum(row.nbytes for row in rows if row.category == "constants")
    held = _jax.held_bytes(fields)
    hidden = notes.hidden_bytes(case, held, options) if assignment.hides else 0
    live = sum(row.nbytes for row in rows) - assignment.unused
    fields = {**fields, "constant": constant, "live": live, "hidden": hidden}
    return fields, rows, [notes.hides(hidden)] if hidden else []
