"""How a hand-written rule becomes a function that every JAX transformation understands.

`jax.custom_vjp` forbids forward mode, and with it `jvp`, `linearize` and Gauss-Newton products. Here a rule
is a `jax.custom_jvp` whose tangent map is ONE linear primitive that knows its own transpose:

    primal     y, r = forward(x)
    tangent    ẏ = pushforward(r, ẋ)        the primitive: linear in ẋ
    cotangent  x̄ = pullback(r, ȳ)           its transpose: the hand-written backward

Reverse mode transposes the primitive and so runs the hand-written backward. Forward mode evaluates it: the
rule's own `jvp`, or the transpose of the backward. Differentiating the primitive again differentiates the
backward rule by ordinary autodiff, so second order is exact.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.custom_derivatives import SymbolicZero

from funcprop import _compat
from funcprop.layer_calls import LayerCall
from funcprop.linear_map import Arrays, LinearMap, linear_p
from funcprop.registry import Rule, RuleError

Type = tuple[tuple[int, ...], str]  # shape and dtype


@dataclass(frozen=True)
class BoundRule:
    """A rule at one operator: its static parameters, the structure of its arguments, its results' types."""

    rule: Rule
    operator: str
    static: dict[str, Any]
    tree: Any
    argument_names: tuple[str, ...]
    results: tuple[Type, ...] | None = None

    @classmethod
    def of_layer(cls, rule: Rule, call: LayerCall, eqn: Any) -> BoundRule:
        """The rule at a layer call, without the call's batching."""
        shapes = [list(v.aval.shape) for v in eqn.outvars]
        for axis in reversed(call.axes):
            for shape, dim in zip(shapes, axis.out_axes, strict=True):
                if dim is not None:
                    del shape[dim]
        results = tuple((tuple(s), str(v.aval.dtype)) for s, v in zip(shapes, eqn.outvars, strict=True))
        return cls(rule, call.layer.name, dict(call.static), call.tree, call.argument_names(), results)

    @classmethod
    def of_primitive(cls, rule: Rule, eqn: Any) -> BoundRule:
        """The rule at an equation, whose parameters become keyword arguments."""
        operands = tuple(range(len(eqn.invars)))
        names = tuple(f"operand {i}" for i in operands)
        results = tuple((tuple(v.aval.shape), str(v.aval.dtype)) for v in eqn.outvars)
        return cls(rule, eqn.primitive.name, dict(eqn.params), jax.tree.structure(operands), names, results)

    def forward(self, leaves: Sequence[Any]) -> tuple[Arrays, Any, Arrays, Any]:
        """Results and residuals, flat, each followed by its structure."""
        with self._named():
            returned = self.rule.forward(*jax.tree.unflatten(self.tree, leaves), **self.static)
        if not (isinstance(returned, tuple) and len(returned) == 2):
            raise RuleError(
                f"rule for {self.operator}: forward returned {_kind(returned)}; return the pair "
                "(results, residuals)."
            )
        results, result_tree = jax.tree.flatten(returned[0])
        types = tuple((tuple(np.shape(y)), str(jax.numpy.result_type(y))) for y in results)
        if self.results is not None and types != self.results:
            raise RuleError(
                f"rule for {self.operator}: forward returned {_types(types)} where the operator returns "
                f"{_types(self.results)}; the forward must compute the operator's own results."
            )
        residuals, residual_tree = jax.tree.flatten(returned[1])
        for path, residual in jax.tree.leaves_with_path(returned[1]):
            if not isinstance(residual, jax.Array | np.ndarray | np.generic | float | int | complex):
                raise RuleError(
                    f"rule for {self.operator}: residual {_path(path)}={residual!r} is not an array; save "
                    "arrays only and pass static values as keyword arguments."
                )
        return results, result_tree, residuals, residual_tree

    def value(self, leaves: Sequence[Any]) -> Arrays:
        """Results, flat, where nothing is differentiated."""
        if self.rule.value is None:
            return self.forward(leaves)[0]
        with self._named():
            return jax.tree.leaves(self.rule.value(*jax.tree.unflatten(self.tree, leaves), **self.static))

    def backward(
        self, residuals: Any, cotangents: Any, needs: Sequence[bool], arguments: Sequence[Any]
    ) -> Arrays:
        """The wanted cotangents, flat and checked against the types of the arguments."""
        wanted = jax.tree.unflatten(self.tree, needs)
        with self._named():
            returned = self.rule.backward(residuals, cotangents, wanted, **self.static)
        where = f"rule for {self.operator}: backward returned"
        count = len(wanted)
        if not (isinstance(returned, tuple | list) and len(returned) == count):
            raise RuleError(
                f"{where} {_kind(returned)} for {count} arguments {self.argument_names}; return a tuple "
                "with one cotangent for each argument (None where it is not needed)."
            )
        try:
            leaves = self.tree.flatten_up_to(tuple(returned))
        except ValueError as error:
            raise RuleError(
                f"{where} cotangents whose structure is not that of the arguments {self.argument_names}: "
                f"{error}. Return one array for every array of the argument."
            ) from None
        return [
            self._checked(leaf, aval, name)
            for leaf, aval, name, need in zip(leaves, arguments, self.argument_names, needs, strict=True)
            if need
        ]

    def _checked(self, cotangent: Any, aval: Any, name: str) -> Any:
        expected = f"{aval.dtype}{list(aval.shape)}"
        where = f"rule for {self.operator}: the cotangent of argument {name!r}"
        if cotangent is None:
            return _compat.zeros_like_aval(aval.to_tangent_aval())
        if not hasattr(cotangent, "dtype"):
            raise RuleError(f"{where} is {_kind(cotangent)}; return an array of type {expected}.")
        actual = jax.typeof(cotangent)
        if tuple(actual.shape) != tuple(aval.shape):
            raise RuleError(
                f"{where} has shape {tuple(actual.shape)} but the argument has {tuple(aval.shape)}; sum it "
                "over the axes along which the argument was broadcast."
            )
        if actual.dtype != aval.dtype:
            raise RuleError(
                f"{where} has dtype {actual.dtype} but the argument has {aval.dtype}; end the rule with "
                f"`.astype(jnp.{aval.dtype})`."
            )
        return _compat.with_weak_type(cotangent, bool(getattr(aval, "weak_type", False)))

    def pushforward(self, residuals: Any, tangents: Sequence[Any]) -> Arrays:
        """The rule's own forward mode on flat tangents, None where an argument is not perturbed."""
        assert self.rule.jvp is not None
        with self._named():
            return jax.tree.leaves(
                self.rule.jvp(residuals, jax.tree.unflatten(self.tree, tangents), **self.static)
            )

    def why_not(self, arguments: Sequence[Any]) -> str | None:
        """Why this operator is left to autodiff, or None if the rule applies to these types."""
        shapes = [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in arguments]
        try:
            with self._named():
                answer = self._applies(shapes)
            if answer is True and any(map(_compat.has_symbolic_size, arguments)):
                jax.eval_shape(self._both_sweeps, *shapes)
        except _compat.InconclusiveDimensionOperation:
            return "it compares sizes, and some of these are symbolic"
        if answer is True:
            return None
        if isinstance(answer, str):
            return answer
        raise RuleError(
            f"rule for {self.operator}: applies returned {answer!r}; return True, or a string that says "
            "why the operator is left to autodiff."
        )

    def _applies(self, shapes: Sequence[Any]) -> Any:
        if self.rule.applies is None:
            return True
        return self.rule.applies(*jax.tree.unflatten(self.tree, shapes), **self.static)

    def _both_sweeps(self, *leaves: Any) -> Any:
        smooth = [i for i, x in enumerate(leaves) if _compat.is_differentiable(x)]

        def of_smooth(*values: Any) -> Arrays:
            full = list(leaves)
            for i, value in zip(smooth, values, strict=True):
                full[i] = value
            return [y for y in attach(self, full) if _compat.is_differentiable(y)]

        values, pullback = jax.vjp(of_smooth, *(leaves[i] for i in smooth))
        return pullback(values)

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        """Say of an exception of the rule's own whose rule it is."""
        try:
            yield
        except Exception as error:
            if not isinstance(error, RuleError):
                error.add_note(f"raised by the rule for {self.operator}")
            raise


