"""The terms of a check: each is a function from a case to the claims that it makes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from funcprop import _jax
from funcprop.program.linear_map import Arrays
from funcprop.program.sizes import nbytes
from funcprop.rules.attach import why_not
from funcprop.testing.case import RuleCase, cast, generator, magnitude, normal_like, subsets
from funcprop.testing.compare import CheckError, Claim, Limit, Tolerances, as_numpy, deviations

Claims = Iterator[Claim]

DIRECTIONS = 3  # random directions of a finite difference, for each argument


def value(case: RuleCase) -> Claims:
    """The rule's forward computes the plain function."""
    results, tree, _, _ = case.bind(case.leaves).forward(case.leaves)
    if len(results) != len(case.results):
        raise CheckError(
            f"{case.subject}: value: forward returned {len(results)} arrays ({tree}) where the plain "
            f"function returns {len(case.results)}."
        )
    yield from case.result_claims("value", results, case.expected_results)


def linearity(case: RuleCase) -> Claims:
    """`B(2a + 3b) = 2B(a) + 3B(b)` and `B(0) = 0`, for the pullback `B`."""
    a, b = case.random_results(3), case.random_results(4)
    sums = [jnp.asarray(2 * np.asarray(x) + 3 * np.asarray(y)) for x, y in zip(a, b, strict=True)]
    zeros = [jnp.asarray(np.zeros_like(x)) for x in a]
    of_sum, of_a, of_b, of_zero = (case.pullback(case.leaves, ct) for ct in (sums, a, b, zeros))
    for i, cotangent in of_sum.items():
        with np.errstate(invalid="ignore"):
            expected = 2 * as_numpy(of_a[i]) + 3 * as_numpy(of_b[i])
        # Where it is not finite, "not linear" would be true but not helpful; the next term names it.
        finite = np.isfinite(as_numpy(cotangent)) & np.isfinite(expected)
        expected = np.where(finite, expected, 0)
        # A cotangent of the wrong dtype is not linear to the last digit of the right one.
        coarse = replace(case, precision=_coarser(case.precision, Tolerances.of(cotangent.dtype)))
        for where, value, linear in (
            ("B(2a + 3b) = 2B(a) + 3B(b)", cotangent, expected),
            ("zero cotangent", of_zero[i], np.zeros_like(expected)),
        ):
            yield coarse.claim(
                f"linearity, {where}",
                f"pullback to argument {case.names[i]!r}",
                np.where(finite, as_numpy(value), 0),
                linear,
                [expected],
            )


def cotangents(case: RuleCase) -> Claims:
    """`x̄ = (∂y/∂x)ᵀ ȳ` as autodiff of the plain function has it."""
    found = case.pullback(case.leaves, case.cotangents)
    yield from case.cotangent_claims("cotangent against autodiff", found, case.expected)


def finite_differences(case: RuleCase) -> Claims:
    """`⟨x̄, v⟩ = ⟨ȳ, f(x + hv) − f(x − hv)⟩ / 2h` for random directions `v` of each argument."""
    found = case.pullback(case.leaves, case.cotangents)
    function, step = jax.jit(case.plain), case.precision.step
    rng = generator(5)

    def objective(i: int, x: Any) -> float:
        results = function(*case.with_arguments(case.leaves, [i], [jnp.asarray(x)]))
        return inner([results[j] for j in case.smooth_results], case.cotangents)

    pairs = zip((case.expected_results[j] for j in case.smooth_results), case.cotangents, strict=True)
    size = sum(float(np.sum(np.abs(as_numpy(y) * as_numpy(ct)))) for y, ct in pairs)
    for i, cotangent in found.items():
        x = np.asarray(case.leaves[i])
        directions = [np.asarray(normal_like(rng, x)) for _ in range(DIRECTIONS)]
        slopes = [(objective(i, x + step * v) - objective(i, x - step * v)) / (2 * step) for v in directions]
        claim = case.claim(
            "cotangent against finite differences",
            f"cotangent of argument {case.names[i]!r}",
            np.asarray([inner([cotangent], [v]) for v in directions]),
            np.asarray(slopes),
            [],
        )
        # Rounding of the function, divided by the step, is all that a difference of zero shows.
        yield replace(claim, relative=step, absolute=100 * case.precision.relative * max(1.0, size))


