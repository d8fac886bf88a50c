"""The same program with JAX's transformations and with this library's: the same results, or the same error.

A program takes the transformations `t` and returns all that it has seen: values, gradients, what it logged,
what became of its arguments. Whatever it changes it makes itself, so that each run finds the same world.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from against_jax import assert_same

import funcprop as fp

RULE_SETS = (fp.rules.default, fp.rules.handwritten)


def _product(grad: Callable[..., Any]) -> Callable[..., Any]:
    def hvp(fun: Callable[..., Any]) -> Callable[..., Any]:
        return lambda x, v, *rest: jax.jvp(lambda x: grad(fun)(x, *rest), (x,), (v,))[1]

    return hvp


JAX = types.SimpleNamespace(
    grad=jax.grad,
    value_and_grad=jax.value_and_grad,
    vjp=jax.vjp,
    jacobian=jax.jacobian,
    hvp=_product(jax.grad),
    with_rules=lambda fun: fun,
)


def ours(rules: fp.RuleSet) -> types.SimpleNamespace:
    """This library's transformations with a rule set."""

    def with_set(transformation: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **options: transformation(*args, rules=rules, **options)

    return types.SimpleNamespace(**{name: with_set(getattr(fp, name)) for name in vars(JAX)})


def outcome(program: Callable[[Any], Any], t: types.SimpleNamespace) -> Any:
    """What a program returns, or the exception that it raises."""
    try:
        return program(t)
    except Exception as error:
        return error


def assert_as_jax(
    program: Callable[[Any], Any], raises: type[Exception] | None = None, rtol: float = 1e-12
) -> None:
    """With each rule set what JAX gives: the same values of the same types, or the same class of exception.

    `raises` is what JAX raises; without it, JAX must return.
    """
    expected = outcome(program, JAX)
    if raises is None and isinstance(expected, Exception):
        raise AssertionError("JAX itself does not run this program") from expected
    assert raises is None or type(expected) is raises, f"JAX gives {expected!r}"
    for rules in RULE_SETS:
        assert_same_outcome(outcome(program, ours(rules)), expected, rules.name, rtol)


def assert_same_outcome(actual: Any, expected: Any, name: str, rtol: float = 1e-12) -> None:
    """Equal values, or exceptions of one class."""
    if isinstance(actual, Exception):
        if type(actual) is not type(expected):
            raise AssertionError(f"{name}: {type(actual).__name__}; JAX gives {expected!r}") from actual
        return
    assert not isinstance(expected, Exception), f"{name} gives {actual!r}; JAX raises {expected!r}"
    assert_same(actual, expected, rtol)


def _stacked(x: Any) -> Any:
    return jax.tree.map(lambda leaf: jnp.stack([jnp.asarray(leaf), 2 * jnp.asarray(leaf)]), x)


def _ones(x: Any) -> Any:
    return jax.tree.map(jnp.ones_like, x)


def _without_jit(t: Any, fun: Callable[..., Any], *args: Any) -> Any:
    with jax.disable_jit():
        return t.value_and_grad(fun)(*args)


# Ways to differentiate `fun(x, *rest)` in `x`. JAX itself fails in some, and then so do we.
WAYS: dict[str, Callable[..., Any]] = {
    "eager": lambda t, fun, *args: t.value_and_grad(fun)(*args),
    "jit": lambda t, fun, x, *rest: jax.jit(lambda x: t.value_and_grad(fun)(x, *rest))(x),
    "jit of all": lambda t, fun, *args: jax.jit(t.grad(fun))(*args),
    "vmap": lambda t, fun, x, *rest: jax.vmap(lambda x: t.grad(fun)(x, *rest))(_stacked(x)),
    "vjp": lambda t, fun, x, *rest: t.vjp(lambda x: fun(x, *rest), x)[1](jnp.ones_like(fun(x, *rest))),
    "hvp": lambda t, fun, x, *rest: t.hvp(fun)(x, _ones(x), *rest),
    "disable_jit": _without_jit,
}


def assert_differentiates_as_jax(way: str, fun: Callable[..., Any], *args: Any) -> None:
    """In one of the `WAYS` what JAX gives; evaluated at once, it must be a value."""

    def program(t: Any) -> Any:
        return WAYS[way](t, fun, *args)

    expected = outcome(program, JAX)
    if way == "eager" and isinstance(expected, Exception):
        raise AssertionError("JAX itself does not differentiate this function") from expected
    for rules in RULE_SETS:
        assert_same_outcome(outcome(program, ours(rules)), expected, rules.name)


@contextlib.contextmanager
def printed() -> Iterator[list[str]]:
    """The lines that python and `jax.debug.print` write to the standard output, in their order."""
    import io

    text, lines = io.StringIO(), list[str]()
    with contextlib.redirect_stdout(text):
        yield lines
        jax.effects_barrier()
    lines += text.getvalue().splitlines()
