"""`Rule(pure=True)`: outside of `jit` a rule is compiled once for its operands' types; others run anew."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import funcprop as fp

SCALE = {"factor": 1.0}


class Kept(NamedTuple):
    x: Any
    unread: Any


class Counted:
    """A rule of `x ↦ factor · x²`, and how often python ran its parts."""

    def __init__(self, pure: bool, **options: Any) -> None:
        self.forwards = self.backwards = 0
        self.layer = fp.layer(rule=fp.Rule(self.forward, self.backward, pure=pure, **options))(self.function)

    @staticmethod
    def function(x: Any, *, power: Any = 2) -> Any:
        return SCALE["factor"] * x**2

    def forward(self, x: Any, **_: Any) -> Any:
        self.forwards += 1
        return SCALE["factor"] * x**2, Kept(x, jnp.sum(x))

    def backward(self, kept: Kept, g: Any, needs: Any, **_: Any) -> Any:
        self.backwards += 1
        return (2 * SCALE["factor"] * kept.x * g,)

    def gradient(self, x: Any) -> Any:
        return fp.grad(lambda x: jnp.sum(self.layer(x)), rules=fp.rules.handwritten)(x)


@pytest.fixture(autouse=True)
def _factor_of_one(monkeypatch):
    monkeypatch.setitem(SCALE, "factor", 1.0)


def test_a_pure_rule_is_traced_once_for_each_type():
    rule = Counted(pure=True)
    for x in (jnp.ones(3), jnp.arange(3.0), jnp.arange(3.0) - 1):
        np.testing.assert_array_equal(rule.gradient(x), 2 * x)
    assert rule.forwards == 1
    backwards = rule.backwards
    rule.gradient(jnp.ones(3))
    assert (rule.forwards, rule.backwards) == (1, backwards)
    rule.gradient(jnp.ones(4))
    assert rule.forwards == 2


def test_another_rule_runs_each_time_and_sees_what_has_changed(monkeypatch):
    rule = Counted(pure=False)
    np.testing.assert_array_equal(rule.gradient(jnp.ones(3)), 2 * jnp.ones(3))
    monkeypatch.setitem(SCALE, "factor", 5.0)
    np.testing.assert_array_equal(rule.gradient(jnp.ones(3)), 10 * jnp.ones(3))
    assert rule.forwards == 2


def test_rules_run_each_time_unless_they_say_that_they_are_pure():
    assert not fp.Rule(lambda x: (x, ()), lambda r, g, needs: (g,)).pure


def test_a_pure_rule_that_is_traced_is_no_jit_of_its_own():
    rule = Counted(pure=True)
    jaxpr = jax.make_jaxpr(rule.gradient)(jnp.ones(3))
    inner = [eqn.params["name"] for eqn in jaxpr.eqns if eqn.primitive.name in ("jit", "pjit")]
    assert not [name for name in inner if name.startswith("_")], inner


def test_nan_is_found_inside_of_a_compiled_rule():
    rule = Counted(pure=True)
    rule.gradient(jnp.ones(3))
    with jax.debug_nans(True), pytest.raises(FloatingPointError):
        rule.gradient(jnp.full(3, jnp.nan))


def test_second_order_and_batches_of_a_pure_rule():
    rule = Counted(pure=True)
    x = jnp.arange(1.0, 4.0)
    np.testing.assert_allclose(
        fp.hvp(lambda x: jnp.sum(rule.layer(x)), rules=fp.rules.handwritten)(x, x), 2 * x
    )
    each = jax.vmap(rule.gradient)(jnp.stack([x, 2 * x]))
    np.testing.assert_allclose(each, jnp.stack([2 * x, 4 * x]))


def test_without_jit():
    rule = Counted(pure=True)
    with jax.disable_jit():
        np.testing.assert_array_equal(rule.gradient(jnp.ones(3)), 2 * jnp.ones(3))


def test_values_of_compiled_rules_are_those_under_jit():
    x = jax.random.normal(jax.random.key(0), (4, 16))
    loss = lambda x: jnp.sum(jax.nn.softmax(x) * jnp.arange(16)) + jnp.sum(jax.nn.gelu(x))  # noqa: E731
    eager, compiled = fp.grad(loss)(x), jax.jit(fp.grad(loss))(x)
    np.testing.assert_allclose(eager, compiled, rtol=1e-12)
    np.testing.assert_allclose(eager, jax.grad(loss)(x), rtol=1e-10)
