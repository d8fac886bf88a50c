"""`fp.compare`: which rules fired on a function, what each saved, what was left and why."""

from __future__ import annotations

import json

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import PartitionSpec as P

import funcprop as fp

IMAGES = jax.ShapeDtypeStruct((8, 16, 16, 16), jnp.float32)


def pooled(x, power):
    """Two equal pools, one of another size, and a narrowing product."""
    y = nn.max_pool(nn.max_pool(x, (2, 2), (1, 1), "SAME"), (2, 2), (1, 1), "SAME")
    y = nn.max_pool(y, (2, 2), (2, 2))
    return jnp.sum((y @ jnp.ones((16, 2), y.dtype)) ** power)


def test_rows_count_what_fires_and_say_why_the_rest_does_not():
    found = fp.compare(pooled, repeats=2)(jnp.ones(IMAGES.shape), 2)
    assert [(row.operator, row.count) for row in found.fired] == [
        ("reduce_window_max", 2),
        ("reduce_window_max", 1),
    ]
    assert [row.operator for row in found.left] == ["dot_general"]
    assert all(row.measured.bytes < 0.5 for row in found.fired)
    assert found.left[0].where.startswith("test_comparison.py:")
    assert found.left[0].measured is None
    assert found.whole.bytes < 0.5
    text = str(found)
    assert text.startswith("pooled: value_and_grad by rules 'default' beside autodiff, on cpu\n")
    assert "test_comparison.py:" in text
    json.dumps(found.as_dict())


def test_bytes_of_shapes_alone():
    found = fp.compare(pooled)(IMAGES, 2)
    assert (found.whole.time, found.whole.autodiff_seconds) == (None, None)
    run = fp.compare(pooled, repeats=1)(jnp.ones(IMAGES.shape, IMAGES.dtype), 2)
    assert run.whole.rules_bytes == found.whole.rules_bytes
    measured = [[r.measured and r.measured.rules_bytes for r in each.rows] for each in (run, found)]
    assert measured[0] == measured[1]
    assert " -  " in str(found)


def test_bytes_are_those_of_the_compiled_program():
    x = jnp.ones(IMAGES.shape)
    whole = fp.compare(lambda x: pooled(x, 2), repeats=1)(x).whole
    for rules, measured in ((fp.rules.autodiff, whole.autodiff_bytes), (None, whole.rules_bytes)):
        program = jax.jit(fp.value_and_grad(lambda x: pooled(x, 2), rules=rules)).lower(x).compile()
        assert measured == program.memory_analysis().temp_size_in_bytes


def test_loops_auxiliary_results_and_other_arguments():
    def loss(w, x, activation):
        step = lambda h, _: (activation(h @ w), None)  # noqa: E731
        return jnp.sum(jax.lax.scan(step, x, None, length=3)[0]), {"mean": x.mean()}

    rules = fp.rules.autodiff.replace({"tanh": fp.rules.handwritten["tanh"]})
    found = fp.compare(loss, has_aux=True, rules=rules, repeats=1)(jnp.eye(3), jnp.ones(3), jnp.tanh)
    assert [(row.operator, row.count) for row in found.rows] == [("tanh", 1)]


def test_inside_of_shard_map_an_operator_is_not_run_by_itself():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    mapped = jax.shard_map(
        lambda x: jax.lax.psum(jnp.tanh(x), "data"), mesh=mesh, in_specs=P("data"), out_specs=P()
    )
    found = fp.compare(lambda x: jnp.sum(mapped(x)), rules=fp.rules.handwritten, repeats=1)(jnp.ones(4))
    assert [(row.operator, row.reason, row.measured) for row in found.rows] == [("tanh", None, None)]
    assert found.whole.time is not None


def test_time_is_that_of_the_rules_over_that_of_autodiff():
    """The rule's backward takes 100,000 sines on its way: a few milliseconds, of a few microseconds."""

    def slow(residuals, g, needs, **_):
        wasted = jax.lax.fori_loop(0, 100_000, lambda _, h: jnp.sin(h), g)
        return (jnp.cos(residuals[0]) * g + 1e-300 * wasted,)

    rules = fp.rules.autodiff.replace({"sin": fp.Rule(lambda x, **_: (jnp.sin(x), (x,)), slow)})
    found = fp.compare(lambda x: jnp.sum(jnp.sin(x)), rules=rules, repeats=2)(jnp.ones(2))
    (row,) = found.fired
    for measured in (found.whole, row.measured):
        assert measured.time == measured.rules_seconds / measured.autodiff_seconds > 5
        assert measured.rules_seconds > 2e-4


def test_models_as_they_are():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.dense, self.norm = nnx.Linear(4, 3, rngs=rngs), nnx.BatchNorm(3, rngs=rngs)
            self.dropout = nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x):
            return self.dropout(nnx.silu(self.norm(self.dense(x))))

    found = fp.compare(lambda net, x: jnp.sum(net(x)), repeats=1)(
        Net(nnx.Rngs(0)), jnp.ones((2, 4), "float32")
    )
    assert "silu" in [row.operator for row in found.fired]
    mlp = eqx.nn.MLP(4, 2, 8, 1, key=jax.random.key(0))
    tagged = {"model": mlp, "tag": "a string", "count": 3}
    loss = lambda tree, x: (jnp.sum(tree["model"](x) ** 2), tree["tag"])  # noqa: E731
    found = fp.compare(loss, has_aux=True, repeats=1)(tagged, jnp.ones(4))
    assert not found.fired
    assert found.whole.bytes == 1


def test_no_rule_fires():
    found = fp.compare(jnp.sin, repeats=1)(0.5)
    assert found.rows == ()
    assert "No rule fires; what has no rule is differentiated by JAX." in str(found)
    assert found.whole.bytes == 1


def test_errors():
    with pytest.raises(ValueError, match="repeats=0; every program has to run at least once"):
        fp.compare(jnp.sin, repeats=0)
    with pytest.raises(TypeError, match=r"argument at argnums=0 holds Array\(1.*, which has no derivative"):
        fp.compare(jnp.sin)(jnp.array(1))
    with pytest.raises(ValueError, match="argnums=1, but the function was called with 1 positional"):
        fp.compare(jnp.sin, 1)(1.0)
    assert fp.compare(jnp.sin, None)(jax.ShapeDtypeStruct((), "float32")).whole.bytes == 1
    with pytest.raises(TypeError, match="a gradient is of one scalar"):
        fp.compare(jnp.sin)(np.ones(3))


def test_scopes_are_those_of_the_graph():
    """A `vmap` around a scope is no part of its name, and one without a scope gives way to the line."""

    def loss(w, x):
        def one(x):
            with jax.named_scope("layer"):
                hidden = jnp.tanh(w * x)
            return jnp.exp(hidden)

        return jnp.sum(jax.vmap(one)(x))

    found = fp.compare(loss, rules=fp.rules.handwritten)(*jax.eval_shape(lambda: (jnp.ones(()), jnp.ones(3))))
    assert [row.scope for row in found.fired] == ["layer", ""]