def stale_residual(case: RuleCase) -> Claims:
    """A backward reads the residuals that it is given, not those of the last or the first forward."""
    kept = []
    for leaves in case.examples[:2]:
        _, tree, residuals, residual_tree = case.bind(leaves).forward(leaves)
        kept.append((leaves, jax.tree.unflatten(residual_tree, residuals), tree))
    for b, (leaves, residuals, tree) in enumerate(kept):
        found = case.backward(leaves, residuals, tree, case.batch_cotangents[b])
        which = "another forward followed" if b == 0 else "another forward came before"
        yield from case.cotangent_claims(f"stale residual, {which}", found, case.expected_examples[b][1])


def needs(case: RuleCase) -> Claims:
    """Check that a wanted cotangent is the same whichever others are wanted; alone, and attached."""
    choices = subsets(case.smooth, every_up_to=6)

    @jax.jit  # One program, here and below: it compiles several times faster than one for each choice.
    def gradients(leaves: Arrays, cotangents: Arrays) -> list[Arrays]:
        return [case.vjp(case.attached, leaves, cotangents, wanted)[1] for wanted in choices]

    for wanted, attached in zip(choices, gradients(case.leaves, case.cotangents), strict=True):
        where = f"needs, only {case.chosen(wanted)} wanted"
        alone = case.pullback(case.leaves, case.cotangents, wanted)
        yield from case.cotangent_claims(where, alone, case.expected)
        found = dict(zip(wanted, attached, strict=True))
        yield from case.cotangent_claims(f"{where}, attached", found, case.expected)


def forward_mode(case: RuleCase) -> Claims:
    """`ẏ = (∂y/∂x) ẋ` of the attached rule, for each argument and for all together."""
    choices = [*((i,) for i in case.smooth), tuple(case.smooth)]
    tangents = case.random_arguments(6)
    pairs = (pushforwards(case, function, tangents, choices) for function in (case.attached, case.plain))
    for wrt, actual, expected in zip(choices, *pairs, strict=True):
        for i, a, e in zip(case.smooth_results, actual, expected, strict=True):
            what = "tangent of the result" if len(case.results) == 1 else f"tangent of result {i}"
            yield case.claim(f"jvp, tangent of argument {case.chosen(wrt)}", what, a, e, expected, e.dtype)


def pushforwards(
    case: RuleCase, function: Callable[..., Arrays], tangents: Arrays, choices: Sequence[tuple[int, ...]]
) -> list[Arrays]:
    """The tangents of the results for each choice of the arguments that are perturbed."""

    @jax.jit
    def pushed(leaves: Arrays, tangents: dict[int, Any]) -> list[Arrays]:
        return [case.jvp(function, leaves, [tangents[i] for i in wrt], wrt) for wrt in choices]

    return list(pushed(case.leaves, dict(zip(case.smooth, tangents, strict=True))))


def adjoint(case: RuleCase) -> Claims:
    """`⟨ȳ, J v⟩ = ⟨Jᵀ ȳ, v⟩`: the rule's pullback is the transpose of its own forward mode."""
    found = case.pullback(case.leaves, case.cotangents)
    tangents = case.random_arguments(7)
    each = pushforwards(case, case.attached, tangents, [(i,) for i in case.smooth])
    for i, tangent, pushed in zip(case.smooth, tangents, each, strict=True):
        what = f"pullback to argument {case.names[i]!r}"
        pulled = inner([found[i]], [tangent])
        size = np.asarray(magnitude(found[i]) * magnitude(tangent) * found[i].size)
        where = "adjoint, ⟨ȳ, J v⟩ = ⟨Jᵀ ȳ, v⟩"
        yield case.claim(where, what, np.asarray(pulled), np.asarray(inner(pushed, case.cotangents)), [size])


def second_order(case: RuleCase) -> Claims:
    """The derivatives of the pullback, forward over reverse and reverse over reverse."""
    arguments = [case.leaves[i] for i in case.smooth]
    directions, duals = case.random_arguments(8), case.random_arguments(9)
    result_directions = case.random_results(8)

    def derivatives(function: Callable[..., Arrays]) -> Any:
        def pullback(values: Arrays, cotangents: Arrays) -> Arrays:
            return case.vjp(function, case.with_arguments(case.leaves, case.smooth, values), cotangents)[1]

        primals = (arguments, case.cotangents)
        forward = jax.jvp(pullback, primals, (directions, result_directions))[1]
        reverse = jax.vjp(pullback, *primals)[1](duals)
        return dict(zip(case.smooth, forward, strict=True)), dict(zip(case.smooth, reverse[0], strict=True))

    actual = jax.jit(partial(derivatives, case.attached))()
    expected = jax.jit(partial(derivatives, case.plain))()
    for order, a, e in zip(("forward over reverse", "reverse over reverse"), actual, expected, strict=True):
        yield from case.cotangent_claims(f"second order, {order}", a, e)