def attach(bound: BoundRule, arguments: Sequence[Any]) -> Arrays:
    """Evaluate an operator so that its derivative is the hand-written one; flat arrays to flat arrays."""
    operator = jax.custom_jvp(lambda *leaves: bound.value(leaves))
    operator.defjvp(partial(_differentiate, bound), symbolic_zeros=True)
    return list(operator(*_compat.align_varying_axes(arguments)))


def _differentiate(bound: BoundRule, primals: Any, tangents: Any) -> tuple[Arrays, Arrays]:
    results, result_tree, residuals, residual_tree = bound.forward(primals)
    needs = [not isinstance(t, SymbolicZero) for t in tangents]
    perturbed = [i for i, need in enumerate(needs) if need]
    arguments = [jax.typeof(p) for p in primals]
    result_avals = [jax.typeof(y) for y in results]
    smooth = [i for i, aval in enumerate(result_avals) if _compat.is_differentiable(aval)]
    smooth_avals = [result_avals[i].to_tangent_aval() for i in smooth]

    def backward(residuals: Arrays, cotangents: Arrays) -> Arrays:
        full = [_compat.zero_tangent(a) if i not in smooth else None for i, a in enumerate(result_avals)]
        for i, cotangent in zip(smooth, cotangents, strict=True):
            full[i] = cotangent
        return bound.backward(
            jax.tree.unflatten(residual_tree, residuals),
            jax.tree.unflatten(result_tree, full),
            needs,
            arguments,
        )

    def pushforward(residuals: Arrays, tangents: Arrays) -> Arrays:
        full: list[Any] = [None] * len(needs)
        for i, tangent in zip(perturbed, tangents, strict=True):
            full[i] = tangent
        pushed = bound.pushforward(jax.tree.unflatten(residual_tree, residuals), full)
        return [pushed[i] for i in smooth]

    if bound.rule.jvp is None:
        pullback, read, extra = _as_jaxpr(backward, residuals, smooth_avals)
        saved = [*extra, *(r for r, is_read in zip(residuals, read, strict=True) if is_read)]
        linear = LinearMap(pullback, None, tuple(smooth_avals))
    else:
        inputs = [arguments[i].to_tangent_aval() for i in perturbed]
        programs = _as_jaxpr(backward, residuals, smooth_avals), _as_jaxpr(pushforward, residuals, inputs)
        saved, (pullback, pushed_by_rule) = _on_shared(programs, residuals)
        linear = LinearMap(pullback, pushed_by_rule, tuple(smooth_avals))
    pushed = linear_p.bind(*saved, *(tangents[i] for i in perturbed), linear=linear, residuals=len(saved))
    full_tangents: list[Any] = [SymbolicZero(aval.to_tangent_aval()) for aval in result_avals]
    for i, tangent in zip(smooth, pushed, strict=True):
        full_tangents[i] = tangent
    return results, full_tangents


