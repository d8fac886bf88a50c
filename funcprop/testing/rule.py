"""`check_rule`: one hand-written rule at concrete arguments, against every oracle there is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypeAlias

import jax

from funcprop.rules.attach import why_not
from funcprop.rules.layer import Layer
from funcprop.rules.rule import Rule
from funcprop.testing import batching, terms
from funcprop.testing.case import RuleCase, make_case
from funcprop.testing.compare import CheckError, CheckReport, CheckRow, Claim, Limit

Term: TypeAlias = Callable[[RuleCase], Iterator[Claim] | Iterator[Limit]]

# What breaks first is reported, so the more basic terms come first: a pullback that is not linear is called
# that, and not "wrong".
TERMS: dict[str, Term] = {
    "value": terms.value,
    "linearity": terms.linearity,
    "cotangent": terms.cotangents,
    "finite differences": terms.finite_differences,
    "stale residual": terms.stale_residual,
    "needs": terms.needs,
    "jvp": terms.forward_mode,
    "adjoint": terms.adjoint,
    "second order": terms.second_order,
    "jit": terms.under_jit,
    "vmap": batching.under_vmap,
    "scan": batching.under_scan,
}


def check_rule(
    operator: Layer | Rule,
    *args: Any,
    function: Callable[..., Any] | None = None,
    primitive: str | None = None,
    rule: Rule | None = None,
    tolerance: float | None = None,
    residual_bytes: float | None = 1.0,
    batch_times_parameters: float | None = 1.0,
    dtypes: Sequence[str] = ("float32", "bfloat16"),
    **static: Any,
) -> CheckReport:
    """Check a hand-written rule at concrete arguments.

    For the plain function `y = f(x₁, …, xₙ)`, its rule with pullback `B`, and random `ȳ`, `v`:

    | term                | what must hold                                                               |
    |---------------------|------------------------------------------------------------------------------|
    | value               | the rule's forward is `f`                                                    |
    | linearity           | `B(2a + 3b) = 2B(a) + 3B(b)`, `B(0) = 0`                                     |
    | cotangent           | `B(ȳ) = (∂f/∂x)ᵀ ȳ` by autodiff                                              |
    | finite differences  | `⟨B(ȳ), v⟩ = ⟨ȳ, f(x + hv) − f(x − hv)⟩ / 2h`                                |
    | stale residual      | two forwards in a row do not disturb each other's backward                   |
    | needs               | every wanted cotangent is the same, whichever others are wanted              |
    | jvp                 | forward mode of the attached rule is `(∂f/∂x) v`                             |
    | adjoint             | `⟨ȳ, (∂f/∂x) v⟩ = ⟨B(ȳ), v⟩`                                                 |
    | second order        | forward over reverse and reverse over reverse, also in `ȳ`                   |
    | jit, vmap, scan     | values and cotangents; under `vmap` with every choice of shared arguments    |
    | batch × parameters  | no cotangent of a shared argument is formed per example and then summed      |
    | float32, bfloat16   | dtypes, and about the accuracy of autodiff                                   |
    | residual bytes      | no more is saved than autodiff saves                                         |

    All but the lower precisions are in float64, whatever `jax_enable_x64` says; the arguments are converted.
    They should be inside the domain, away from kinks and ties.

    Args:
        operator: a layer with a rule, or a rule.
        *args: positional arguments: arrays, integers, PRNG keys, or pytrees of them.
        function: the plain function that a rule differentiates: called as `function(*args, **static)`.
        primitive: for the rule of a JAX primitive, its name; `function` is then the `jax.lax` function that
            is this one primitive, and the equation's parameters are the rule's keyword arguments.
        rule: a rule to check in place of the layer's own.
        tolerance: relative to the largest entry; by default `ε^⅔` of the dtype (4e-11 in float64). Pass a
            larger one for a function that computes in float32 inside.
        residual_bytes: how many times autodiff's residuals the rule may save; None for no limit, for a rule
            that buys time with memory.
        batch_times_parameters: how many times larger than everything in autodiff's gradient an intermediate
            of the size batch × parameter may be; None for no limit.
        dtypes: the lower precisions in which it is checked; leave out one that the function cannot run in.
            One in which the rule does not apply is skipped.
        **static: keyword arguments of the layer or function, and of the rule.

    Returns:
        A report with the largest error of every term; `print` shows it as a table.

    Raises:
        CheckError: with the term, the argument by its name, the largest deviation and, where it can be
            seen, the likely mistake.
        ValueError: there is nothing to check: no rule, no plain function, no differentiable argument.

    Reference: Griewank and Walther, *Evaluating Derivatives*, section 3.2 (the adjoint identity). The
    terms follow ChainRulesTestUtils.jl and matfree's adjoint tests.

    Example:
        >>> import jax.numpy as jnp, funcprop as fp
        >>> from funcprop.testing.rule import check_rule
        >>> tanh = fp.rules.handwritten["tanh"]
        >>> report = check_rule(tanh, jnp.linspace(-1, 1, 5), function=jnp.tanh, primitive="tanh")
        >>> report["cotangent"].error < 1e-12
        True
    """
    with jax.enable_x64(True):
        case = make_case(
            operator, args, static, rule=rule, function=function, primitive=primitive, tolerance=tolerance
        )
        reason = why_not(case.bind(case.leaves), [jax.typeof(x) for x in case.leaves])
        if reason is not None:
            raise CheckError(f"{case.subject}: the rule does not apply to these arguments: {reason}.")
        table: dict[str, Term] = {
            **TERMS,
            **{dtype: partial(terms.lower_precision, dtype=dtype) for dtype in dtypes},
            "batch × parameters": partial(batching.batch_times_parameters, factor=batch_times_parameters),
            "residual bytes": partial(terms.residual_bytes, factor=residual_bytes),
        }
        return CheckReport(case.subject, tuple(_row(case, name, term) for name, term in table.items()))


def _row(case: RuleCase, name: str, term: Term) -> CheckRow:
    errors, note = [], ""
    try:
        for claim in term(case):
            errors.append(claim.verify(case.subject))
            note = claim.note
    except CheckError:
        raise
    except Exception as error:
        raise CheckError(f"{case.subject}: {name}: {type(error).__name__}: {error}") from error
    return CheckRow(name, len(errors), max(errors, default=0.0), note if errors else "nothing to compare")