def under_jit(case: RuleCase) -> Claims:
    """The attached rule, compiled."""
    results, found = jax.jit(partial(case.vjp, case.attached))(case.leaves, case.cotangents)
    yield from case.result_claims("jit", results, case.expected_results)
    yield from case.cotangent_claims("jit", dict(zip(case.smooth, found, strict=True)), case.expected)


# --- what is kept, and in which precision -----------------------------------------------------


def lower_precision(case: RuleCase, dtype: str) -> Claims:
    """Values and cotangents in a lower precision: the right dtypes, and about as accurate as autodiff's.

    Both are compared with double precision at the same rounded arguments, because the plain function's own
    rounding error says how accurate the rule can be asked to be.
    """
    leaves = [cast(leaf, dtype) for leaf in case.leaves]
    low = replace(case, leaves=leaves, precision=_coarser(case.precision, Tolerances.of(dtype)))
    if why_not(low.bind(leaves), [jax.typeof(x) for x in leaves]) is not None:
        return  # The engine leaves these types to autodiff.

    @jax.jit
    def by_plain_and_rule(leaves: Arrays, cotangents: Arrays) -> Any:
        of_rule = low.bind(leaves).forward(leaves)[0], low.pullback(leaves, cotangents)
        return low.vjp(low.plain, leaves, cotangents), of_rule

    (plain_results, plain_cotangents), (results, found) = by_plain_and_rule(leaves, low.cotangents)
    double = [cast(x, jnp.float64) for x in leaves], [cast(x, jnp.float64) for x in low.cotangents]
    exact_results, exact_cotangents = case.evaluate(*double)
    actual = [*low.result_claims(dtype, results, plain_results)]
    actual += low.cotangent_claims(dtype, found, dict(zip(low.smooth, plain_cotangents, strict=True)))
    for claim, exact in zip(actual, [*exact_results, *exact_cotangents], strict=True):
        rounding = float(np.max(deviations(as_numpy(claim.expected), as_numpy(exact)), initial=0.0))
        yield replace(claim, expected=exact, absolute=claim.absolute + 2 * rounding)


def _coarser(a: Tolerances, b: Tolerances) -> Tolerances:
    return Tolerances(max(a.eps, b.eps))


def residual_bytes(case: RuleCase, factor: float | None) -> Iterator[Limit]:
    """Compare the bytes that the attached rule saves between the sweeps with those of autodiff.

    An argument that is kept costs nothing if its owner holds it anyway (a parameter), and its bytes if nobody
    else does (an activation). A rule is at fault only if it saves more by both counts; the report has the
    count in which it does better. Constants are not counted.
    """

    def saved(function: Callable[..., Arrays]) -> tuple[int, int]:
        def residuals(*leaves: Any) -> Arrays:
            def of_smooth(*values: Any) -> Arrays:
                results = function(*case.with_arguments(leaves, case.smooth, values))
                return [results[i] for i in case.smooth_results]

            return jax.tree.leaves(jax.vjp(of_smooth, *[leaves[i] for i in case.smooth])[1])

        jaxpr = _jax.open_jaxpr(jax.make_jaxpr(residuals)(*case.leaves))
        held = {v for v in jaxpr.outvars if not isinstance(v, _jax.Literal)} - {*jaxpr.constvars}
        without, with_arguments = (sum(map(nbytes, counted)) for counted in (held - {*jaxpr.invars}, held))
        return without, with_arguments

    counts = ("besides the arguments", "with the arguments")
    triples = zip(counts, saved(case.attached), saved(case.plain), strict=True)
    count, of_rule, of_autodiff = min(triples, key=lambda triple: triple[1] - (factor or 1) * triple[2])
    yield Limit(
        "residual bytes",
        f"rule saves {of_rule} bytes {count}",
        of_rule,
        of_autodiff,
        factor,
        f"bytes {count}",
        "Save less and recompute, or pass `residual_bytes=` (a factor, or None for no limit) and say why",
    )


def inner(xs: Sequence[Any], ys: Sequence[Any]) -> float:
    """`Re Σ x y`, the pairing of cotangents with tangents."""
    with np.errstate(invalid="ignore"):
        return sum(float(np.sum(as_numpy(x) * as_numpy(y)).real) for x, y in zip(xs, ys, strict=True))
