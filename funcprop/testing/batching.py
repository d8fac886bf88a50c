"""The terms of a check that need several examples: under `vmap` and `scan`, and the sizes under `vmap`."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

from funcprop import _jax
from funcprop.program.linear_map import Arrays
from funcprop.rules.running import with_rules
from funcprop.testing.case import RuleCase, stack, subsets
from funcprop.testing.compare import Claim, Limit


def batches(case: RuleCase) -> list[tuple[int, ...]]:
    """Choose arguments to map: every subset of a few; else each alone, all but each, and all."""
    every = range(len(case.leaves))
    if len(every) <= 3:
        return subsets(every, every_up_to=3)
    singles = [(i,) for i in every]
    return list(dict.fromkeys([*singles, *(tuple(set(every) - {i}) for i in every), tuple(every)]))


def stacked(case: RuleCase, mapped: Sequence[int]) -> Arrays:
    """The mapped arguments of all examples along a leading axis; the others are those of the first."""
    stacks = [stack(leaf) for leaf in zip(*case.examples, strict=True)]
    return [stacks[i] if i in mapped else leaf for i, leaf in enumerate(case.leaves)]


def batch_claims(
    case: RuleCase, where: str, mapped: Sequence[int], actual: tuple[Arrays, Arrays]
) -> Iterator[Claim]:
    """Claim that results are those of each example, and cotangents of shared arguments are summed."""
    cts = case.batch_cotangents
    if len(mapped) == len(case.leaves):
        each = case.expected_examples
    else:
        chosen = [
            [example[i] if i in mapped else leaf for i, leaf in enumerate(case.leaves)]
            for example in case.examples
        ]
        pairs = [case.evaluate(leaves, ct) for leaves, ct in zip(chosen, cts, strict=True)]
        each = [(results, dict(zip(case.smooth, found, strict=True))) for results, found in pairs]
    results = [stack(ys) for ys in zip(*(results for results, _ in each), strict=True)]
    stacks = {i: np.asarray(stack([found[i] for _, found in each])) for i in case.smooth}
    expected = {i: cts if i in mapped else cts.sum(0) for i, cts in stacks.items()}
    yield from case.result_claims(where, actual[0], results)
    yield from case.cotangent_claims(where, dict(zip(case.smooth, actual[1], strict=True)), expected)


def mapped_by_vmap(
    case: RuleCase, function: Callable[..., Arrays], mapped: Sequence[int]
) -> Callable[..., Any]:
    """A function under `vmap` over some of its arguments."""
    return jax.vmap(function, in_axes=[0 if i in mapped else None for i in range(len(case.leaves))])


def mapped_by_scan(
    case: RuleCase, function: Callable[..., Arrays], mapped: Sequence[int]
) -> Callable[..., Any]:
    """A function in the body of a `scan` over some of its arguments; the others are constants of the loop."""

    def looped(*leaves: Any) -> Arrays:
        def body(carry: None, xs: Arrays) -> tuple[None, Arrays]:
            return carry, function(*case.with_arguments(leaves, mapped, xs))

        return jax.lax.scan(body, None, [leaves[i] for i in mapped])[1]

    return looped


def batched(case: RuleCase, mapped: Sequence[int]) -> dict[str, Callable[..., Any]]:
    """The rule under `vmap`; and where a rule set has it, the rule at the operator that `vmap` makes."""
    functions = {"vmap": mapped_by_vmap(case, case.attached, mapped)}
    if case.operator is not None:
        functions["with_rules over vmap"] = with_rules(
            mapped_by_vmap(case, case.operator, mapped), case.rules
        )
    return functions


def under_vmap(case: RuleCase) -> Iterator[Claim]:
    """Examples together, with every choice of which arguments they share."""
    choices = [
        (f"{name} over {case.chosen(mapped)}", function, mapped)
        for mapped in batches(case)
        for name, function in batched(case, mapped).items()
    ]
    yield from mapped_claims(case, choices)
    cts = [stack(ct) for ct in zip(*case.batch_cotangents, strict=True)]
    everything = range(len(case.leaves))
    per_example = jax.jit(jax.vmap(partial(case.vjp, case.attached)))(stacked(case, everything), cts)
    yield from batch_claims(case, "vmap of the gradient", everything, per_example)


def under_scan(case: RuleCase) -> Iterator[Claim]:
    """Examples one after the other in a loop, with constants of the loop."""
    yield from mapped_claims(
        case,
        [
            (f"scan over {case.chosen(mapped)}", mapped_by_scan(case, case.attached, mapped), mapped)
            for mapped in dict.fromkeys([(case.smooth[0],), tuple(range(len(case.leaves)))])
        ],
    )


def mapped_claims(
    case: RuleCase, choices: Sequence[tuple[str, Callable[..., Any], tuple[int, ...]]]
) -> Iterator[Claim]:
    """The claims for functions of several examples, of which each is given with the arguments it maps."""
    cts = [stack(ct) for ct in zip(*case.batch_cotangents, strict=True)]
    inputs = [stacked(case, mapped) for _, _, mapped in choices]

    @jax.jit
    def gradients(inputs: list[Arrays], cts: Arrays) -> list[tuple[Arrays, Arrays]]:
        pairs = zip(choices, inputs, strict=True)
        return [case.vjp(function, leaves, cts) for (_, function, _), leaves in pairs]

    for (where, _, mapped), actual in zip(choices, gradients(inputs, cts), strict=True):
        yield from batch_claims(case, where, mapped, actual)


def batch_times_parameters(case: RuleCase, factor: float | None) -> Iterator[Limit]:
    """No cotangent of a shared argument is formed for every example and then summed.

    An intermediate of the gradient counts as batch × parameter if it has as many entries as the batch times
    the argument, or the batch axis beside all axes of the argument. It is an error only if it is larger than
    everything that the gradient of the plain function holds or is given. Other intermediates may be larger
    than autodiff's (a convolution's patches), so that the default needs no slack. A batch of 97 tells its
    axis from all others; nothing is run.
    """
    batch = 97
    cts = [jax.ShapeDtypeStruct((batch, *y.shape), y.dtype) for y in case.cotangents]
    for mapped in batches(case):
        shared = [i for i in case.smooth if i not in mapped and case.leaves[i].size > 1]
        if not shared:
            continue
        types = [jax.typeof(leaf) for leaf in case.leaves]
        leaves = [
            jax.ShapeDtypeStruct((batch, *t.shape) if i in mapped else t.shape, t.dtype)
            for i, t in enumerate(types)
        ]

        def shapes_in_gradient(
            function: Callable[..., Any], leaves: Any = leaves, shared: Any = shared
        ) -> set[tuple[int, ...]]:
            gradient = lambda leaves, cts: case.vjp(function, leaves, cts, shared)[1]  # noqa: E731
            jaxpr = jax.make_jaxpr(gradient)(leaves, cts)
            inner = _jax.open_jaxpr(jaxpr)
            return set(_shapes(_jax.without_unread_inputs(inner, [False] * len(inner.invars))[0]))

        plain = shapes_in_gradient(mapped_by_vmap(case, case.plain, mapped))
        allowed = max(map(math.prod, [*plain, *(x.shape for x in [*leaves, *cts])]))
        for name, function in batched(case, mapped).items():
            shapes = shapes_in_gradient(function)
            for i in shared:
                own = case.leaves[i].shape
                found = [shape for shape in shapes if _is_batch_of(shape, batch, own)]
                largest = max(found, key=math.prod, default=())
                yield Limit(
                    f"batch × parameters, {name} over {case.chosen(mapped)}",
                    f"gradient of the shared argument {case.names[i]!r} of shape {own} holds an intermediate "
                    f"of shape {largest} at batch {batch}",
                    math.prod(largest),
                    allowed,
                    factor,
                    "entries",
                    "Contract over the batch with one `dot_general` or `einsum`, scatter instead of one-hot, "
                    "or pass `batch_times_parameters=` (a factor, or None for no limit) and say why",
                )


def _shapes(jaxpr: Any) -> Iterator[tuple[int, ...]]:
    """The shapes of all intermediates of a jaxpr, at any depth."""
    for eqn in _jax.equations(jaxpr):
        yield from (tuple(v.aval.shape) for v in eqn.outvars if hasattr(v.aval, "shape"))


def _is_batch_of(shape: tuple[int, ...], batch: int, own: tuple[int, ...]) -> bool:
    beside = Counter((batch, *(n for n in own if n > 1)))
    return math.prod(shape) == batch * math.prod(own) or beside <= Counter(shape)
