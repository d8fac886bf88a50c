"""Pure rules outside of `jit`: compiled once for the types of their operands, not run operator by operator.

A max-pool of 4 × 4 whose rule ran in python took seven times as long as JAX's. What is compiled belongs to
the rule and its static parameters, which are data, never to a function of the user's.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from funcprop import _jax
from funcprop.program.linear_map import Arrays, LinearMap
from funcprop.rules.bound_rule import BoundRule
from funcprop.rules.derivative import Derivative

Types = tuple[Any, ...]


def is_staged(bound: BoundRule, operands: Sequence[Any]) -> bool:
    """Whether a rule is to be compiled by itself: it is pure, and nothing around compiles its operands."""
    return bound.is_pure and bound.elsewhere is None and not any(map(_jax.is_traced, operands))


def compiled(bound: BoundRule) -> BoundRule:
    """Compile the forward of a rule."""

    def forward(*args: Any, **_: Any) -> Any:
        return _forward(bound, *jax.tree.leaves(args))

    return replace(bound, rule=replace(bound.rule, forward=forward))


def tangent_map(derivative: Derivative, residuals: Arrays) -> tuple[LinearMap, Arrays]:
    """As `Derivative.tangent_map`, with compiled programs."""
    types = tuple(map(jax.typeof, residuals))
    read = _read(derivative, types)
    static = derivative, types, read
    pushforward = None if derivative.bound.rule.jvp is None else partial(_pushforward, *static)
    saved = [r for r, is_read in zip(residuals, read, strict=True) if is_read]
    return LinearMap(partial(_pullback, *static), pushforward, tuple(derivative.smooth)), saved


@functools.lru_cache(maxsize=1024)
def _read(derivative: Derivative, types: Types) -> tuple[bool, ...]:
    programs = derivative.programs(list(types))
    return tuple(any(reads) for reads in zip(*(program.read for program in programs), strict=True))


@partial(jax.jit, static_argnums=0)
def _forward(bound: BoundRule, *leaves: Any) -> Any:
    return bound.returned(leaves)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _pullback(d: Derivative, types: Types, read: tuple[bool, ...], saved: Arrays, cotangents: Arrays) -> Any:
    return d.backward(_with_unread(types, read, saved), cotangents)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _pushforward(d: Derivative, types: Types, read: tuple[bool, ...], saved: Arrays, tangents: Arrays) -> Any:
    return d.pushforward(_with_unread(types, read, saved), tangents)


def _with_unread(types: Types, read: tuple[bool, ...], saved: Arrays) -> Arrays:
    given = iter(saved)
    return [
        next(given) if is_read else jnp.zeros(t.shape, t.dtype)
        for t, is_read in zip(types, read, strict=True)
    ]
