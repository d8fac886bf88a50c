"""The derivative of one operator by its rule: a linear map, and the residuals that it reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax

from funcprop import _jax
from funcprop.program.linear_map import Arrays, LinearMap
from funcprop.rules.bound_rule import BoundRule


@dataclass(frozen=True)
class ResidualProgram:
    """A part of a rule as a program over what it really reads.

    `read` says which residuals these are; `closed_over` are traced values that the rule closes over, operands
    too, so that they can be transformed.
    """

    read: tuple[bool, ...]
    closed_over: Arrays
    call: Callable[[Arrays], Arrays]

    @classmethod
    def of(cls, closed: Any, residuals: Arrays, inputs: Sequence[Any]) -> ResidualProgram:
        """Of the closed jaxpr of a function of residuals and inputs."""
        jaxpr, constants = _jax.with_constants_as_inputs(closed)
        keep = [True] * len(constants) + [False] * len(residuals) + [True] * len(inputs)
        pruned, used = _jax.without_unread_inputs(jaxpr, keep)
        read = tuple(used[len(constants) : len(constants) + len(residuals)])
        traced = list(map(_jax.is_traced, constants))

        def call(operands: Arrays) -> Arrays:
            given = iter(operands)
            # Concrete constants belong to the program.
            first = [next(given) if is_traced else c for c, is_traced in zip(constants, traced, strict=True)]
            return _jax.evaluate(pruned, (), [*first, *given])

        return cls(read, [c for c, is_traced in zip(constants, traced, strict=True) if is_traced], call)

    def __call__(self, closed_over: Arrays, residuals: Arrays, inputs: Arrays) -> Arrays:
        """The results; of the residuals, those that are read."""
        return self.call([*closed_over, *residuals, *inputs])


@dataclass(frozen=True)
class Derivative:
    """The derivative of an operator in some of its arguments, by its rule."""

    bound: BoundRule
    needs: tuple[bool, ...]
    residual_tree: Any
    result_tree: Any
    arguments: tuple[Any, ...]
    results: tuple[Any, ...]

    @property
    def smooth(self) -> list[Any]:
        """The types of the tangents of the differentiable results."""
        return [a.to_tangent_aval() for a in self.results if _jax.is_differentiable(a)]

    def backward(self, residuals: Arrays, cotangents: Arrays) -> Arrays:
        """Cotangents of the arguments that are needed, from those of the differentiable results."""
        return self.bound.backward(
            jax.tree.unflatten(self.residual_tree, residuals),
            jax.tree.unflatten(self.result_tree, _jax.with_zero_tangents(cotangents, self.results)),
            self.needs,
            self.arguments,
        )

    def pushforward(self, residuals: Arrays, tangents: Arrays) -> Arrays:
        """Tangents of the differentiable results, by the rule's own forward mode."""
        given = iter(tangents)
        full = [next(given) if need else None for need in self.needs]
        pushed = self.bound.pushforward(jax.tree.unflatten(self.residual_tree, residuals), full)
        return [y for y, a in zip(pushed, self.results, strict=True) if _jax.is_differentiable(a)]

    def programs(self, residuals: Arrays) -> list[ResidualProgram]:
        """The backward, and the rule's own forward mode if it has one."""
        programs = [self._program("backward", residuals, self.smooth)]
        if self.bound.rule.jvp is not None:
            inputs = [a.to_tangent_aval() for a, need in zip(self.arguments, self.needs, strict=True) if need]
            programs.append(self._program("pushforward", residuals, inputs))
        return programs

    def _program(self, part: str, residuals: Arrays, inputs: list[Any]) -> ResidualProgram:
        if self.bound.is_pure:
            closed = _of_pure.trace(self, part, residuals, inputs).jaxpr
        else:
            closed = jax.make_jaxpr(getattr(self, part))(residuals, inputs)
        return ResidualProgram.of(closed, residuals, inputs)

    def tangent_map(self, residuals: Arrays) -> tuple[LinearMap, Arrays]:
        """The tangent map, and what it reads of the residuals and of what the rule closes over."""
        programs = self.programs(residuals)
        kept = [i for i in range(len(residuals)) if any(program.read[i] for program in programs)]
        saved = [*(x for program in programs for x in program.closed_over), *(residuals[i] for i in kept)]
        starts = [sum(len(p.closed_over) for p in programs[:k]) for k in range(len(programs))]

        def on_saved(program: ResidualProgram, start: int) -> Callable[[Arrays, Arrays], Arrays]:
            def call(saved: Arrays, inputs: Arrays) -> Arrays:
                residuals = zip(kept, saved[len(saved) - len(kept) :], strict=True)
                own = saved[start : start + len(program.closed_over)]
                return program(own, [x for i, x in residuals if program.read[i]], inputs)

            return call

        pullback, *pushforward = map(on_saved, programs, starts)
        return LinearMap(pullback, pushforward[0] if pushforward else None, tuple(self.smooth)), saved


@partial(jax.jit, static_argnums=(0, 1))
def _of_pure(derivative: Derivative, part: str, residuals: Arrays, inputs: Arrays) -> Arrays:
    """A part of a pure rule; its jaxpr is found again for the same operator elsewhere, as in other blocks."""
    found: Arrays = getattr(derivative, part)(residuals, inputs)
    return found
