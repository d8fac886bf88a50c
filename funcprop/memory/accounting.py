"""`fp.memory.footprint`: what a function holds in memory, for inference and for training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import optax

from funcprop._jax import nnx
from funcprop.graph.references import require_no_references
from funcprop.graph.tracing import Arguments
from funcprop.memory import traps
from funcprop.memory.cases import KINDS, AccountedProgram, Kind, Subject
from funcprop.memory.ledger import Footprint, Ledger
from funcprop.memory.rows import predicted
from funcprop.memory.traps import SHOWN, measured
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
    """The memory of a function, predicted and compiled, buffer by buffer.

    `footprint(fun, argnums)(*args, **kwargs) -> Footprint`. Arguments may be shapes; the function is traced
    and compiled, never run. What is predicted is the peak of a liveness analysis of the jaxpr,

        max over t of the bytes of all buffers that are needed at t,

    after what XLA's CPU backend does to it: fusion, order, writing in place, copies of donated arguments that
    are still read, placement. What is compiled is `argument + output + temporary − alias`,
    and the arrays that the function captures, which are part of the executable.

    A loss (one real scalar) is accounted as it is (`inference`), and its value with its gradient, or a step
    of `optimizer` (`training`). A prediction is accounted as it is, and with the pullback of cotangents that
    are given as arguments. A whole train step, which contains a backward sweep of its own, is `training`
    alone.

    The prediction is meant for programs of megabytes; of kilobytes, some are a third off. It is known to be
    too low for `jax.lax.associative_scan`, by a quarter in inference and a tenth in training.

    Args:
        fun: a loss, a prediction, or a train step, jitted or not.
        argnums: what is differentiated, as in `fp.grad`; None for all that can be.
        has_aux: whether `fun` returns the pair (result, auxiliary data).
        optimizer: any optax optimizer; `training` is a step of it: new parameters, new state, value.
        donate: whether that step overwrites parameters and state.
        rules: a rule set for the gradient; `fp.rules.default` if None.
        kind: "loss", "prediction" or "step" if it is not what it looks like.
        measure: whether to compile; if not, `compiled` is None.
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
        >>> fp.memory.footprint(predict)(w, x).inference.predicted  # 4 (P + Bd + Bh + Bq), P = dh + hq
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
        notes: list[str] = []
        ledgers = {
            name: _ledger(case, measure, options, notes, name)
            for name, case in cases.items()
            if case is not None and name in programs
        }
        if which == "step":
            notes += traps.undonated(cases.get("training"))
        return Footprint(subject.label, ledgers.get("inference"), ledgers.get("training"), tuple(notes))

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
    case: AccountedProgram, measure: bool, options: Mapping[str, Any], notes: list[str], name: str
) -> Ledger:
    """One program; what inference hides in fused kernels is shown."""
    shown = SHOWN if name == "inference" else {}
    library = not shown and not traps.without_library(options)
    found = predicted(case, library, traps.keeps_barriers(options))
    known = (*traps.embedded(found), *traps.widened(case), *traps.divided(case))
    notes += (f"{name}: {text}" for text in known)
    if not measure:
        return Ledger(found.total, None, found.rows)
    result = measured(case, options, shown, captures=found.captured > 0)
    notes += (f"{name}: {text}" for text in traps.found(case, found, result, options))
    return Ledger(found.total, result.total, found.rows, result.fields)
