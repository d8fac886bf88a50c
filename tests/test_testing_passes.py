"""The checker lets right rules and gradients pass, names wrong gradients, refuses what it cannot check."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from rules_to_check import COMPLEX, OBLONG, affine, affine_rule, bounded, bounded_rule, numbers

import funcprop as fp
from funcprop.testing import CheckError, check_gradient, check_rule


@fp.layer(rule=affine_rule())
def affine_layer(x: Any, w: Any, b: Any) -> Any:
    return affine(x, w, b)


class Weights(NamedTuple):
    params: Any
    x: jax.Array


@fp.layer(
    rule=fp.Rule(
        lambda params, x: (x @ params["w"] + params["b"], Weights(params, x)),
        lambda r, g, needs: ({"w": r.x.T @ g, "b": g.sum(0)}, g @ r.params["w"].T),
    )
)
def of_pytree(params: Any, x: Any) -> Any:
    return x @ params["w"] + params["b"]


class Rows(NamedTuple):
    index: jax.Array
    table: jax.Array


@fp.layer(
    rule=fp.Rule(
        lambda table, index: (table[index], Rows(index, table)),
        lambda r, g, needs: (jnp.zeros_like(r.table).at[r.index].add(g), None),
    )
)
def lookup(table: Any, index: Any) -> Any:
    return table[index]


@fp.layer(
    rule=fp.Rule(
        lambda x, key: (jnp.where(jax.random.bernoulli(key, 0.5, x.shape), x, 0), (key,)),
        lambda r, g, needs: (jnp.where(jax.random.bernoulli(r[0], 0.5, g.shape), g, 0), None),
    )
)
def masked(x: Any, key: Any) -> Any:
    return jnp.where(jax.random.bernoulli(key, 0.5, x.shape), x, 0)


def largest_with_index(x: Any) -> Any:
    return {"value": x.max(), "index": x.argmax(), "sum": x.sum()}


def spread(index: Any, cotangents: Any, size: int) -> Any:
    at_largest = jax.nn.one_hot(index, size, dtype=cotangents["sum"].dtype)
    return (at_largest * cotangents["value"] + cotangents["sum"],)


# The size of the argument is not a residual: a rule may keep the argument itself, which costs nothing.
two_outputs = fp.layer(
    rule=fp.Rule(
        lambda x: (largest_with_index(x), (x.argmax(), x)),
        lambda r, g, needs: spread(r[0], g, r[1].size),
    )
)(largest_with_index)


@fp.layer(
    rule=fp.Rule(
        lambda x, *, slope: (jnp.where(x > 0, x, slope * x), (x,)),
        lambda r, g, needs, *, slope: (jnp.where(r[0] > 0, g, slope * g),),
        jvp=lambda r, tangents, *, slope: jnp.where(r[0] > 0, tangents[0], slope * tangents[0]),
    )
)
def leaky(x: Any, *, slope: float) -> Any:
    return jnp.where(x > 0, x, slope * x)


def unfinished(x: Any) -> Any:
    """Computes in float32 inside, so that a check in float64 needs a wider tolerance."""
    return jnp.sin(x.astype(jnp.float32)).astype(x.dtype)


RIGHT = {
    "layer": (affine_layer, OBLONG, {}),
    "another rule for a layer": (affine_layer, OBLONG, {"rule": affine_rule()}),
    "rule and function": (affine_rule(), OBLONG, {"function": affine}),
    "pytree": (of_pytree, ({"w": OBLONG[1], "b": OBLONG[2]}, OBLONG[0]), {}),
    "integer": (lookup, (numbers(5, 2), jnp.array([4, 0, 4])), {"residual_bytes": None}),
    "key": (masked, (numbers(3, 2), jax.random.key(0)), {"residual_bytes": None}),
    "several outputs": (two_outputs, (numbers(5),), {}),
    "static": (leaky, (numbers(3, 4),), {"slope": 0.25}),
    "python scalar": (leaky, (0.5,), {"slope": 0.25, "residual_bytes": None}),
    "empty": (leaky, (jnp.zeros((0, 2)),), {"slope": 0.25}),
    "complex": (
        fp.Rule(lambda x: (x * x, (x,)), lambda r, g, needs: (2 * r[0] * g,)),
        (COMPLEX,),
        {"function": lambda x: x * x, "dtypes": ("float32",), "residual_bytes": None},
    ),
    "float32 inside": (
        fp.Rule(lambda x: (unfinished(x), (x,)), lambda r, g, needs: (g * jnp.cos(r[0]),)),
        (numbers(3),),
        {"function": unfinished, "tolerance": 1e-5, "residual_bytes": None},
    ),
}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", RIGHT)
def test_a_right_rule_passes(name: str) -> None:
    operator, args, options = RIGHT[name]
    report = check_rule(operator, *args, **options)
    terms = {row.term: row for row in report.rows}
    assert {"value", "linearity", "needs", "adjoint", "second order", "vmap", "scan", "float32"} <= set(terms)
    assert terms["cotangent"].error < 1e-4
    assert ("no limit" in terms["residual bytes"].note) == (options.get("residual_bytes", 1) is None)


def test_the_report_is_an_aligned_table() -> None:
    report = check_rule(affine_layer, *OBLONG)
    subject, header, *rows = str(report).splitlines()
    assert subject == "affine_layer"
    assert header.split() == ["term", "comparisons", "largest", "error"]
    assert len(rows) == len(report.rows)
    assert len({len(row[: header.index("error") + 5]) for row in rows}) == 1
    assert report["residual bytes"].note == "0 bytes besides the arguments, autodiff 0"


@pytest.mark.parametrize("enabled", [False, True])
def test_the_configuration_of_jax_is_left_alone(enabled: bool) -> None:
    with jax.enable_x64(enabled):
        report = check_rule(affine_layer, *(jnp.asarray(x, jnp.float32) for x in OBLONG))
        assert report["cotangent"].error < 1e-14
        assert jax.config.jax_enable_x64 == enabled


UNCHECKABLE = {
    "no rule": (fp.layer(lambda x: x), (1.0,), {}, "has no rule"),
    "no function": (bounded_rule(), (1.0,), {}, "pass a layer, or a rule with the plain function"),
    "a function for a layer": (affine_layer, OBLONG, {"function": affine}, "belong to a rule"),
    "static by position": (
        bounded_rule(), ("same",), {"function": bounded}, "argument x='same' is not an array"
    ),
    "nothing differentiable": (
        bounded_rule(), (1,), {"function": lambda x: x}, "no differentiable result|no differentiable argument"
    ),
    "no primitive": (
        bounded_rule(), (1.0,), {"function": jnp.sinc, "primitive": "sin"}, "must be the primitive 'sin'"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", UNCHECKABLE)
def test_what_cannot_be_checked_is_refused(name: str) -> None:
    operator, args, options, message = UNCHECKABLE[name]
    with pytest.raises(ValueError, match=message):
        check_rule(operator, *args, **options)


# --- whole functions --------------------------------------------------------------------------


def loss(params: Any, x: Any, kind: str = "square") -> Any:
    assert kind == "square"
    return jnp.sum(affine_layer(jnp.tanh(x), params["w"], params["b"]) ** 2)


PARAMS = {"w": OBLONG[1], "b": OBLONG[2]}


def with_affine(**mistakes: Any) -> fp.RuleSet:
    return fp.rules.autodiff.replace({affine_layer: affine_rule(**mistakes)})


def test_a_right_gradient_passes() -> None:
    report = check_gradient(loss, PARAMS, OBLONG[0], argnums=(0, 1), rules=with_affine())
    assert [row.term for row in report.rows] == [
        f"argument {path} against {oracle}"
        for path in ("0['b']", "0['w']", "1")
        for oracle in ("autodiff", "finite differences")
    ]
    assert max(row.error for row in report.rows) < 1e-6


WRONG_GRADIENTS = {
    "a rule": (
        loss,
        with_affine(w=lambda r, g, needs: 1.001 * r.x.T @ g),
        r"loss: against autodiff: the gradient of argument 0\['w'\] is wrong: it is off by 0\.1 %",
    ),
    "the function": (
        lambda params, x, kind: loss({**params, "b": lax.stop_gradient(params["b"])}, x),
        fp.rules.autodiff,
        r"against finite differences: the gradient of argument 0\['b'\] is wrong: it is zero",
    ),
}


@pytest.mark.parametrize("name", WRONG_GRADIENTS)
def test_a_wrong_gradient_is_named(name: str) -> None:
    function, rules, message = WRONG_GRADIENTS[name]
    with pytest.raises(CheckError, match=message):
        check_gradient(function, PARAMS, OBLONG[0], "square", rules=rules)