def _as_jaxpr(
    backward: Callable[[Arrays, Arrays], Arrays], residuals: Arrays, cotangents: Sequence[Any]
) -> tuple[Callable[[Arrays, Arrays], Arrays], list[bool], Arrays]:
    """The backward as a program over the residuals that it really reads.

    Returns the program (on the extra values it closes over, then the residuals that are read, and the
    cotangents), which residuals are read, and the extra values.
    """
    closed = jax.make_jaxpr(backward)(residuals, list(cotangents))
    jaxpr, closed_over = _compat.with_constants_as_inputs(closed)
    keep = [True] * len(closed_over) + [False] * len(residuals) + [True] * len(cotangents)
    pruned, used = _compat.without_unread_inputs(jaxpr, keep)
    read = used[len(closed_over) : len(closed_over) + len(residuals)]
    is_traced = [isinstance(c, jax.core.Tracer) for c in closed_over]
    extra = [c for c, traced in zip(closed_over, is_traced, strict=True) if traced]

    def program(saved: Arrays, cts: Arrays) -> Arrays:
        given = iter(saved)
        # Concrete constants belong to the program; what is traced must be an operand to be transformed.
        first = [next(given) if traced else c for c, traced in zip(closed_over, is_traced, strict=True)]
        return _compat.evaluate(pruned, (), [*first, *given, *cts])

    return program, read, extra


def _on_shared(programs: Sequence[Any], residuals: Arrays) -> tuple[Arrays, list[Callable[..., Arrays]]]:
    """Several programs of `_as_jaxpr`, on the same values: what any of them reads, and these programs."""
    kept = [i for i in range(len(residuals)) if any(read[i] for _, read, _ in programs)]
    extras = [extra for _, _, extra in programs]
    saved = [*(value for extra in extras for value in extra), *(residuals[i] for i in kept)]

    def on_shared(program: Any, read: Sequence[bool], first: int, count: int) -> Callable[..., Arrays]:
        def call(saved: Arrays, inputs: Arrays) -> Arrays:
            pairs = zip(kept, saved[len(saved) - len(kept) :], strict=True)
            return program([*saved[first : first + count], *(x for i, x in pairs if read[i])], inputs)

        return call

    starts = [sum(map(len, extras[:k])) for k in range(len(extras))]
    return saved, [
        on_shared(program, read, start, len(extra))
        for (program, read, extra), start in zip(programs, starts, strict=True)
    ]


def _kind(value: Any) -> str:
    return (
        f"a {type(value).__name__} of length {len(value)}" if isinstance(value, tuple | list) else repr(value)
    )


def _types(types: Sequence[Type]) -> str:
    return "(" + ", ".join(f"{dtype}{list(shape)}" for shape, dtype in types) + ")"


def _path(path: Any) -> str:
    return jax.tree_util.keystr(path).lstrip(".") or "(the whole)"
