"""Rules, layers and models under strict promotion of dtypes, and with promotion of ranks as an error."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rule_examples import LAYERS, PRIMITIVES

import funcprop as fp

DTYPES = ["float32", "bfloat16", "float64"]
RULES = {"default": fp.rules.default, "handwritten": fp.rules.handwritten}


@pytest.fixture(autouse=True)
def strict() -> Iterator[None]:
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


def cast(tree: Any, dtype: str) -> Any:
    def one(x: Any) -> Any:
        smooth = not isinstance(x, float) and jnp.issubdtype(jnp.result_type(x), jnp.floating)
        return jnp.asarray(x, dtype) if smooth else x

    return jax.tree.map(one, tree)


def static_of(function: Callable[..., Any], options: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments of a layer among the options of an example."""
    keywords = inspect.signature(function).parameters
    return {k: v for k, v in options.items() if k in keywords and k != "rule"}


def calls() -> dict[str, tuple[Callable[..., Any], tuple[Any, ...], fp.Rule | None, Any]]:
    """A function of arrays, its arguments, and a rule that is to be used whatever its cost model says."""
    found: dict[str, Any] = {}
    for name, examples in LAYERS.items():
        layer = getattr(fp.layers, name)
        for i, example in enumerate(examples):
            static = static_of(layer.function, example.options)
            call = functools.partial(layer, **static)
            rule = example.rule or example.options.get("rule")
            found[f"layer {name} {i}"] = call, example.args, rule, layer
    for name, (function, examples) in PRIMITIVES.items():
        for i, example in enumerate(examples):
            found[f"primitive {name} {i}"] = function, example.args, example.rule, name
    return found


CALLS = calls()


def loss_of(function: Callable[..., Any]) -> Callable[..., Any]:
    def loss(*args: Any) -> Any:
        results = [y for y in jax.tree.leaves(function(*args)) if jnp.issubdtype(y.dtype, jnp.inexact)]
        weights = [jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape) for y in results]
        wide = [jnp.real(y).astype(jnp.float32) for y in results]
        return sum(jnp.sum(y * w) for y, w in zip(wide, weights, strict=True))

    return loss


def smooth(args: tuple[Any, ...]) -> tuple[int, ...]:
    def is_smooth(x: Any) -> bool:
        return bool(jnp.issubdtype(jnp.result_type(x), jnp.floating)) and not isinstance(x, float)

    return tuple(i for i, a in enumerate(args) if any(map(is_smooth, jax.tree.leaves(a))))


def check(
    function: Callable[..., Any], args: tuple[Any, ...], rules: dict[str, fp.RuleSet], dtype: str
) -> None:
    loss, argnums = loss_of(function), smooth(args)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        exact = jax.grad(loss, argnums)(*cast(args, "float64"))
    eps = float(jnp.finfo(dtype).eps)
    for rule_set in rules.values():
        gradient = jax.jit(fp.grad(loss, argnums, rules=rule_set))(*args)
        for g, e in zip(jax.tree.leaves(gradient), jax.tree.leaves(exact), strict=True):
            scale = np.max(np.abs(e), initial=1e-3)
            np.testing.assert_allclose(np.asarray(g, float) / scale, e / scale, atol=30 * eps)
    p = fp.backprop(loss, argnums)(*args)
    assert jax.tree.structure(p.gradient) == jax.tree.structure(exact)
    derivation = fp.derive(loss, argnums)(*args)
    assert derivation.text()
    if dtype == "float64":
        derivation.verify()


@pytest.mark.sampled(4)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CALLS)
def test_every_layer_and_every_rule(case: str, dtype: str) -> None:
    function, args, rule, operator = CALLS[case]
    if any(jnp.iscomplexobj(x) for x in jax.tree.leaves(args)):
        return
    own = {} if rule is None else {"own": fp.rules.handwritten.replace({operator: rule})}
    check(function, cast(args, dtype), RULES | own, dtype)
